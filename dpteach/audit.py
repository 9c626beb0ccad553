"""Audits: a lower bound on ε by experiment, to hold beside the accountant's upper bound.

:func:`audit_training` hides canaries in the data, each by a coin, and trains once. What the weights give away about the
coins becomes a bound: :func:`clopper_pearson`, :func:`one_run`, :func:`one_run_fdp` and :func:`gaussian_fit` read the
same scores, and each assumes something else. :func:`sensitivity` is exact, and sees what no statistic sees.

A bound above the claimed ε convicts a trainer. A low bound proves nothing: a better attack may come tomorrow.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import Tensor, nn

from dpteach._checks import number, whole
from dpteach.data import Data
from dpteach.settings import Settings
from dpteach.training import Step

Trainer = Callable[[nn.Module, Data, Settings], Iterable[Step]]  # as dpteach.training.train

_LR, _CLASSES = 0.02, 10
_GUESSED = 8  # one canary of so many is guessed to be in, and one to be out: a share that no score has chosen


@dataclass(frozen=True, eq=False)
class Audit:
    """One audited training.

    Attributes:
        included: ``(m,)`` bool: which canaries were in, each by a fair coin.
        seen: ``(steps, m)`` float64: how far each step pushed the weights towards each canary.
        epsilon: ε that the trainer claims.
        target_delta: its δ.
    """

    included: Tensor
    seen: Tensor
    epsilon: float
    target_delta: float = 1e-5

    @property
    def scores(self) -> Tensor:
        """``(m,)``: how far the final weights lean towards each canary. All that the reader of a model has."""
        return self.seen.sum(0)

    def lower_bound(self, confidence: float = 0.95) -> float:
        """A bound for someone who saw every step: the larger of two by :func:`one_run`, each at half the error.

        The second looks at how much the steps *vary*. Where every step has the same noise, it is all that shows.

        Args and errors as for :func:`one_run`.
        """
        looks = [self.scores, self.seen.var(0)] if len(self.seen) > 1 else [self.scores]
        error = (1 - _confidence(confidence)) / len(looks)
        of = {"target_delta": self.target_delta, "confidence": 1 - error}
        return max(one_run(look, self.included, **of) for look in looks)


def dead_pixels(data: Data) -> Tensor:
    """The pixels that are 0 in every image: no record has ever moved their weights. ``(k,)`` int64, ascending.

    Raises:
        ValueError: if there is none.
    """
    dead = (data.X.flatten(1).amax(0) == 0).nonzero().flatten()
    if not len(dead):
        raise ValueError("data must have a pixel that is 0 in every image: canaries live there")
    return dead


def audit_training(
    trainer: Trainer,
    data: Data,
    pixels: Tensor,
    *,
    noise_multiplier: float,
    epochs: int = 30,
    steps_per_epoch: int = 1,
    brightness: float = 10.0,
    target_delta: float = 1e-5,
    seed: int = 0,
) -> Audit:
    """Train a softmax regression once, with canaries, and read each canary's trace in the weights.

    A canary is a black image with one pixel lit, and a label: ten for each pixel. Its gradient touches that pixel's ten
    weights only, so a private record does not disturb its trace. C is 1, and a canary's gradient is longer.

    Args:
        trainer: called as ``dpteach.train`` is, with a model, data and settings; trains the model in place and yields
            a :class:`~dpteach.training.Step` after each step. The last one's ``epsilon`` is what it claims.
        data: images ``(n, 1, 28, 28)`` with labels in 0 … 9, that are black at ``pixels``.
        pixels: ``(k,)``, see :func:`dead_pixels`: they make 10·k canaries.
        noise_multiplier, epochs, target_delta: of the training.
        steps_per_epoch: 1/q. At 1 every record takes part in every step.
        brightness: of a canary's pixel. Below about 1 its gradient is shorter than C, and the audit is weaker.
        seed: of the coins and of the training.

    Raises:
        ValueError: if an argument is out of its range, a record is not black at ``pixels``, or the trainer takes no
            step.

    Source: Steinke et al. 2023; canaries of one lit pixel, after Nasr et al. 2023's gradients that nothing else has.
    """
    if bool((data.X.flatten(1)[:, pixels] != 0).any()):
        raise ValueError("data must be black at pixels, got a record that is not: see dead_pixels")
    m = _CLASSES * len(pixels)
    included = torch.rand(m, generator=torch.Generator().manual_seed(whole("seed", seed, low=0))) < 0.5
    images = torch.zeros(m, data.X[0].numel())
    images[torch.arange(m), pixels.repeat_interleave(_CLASSES)] = number("brightness", brightness, low=0, above=True)
    X, y = images.view(m, *data.X.shape[1:])[included], torch.arange(_CLASSES).repeat(len(pixels))[included]
    both = Data(torch.cat([data.X, X]), torch.cat([data.y, y]))
    per_epoch = whole("steps_per_epoch", steps_per_epoch, low=1, high=len(both))
    settings = Settings(
        noise_multiplier, 1.0, epochs, math.ceil(len(both) / per_epoch), _LR, target_delta=target_delta, seed=seed
    )
    weights, claimed = _watched(trainer, both, settings)
    traces = weights[:, :, pixels].double().diff(dim=0)  # (steps, 10, k)
    traces = traces - traces.mean(1, keepdim=True)  # a canary pushes its label up, and all others down
    return Audit(included, traces.transpose(1, 2).flatten(1), claimed, target_delta)


def _watched(trainer: Trainer, data: Data, settings: Settings) -> tuple[Tensor, float]:
    """The weights before training and after each step, ``(steps + 1, 10, inputs)``, and the claimed ε."""
    layer = nn.Linear(data.X[0].numel(), _CLASSES, bias=False)  # one layer: a fault in any other would go unseen
    nn.init.zeros_(layer.weight)
    weights, claimed = [layer.weight.detach().clone()], math.nan
    for step in trainer(nn.Sequential(nn.Flatten(), layer), data, settings):
        weights.append(layer.weight.detach().clone())
        claimed = step.epsilon
    if len(weights) == 1:
        raise ValueError("trainer must yield a Step after each step, got none")
    return torch.stack(weights), claimed


def sensitivity(trainer: Trainer, brightness: float = 10.0) -> float:
    """How far one record moves the sum of the gradients, in units of C: two steps with the same random numbers.

    The noise is the same in both, so it cancels, and what is left is exact: at most 1 where each gradient is clipped.
    It says nothing about the noise.

    Args:
        trainer: as for :func:`audit_training`.
        brightness: of the record; its gradient is about as long.

    Source: same random numbers, neighbouring data: Re:cord-play, arXiv 2602.17454.
    """
    black = torch.zeros(20, 1, 28, 28)
    lit = black.clone()
    lit[0, 0, 14, 14] = number("brightness", brightness, low=0, above=True)
    settings = Settings(1.0, 1.0, 1, len(black), _LR)
    ends = [_watched(trainer, Data(X, torch.zeros(20, dtype=torch.int64)), settings)[0][-1] for X in (black, lit)]
    return (ends[1] - ends[0]).double().norm().item() * len(black) / _LR


def clopper_pearson(scores: Tensor, included: Tensor, *, target_delta: float = 1e-5, confidence: float = 0.95) -> float:
    """ε from the share of hits and of false positives, each with its confidence interval.

    Half of the canaries choose the threshold, the others are counted. **Assumes** that the scores are independent, as
    those of one canary in many trainings are. In one training they need not be.

    Args:
        scores: ``(m,)``, higher for "more likely in".
        included: ``(m,)`` bool: the fair coins.
        target_delta: δ in [0, 1).
        confidence: in (0, 1): a bound above the truth comes with at most the rest, where the assumption holds.

    Returns:
        ε >= 0; 0.0 where nothing can be said.

    Raises:
        ValueError: if there is no canary, all are in or all are out, a score is not finite, or all are equal.

    Source: Clopper & Pearson 1934; as an audit, Jagielski et al. 2020.
    """
    s, coins, delta, error = _checked(scores, included, target_delta, confidence)
    halves = [(np.sort(s[k::2][coins[k::2]]), np.sort(s[k::2][~coins[k::2]])) for k in (0, 1)]
    if not all(len(part) for half in halves for part in half):
        return 0.0

    def bounds(half: tuple[np.ndarray, np.ndarray], thresholds: np.ndarray) -> np.ndarray:
        hits, false = (len(part) - np.searchsorted(part, thresholds) for part in half)
        return _clopper_pearson(hits, len(half[0]), false, len(half[1]), delta, error)

    thresholds = np.unique(s[::2])
    return float(bounds(halves[1], thresholds[[bounds(halves[0], thresholds).argmax()]])[0])


def _clopper_pearson(hits: Any, members: int, false: Any, strangers: int, delta: float, error: float) -> np.ndarray:
    """ln((TPR - δ) / FPR) with TPR at the low end of its interval and FPR at the high end: each may err by half."""
    low = np.nan_to_num(stats.beta.ppf(error / 2, hits, members - hits + 1))
    high = np.nan_to_num(stats.beta.ppf(1 - error / 2, false + 1, strangers - false), nan=1.0)
    return np.log(np.maximum(low - delta, high) / high)  # 0 where nothing can be said


def one_run(scores: Tensor, included: Tensor, *, target_delta: float = 1e-5, confidence: float = 0.95) -> float:
    """ε from one training with many canaries, for any mechanism.

    The highest eighth of the scores is guessed to be in, the lowest to be out. **Assumes** nothing but fair coins. It
    reaches a part of ε only: with r guesses, all right, about ln(r / 3).

    Args, errors and the value as for :func:`clopper_pearson`.

    Source: Steinke, Nasr & Jagielski 2023, Theorem 5.2 and appendix D.
    """
    s, coins, delta, error = _checked(scores, included, target_delta, confidence)
    return _one_run(len(s), *_guesses(s, coins), delta, error)


def _one_run(m: int, guesses: int, right: int, delta: float, error: float) -> float:
    back = np.arange(1, right + 1)

    def rejects(epsilon: float) -> float:
        q = special.expit(epsilon)
        p = stats.binom.sf(right - 1, guesses, q)
        near = (stats.binom.sf(right - 1 - back, guesses, q) - p) / back  # so near to `right` that δ may have helped
        return error - (p + 2 * m * delta * near.max(initial=0))

    return _largest(rejects)


def one_run_fdp(scores: Tensor, included: Tensor, *, target_delta: float = 1e-5, confidence: float = 0.95) -> float:
    """:func:`one_run`, where the whole trade-off curve is that of Gaussian noise: a much better bound.

    **Assumes** fair coins, and that the mechanism is Gaussian (μ-GDP for some μ). DP-SGD with q = 1 claims that. Where
    something else is claimed, q < 1 or another noise, this is no bound on ε.

    Args, errors and the value as for :func:`clopper_pearson`.

    Source: Mahloujifar, Melis & Chaudhuri 2024, *Auditing f-differential privacy in one run*.
    """
    s, coins, delta, error = _checked(scores, included, target_delta, confidence)
    return gaussian_epsilon(_one_run_mu(len(s), *_guesses(s, coins), error), delta)


def _one_run_mu(m: int, guesses: int, right: int, error: float) -> float:
    def rejects(mu: float) -> float:
        rights, wrongs = error * right / m, error * (guesses - right) / m
        for i in range(right - 1, -1, -1):
            least = special.ndtr(special.ndtri(rights) - mu)  # what the curve allows, at the least
            if least <= wrongs:
                break
            rights = min(1.0, rights + i / (guesses - i) * (least - wrongs))
            wrongs = least
        return rights + wrongs - guesses / m

    return _largest(rejects)


def gaussian_fit(scores: Tensor, included: Tensor, *, target_delta: float = 1e-5, confidence: float = 0.95) -> float:
    """ε from two bells: how far apart the scores of those in and out are, in their standard deviation.

    **Assumes** the curve of Gaussian noise, as :func:`one_run_fdp`, and bells of one width, with independent scores.
    Where that holds it is the tightest. Where it does not, it convicts the honest.

    Args, errors and the value as for :func:`clopper_pearson`; one more error where the scores do not spread.

    Source: the standard error of a standardised difference, Hedges & Olkin 1985; as an audit, Nasr et al. 2023.
    """
    s, coins, delta, error = _checked(scores, included, target_delta, confidence)
    inside, outside = s[coins], s[~coins]
    n, k = len(inside), len(outside)
    spread = math.sqrt((inside.var() * n + outside.var() * k) / max(1, n + k - 2))
    if n + k < 3 or spread == 0:
        raise ValueError("scores must spread within those in or those out: there is no bell to fit")
    mu = (inside.mean() - outside.mean()) / spread
    return gaussian_epsilon(mu - stats.norm.isf(error) * math.sqrt(1 / n + 1 / k + mu**2 / (2 * (n + k))), delta)


def gaussian_epsilon(mu: float, target_delta: float = 1e-5) -> float:
    """ε at δ of a μ-GDP mechanism: T steps of DP-SGD with q = 1 have μ = √T/σ. 0.0 for μ <= 0; else ∞ for δ = 0.

    Source: Balle & Wang 2018; Dong, Roth & Su 2019, Corollary 2.13.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    if mu <= 0 or target_delta == 0:
        return 0.0 if mu <= 0 else math.inf

    def too_small(epsilon: float) -> float:
        above, below = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
        return special.ndtr(above) - np.exp(epsilon + special.log_ndtr(below)) - target_delta

    return _largest(too_small)


def _largest(rejects: Callable[[float], float]) -> float:
    """The largest value that is rejected, > 0 in ``rejects``; 0.0 if none is."""
    if rejects(0.0) <= 0:
        return 0.0
    high = 1.0
    while rejects(high) > 0:
        high *= 2
    return float(optimize.brentq(rejects, 0.0, high))


def _guesses(s: np.ndarray, coins: np.ndarray) -> tuple[int, int]:
    """How many are guessed, and how many of these guesses are right."""
    k = max(1, len(s) // _GUESSED)
    order = np.argsort(s, kind="stable")
    return 2 * k, int(coins[order[-k:]].sum() + (~coins[order[:k]]).sum())


def _checked(
    scores: Tensor, included: Tensor, target_delta: float, confidence: float
) -> tuple[np.ndarray, np.ndarray, float, float]:
    s, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if s.ndim != 1 or coins.shape != s.shape or coins.dtype != bool:
        raise ValueError(
            f"scores and included must be (m,), and included True or False, got shapes {s.shape} and {coins.shape} "
            f"and {coins.dtype}"
        )
    if not 0 < coins.sum() < len(s):
        which = "there is no canary" if not len(s) else f"all {len(s)} are {'in' if coins[0] else 'out'}"
        raise ValueError(f"included must have canaries in and canaries out, by fair coins: {which}")
    if not np.isfinite(s).all():
        raise ValueError(f"scores must be finite, got {s[~np.isfinite(s)][0]}: did the training diverge?")
    if (s == s[0]).all():
        raise ValueError(f"scores must differ, got {s[0]:g} for every canary: this attack looks at nothing")
    delta = number("target_delta", target_delta, low=0, high=1)
    return s, coins, delta, 1 - _confidence(confidence)


def _confidence(confidence: float) -> float:
    return number("confidence", confidence, low=0, above=True, high=1)
