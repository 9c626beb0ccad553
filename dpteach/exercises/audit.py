"""Notebook 08, the audit: a bound from hits and misses, three sealed trainers, and a step that is audited.

:data:`BROKEN` holds five trainers that claim more privacy than they give. Each bug is one that real code has had.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dpteach import models
from dpteach.accounting import epsilon_path
from dpteach.audit import Trainer, audit_training, sensitivity
from dpteach.data import Data
from dpteach.exercises.core import Complaint, Wrong, attempted, changed, choose, coding
from dpteach.mechanism import add_noise, clip, clipped_sum, per_sample_gradients, poisson_batches
from dpteach.randomness import Random, generators
from dpteach.settings import Settings
from dpteach.training import Step, train

DPStep = Callable[[nn.Module, Tensor, Tensor, float, float, float, Random], Tensor]


def trainer_of(dp_step: DPStep) -> Trainer:
    """A trainer that samples, steps and counts ε as ``dpteach.train`` does, and takes each gradient from ``dp_step``.

    Args:
        dp_step: ``dp_step(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator) -> (P,)``.
    """

    def trainer(model: nn.Module, data: Data, settings: Settings) -> Iterator[Step]:
        n, per_epoch = len(data), settings.steps_per_epoch(len(data))
        q, steps = 1 / per_epoch, settings.epochs * per_epoch
        sampling, noise = generators(settings.seed)
        path = epsilon_path(
            noise_multiplier=settings.noise_multiplier, sample_rate=q, steps=steps, target_delta=settings.target_delta
        )
        for k, batch in enumerate(poisson_batches(n, q, steps, sampling)):
            sigma, C = settings.noise_multiplier, settings.max_grad_norm
            gradient = dp_step(model, *data[batch], sigma, C, n * q, noise).detach()
            weights = parameters_to_vector(model.parameters()).detach() - settings.lr * gradient
            vector_to_parameters(weights, model.parameters())
            yield Step(k + 1, steps, k // per_epoch + 1, math.nan, float(path[k]))

    return trainer


def divided_twice(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """Noise ÷ B twice: it is made for the mean, and then divided with the sum."""
    summed = clipped_sum(model, F.cross_entropy, X, y, max_grad_norm)
    return add_noise(summed, noise_multiplier / expected_batch_size, max_grad_norm, generator) / expected_batch_size


def clipped_late(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """Clip after averaging: as ``clip_grad_norm_`` in an ordinary loop does."""
    loss = F.cross_entropy(model(X), y, reduction="sum") / expected_batch_size
    mean = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))).unsqueeze(0)
    return add_noise(clip(mean, max_grad_norm)[0], noise_multiplier / expected_batch_size, max_grad_norm, generator)


def last_layer_bare(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """No noise on the last layer: it was added later, and the list of what gets noise is an old one."""
    summed = clipped_sum(model, F.cross_entropy, X, y, max_grad_norm)
    noisy = add_noise(summed, noise_multiplier, max_grad_norm, generator)
    last = list(model.parameters())[-1].numel()
    return torch.cat([noisy[:-last], summed[-last:]]) / expected_batch_size


def same_noise(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """The same noise every step: somebody seeds the generator inside of the step, to be able to repeat it."""
    summed = clipped_sum(model, F.cross_entropy, X, y, max_grad_norm)
    generator = torch.Generator().manual_seed(generator.initial_seed())
    return add_noise(summed, noise_multiplier, max_grad_norm, generator) / expected_batch_size


def one_epoch_reported(model: nn.Module, data: Data, settings: Settings) -> Iterator[Step]:
    """ε of one epoch reported: a new accountant at the start of each."""
    steps = []
    for step in train(model, data, settings):
        steps.append(step.epsilon)
        yield Step(
            step.step, step.steps, step.epoch, step.loss, steps[(step.step - 1) % (step.steps // settings.epochs)]
        )


BROKEN: dict[str, Trainer] = {
    "noise ÷ B twice": trainer_of(divided_twice),
    "clip after averaging": trainer_of(clipped_late),
    "no noise on the last layer": trainer_of(last_layer_bare),
    "the same noise every step": trainer_of(same_noise),
    "ε of one epoch reported": one_epoch_reported,
}

# 8.4: hits and misses into a bound


def epsilon_at_least(hits, members, false_positives, strangers, target_delta, confidence):
    """A lower bound on ε, from how often an attacker said "in" about members and about strangers."""
    found = binomtest(hits, members).proportion_ci(confidence).low  # at the least; too high in half of the errors
    wrong = binomtest(false_positives, strangers).proportion_ci(confidence).high  # at the most; the other half
    return max(0.0, math.log((found - target_delta) / wrong)) if found > target_delta else 0.0


def _rates(hits, members, false_positives, strangers, confidence):
    """Both intervals."""
    return binomtest(hits, members).proportion_ci(confidence), binomtest(false_positives, strangers).proportion_ci(
        confidence
    )


exercise_8_4 = coding(
    "8.4",
    hint="`scipy.stats.binomtest(k, n).proportion_ci(confidence)` is the Clopper–Pearson interval of a share: it has a "
    "`.low` and a `.high`. Which end of the hits, and which end of the false positives, makes ε smallest? A bound "
    "below 0 says nothing: return 0.",
    reference=epsilon_at_least,
    inputs=[
        lambda: (70, 100, 10, 100, 0.1, 0.95),
        lambda: (300, 400, 20, 400, 1e-5, 0.9),
        lambda: (100, 100, 0, 200, 1e-5, 0.95),  # no false positive: the share itself would say infinity
        lambda: (10, 100, 12, 100, 1e-5, 0.95),
        lambda: (8, 100, 0, 400, 1e-5, 0.95),
        lambda: (0, 50, 0, 50, 1e-5, 0.95),
    ],
    wrong=[
        Wrong(
            lambda hits, n, false, k, delta, confidence: max(0.0, math.log((hits / n - delta) / (false / k))),
            "you took the shares as they were counted. Another 100 coins would give other shares, so this is an "
            "estimate, not a bound, and with no false positive it is infinite. Use the ends of their intervals.",
        ),
        Wrong(
            lambda hits, n, false, k, delta, confidence: (
                max(0.0, math.log((found.high - delta) / wrong.low))
                if (found := _rates(hits, n, false, k, confidence)[0])
                and (wrong := _rates(hits, n, false, k, confidence)[1]).low
                else math.inf
            ),
            "you took the ends that flatter the attacker. That is a bound from above, on this attack. To be sure that "
            "ε is *at least* so large, take the low end of the hits and the high end of the false positives.",
        ),
        Wrong(
            changed(epsilon_at_least, target_delta=0.0),
            "you left out δ. The promise is P(in) ≤ e^ε · P(out) + δ, so δ comes off the hits before you divide.",
        ),
        Wrong(
            changed(epsilon_at_least, confidence=lambda given: 2 * given.confidence - 1),
            "each of your two intervals may err as often as the whole bound may. One of the two is wrong twice as "
            "often. Give each half of the error; the two ends of `proportion_ci(confidence)` do just that.",
        ),
        Wrong(
            lambda hits, n, false, k, delta, confidence: (
                math.log((low - delta) / _rates(hits, n, false, k, confidence)[1].high)
                if (low := _rates(hits, n, false, k, confidence)[0].low) > delta
                else 0.0
            ),
            "your bound can be below 0. ε never is, so a negative bound says nothing: return 0 there.",
        ),
        Wrong(
            lambda hits, n, false, k, delta, confidence: (
                max(0.0, math.log10((low - delta) / _rates(hits, n, false, k, confidence)[1].high))
                if (low := _rates(hits, n, false, k, confidence)[0].low) > delta
                else 0.0
            ),
            "you took another logarithm. ε stands in e^ε, so it is the natural one, `math.log`.",
        ),
    ],
    praise="the low end of the hits, the high end of the false positives, and δ off the hits. It holds with the "
    "confidence that was asked for, also where no false positive was seen.",
)

# 8.5: which of three lies


def dp_step(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """The gradient of one private step: (P,). X may hold no record."""
    summed = clipped_sum(model, F.cross_entropy, X, y, max_grad_norm)
    return add_noise(summed, noise_multiplier, max_grad_norm, generator) / expected_batch_size


SEALED: dict[str, Trainer] = {
    "a": trainer_of(changed(dp_step, noise_multiplier=lambda given: 2 * given.noise_multiplier)),
    "b": trainer_of(dp_step),
    "c": trainer_of(same_noise),
}

exercise_8_5 = choose(
    "8.5",
    hint="Audit each of them with `audit.audit_training(..., steps_per_epoch=2)` and call the result `run`. "
    "`audit.one_run(run.scores, run.included)` looks at the final weights, `run.lower_bound()` at every step. Compare "
    "both with `run.epsilon`, the claim.",
    answer="c",
    wrong=[
        Wrong(
            "a",
            "trainer a adds twice the noise that it claims. Its bound is far below its claim, and its claim is true. "
            "A low bound proves nothing. Whose bound is *above* the claim?",
        ),
        Wrong(
            "b",
            "trainer b is honest. From its final weights an attacker gets the most of the three, and that is still "
            "less than it claims. Look at every step, not only at the end: whose bound is above the claim?",
        ),
    ],
    praise="trainer c adds the same noise at every step. Its final weights look the most private of the three, since "
    "equal noise adds up. Who sees two steps subtracts them, and the noise is gone.",
    solution="**c.** Its bound is above its claim, and only `lower_bound()`, which looks at every step, shows it: "
    "c has the same noise at every step, so the difference of two steps has none. In its final weights the equal noise "
    "has added up, and a bound from those alone is near 0.\n\n```python\nfor name, trainer in SEALED.items():\n"
    "    run = audit.audit_training(trainer, thousand, pixels, noise_multiplier=8.0, epochs=50, steps_per_epoch=2)\n"
    "    print(name, audit.one_run(run.scores, run.included), run.lower_bound(), run.epsilon)\n```",
)

# 8.6: hand in a step

_STEP_TRAITS = {
    "sum": "without noise (σ = 0), what you return is not the clipped sum over `expected_batch_size`: it is off by "
    "{mine:.0%} of its length.",
    "empty": "for a batch without records you return NaN or infinity. Its sum is zero, and it gets noise too.",
    "coordinates": "the noise is the same in every coordinate: it cancels in the difference of two.",
    "noise": "the standard deviation of your noise is {times:.3g} times what it must be: σ·C on the sum, then divided "
    "with it.",
    "last": "in the last parameter, the standard deviation of your noise is {times:.3g} times what it must be. Who "
    "reads the whole model reads that part too.",
    "in turn": "the noise of one call can be told from that of the call before: it cancels in their difference.",
    "moves": "the same-seed test: one record moves your sum by {mine:.2f}·C. Clip each gradient to C, before the sum.",
    "caught": "the audit's lower bound is above the ε that your steps claim.",
}


@cache
def _ground() -> tuple[Data, Tensor]:
    """Records and pixels to audit on: 200 images of noise, black where the canaries live."""
    pixels = torch.arange(0, 60)
    images = torch.rand(200, 784, generator=torch.Generator().manual_seed(0))
    images[:, pixels] = 0
    return Data(images.view(-1, 1, 28, 28), torch.arange(200) % 10), pixels


def _audited(fn: Any, args: tuple) -> Any:
    """What a step does without noise, what its noise is like, and what an audit of a training by it finds."""
    model, X, y, sigma, C, size, generator = args
    P = sum(p.numel() for p in model.parameters())

    def step(X: Tensor, y: Tensor, sigma: float, C: float = C) -> Tensor:
        gradient = attempted(fn(model, X, y, sigma, C, size, generator))
        if not isinstance(gradient, Tensor) or gradient.shape != (P,):
            found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else f"a {type(gradient).__name__}"
            raise Complaint(f"your function must return a tensor of shape (P,), here {(P,)}, got {found}.")
        return gradient.detach().double()

    rows = per_sample_gradients(model, F.cross_entropy, X, y)
    right, wide = (clip(rows, c).sum(0).double() / size for c in (C, 2 * C))
    pairs = [(step(X, y, sigma) - right, (step(X, y, sigma, 2 * C) - wide) / 2) for _ in range(100)]
    noise = torch.stack([draw for pair in pairs for draw in pair]) * size / (sigma * C)
    last = list(model.parameters())[-1].numel()
    data, pixels = _ground()
    trainer = trainer_of(fn)
    audit = audit_training(trainer, data, pixels, noise_multiplier=8.0, epochs=25, steps_per_epoch=2)
    diverged = not bool(audit.seen.isfinite().all())
    return {
        "sum": ((step(X, y, 0.0) - right).norm() / right.norm()).item(),
        "empty": float(step(X[:0], y[:0], sigma).isfinite().all()),
        "coordinates": (noise.std(1).mean() / noise.std().clamp(min=1e-9)).item(),
        "noise": (noise[:, :-last] - noise[:, :-last].mean(0)).std().item(),
        "last": (noise[:, -last:] - noise[:, -last:].mean(0)).std().item(),
        "in turn": ((noise[1:] * noise[:-1]).mean() / noise.square().mean().clamp(min=1e-9)).item(),
        "moves": sensitivity(trainer),
        "caught": float(diverged or audit.lower_bound() > audit.epsilon),
    }


def _worked() -> tuple:
    """A batch of 12 in which some gradients are longer than C and some are not."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(12, 6, generator=generator) * torch.linspace(0.1, 20, 12).unsqueeze(1)
    return models.mlp(6, 8, 3), X, torch.arange(12) % 3, 1.5, 0.7, 16.0, torch.Generator().manual_seed(5)


exercise_8_6 = coding(
    "8.6",
    hint="`per_sample_gradients(model, cross_entropy, X, y)`, `clip` each row, add the rows up, `add_noise` to the "
    "sum, and divide last. `clipped_sum` does the first three. Pass `generator` on.",
    reference=dp_step,
    observe=_audited,
    traits=_STEP_TRAITS,
    rtol=0.05,
    atol=0.06,
    inputs=[_worked],
    wrong=[
        Wrong(
            divided_twice,
            "your noise is divided by the batch size twice: once in its standard deviation, and once with the sum. The "
            "audit reads every canary. Make the noise for the sum, σ·C, and divide the noisy sum.",
        ),
        Wrong(
            clipped_late,
            "you clip the mean gradient, not each record's. The same-seed test shows it: one long record moves the sum "
            "by its whole length. Clip each row to C, before you add them up.",
        ),
        Wrong(
            last_layer_bare,
            "the last part of your gradient has no noise. Whoever reads that layer reads the records. Noise goes on "
            "every coordinate.",
        ),
        Wrong(
            same_noise,
            "your noise is the same at each call. The difference of two steps has none, and the audit that sees every "
            "step reads the canaries there. Draw from the generator that is handed in, and don't seed one.",
        ),
        Wrong(
            lambda model, X, y, sigma, C, size, generator: (
                add_noise(per_sample_gradients(model, F.cross_entropy, X, y).sum(0), sigma, C, generator) / size
            ),
            "nothing is clipped: a record's gradient may be as long as it likes, and the noise is made for C.",
        ),
        Wrong(
            lambda model, X, y, sigma, C, size, generator: (
                add_noise(clipped_sum(model, F.cross_entropy, X, y, C), sigma, 1.0, generator) / size
            ),
            "the standard deviation of your noise is σ. It must be σ·C: C is how far one record can move the sum.",
        ),
        Wrong(
            changed(dp_step, noise_multiplier=0.0),
            "there is no noise. Clipping alone hides nobody: the audit reads every canary.",
        ),
    ],
    praise="each record moves the sum by C at most, the noise is σ·C on every coordinate and new at every step, and "
    "the audit's lower bound stays below your ε. That is no proof, but none of the bugs above would have passed.",
)

EXERCISES = [exercise_8_4, exercise_8_5, exercise_8_6]
