"""Notebook 03: the noisy mean, the Poisson batch, a division that leaks, and an attacker's belief."""

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpteach.exercises.core import Complaint, Wrong, attempted, changed, coding, value


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
    "middle": "your noise is not Gaussian, and the accountants compute ε for Gaussian noise. Use `torch.randn`.",
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
            "moves the sum by up to C, so the noise must grow with C. For C = 2 you gave half the noise that ε is "
            "computed for.",
        ),
        Wrong(
            noisy(lambda rows, z, sigma, C, size: (rows.sum(0) + C * z * (sigma > 0)) / size),
            "your noise has standard deviation C on the sum; it must be σ·C. The noise multiplier does nothing in your "
            "code, so ε would be computed for noise that nobody added.",
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
            "little by a factor of the batch size, so the real ε is far above the reported one. Add σ·C to the sum, "
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
            "attacker is certain. The accountants compute ε for Gaussian noise. Use `torch.randn`.",
        ),
        Wrong(
            drawn(lambda P, generator: torch.distributions.Laplace(0.0, 1.0).sample((P,))),
            "this is Laplace noise. Its natural measure is the L1 norm, and clipping bounds the L2 norm; the "
            "accountants compute ε for Gaussian noise. Use `torch.randn`.",
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
            "that gets in keeps another one out. The accountants compute ε for independent draws; for yours it is not "
            "the ε that they report. Draw for each record on its own.",
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
            "ε was computed for q. Return the empty batch: it gets noise like any other.",
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

# 3.4: an attacker's belief

_PRIOR, _SIGMA, _SEEN = 0.2, 0.8, 1.3
_RATIO = math.exp((_SEEN - 0.5) / _SIGMA**2)  # e^1.25


def _belief(prior: float, exponent: float) -> float:
    odds = prior / (1 - prior) * math.exp(exponent)
    return odds / (1 + odds)


exercise_3_4 = value(
    "3.4",
    hint="Three steps: the likelihood ratio is exp((x - ½) / σ²); the odds are prior / (1 - prior); the new odds are "
    "the old odds times the ratio. A probability is odds / (1 + odds).",
    answer=_belief(_PRIOR, (_SEEN - 0.5) / _SIGMA**2),
    share=True,
    wrong=[
        Wrong(
            _RATIO,
            "that is the likelihood ratio. It says how much the observation speaks for you, not yet what the attacker "
            "believes: the prior is still to come, and a probability can't exceed 1.",
        ),
        Wrong(
            _belief(0.5, (_SEEN - 0.5) / _SIGMA**2),
            "you started from a prior of ½. This attacker thought 0.2 before the look, so the odds were 1 to 4, not 1 "
            "to 1.",
        ),
        Wrong(
            _belief(_PRIOR, (_SEEN - 0.5) / _SIGMA),
            "you divided by σ where σ² belongs: the exponent of a Gaussian has the *variance*. With σ below 1 this "
            "makes the noise look better than it is.",
        ),
        Wrong(
            _belief(_PRIOR, _SEEN - 0.5),
            "you computed with σ = 1. Here σ is 0.8, and the ratio grows quickly as σ gets smaller.",
        ),
        Wrong(
            _belief(_PRIOR, _SEEN / _SIGMA**2),
            "you forgot the ½: the bells cross at ½, halfway between 0 and 1, and only what lies beyond speaks for "
            "you.",
        ),
        Wrong(
            _belief(_PRIOR, (_SEEN - 0.5) / (2 * _SIGMA**2)),
            "there is a factor 2 too much under your fraction. The squares differ by 2x - 1, and (2x - 1) / (2σ²) is "
            "(x - ½) / σ².",
        ),
        Wrong(
            _belief(_PRIOR, -(_SEEN - 0.5) / _SIGMA**2),
            "your ratio is upside down: the likelihood *with* you stands above the one *without* you. An observation "
            "beyond ½ must make the attacker believe more in you, not less.",
        ),
        Wrong(
            _PRIOR * _RATIO,
            "you multiplied the *probability* by the ratio. Bayes' rule multiplies the *odds*, 0.2 to 0.8; otherwise a "
            "larger ratio would lead to a probability above 1.",
        ),
        Wrong(_PRIOR / (1 - _PRIOR) * _RATIO, "these are the odds, 0.87 to 1. The probability is odds / (1 + odds)."),
        Wrong(
            _PRIOR,
            "that is the prior: the observation has changed nothing for you. It speaks for you, by a ratio above 3.",
        ),
    ],
    praise="the ratio 3.49 lifts the odds from 1 : 4 to 0.87 : 1, and that is a probability of 0.47.",
    solution="Ratio: exp((1.3 - ½) / 0.8²) = exp(1.25) ≈ 3.49. Odds before: 0.2 / 0.8 = 0.25. Odds after: 0.25 · 3.49 "
    "≈ 0.873. Probability after: 0.873 / 1.873 ≈ **0.466**.\n\n```python\nanswer_3_4 = posterior(1.3, "
    "noise_multiplier=0.8, prior=0.2)\n```",
)

EXERCISES = [exercise_3_1, exercise_3_2, exercise_3_3, exercise_3_4]
