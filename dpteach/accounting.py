"""What a run costs: ε from the noise multiplier, the sampling rate and the number of steps.

Nothing else enters: not the model, not the clipping norm, not the learning rate, not the data. The numbers are those
of Opacus' accountants and of Google's ``dp-accounting``; this room gives them one name and one set of checks, and sees
to it that each answer takes seconds at most: where a numerical accountant would take longer, or could say too little,
the bound by RDP is the answer.

The neighbouring relation is add/remove of one record, under Poisson sampling (see ``mechanism.poisson_batches``).
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dpteach._checks import choice, number, whole

ACCOUNTANTS = ("prv", "rdp", "gdp", "pld", "rdp-classic")

MAX_STEPS = 10**15  # a float counts them exactly
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100  # σ² neither overflows nor vanishes
_RAREST = 1e-12  # a lower sample rate is priced as this one, which costs no less
_MOST_ORDERS, _HIGHEST_ORDER = 500, 10_000
_LONGEST_PATH = 10**6

# The orders that Opacus searches today, and the ones of the 2020 blog post.
_ALPHAS = {"rdp": (*(1 + x / 10 for x in range(1, 100)), *range(12, 64)), "rdp-classic": tuple(range(2, 32))}

# How fine the numerical accountants are while an answer takes about a second: PRV's mesh is as Opacus', for an error of
# 0.01 in ε, up to so many points; PLD's is 0.0001 wide, up to so many for one step and for all. Beyond, they are
# coarser: still bounds.
_PRV_POINTS, _PLD_POINTS = 1 << 20, (100_000, 500_000)

# So many different settings (σ, q) are priced one by one. More of them are first rounded, to less noise and a higher
# rate: what comes out is a bound.
_SETTINGS = {"prv": 16, "pld": 16, "gdp": 10_000, "rdp": 128, "rdp-classic": 128}

# ``epsilon_path`` asks the slower accountants at up to so many steps.
_ASKED = {"prv": 20, "pld": 5, "gdp": 1000}


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    target_delta: float = 1e-5,
    accountant: str = "prv",
    alphas: Sequence[float] | None = None,
) -> float:
    """ε of ``steps`` steps of DP-SGD, at ``target_delta``.

    Args:
        noise_multiplier: σ, 0 or from 1e-100 to 1e100; the noise on the clipped sum has standard deviation σ·C.
        sample_rate: q in (0, 1], the probability that a record takes part in a step. Below 1e-12 it is priced as 1e-12.
        steps: number of steps, from 0 to 10¹⁵.
        target_delta: δ in (0, 1); keep it well below one over the number of records.
        accountant:
            ``"prv"``: numerical. An upper bound, above the truth by at most 0.015, or 2e-5·(ε + 3)·√steps if that is
            more; RDP's bound where that is smaller, and for δ < 1e-10, ε > 700 or more than δ·10¹⁴ steps.
            ``"rdp"``: quick, a looser upper bound.
            ``"pld"``: numerical, from dp-accounting. An upper bound, tightest up to some 10,000 steps; RDP's where that
            is smaller, and for δ < 1e-8, ε > 1000 by RDP or more than 200,000 steps.
            ``"gdp"``: Gaussian DP by the central limit theorem, μ = q·√(steps·(exp(1/σ²) − 1)), as in Opacus. **Not a
            bound**: for q < 1 it can report far too little. For q = 1 Gaussian DP is exact, with μ = √steps / σ; this
            formula only comes near that for a large σ, and reports too much for a small one. There ``"pld"`` and
            ``"prv"`` give the exact value, rounded up.
            ``"rdp-classic"``: RDP with the conversion of 2017, as tools printed it until about 2020.
        alphas: the RDP orders to search, up to 500, each > 1 and <= 10,000; for the two RDP accountants only.

    Returns:
        ε >= 0. ``inf`` without noise; 0.0 without a step.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Gopi et al. 2021 (PRV), Mironov 2017, Mironov et al. 2019 and Balle et al. 2020 (RDP), Dong et al. 2019 and
    Bu et al. 2019 (GDP), Koskela et al. 2020 (PLD).

    >>> round(epsilon(noise_multiplier=1.0, sample_rate=1 / 79, steps=790), 2)
    2.12
    """
    delta, alphas = _question(target_delta, accountant, alphas)
    return _of_history((_setting(noise_multiplier, sample_rate, steps),), delta, accountant, alphas)


def epsilon_path(
    *, noise_multiplier: float, sample_rate: float, steps: int, target_delta: float = 1e-5, accountant: str = "rdp"
) -> np.ndarray:
    """ε after each of ``steps`` steps: what a live plot draws.

    The RDP accountants answer in milliseconds. The others are asked at each of up to 20 steps (``"prv"``), 5
    (``"pld"``) or 1000 (``"gdp"``), evenly spread, the last with :func:`epsilon`'s accuracy. In between stands the next
    one's ε, or RDP's if that is smaller: for the two bounds still a bound.

    Args and errors as for :func:`epsilon`; ``steps`` is at most a million.

    Returns:
        ``(steps,)`` float64: ε after step 1, 2, …
    """
    steps = whole("steps", steps, low=0, high=_LONGEST_PATH)
    delta, _ = _question(target_delta, accountant)
    sigma, q, steps = _setting(noise_multiplier, sample_rate, steps)
    if sigma == 0:
        return np.full(steps, math.inf)
    times, step = np.arange(1, steps + 1), ((sigma, max(q, _RAREST), 1),)
    if accountant.startswith("rdp"):
        return _rdp(step, times, delta, accountant)
    at = np.unique(np.linspace(1, steps, min(steps, _ASKED[accountant])).round().astype(int))
    share = math.ceil(len(at) / 5)
    asked = [_of_history(((sigma, q, int(t)),), delta, accountant, share=share if t < steps else 1) for t in at]
    # ε never falls: what holds later, holds here too.
    path = np.minimum.accumulate(np.array(asked)[::-1])[::-1][np.searchsorted(at, times)]
    return path if accountant == "gdp" else np.minimum(path, _rdp(step, times, delta, "rdp"))


def privacy_loss(*, noise_multiplier: float, sample_rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The distribution of a run's privacy loss, for someone who took part: all its ε and δ at once.

    The privacy loss of a result is log(how likely it is with you / how likely it is without you). Steps add theirs up,
    so a run's distribution is that of one step, folded with itself: a power of its Fourier transform.

    Args:
        noise_multiplier, sample_rate, steps: as for :func:`epsilon`, but σ > 0 and at least one step.

    Returns:
        ``(losses, probabilities)``, ``(8192,)`` float64 each, the losses ascending. δ(ε) is the mean of
        max(0, 1 - exp(ε - loss)). Without you a loss is exp(-loss) times as probable. Rounded to the nearest and not
        upward: for pictures, as a δ from it is right to about 3 % where ε < 20. For a bound ask :func:`epsilon`.

    Raises:
        ValueError: if an argument is out of its range, or ε is beyond all bounds.

    Source: Koskela et al. 2020; that rounding keeps the mean, Gopi et al. 2021.

    >>> losses, probabilities = privacy_loss(noise_multiplier=1.0, sample_rate=1 / 79, steps=790)
    >>> delta = probabilities @ np.maximum(0, 1 - np.exp(2.12 - losses))
    >>> bool(0.9e-5 < delta < 1e-5)
    True
    """
    sigma, q, steps = _setting(noise_multiplier, sample_rate, steps)
    q = max(q, _RAREST)
    reach = 2 * _of_history(((sigma, q, steps),), 1e-6, "rdp")
    if not 0 < reach < 1000:
        raise ValueError(
            f"noise_multiplier and steps must make an ε above 0 and below 500, got {noise_multiplier!r} and {steps!r}"
        )
    points = 8192
    losses = 2 * reach / points * (np.arange(points) - points / 2)
    with np.errstate(all="ignore"):  # below the least loss, log(1 - q), there is no result, and above 700 no number
        result = sigma**2 * np.log1p(np.expm1(losses - reach / points) / q) + 0.5  # of a step with C = 1
    result = torch.from_numpy(np.nan_to_num(result, nan=-math.inf, neginf=-math.inf, posinf=math.inf)) / sigma
    below = (1 - q) * torch.special.ndtr(result) + q * torch.special.ndtr(result - 1 / sigma)
    step = np.diff(below.numpy(), append=1.0)
    drift = float(_divergences(sigma, q, (1.0,))[0]) - losses @ step  # what rounding did to the mean
    whole = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(step)) ** steps, points)
    whole = np.where(whole > 1e-15, whole, 0.0)  # below that there are only rounding errors
    return losses + steps * drift, np.fft.fftshift(whole)


def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, target_delta: float = 1e-5, accountant: str = "prv"
) -> float:
    """The smallest noise multiplier σ that keeps the whole run within ``target_epsilon``.

    Args:
        target_epsilon: ε > 0 that the run may cost.
        sample_rate, steps, target_delta, accountant: as for :func:`epsilon`.

    Returns:
        σ, rounded up: ``epsilon(noise_multiplier=σ, ...) <= target_epsilon``, and a σ that is smaller by 0.1 % is not
        enough.

    Raises:
        ValueError: if an argument is out of its range, or no σ up to 10,000 is enough.
    """
    target_epsilon = number("target_epsilon", target_epsilon, low=0, above=True)
    steps = whole("steps", steps, low=1, high=MAX_STEPS)
    run: dict[str, Any] = {"sample_rate": sample_rate, "steps": steps, "target_delta": target_delta}

    def cost(sigma: float, accountant: str = accountant) -> float:
        return epsilon(noise_multiplier=sigma, accountant=accountant, **run)

    most = 10_000.0
    if cost(most) > target_epsilon:
        raise ValueError(
            f"target_epsilon must be reachable with a noise_multiplier up to 10000, got {target_epsilon!r} (accountant "
            f"{accountant!r}, sample_rate {sample_rate!r}, {steps} steps): raise target_epsilon"
        )
    slow = accountant in ("prv", "pld")
    high = _halved(lambda sigma: cost(sigma, "rdp" if slow else accountant) <= target_epsilon, _LEAST_NOISE, most)
    return _closed_in(cost, target_epsilon, high) if slow else high  # they never say more than RDP: its σ is enough


def _halved(enough: Callable[[float], bool], low: float, high: float) -> float:
    while high / low > 1.0005:
        middle = math.sqrt(high) * math.sqrt(low)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _closed_in(cost: Callable[[float], float], target: float, high: float) -> float:
    """As :func:`_halved`, from above and in a few questions: log ε over log σ is nearly a straight line.

    Where it is not, every second question halves.
    """
    low, at_low, at_high, guess, halve = 0.0, math.inf, 0.0, high, False
    while low == 0 or high / low > 1.0005:
        width, at = high / low if low else math.inf, cost(guess)
        if at <= target:
            high, at_high = guess, at
        else:
            low, at_low = guess, at
        if low == 0:
            guess = high * max(0.5, 0.999 * at_high / target)
        elif at_low == math.inf or at_high == 0 or (halve := not halve and (high / low) ** 2 > width):
            guess = math.sqrt(high * low)
        else:
            share = math.log(at_low / target) / math.log(at_low / at_high)
            guess = min(max(low * (high / low) ** share, low * 1.0004), high / 1.0004)
    return high


def __getattr__(name: str) -> Any:
    if name in ("Charge", "Ledger"):  # they lived here
        return getattr(importlib.import_module("dpteach.ledger"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _setting(noise_multiplier: float, sample_rate: float, steps: int) -> tuple[float, float, int]:
    """The three, if they have a price."""
    sigma = number("noise_multiplier", noise_multiplier, low=0, high=_MOST_NOISE, below=False)
    if 0 < sigma < _LEAST_NOISE:
        raise ValueError(f"noise_multiplier must be 0 or a number >= {_LEAST_NOISE:g}, got {noise_multiplier!r}")
    q = number("sample_rate", sample_rate, low=0, above=True, high=1, below=False)
    return sigma, q, whole("steps", steps, low=0, high=MAX_STEPS)


def _question(
    target_delta: float, accountant: str, alphas: Sequence[float] | None = None
) -> tuple[float, tuple[float, ...] | None]:
    """δ and the orders, if they and the accountant can be asked for."""
    choice("accountant", accountant, ACCOUNTANTS)
    if alphas is not None:
        if accountant not in _ALPHAS:
            raise ValueError(f"alphas must be left out with accountant {accountant!r}: only the RDP ones use it")
        alphas = tuple(number("alphas", alpha, low=1, above=True, high=_HIGHEST_ORDER, below=False) for alpha in alphas)
        if not 0 < len(alphas) <= _MOST_ORDERS:
            raise ValueError(f"alphas must hold 1 to {_MOST_ORDERS} orders > 1, got {len(alphas) or 'none'}")
    return number("target_delta", target_delta, low=0, above=True, high=1), alphas


# What has run, as Opacus' accountants keep it: (noise multiplier, sample rate, steps), one entry a setting.
_History = tuple[tuple[float, float, int], ...]


def _of_history(
    history: _History, delta: float, accountant: str, alphas: Sequence[float] | None = None, share: int = 1
) -> float:
    """ε of a history. ``share``: of how many such questions this is one; the numerical accountants then take less."""
    history = tuple((sigma, max(q, _RAREST), steps) for sigma, q, steps in history if steps > 0)
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    every, history = history, _with_few_settings(history, _SETTINGS[accountant])
    if accountant == "gdp":
        return _gdp(history, delta)
    if accountant.startswith("rdp"):
        return float(_rdp(history, np.ones(1), delta, accountant, alphas)[0])
    bound = _of_history(every, delta, "rdp")
    # Where δ is as small as the rounding errors of a Fourier transform, and where exponentials overflow, RDP has the
    # word.
    total = sum(steps for _, _, steps in history)
    if delta < (1e-10 if accountant == "prv" else 1e-8) or total > delta * 1e14 or bound > 1000:
        return bound
    return min(bound, (_prv if accountant == "prv" else _pld)(history, delta, bound, share))


def _with_few_settings(history: _History, most: int) -> _History:
    """The same history, or with σ rounded down and q rounded up until there are at most ``most`` settings: a bound."""
    kinds: dict[Any, tuple[float, float, int]] = dict(enumerate(history))
    width = 0.01
    while len(kinds) > most:
        kinds = {}
        for sigma, q, steps in history:
            key = (math.floor(math.log(sigma) / width), math.floor(math.log(q) / width))
            least, rate, so_far = kinds.get(key, (sigma, q, 0))
            kinds[key] = (min(least, sigma), max(rate, q), so_far + steps)
        width *= 2
    return tuple(kinds.values())


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@functools.lru_cache(maxsize=1024)
def _divergences(sigma: float, q: float, alphas: tuple[float, ...]) -> np.ndarray:
    """RDP of one step at each order α >= 1 (at 1: the mean of the privacy loss).

    Integrated numerically; Opacus sums series, which gives the same within 1e-11, but takes seconds for some settings,
    and can come out below zero or not at all for a large σ.

    Source: Mironov et al. 2019, Section 3.
    """
    if q == 1:
        return np.array(alphas) / (2 * sigma**2)
    if sigma < 0.02:  # the record's Gaussian outweighs the rest: Minkowski's inequality is an equation to 16 digits
        alpha = np.array(alphas)
        log_norm = np.logaddexp(math.log1p(-q), math.log(q) + (alpha - 1) / (2 * sigma**2))
        return np.asarray(alpha / (alpha - 1) * log_norm)
    with np.errstate(all="ignore"):
        return np.array([_divergence(sigma, q, alpha) for alpha in alphas])


def _divergence(sigma: float, q: float, alpha: float) -> float:
    # E[(1 + v)^α] over z ~ N(0, 1), with 1 + v = 1 − q + q·exp(z/σ − 1/(2σ²)). As E[v] = 0, this is 1 + the mean of
    # (1 + v)^α − 1 − αv, which is never negative: nothing cancels. It is large near 0, 2/σ or α/σ, or where q·exp(…)
    # passes 1 − q.
    top = max(alpha, 2) / sigma + 10
    if sigma >= 1:
        edges = np.arange(-10, top + 0.75, 0.75)
    else:
        turn = sigma * (math.log1p(-q) - math.log(q)) + 1 / (2 * sigma)
        peaks = [peak / sigma + np.arange(-10, 10.5, 0.75) for peak in (0, 2, alpha)]
        edges = np.unique(np.concatenate([turn + sigma * np.arange(-20, 21), *peaks]))
        edges = edges[(edges >= -10) & (edges <= top)]
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half + half * _NODES).ravel()
    t = z / sigma - 1 / (2 * sigma**2)
    v, loss = q * np.expm1(t), np.logaddexp(math.log1p(-q), math.log(q) + t)  # loss = log(1 + v)
    # The logarithm of ((1 + v)^α − 1 − αv) / (α − 1): a series where v is small, without overflow where it is large.
    if alpha == 1:
        excess = np.where(loss < 300, np.log(np.exp(loss) * loss - v), loss + np.log(loss - 1))
    else:
        x = alpha * loss
        excess = np.where(x < 300, np.log(np.expm1(x) - alpha * v), x + np.log1p(-np.exp(math.log(alpha) + loss - x)))
        excess -= math.log(alpha - 1)
    small = np.abs(alpha * v) < 0.1
    few = v[small]
    series = np.ones_like(few)
    for k in range(10, 2, -1):
        series = 1 + series * few * (alpha - k + 1) / k
    excess[small] = np.log(alpha / 2 * few**2 * series)
    parts = np.log((half * _WEIGHTS).ravel()) - z * z / 2 + excess
    log_mean = np.logaddexp.reduce(parts) - math.log(2 * math.pi) / 2
    return float(math.exp(log_mean) if alpha == 1 else np.logaddexp(0, math.log(alpha - 1) + log_mean) / (alpha - 1))


def _rdp(
    history: _History, times: np.ndarray, delta: float, accountant: str, alphas: Sequence[float] | None = None
) -> np.ndarray:
    """ε of the whole history ``times`` times over, one value for each of ``times``."""
    orders = alphas or _ALPHAS[accountant]
    alpha = np.asarray(orders, dtype=np.float64)
    if accountant == "rdp":  # Balle et al. 2020, Theorem 21
        convert = np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    else:  # Mironov 2017, Proposition 3
        convert = -math.log(delta) / (alpha - 1)
    total = np.sum([steps * _divergences(sigma, q, tuple(orders)) for sigma, q, steps in history], axis=0)
    best = np.full(len(times), np.inf)
    for rdp, extra in zip(total, convert):
        if math.isfinite(rdp):
            np.minimum(best, times * rdp + extra, out=best)
    return np.asarray(np.maximum(best, 0.0))


@functools.lru_cache(maxsize=256)
def _prv(history: _History, delta: float, bound: float, share: int) -> float:
    from opacus.accountants.analysis import prv

    # As Opacus' PRVAccountant, with three changes: the mesh has a power of two of points, and never too many; the mean
    # loss is accurate also when it counts 10⁸ times; no warnings, as there is no safe way to silence them in a thread.
    delta_error, times = delta / 1000, [steps for _, _, steps in history]
    alone = [_of_history(((sigma, q, 1),), delta_error / (8 * sum(times)), "rdp") for sigma, q, _ in history]
    reach = 3 + max(_of_history(history, delta_error / 4, "rdp"), *alone)
    meshes = math.sqrt(sum(times) * math.log(12 / delta_error) / 2)  # Gopi et al. 2021: this many meshes are the error
    points = 1 << math.ceil(math.log2(2 * reach * meshes / 0.01 + 2))
    most = 1 << int(math.log2(_PRV_POINTS / (share * len(history))))
    mesh = reach / (min(points, most) / 2 - 1)
    error = 0.01 if points <= most else mesh * meshes
    if error > bound:
        return bound
    domain = prv.Domain(-reach, reach + mesh, min(points, most))
    with np.errstate(all="ignore"):
        try:
            steps = [prv.discretize(_loss(sigma, q, domain), domain) for sigma, q, _ in history]
            value = float(prv.compose_heterogeneous(steps, times).compute_epsilon(delta, delta_error, error)[2])
        except (ValueError, RuntimeError, FloatingPointError, OverflowError):
            return bound
    # Near 709 the exponentials overflow, and about 711 comes out for whatever is larger.
    return max(value, 0.0) if value < 700 else bound


def _loss(sigma: float, q: float, domain: Any) -> Any:
    """The privacy loss of one step, for Opacus' ``discretize``."""
    from opacus.accountants.analysis import prv

    step, mean = prv.PoissonSubsampledGaussianPRV(q, sigma), float(_divergences(sigma, q, (1.0,))[0])
    loss = prv.TruncatedPrivacyRandomVariable(step, domain.t_min, domain.t_max)
    loss.mean = lambda: mean
    return loss


def _gdp(history: _History, delta: float) -> float:
    from opacus.accountants.analysis.gdp import delta_eps_mu, eps_from_mu

    with np.errstate(all="ignore"):
        # Opacus' compute_mu_poisson, with expm1: it stays above zero for a large σ.
        mu = math.hypot(*(float(q * np.sqrt(steps * np.expm1(sigma**-2))) for sigma, q, steps in history))
        if mu == 0 or delta_eps_mu(eps=0.0, mu=mu) <= delta:
            return 0.0
        # Opacus searches ε up to 500.
        return float(eps_from_mu(mu=mu, delta=delta)) if delta_eps_mu(eps=500.0, mu=mu) < delta else math.inf


@functools.lru_cache(maxsize=256)
def _pld(history: _History, delta: float, bound: float, share: int) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    # How far the losses of one step, and of all, can spread; dp-accounting bounds the latter at orders of 1 / ``one``
    # and more.
    ones = [_loss_at(sigma, q, 10) - _loss_at(sigma, q, -10) for sigma, q, _ in history]
    if min(ones) == 0:
        return bound
    spread = 2 * _of_history(history, 1e-15, "rdp") + sum(
        2 * one + 2 * steps * _divergences(sigma, q, (1.0,))[0] / one for (sigma, q, steps), one in zip(history, ones)
    )
    width = max(1e-4, share * len(history) * max(ones) / _PLD_POINTS[0], share * spread / _PLD_POINTS[1])
    # Its exponentials overflow; its grid can't resolve a step; it computes (points of one step) ** steps as an int.
    if max(ones) > 600 or min(ones) < 20 * width or max(steps for _, _, steps in history) > 200_000:
        return bound
    accountant = PLDAccountant(value_discretization_interval=width)
    with np.errstate(all="ignore"):
        for sigma, q, steps in history:
            accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps))
        return float(accountant.get_epsilon(delta))


def _loss_at(sigma: float, q: float, z: float) -> float:
    rest = math.log1p(-q) if q < 1 else -math.inf
    return float(np.logaddexp(rest, math.log(q) + z / sigma + 1 / (2 * sigma**2)))
