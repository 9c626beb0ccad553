"""Notebook 03: the noisy mean, the Poisson batch, a division that leaks, and the learner's own DP-SGD loop."""

import copy
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dpteach.data import two_moons
from dpteach.exercises.core import Complaint, Wrong, attempted, changed, coding
from dpteach.mechanism import add_noise, clip, clipped_sum, per_sample_gradients, poisson_batches
from dpteach.models import mlp
from dpteach.settings import Settings


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _repeats(call: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
    """1 if the same seed in ``generator`` gives the same results again, else 0."""

    def results() -> list[Tensor]:
        generator.manual_seed(1)
        return [call() for _ in range(20)]  # one would not do: two empty batches are equal

    return torch.tensor(float(all(map(torch.equal, results(), results()))))


# 3.1: the noisy mean


def noisy_mean_gradient(clipped, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """The gradient that DP-SGD hands to the optimizer: clipped is (B, P), the result is (P,)."""
    summed = clipped.sum(0)  # zeros for an empty batch: it needs no case of its own
    noise = torch.randn(summed.shape, generator=generator)
    return (summed + noise_multiplier * max_grad_norm * noise) / expected_batch_size


def noisy(gradient):
    """An answer ``gradient(rows, z, σ, C, size)``, with one draw z for each coordinate."""
    return lambda rows, sigma, C, size, generator: gradient(
        rows, torch.randn(rows.shape[1], generator=generator), sigma, C, size
    )


def drawn(draw):
    """An answer that is right, but for its draw: ``draw(P, generator)``."""
    return lambda rows, sigma, C, size, generator: (rows.sum(0) + sigma * C * draw(rows.shape[1], generator)) / size


def _halves(P, generator):
    half = torch.randn((P + 1) // 2, generator=generator)
    return torch.cat([half, -half])[:P]


_NOISE_TRAITS = {
    "finite": "your result holds NaN or infinity. What does your code do with a batch without rows?",
    "mean": "your noise is not centred at zero, or the sum of the rows is wrong: the mean of result minus sum / "
    "expected batch size is {mine:.2g} standard deviations of the right noise.",
    "in turn": "the noise of one call can be told from that of the call before: in the sum or difference of two "
    "updates it is gone. Draw at each call.",
    "coordinates": "the noise is nearly the same in every coordinate: it cancels in the difference of two. Draw one "
    "number for each.",
    "pairs": "the noise of one coordinate depends on that of another: in their sum or difference it cancels, wholly or "
    "in part, and the attacker reads what is left. Draw one number for each coordinate.",
    "middle": "your noise is not Gaussian, and what is promised later is computed for Gaussian noise. Use "
    "`torch.randn`.",
    "spread": "the standard deviation of your noise is {times:.3g} times what it must be: σ·C on the sum, then divided "
    "with it.",
    "repeats": "the noise is right, but the same seed in `generator` does not give it again. Pass "
    "`generator=generator` to `torch.randn`, and draw from nothing else.",
}


def _noise_traits(fn: Any, args: tuple) -> Any:
    """The result itself where σ = 0; else what is typical of the noise, in units of its right standard deviation."""
    clipped, noise_multiplier, max_grad_norm, expected_batch_size, generator = args
    P = clipped.shape[1]

    def call() -> Any:
        try:
            result = attempted(fn(*args))
        except ZeroDivisionError:  # a division by the actual size, as a Python number
            return torch.full((P,), math.nan)
        return torch.as_tensor(result) if isinstance(result, np.ndarray) else result

    first = call()
    if not isinstance(first, Tensor):
        return first
    if first.shape != (P,):
        raise Complaint(
            f"your function must return one number for each coordinate of the gradient, shape {(P,)}, "
            f"got {tuple(first.shape)}."
        )
    if first.dtype not in (torch.float32, torch.float64):
        raise Complaint(
            f"your function must return float32, got {first.dtype}: in coarser numbers, noise can be told from its "
            "last digits."
        )
    if noise_multiplier == 0:
        return first
    # Every column of the input is the same, so that coordinates differ by the noise only.
    draws = torch.stack([call() for _ in range(20 if P > 100 else 2000)])
    noise = (draws - clipped.sum(0) / expected_batch_size) * expected_batch_size / (noise_multiplier * max_grad_norm)
    finite = bool(noise.isfinite().all())
    traits = {
        "finite": torch.tensor(float(finite)),
        "in turn": (noise[1:] * noise[:-1]).mean() / noise.square().mean(),
        "spread": noise.std(),
    }
    if P > 100:
        traits |= {
            "mean": noise.mean(),
            "coordinates": noise.std(dim=1).mean() / noise.std(),
            "middle": 3
            * ((noise - noise.mean()).abs() <= noise.std() / 2).float().mean(),  # 1.15; Laplace 1.5, uniform 0.9
            "repeats": _repeats(call, generator),
        }
    elif P > 1:
        together = (torch.corrcoef(noise.T) - torch.eye(P)).flatten()
        closest = together[together.abs().argmax()]
        traits["pairs"] = closest - closest.clamp(-0.15, 0.15)  # more than six standard deviations of chance
    return {name: traits[name] if finite or name == "finite" else math.nan for name in _NOISE_TRAITS if name in traits}


exercise_3_1 = coding(
    "3.1",
    hint="Four steps: add up the rows; draw `torch.randn` once, in the shape of that *sum*, with "
    "`generator=generator`; multiply the draw by σ·C and add it; divide everything by `expected_batch_size`. What is "
    "the sum of a matrix with no rows, and does your code do the right thing with it?",
    reference=noisy_mean_gradient,
    observe=_noise_traits,
    traits=_NOISE_TRAITS,
    rtol=0.05,
    atol=0.06,
    inputs=[
        lambda: (
            torch.tensor([[0.6, -0.8, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5], [-1.0, 0.0, 0.0], [0.9, 0.1, 0.2]]),
            *(0.0, 1.0, 2, _seed(0)),
        ),
        lambda: (torch.full((5, 2000), 0.04), 1.5, 2.0, 8, _seed(1)),
        lambda: (torch.full((12, 2000), 0.01), 0.8, 0.5, 3, _seed(2)),
        lambda: (torch.zeros(0, 2000), 1.5, 2.0, 8, _seed(3)),  # an empty batch
        lambda: (torch.randn(7, 30, generator=_seed(4)), 0.0, 3.0, 5, _seed(5)),
        lambda: (torch.full((3, 4), 0.1), 1.2, 0.7, 6, _seed(6)),  # few coordinates, many draws
        lambda: (torch.full((3, 1), 0.1), 0.7, 1.3, 2, _seed(7)),  # a single coordinate
    ],
    wrong=[
        Wrong(
            noisy(lambda rows, z, sigma, C, size: rows.sum(0) / size),
            "there is no noise in your result, whatever σ is. Then the attacker reads off with certainty whether you "
            "took part. Draw `torch.randn` in the shape of the sum, times σ·C.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + sigma * z) / size),
            "your noise has standard deviation σ on the sum; it must be σ·C. σ is only the *multiplier*: one record "
            "moves the sum by up to C, so the noise must grow with C. For C = 2 you gave half the noise that "
            "it takes.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + C * z * (sigma > 0)) / size),
            "your noise has standard deviation C on the sum; it must be σ·C. The noise multiplier does nothing in your "
            "code, so you would promise something for noise that nobody added.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: rows.sum(0) / size + sigma * C * z),
            "you divided the sum by the expected batch size first, and then added noise of standard deviation σ·C. "
            "That noise is meant for the *sum*: on the mean it is too large, by a factor of the batch size, and the "
            "model learns nothing. Add first, then divide both.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + sigma * C * z / size) / size),
            "you divided the noise by the batch size twice. This is noise for the *mean*, added to the *sum*: too "
            "little by a factor of the batch size, so nobody is hidden, whatever you promise. Add σ·C to the sum, "
            "then divide once.",
        ),
        Wrong(
            lambda rows, sigma, C, size, generator: (
                (rows + sigma * C * torch.randn(rows.shape, generator=generator)).sum(0) / size
            ),
            "you drew noise for each record's row. The draws add up: the variance is as many times too large as the "
            "batch has rows, and an empty batch gets no noise at all. Draw once, for the sum.",
        ),
        Wrong(
            changed(noisy_mean_gradient, expected_batch_size=lambda run: len(run.clipped)),
            "you divided by the actual batch size. It changes when one record joins, so the division tells who was in, "
            "and an empty batch divides by zero. Divide by the expected batch size, which is n·q for every batch.",
        ),
        Wrong(
            changed(noisy_mean_gradient, expected_batch_size=lambda run: max(len(run.clipped), 1)),
            "you divided by `max(len(clipped), 1)`. That mends the empty batch, but the divisor is still the actual "
            "batch size: it changes when one record joins. Divide by the expected batch size, whatever the batch "
            "holds.",
        ),
        Wrong(
            changed(noisy_mean_gradient, noise_multiplier=lambda run: 2 * run.noise_multiplier),
            "your noise is twice as large as it must be: 2·σ·C. That would fit where one record is *replaced* by "
            "another, which moves the sum by up to 2·C. Here a record joins or leaves, and moves it by up to C.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: rows.mean(0) + sigma * C * z / size),
            "your noise is right, but `mean(0)` divides the gradients by the *actual* batch size. In a small batch one "
            "record then moves the result by far more than C / expected batch size, and the noise does not cover that; "
            "an empty batch gives NaN. Take the sum, and divide by the expected batch size.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: rows.mean(0) + sigma * C * z),
            "you added noise of standard deviation σ·C to `mean(0)`. Two things are mixed up: σ·C belongs to the "
            "*sum*, and `mean` divides by the actual batch size. Sum, add the noise, then divide by the expected batch "
            "size.",
        ),
        Wrong(
            drawn(lambda P, generator: torch.randn(1, generator=generator)),
            "you drew one number and added it to every coordinate. It cancels in the difference of two coordinates, "
            "and what remains has no noise at all. Draw one number for each coordinate.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + math.sqrt(sigma * C) * z) / size),
            "you took σ·C for the *variance*; it is the standard deviation. `torch.randn` has standard deviation 1, so "
            "multiply it by σ·C itself, without the square root.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + (sigma * C) ** 2 * z) / size),
            "you multiplied the noise by σ²·C². That is its *variance*. `torch.randn` has standard deviation 1, so "
            "multiply it by σ·C.",
        ),
        Wrong(
            lambda rows, *rest: noisy_mean_gradient(rows, *rest) if len(rows) else torch.zeros(rows.shape[1]),
            "an empty batch gets zeros from you, without noise. Then an update of exactly zero says with certainty "
            "that nobody took part. The sum of an empty batch is zeros, and it gets the same noise as any other.",
        ),
        Wrong(
            changed(noisy_mean_gradient, expected_batch_size=1),
            "the noisy sum is right, but you did not divide it. The learning rate would then depend on the batch size. "
            "Divide by the expected batch size.",
        ),
        Wrong(
            drawn(lambda P, generator: torch.rand(P, generator=generator)),
            "`torch.rand` is uniform between 0 and 1: it is never negative, so it pushes every coordinate up, and it "
            "has an end, beyond which the attacker is certain. Use `torch.randn`, the Gaussian.",
        ),
        Wrong(
            drawn(lambda P, generator: math.sqrt(12) * (torch.rand(P, generator=generator) - 0.5)),
            "the size of the noise is right, but it is not Gaussian: uniform noise has an end, and beyond it the "
            "attacker is certain. What is promised later is computed for Gaussian noise. Use `torch.randn`.",
        ),
        Wrong(
            drawn(lambda P, generator: torch.distributions.Laplace(0.0, 1.0).sample((P,))),
            "this is Laplace noise. Its natural measure is the L1 norm, and clipping bounds the L2 norm; the "
            "promise of notebook 04 is computed for Gaussian noise. Use `torch.randn`.",
        ),
        Wrong(
            drawn(_halves),
            "you drew noise for half of the coordinates and used it again, with the sign turned, for the other half. "
            "In the sum of such a pair it cancels, and the attacker reads that sum without any noise. Draw one number "
            "for each coordinate.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + sigma * C * (z - z.mean())) / size),
            "you subtracted the mean of the noise. Then the noise of all coordinates adds up to zero, and the attacker "
            "reads the sum of the gradient's coordinates without any noise. Leave the draw as it is.",
        ),
        Wrong(
            changed(noisy_mean_gradient, generator=lambda run: _seed(0)),
            "you seed the random numbers inside the function, so every step gets the *same* noise: in the difference "
            "of two updates it is gone. Draw from the generator that is handed to you.",
        ),
        Wrong(
            changed(noisy_mean_gradient, generator=None),
            "the noise is right, but it does not come from `generator`, so nobody can repeat your run. Pass "
            "`generator=generator` to `torch.randn`.",
        ),
    ],
    praise="noise of standard deviation σ·C on the sum, once for each coordinate, divided by the expected batch size; "
    "and an empty batch gets it too.",
)

# 3.2: the Poisson batch


def poisson_batch(n, sample_rate, generator):
    """The indices of one Poisson batch: each of the n records takes part with probability sample_rate."""
    takes_part = torch.rand(n, generator=generator) < sample_rate  # one draw for each record
    return torch.nonzero(takes_part).squeeze(1)


_BATCH_TRAITS = {
    "fixed": "your batches always have the same size. In such a batch the records are not independent: one that gets "
    "in keeps another one out. Draw for each record on its own.",
    "size": "your batches hold {times:.2g} times as many records as n·q, on average.",
    "luckiest": "some records take part at a higher rate than others. Each must take part with probability q.",
    "once": "a record can be in your batch twice, or the records take part at another rate than q.",
    "varies": "the sizes of your batches vary {times:.2g} times as much as those of independent draws. Draw for each "
    "record on its own.",
    "empty": "an empty batch must come now and then: with probability (1 - q)^n. Yours come more or less often.",
    "alone": "batches of one record come too often, or too rarely.",
    "pairs": "two records take part together more often, or less often, than independent draws would have it: who "
    "knows that one is in learns about the other. Draw for each record on its own.",
    "in turn": "who was in one batch says who is in the next. Draw anew at each call.",
    "repeats": "the batches are right, but the same seed in `generator` does not give them again. Pass "
    "`generator=generator` to `torch.rand`, and draw from nothing else.",
}


def _batch_traits(fn: Any, args: tuple) -> Any:
    """What is typical of many batches: how many records, how that varies, which records, in which company."""
    n, sample_rate, generator = args

    def call() -> Any:
        result = attempted(fn(*args))
        return torch.as_tensor(result) if isinstance(result, np.ndarray) else result

    first = call()
    if not isinstance(first, Tensor):
        return first
    if first.dtype == torch.bool:
        raise Complaint(
            f"your function must return the indices of the records, got {len(first)} times True or False. "
            "`torch.nonzero(...).squeeze(1)` makes indices of them."
        )
    batches = [call() for _ in range(4000 if n < 100 else 2000)]
    odd = next(
        (batch for batch in [first, *batches] if batch.ndim != 1 or batch.is_floating_point() or batch.is_complex()),
        None,
    )
    if odd is not None:  # not only the first: `squeeze()` fails where the batch has one record
        raise Complaint(
            f"your function must return whole numbers in one row, shape (b,), got {odd.dtype} of shape "
            f"{tuple(odd.shape)}."
        )
    everyone = torch.cat(batches)
    if len(everyone) and not 0 <= int(everyone.min()) <= int(everyone.max()) < n:
        raise Complaint(
            f"your function must return indices from 0 to {n - 1}, got some from {int(everyone.min())} to "
            f"{int(everyone.max())}."
        )
    counts = torch.stack([torch.bincount(batch, minlength=n) for batch in batches]).double()  # (draws, n)
    sizes, inside = counts.sum(1), (counts > 0).double()
    size = sizes.mean() / (n * sample_rate)
    if sample_rate == 1:
        return {"size": size, "once": inside.mean()}
    other = inside - sample_rate
    pairs = (other.T @ other / len(batches)).fill_diagonal_(0)
    return {
        "fixed": (sizes == sizes[0]).all().double(),
        "size": size,
        "luckiest": inside.mean(0).max(),
        "once": inside.mean() / sample_rate,  # below the first where a record is drawn twice
        "varies": sizes.std() / math.sqrt(n * sample_rate * (1 - sample_rate)),
        "empty": (sizes == 0).double().mean(),
        "alone": (sizes == 1).double().mean(),
        "pairs": pairs.abs().max() / sample_rate,
        "in turn": ((other[1:] * other[:-1]).mean().abs() / sample_rate - 0.05).clamp(min=0),
        "repeats": _repeats(call, generator),
    }


exercise_3_2 = coding(
    "3.2",
    hint="`torch.rand(n, generator=generator)` draws one number between 0 and 1 for each record. What is the "
    "probability that such a number is below q? `torch.nonzero(mask).squeeze(1)` turns a row of True and False into "
    "indices.",
    reference=poisson_batch,
    observe=_batch_traits,
    traits=_BATCH_TRAITS,
    rtol=0.08,
    atol=0.03,
    inputs=[
        lambda: (100, 0.3, _seed(0)),
        lambda: (6, 0.25, _seed(1)),  # often empty
        lambda: (1, 0.5, _seed(2)),
        lambda: (5, 1.0, _seed(3)),  # everybody, always
    ],
    wrong=[
        Wrong(
            lambda n, q, generator: torch.randperm(n, generator=generator)[: int(n * q)],
            "your batches always have the same size. In a batch of a fixed size the records are not independent: one "
            "that gets in keeps another one out. What is promised later is computed for independent draws, "
            "not for yours. Draw for each record on its own.",
        ),
        Wrong(
            lambda n, q, generator: torch.randint(n, (int(n * q),), generator=generator),
            "`torch.randint` can pick a record twice. Its clipped gradient then counts twice, so it moves the sum by "
            "up to 2·C or more, and the noise is made for C. Draw once for each record: in, or not in.",
        ),
        Wrong(
            lambda n, q, generator: (torch.randint(n, (1,), generator=generator) + torch.arange(int(n * q))) % n,
            "your batch is a block of neighbours. Each record takes part at the right rate, but it always brings the "
            "same company, so who knows one of them knows the others. Draw for each record on its own.",
        ),
        Wrong(
            lambda n, q, generator: torch.arange(int(n * q)),
            "your batch is always the same records, the first ones. They take part in every step and the others never: "
            "nobody is hidden by chance, and most of the data is not used. Draw for each record, at each call.",
        ),
        Wrong(
            lambda n, q, generator: torch.nonzero(torch.rand(n, generator=generator) >= q).squeeze(1),
            "the comparison is the wrong way round: `rand > q` is true with probability 1 - q. Your batches hold the "
            "records that should have stayed out, far too many of them.",
        ),
        Wrong(
            lambda n, q, generator: torch.arange(n if torch.rand(1, generator=generator) < q else 0),
            "you flip one coin for the whole data set: everybody, or nobody. The mean size is right, but one known "
            "record gives away all the others. Draw n numbers, one for each record.",
        ),
        Wrong(
            lambda n, q, generator: torch.randperm(n, generator=generator)[
                : int(torch.poisson(torch.tensor(n * q), generator=generator))
            ],
            "you drew the batch *size* from a Poisson distribution. In spite of its name, Poisson sampling does not do "
            "that: it flips a coin of probability q for each record, so the size is binomial and varies less.",
        ),
        Wrong(
            lambda n, q, generator: (
                batch if len(batch := poisson_batch(n, q, generator)) else torch.randint(n, (1,), generator=generator)
            ),
            "you fill an empty batch with a record. That record takes part with a probability above q, and it is alone "
            "in its batch. Return the empty batch: it gets noise like any other.",
        ),
        Wrong(
            lambda n, q, generator: next(filter(len, (poisson_batch(n, q, generator) for _ in count()))),
            "you draw again until the batch is not empty. Each record then takes part with a probability above q, and "
            "what is promised is computed for q. Return the empty batch: it gets noise like any other.",
        ),
        Wrong(
            lambda n, q, generator: torch.nonzero(torch.randn(n, generator=generator) < q).squeeze(1),
            "`torch.randn` is Gaussian: it is below q far more often than in a share q of the draws. Use `torch.rand`, "
            "uniform between 0 and 1.",
        ),
        Wrong(
            changed(poisson_batch, generator=lambda run: _seed(0)),
            "you seed the random numbers inside the function, so every step gets the same batch. Draw from the "
            "generator that is handed to you.",
        ),
        Wrong(
            changed(poisson_batch, generator=None),
            "the batches are right, but they do not come from `generator`, so nobody can repeat your run. Pass "
            "`generator=generator` to `torch.rand`.",
        ),
    ],
    praise="one independent draw for each record. The sizes vary around n·q, and now and then a batch is empty, as it "
    "must be.",
)

# 3.3: a division that leaks

_C, _EXPECTED = 1.0, 100
_EAST = torch.tensor([[1.0, 0.0]])


def neighbours():
    """A batch of clipped rows, shape (b, 2), and the clipped row of one record that joins it, shape (2,)."""
    batch = torch.tensor([[1.0, 0.0]])  # a small batch: the mean follows a newcomer easily
    record = torch.tensor([-1.0, 0.0])  # as long as C allows, and against all the others
    return batch, record


def _how_far(fn: Any, args: tuple) -> Any:
    """A word for what the learner's pair does to ``clipped.mean(0)``."""
    pair = attempted(fn())
    if not (
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, (Tensor, np.ndarray)) for x in pair)
    ):
        raise Complaint("your function must return two tensors: the batch, and the record that joins it.")
    batch, record = (torch.as_tensor(part).detach().double() for part in pair)
    if batch.ndim != 2 or batch.shape[1] != 2 or record.shape != (2,):
        raise Complaint(
            f"the batch must have shape (b, 2) and the record (2,), got {tuple(batch.shape)} and {tuple(record.shape)}."
        )
    if not (batch.isfinite().all() and record.isfinite().all()):
        raise Complaint("the rows must hold finite numbers.")
    if record.norm() > _C * 1.0001:
        return "record not clipped"
    if (batch.norm(dim=1) > _C * 1.0001).any():
        return "batch not clipped"
    if len(batch) == 0:
        return "empty"
    moved = (torch.cat([batch, record[None]]).mean(0) - batch.mean(0)).norm().item()
    if moved >= 49.99 * _C / _EXPECTED:  # 50 times, but for rounding
        return "leaks"
    if moved < 0.01 * _C / _EXPECTED:
        return "does not move"
    if len(batch) <= 3:  # the newcomer can move their mean by 2·C / 4
        return "short rows"
    return "large batch" if len(batch) >= 20 else "a few rows too many"


exercise_3_3 = coding(
    "3.3",
    hint="The sum moves by at most C = 1, whatever you do. The division decides what becomes of that. In a batch of b "
    "rows, how much weight does one more row have in the mean? And which direction is farthest away from the others?",
    reference=neighbours,
    observe=_how_far,
    inputs=[lambda: ()],
    wrong=[
        Wrong(
            lambda: (_EAST, -30 * _EAST[0]),
            "your record is longer than C = 1: clipping would have shortened it. The leak needs no such trick. Keep "
            "every row within C, and look at the division.",
        ),
        Wrong(
            lambda: (40 * _EAST.expand(2, 2), -_EAST[0]),
            "a row of your batch is longer than C = 1: clipping would have shortened it. Keep every row within C, and "
            "look at the division.",
        ),
        Wrong(
            lambda: (_EAST.expand(100, 2), -_EAST[0]),
            "in a batch this large, one record hardly moves the mean. Poisson batches vary in size, and when n·q is "
            "small they may hold a record or two. Try a batch as small as that.",
        ),
        Wrong(
            lambda: (_EAST.expand(4, 2), -_EAST[0]),
            "your batch is small, but not small enough. Among b others, the newcomer has the weight 1 / (b + 1) in the "
            "mean, so it moves the mean by 2·C / (b + 1) at most. Take fewer rows.",
        ),
        Wrong(
            lambda: (_EAST, _EAST[0]),
            "the mean does not move: your record is equal to the mean of the others, so nothing changes when it joins. "
            "Choose a direction that the others do not have.",
        ),
        Wrong(
            lambda: (torch.zeros(0, 2), _EAST[0]),
            "an empty batch has no mean: 0 / 0 is NaN. That is one more reason against this division, but nothing that "
            "can be measured here. Start with one row.",
        ),
        Wrong(
            lambda: (0.2 * _EAST, -0.2 * _EAST[0]),
            "the mean moves, but by less than 50 times C / 100. Rows may be as long as C = 1; use that, and let the "
            "record point against the others.",
        ),
    ],
    praise="with all rows clipped to C, one record moves this mean 50 times farther than the noise was made for, or "
    "more. A division by the expected batch size can't be moved like that: the divisor does not ask who is in "
    "the batch.",
)

# 3.4: the learner's own loop


def my_dp_sgd(model, data, s, sampling, noise):
    """Train model in place with DP-SGD; return each step's batch, and the weights after it."""
    n, C, q = len(data), s.max_grad_norm, s.sample_rate(len(data))
    steps = []
    for batch in poisson_batches(n, q, s.epochs * s.steps_per_epoch(n), sampling):  # move 1: sample
        X, y = data[batch]
        grads = per_sample_gradients(model, cross_entropy, X, y)  # move 2: a gradient for each record
        summed = clip(grads, C).sum(0)  # move 3: clip each of them, then add them up
        noisy = add_noise(summed, s.noise_multiplier, C, noise)  # move 4: noise on the sum
        weights = parameters_to_vector(model.parameters()).detach() - s.lr * noisy / (n * q)
        vector_to_parameters(weights, model.parameters())
        steps.append((batch, weights))
    return steps


def stepping(gradient, batches=poisson_batches):
    """A loop that is right but for ``gradient(rows, s, expected size, noise)``, what lr multiplies, or its batches."""

    def answer(model, data, s, sampling, noise):
        n, q, steps = len(data), s.sample_rate(len(data)), []
        for batch in batches(n, q, s.epochs * s.steps_per_epoch(n), sampling):
            rows = per_sample_gradients(model, cross_entropy, *data[batch])
            weights = parameters_to_vector(model.parameters()).detach() - s.lr * gradient(rows, s, n * q, noise)
            vector_to_parameters(weights, model.parameters())
            steps.append((batch, weights))
        return steps

    return answer


def _noised(summed, s, noise):
    return add_noise(summed, s.noise_multiplier, s.max_grad_norm, noise)


def _right(rows, s, size, noise):
    return _noised(clip(rows, s.max_grad_norm).sum(0), s, noise) / size


def _sized(n, q, steps, generator):
    return (torch.randperm(n, generator=generator)[: round(n * q)] for _ in range(steps))


def _dealt(n, q, steps, generator):
    for k in range(steps):
        if k % round(1 / q) == 0:  # a new epoch
            whose = torch.randint(round(1 / q), (n,), generator=generator)
        yield (whose == k % round(1 / q)).nonzero().flatten()


def _again(n, q, steps, generator):
    epoch = list(poisson_batches(n, q, round(1 / q), generator))
    return (epoch[k % len(epoch)] for k in range(steps))


def _one_draw_an_epoch(model, data, s, sampling, noise):
    steps = []

    def gradient(rows, s, size, noise):
        if len(steps) % s.steps_per_epoch(len(data)) == 0:
            steps.append(torch.randn(rows.shape[1], generator=noise))
        else:
            steps.append(steps[-1])
        return (clip(rows, s.max_grad_norm).sum(0) + s.noise_multiplier * s.max_grad_norm * steps[-1]) / size

    return stepping(gradient)(model, data, s, sampling, noise)


def _skips_the_empty(model, data, s, sampling, noise):
    n, q, steps = len(data), s.sample_rate(len(data)), []
    for batch in poisson_batches(n, q, s.epochs * s.steps_per_epoch(n), sampling):
        weights = parameters_to_vector(model.parameters()).detach()
        if len(batch):
            rows = per_sample_gradients(model, cross_entropy, *data[batch])
            weights = weights - s.lr * _right(rows, s, n * q, noise)
            vector_to_parameters(weights, model.parameters())
        steps.append((batch, weights))
    return steps


_LOOP_TRAITS = {
    "twice": "move 1: a record stands in one of your batches twice. It then moves the sum by up to 2·C.",
    "size": "move 1: on average your batches hold {times:.2g} times as many records as n·q.",
    "fixed": "move 1: your batches always have the same size. Let each record flip its own coin.",
    "capped": "move 1: none of your batches is larger than n·q: then one record that gets in keeps another out. A "
    "batch is as large as the coins say.",
    "varies": "move 1: the sizes of your batches vary {times:.2g} times as much as those of independent coins.",
    "dealt": "move 1: in how many batches a record is varies {times:.2g} times as much as with a coin for each "
    "batch. 0: you deal the records out, each once an epoch. More than 1: batches are used again. Flip every record's "
    "coin anew in every step.",
    "weights": "with σ = 0, your weights are not those of clipped gradients, summed, divided by n·q and multiplied by "
    "lr. Look at moves 2 and 3, and at the step.",
    "coordinates": "move 4: the noise is the same in every coordinate: it cancels in the difference of two. Draw one "
    "number for each.",
    "spread": "move 4: the noise on the sum has {times:.3g} times the standard deviation σ·C that it must have.",
    "mean": "move 4: your noise is not centred at zero, or the sum under it is not that of the clipped gradients.",
    "bare": "move 4: one of the weights gets no noise, and shows what it learned. Draw one number for each weight.",
    "in turn": "move 4: the noise of one step can be told from that of another: in their sum or difference it is gone. "
    "Draw anew in each step, also within an epoch.",
    "by size": "move 4: the noise on the sum depends on how many records are in the batch: in one of your steps it has "
    "{times:.3g} times the standard deviation σ·C.",
    "empty": "move 4: in the step of an empty batch, the noise on the sum has {times:.3g} times the standard deviation "
    "σ·C. It gets the same noise as any other.",
    "sampling": "move 1: your batches do not come from `sampling`: the same seed must give the same ones again, and "
    "another "
    "seed must give others.",
    "noise": "move 4: your noise does not come from `noise`: the same seed must give the same run again, and another "
    "seed "
    "must give another.",
}


def _run(fn: Any, args: tuple) -> tuple[list[Tensor], Tensor]:
    """The batches, and the weights after each step, ``(steps, P)``; a complaint where they are something else."""
    model, data, s, _, _ = args
    before = parameters_to_vector(model.parameters()).detach().clone()
    result = fn(*args)
    last = parameters_to_vector(model.parameters()).detach().clone()
    if result is None and not torch.equal(before, last):
        raise Complaint("your loop trains the model, but returns nothing: return the list of its steps.")
    steps, expected = attempted(result), s.epochs * s.steps_per_epoch(len(data))
    if not (isinstance(steps, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in steps)):
        raise Complaint(
            "your function must return a list with a pair for each step: the batch, and the weights after it."
        )
    if len(steps) != expected:
        raise Complaint(
            f"your loop made {len(steps)} steps of {expected}: `s.epochs * s.steps_per_epoch(n)`. A step whose batch "
            "is "
            "empty is one, too."
        )
    batches, weights = ([torch.as_tensor(part) for part in parts] for parts in zip(*steps))
    if any(b.ndim != 1 or b.is_floating_point() or b.dtype == torch.bool for b in batches):
        raise Complaint("the first of each pair must be the batch: indices of records, in one row.")
    if any(w.shape != before.shape for w in weights):
        raise Complaint(f"the second of each pair must be all weights in one row, {tuple(before.shape)}.")
    if any(w.data_ptr() == weights[0].data_ptr() for w in weights[1:]):
        raise Complaint("all your steps hold the same tensor, which the later steps change: keep a copy of it.")
    path = torch.stack([w.detach().double() for w in weights])
    if not torch.allclose(path[-1], last.double(), atol=1e-6, equal_nan=True):
        raise Complaint(
            "the weights of your last pair are not the model's: put them into the model with `vector_to_parameters`, "
            "in "
            "every step."
        )
    return batches, torch.cat([before.double()[None], path])


def _loop_traits(fn: Any, args: tuple) -> Any:
    """What is typical of a run, whatever its batches were."""
    model, data, s, sampling, noise = args
    n, q, C, sigma = len(data), s.sample_rate(len(data)), s.max_grad_norm, s.noise_multiplier
    fresh, there = copy.deepcopy(model), copy.deepcopy(model)
    batches, path = _run(fn, args)
    if q == 1 and sigma == 0:
        return 1000 * path[1:]  # so that a small tolerance is one
    counts = torch.stack([torch.bincount(b, minlength=n) for b in batches])
    sizes = counts.sum(1).double()
    scale = n * q / (s.lr * C * (sigma or 1))
    right = []
    for batch, weights in zip(batches, path):
        vector_to_parameters(weights.float(), there.parameters())
        X, y = data[batch]
        right.append(clipped_sum(there, cross_entropy, X, y, C).double() / C)
    left = (path[:-1] - path[1:]) * scale - torch.stack(right) / (sigma or 1)  # of what was added up, in σ·C
    seeds = sampling.initial_seed(), noise.initial_seed()

    def again(sampling: int = seeds[0], noise: int = seeds[1]) -> tuple[list[Tensor], Tensor]:
        return _run(fn, (copy.deepcopy(fresh), data, s, _seed(sampling), _seed(noise)))

    def repeated(**seed: int) -> Tensor:
        return again(**seed)[1]

    if sigma == 0:
        others, elsewhere = again(sampling=99)
        own = torch.equal(repeated(), path) and not torch.equal(elsewhere, path)
        runs = torch.stack([counts, torch.stack([torch.bincount(b, minlength=n) for b in others])]).double()
        by_chance = n * q * (1 - q), len(batches) * q * (1 - q)
        return {
            "twice": float((counts > 1).any()),
            "size": _near(runs.mean() / q, 0.12),
            "fixed": float((sizes == sizes[0]).all()),
            "capped": float(runs.sum(2).max() < n * q + 1),
            "varies": _near(runs.sum(2).var() / by_chance[0], 0.95),
            "dealt": _near(runs.sum(1).var() / by_chance[1], 0.4),
            "weights": float(not left.abs().max() < 1e-3),
            "sampling": float(own and torch.equal(repeated(noise=99), path)),  # the noise has no say in it
        }
    alike = torch.corrcoef(left).fill_diagonal_(0)  # of the noise of any two steps
    in_turn = _near(1 + alike.flatten()[alike.abs().argmax()], 0.2)
    if q < 1:
        each = left.std(dim=1)
        return {
            "empty": _near(left[sizes == 0].std(), 0.08) if (sizes == 0).any() else 0.0,
            "by size": _near(each[(each - 1).abs().argmax()], 0.15),
            "in turn": in_turn,
        }
    own = torch.equal(repeated(), path) and not torch.equal(repeated(noise=99), path)
    return {
        "coordinates": _near(left.std(dim=1).mean() / left.std(), 0.5),
        "spread": _near(left.std(), 0.03),
        "bare": float(left.std(dim=0).min() < 0.05),
        "mean": _near(1 + left.mean(), 0.06),
        "in turn": in_turn,
        "noise": float(own and torch.allclose(repeated(sampling=99), path, atol=1e-4)),  # all are in, whoever is drawn
    }


def _near(number: Tensor, far: float) -> float:
    """1 where chance explains the distance from it, else the number."""
    return 1.0 if abs(float(number) - 1) <= far else float(number)


def _loop_input(hidden: int, n: int, seed: int, **settings: Any) -> Callable[[], tuple]:
    def args() -> tuple:
        data = two_moons(n, seed=3)
        data.X[0], data.y[0] = torch.tensor([-4.0, 4.0]), 1  # loud: its gradient is longer than any C below
        return mlp(hidden=hidden), data, Settings(lr=0.3, **settings), _seed(seed), _seed(seed + 50)

    return args


exercise_3_4 = coding(
    "3.4",
    hint="One round of the loop for each batch, in this order: `X, y = data[batch]`; `per_sample_gradients(model, "
    "cross_entropy, X, y)`; `clip`, then `.sum(0)`; noise on that sum; divide by n·q; times `s.lr`. The weights as "
    "one row are "
    "`parameters_to_vector(model.parameters()).detach()`, and `vector_to_parameters(weights, model.parameters())` puts "
    "them back. What does your loop do with a batch without records?",
    reference=my_dp_sgd,
    observe=_loop_traits,
    traits=_LOOP_TRAITS,
    rtol=1e-4,
    atol=0.05,
    inputs=[
        _loop_input(6, 7, 0, noise_multiplier=0.0, max_grad_norm=0.3, epochs=3, batch_size=7),
        _loop_input(6, 7, 0, noise_multiplier=0.0, max_grad_norm=1.3, epochs=3, batch_size=7),
        _loop_input(
            4, 133, 1, noise_multiplier=0.0, max_grad_norm=1.3, epochs=4, batch_size=30
        ),  # q is 1/5, not 30 / 133
        _loop_input(250, 3, 2, noise_multiplier=1.5, max_grad_norm=2.0, epochs=8, batch_size=3),
        _loop_input(250, 4, 3, noise_multiplier=1.0, max_grad_norm=0.5, epochs=5, batch_size=1),  # often empty
    ],
    wrong=[
        Wrong(
            stepping(lambda rows, s, size, noise: _noised(rows.sum(0), s, noise) / size),
            "moves 2 and 3: you add up the gradients as they are. Without clipping, one record moves the sum by any "
            "number of times C, and noise of σ·C hides none of that. Clip each row first.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    _noised(clip(rows.sum(0, keepdim=True) / size, s.max_grad_norm)[0] * size, s, noise) / size
                )
            ),
            "move 3: you clip the mean gradient, not each record's. One record can still turn the mean around, and "
            "moves the sum by up to 2·B·C instead of C (B records in the batch). Clip each row, then add up.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    _noised((rows * (s.max_grad_norm / rows.norm(dim=1, keepdim=True))).sum(0), s, noise) / size
                )
            ),
            "move 3: you make every row C long. A row within C stays as it is: the factor is C / norm, but 1 at most.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: clip(rows, s.max_grad_norm).sum(0) / size),
            "move 4 is missing: there is no noise in your steps, whatever σ is, and the attacker of section 1 is "
            "certain.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    add_noise(clip(rows, s.max_grad_norm).sum(0), s.noise_multiplier, 1.0, noise) / size
                )
            ),
            "move 4: your noise has standard deviation σ on the sum. It must be σ·C: C times as much.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _noised(clip(rows, s.max_grad_norm).sum(0) / size, s, noise)),
            "move 4: you divide by n·q first, and add the noise of the sum to the mean. That is n·q times too much, "
            "and "
            "the model learns nothing. Noise on the sum, then one division.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: _noised(clip(rows, s.max_grad_norm).sum(0), s, noise) / max(len(rows), 1)
            ),
            "the step: you divide by the number of records in the batch. It changes when one record joins, which the "
            "noise does not hide. Divide by n·q in every step.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _noised(clip(rows, s.max_grad_norm).sum(0), s, noise) / len(rows)),
            "the step: you divide by the size of the batch, and an empty one divides by zero: then all weights are "
            "NaN. "
            "The size also changes when one record joins. Divide by n·q in every step.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _noised(clip(rows, s.max_grad_norm).sum(0), s, noise)),
            "the step: you do not divide, so each step is n·q times too long. Divide the noisy sum by n·q.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: -_right(rows, s, size, noise)),
            "the step: the sign is wrong, and your model climbs. Subtract lr times the gradient from the weights.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _right(rows, s, size, noise) / s.lr),
            "the step: the learning rate does nothing in your loop. Subtract `s.lr` times the gradient.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    add_noise(clip(rows, s.max_grad_norm), s.noise_multiplier, s.max_grad_norm, noise).sum(0) / size
                )
            ),
            "move 4: you add noise to each record's row. The draws add up to √B times the noise, and an empty batch "
            "gets "
            "none. Draw once, for the sum.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    add_noise(clip(rows, s.max_grad_norm).sum(0), s.noise_multiplier, s.max_grad_norm / size, noise)
                    / size
                )
            ),
            "move 4: you divide the noise by n·q twice, so it is n·q times too small. The model learns very well, and "
            "hides nobody. Noise of σ·C on the sum, then one division for both.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    add_noise(clip(rows, s.max_grad_norm).sum(0), s.noise_multiplier, 2 * s.max_grad_norm, noise) / size
                )
            ),
            "move 4: your noise is 2·σ·C, twice as much as it must be. One record joins or leaves, and moves the sum "
            "by "
            "C at most.",
        ),
        Wrong(
            _skips_the_empty,
            "an empty batch: you skip the step. Weights that do not move say for certain that nobody was in. The sum "
            "of "
            "an empty batch is zeros, and it gets the same noise of σ·C.",
        ),
        Wrong(
            stepping(_right, _sized),
            "move 1: your batches always have the same size, so a record that gets in keeps another one out. Let each "
            "record flip its own coin of probability q.",
        ),
        Wrong(
            stepping(
                _right, lambda n, q, steps, g: (torch.randint(n, (round(n * q),), generator=g) for _ in range(steps))
            ),
            "move 1: `torch.randint` can draw a record twice in one batch. It then moves the sum by 2·C, and the noise "
            "is made for C.",
        ),
        Wrong(
            stepping(_right, _dealt),
            "move 1: you deal the records out, so that each is in one batch an epoch. That is a shuffle, with sizes "
            "that vary: a coin has no memory, and lets a record in twice in an epoch, or never.",
        ),
        Wrong(
            stepping(_right, _again),
            "move 1: you draw the batches of one epoch, and use them again in the next ones. Who was in once is in "
            "every time. Flip all the coins anew in every step.",
        ),
        Wrong(
            _one_draw_an_epoch,
            "move 4: you draw the noise once an epoch, and add the same in each of its steps: in the difference of two "
            "it is gone. Draw anew in every step.",
        ),
        Wrong(
            stepping(
                lambda rows, s, size, noise: (
                    clip(rows, s.max_grad_norm).sum(0) / size
                    + _noised(torch.zeros(rows.shape[1]), s, noise) / max(len(rows), 1)
                )
            ),
            "move 4: the sum is divided by n·q, and the noise by the number of records in the batch. A large batch "
            "gets too little, and the size can be read from it. Noise on the sum, then one division for both.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _right(rows, s, size, None)),
            "move 4: the noise is right, but it does not come from `noise`, so it cannot be that of Opacus. Hand "
            "`noise` to `add_noise` or to `torch.randn(..., generator=noise)`.",
        ),
        Wrong(
            stepping(lambda rows, s, size, noise: _right(rows, s, size, _seed(noise.initial_seed()))),
            "move 4: you seed the noise anew in every step, so each step gets the same noise, and in the difference "
            "of two "
            "steps it is gone. Make the generator once, and draw on.",
        ),
    ],
    praise="this is DP-SGD, and it is yours: a coin for each record, each gradient clipped, noise of σ·C on the sum, "
    "one "
    "division by n·q; and an empty batch is a step like any other.",
)

EXERCISES = [exercise_3_1, exercise_3_2, exercise_3_3, exercise_3_4]
