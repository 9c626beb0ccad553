"""The exercises of notebook 02: clip each record's gradient, break what clips the mean, reason about who may change."""

import math
from typing import Any

import torch
from torch import Tensor

import dpteach
from dpteach.exercises.core import Exercise, Verdict, Wrong, coding, value
from dpteach.mechanism import clip


def clip_rows(grads, max_grad_norm):
    """Scale each row of grads (B, P) down to a norm of at most max_grad_norm."""
    norms = grads.norm(dim=1, keepdim=True)  # (B, 1): one norm per record
    factors = (max_grad_norm / norms).clamp(max=1.0)  # C / 0 is inf, and becomes 1: a row of zeros stays
    return grads * factors


def _whole_matrix(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.norm()).clamp(max=1.0)


def _norm_of_the_sum(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.sum(0).norm()).clamp(max=1.0)


def _norm_of_the_mean(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.mean(0).norm()).clamp(max=1.0)


def _sum_of_the_rows(grads, max_grad_norm):
    return clip_rows(grads, max_grad_norm).sum(0)


def _mean_of_the_rows(grads, max_grad_norm):
    return clip_rows(grads, max_grad_norm).mean(0)


def _each_coordinate(grads, max_grad_norm):
    return grads.clamp(-max_grad_norm, max_grad_norm)


def _always_c(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _always_c_and_nan(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.norm(dim=1, keepdim=True))


def _zero_over_zero(grads, max_grad_norm):
    norms = grads.norm(dim=1, keepdim=True)
    return grads / norms * norms.clamp(max=max_grad_norm)


def _squared_norm(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.square().sum(1, keepdim=True)).clamp(max=1.0)


def _inverted(grads, max_grad_norm):
    return grads * (grads.norm(dim=1, keepdim=True) / max_grad_norm).clamp(max=1.0)


def _multiplied(grads, max_grad_norm):
    return grads * (grads.norm(dim=1, keepdim=True) / max_grad_norm).clamp(min=1.0)


def _small_rows_grow(grads, max_grad_norm):
    norms = grads.norm(dim=1, keepdim=True)
    return grads * torch.where(norms > 0, max_grad_norm / norms, 1.0).clamp(min=1.0)


def _only_the_direction(grads, max_grad_norm):
    norms = grads.norm(dim=1, keepdim=True)
    return torch.where(norms > max_grad_norm, grads / norms, grads)


def _largest_row(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.norm(dim=1).max()).clamp(max=1.0)


def _columns(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.norm(dim=0, keepdim=True)).clamp(max=1.0)


def _l1(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.abs().sum(1, keepdim=True)).clamp(max=1.0)


def _largest_coordinate(grads, max_grad_norm):
    return grads * (max_grad_norm / grads.abs().amax(1, keepdim=True)).clamp(max=1.0)


def _removed(grads, max_grad_norm):
    return torch.where(grads.norm(dim=1, keepdim=True) <= max_grad_norm, grads, 0.0)


def _share_of_c(grads, max_grad_norm):
    return clip_rows(grads, max_grad_norm / len(grads))


def _unchanged(grads, max_grad_norm):
    return grads.clone()


def _some_gradients(B: int, P: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 2, B).unsqueeze(1)  # from well within C to far beyond it
    return sizes * torch.randn(B, P, generator=generator) / math.sqrt(P)


_CLIP_ROWS = coding(
    "2.1",
    hint="`grads.norm(dim=1, keepdim=True)` has shape (B, 1), so it can be multiplied row by row. The factor is C / "
    "norm, but never more than 1: `tensor.clamp(max=1.0)`. What is C / 0 in PyTorch, and what does `clamp` make "
    "of it?",
    reference=clip_rows,
    inputs=(
        lambda: (torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 8.0]]), 1.0),
        lambda: (_some_gradients(6, 5, seed=0), 2.0),
        lambda: (_some_gradients(4, 30, seed=1), 0.5),
        lambda: (torch.tensor([[0.2, -0.1, 0.2]]), 10.0),
        lambda: (torch.tensor([[3.0], [-0.5], [0.0]]), 1.5),
        lambda: (torch.tensor([[0.03, 0.0], [1e9, 1e9], [0.0, 0.08]]), 0.05),
        lambda: (_some_gradients(5, 5, seed=4).double(), 3.0),
    ),
    wrong=(
        Wrong(
            _whole_matrix,
            "you clipped the batch as a whole, by the norm of the whole matrix: one factor for every row. One "
            "record with a huge gradient then shrinks everybody else's, so it changes the sum by more than its own "
            "row. Take one norm per row.",
        ),
        Wrong(
            _norm_of_the_sum,
            "you took one factor, from the norm of the *sum* of the rows. The sum is then at most C, but one record "
            "decides which way it points, and with it what is left of all the others. Take one norm per row, before "
            "you add.",
        ),
        Wrong(
            _norm_of_the_mean,
            "you clipped by the norm of the *mean* gradient: one outlier still turns the mean as it likes, and a "
            "row may stay far above C. Each record needs a factor of its own.",
        ),
        Wrong(
            _sum_of_the_rows,
            "the rows are clipped rightly, but you returned their sum. This function returns all rows, (B, P); the "
            "sum is the next move.",
        ),
        Wrong(
            _mean_of_the_rows,
            "the rows are clipped rightly, but you returned their mean. This function returns all rows, (B, P). In "
            "DP-SGD the sum gets its noise first; the division comes last.",
        ),
        Wrong(
            _each_coordinate,
            "you clipped each coordinate between -C and C. A row of P coordinates can still have a norm of C·√P, "
            "and the row's direction changes. Scale the row as a whole.",
        ),
        Wrong(
            _always_c,
            "you scaled every row to norm C, also the rows that were shorter. The bound holds (the method has a "
            "name: automatic clipping), but a record that the model knows well now pulls as hard as one that it "
            "gets wrong. Clipping leaves a row within C as it is.",
        ),
        Wrong(
            _always_c_and_nan,
            "you scaled every row to norm C. A row of zeros became NaN (inf · 0), and one NaN row makes the whole "
            "sum NaN; and rows shorter than C grew. Let the factor be at most 1.",
        ),
        Wrong(
            _zero_over_zero,
            "almost: a row of zeros became NaN, because you divide it by its norm, 0 / 0. One NaN row makes the "
            "whole sum NaN. Compute the factor first and limit it to 1.",
        ),
        Wrong(
            _squared_norm,
            "you divided by the *squared* norm: the square root is missing. A row of norm 10 at C = 1 comes out "
            "with norm 0.1 instead of 1.",
        ),
        Wrong(
            _inverted,
            "your factor is norm / C: upside down. It leaves the long rows as they are, and makes the short ones "
            "shorter. The factor is C / norm.",
        ),
        Wrong(
            _multiplied,
            "you multiply by max(1, norm / C): long rows become longer. The paper *divides* by it: g / max(1, norm "
            "/ C).",
        ),
        Wrong(
            _small_rows_grow,
            "you limit the factor from below (min=1) and not from above (max=1): short rows grow to C, and long "
            "rows stay long.",
        ),
        Wrong(_only_the_direction, "your long rows come out with norm 1, whatever C is: multiply the direction by C."),
        Wrong(
            _largest_row,
            "you divided every row by the largest norm in the batch. The bound holds, but the factor of one record "
            "depends on another: adding one long row changes the whole sum, by more than C. Each row's factor comes "
            "from that row alone.",
        ),
        Wrong(
            _columns,
            "you took the norm down the columns (dim=0): that is one norm per parameter, over all records. A record "
            "is a row: dim=1.",
        ),
        Wrong(
            _l1,
            "you used the L1 norm, the sum of absolute values. The noise of DP-SGD is made for the L2 norm: square, "
            "add, take the root. L1 is larger, so you clip more than is needed.",
        ),
        Wrong(
            _largest_coordinate,
            "you used the largest coordinate as the norm. A row of many middle-sized coordinates then stays far "
            "above C in L2 norm, and the noise does not cover it.",
        ),
        Wrong(
            _removed,
            "you removed the rows above C. The bound holds, but the records that the model gets wrong are the ones "
            "with long gradients: they would teach nothing. Shorten them.",
        ),
        Wrong(
            _share_of_c,
            "you clipped each row to C / B. C is the bound for one record, not for the batch: B records may add up "
            "to B·C.",
        ),
        Wrong(_unchanged, "nothing was clipped: the rows came back as they were."),
    ),
    praise="each row is at most C long, keeps its direction, and its factor comes from that row alone. Rows within C, "
    "and rows of zeros, are as they were.",
)


#: The gradients of the eight records in exercise 2.2.
EIGHT = torch.tensor(
    [[1.5, 0.5], [1.5, -0.5], [2.0, 0.0], [1.0, 0.0], [1.5, 0.25], [1.5, -0.25], [2.5, 0.0], [0.5, 0.0]]
)


def clip_the_mean(rows: Tensor, max_grad_norm: float, expected_batch_size: int) -> Tensor:
    """The wrong way: average first, clip the average, then scale back to the size of a sum."""
    mean = rows.sum(0) / expected_batch_size
    return expected_batch_size * clip(mean.unsqueeze(0), max_grad_norm).squeeze(0)


def _moved_by(row: Tensor) -> float:
    before, after = clip_the_mean(EIGHT, 1.0, 8), clip_the_mean(torch.cat([EIGHT, row.unsqueeze(0)]), 1.0, 8)
    return (after - before).norm().item()


def _examine_ninth(given: Any) -> Verdict:
    try:
        row = torch.as_tensor(given).detach()
        if row.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"the answer must be a tensor of two numbers, got a {type(given).__name__}.")
    if row.shape != (2,):
        return Verdict(False, f"the answer must be a tensor of two numbers, shape (2,), got shape {tuple(row.shape)}.")
    row = row.float()
    if not row.isfinite().all():
        return Verdict(False, "use finite numbers: they are enough. (What a NaN does is one of the sharp edges below.)")
    moved, norm = _moved_by(row), row.norm().item()
    if moved > 2.001:  # more than 2C, and not by rounding
        return Verdict(True, _BROKEN.format(moved=moved))
    if norm == 0:
        reason = _ADDS_NOTHING
    elif norm <= 2:
        reason = _TOO_SHORT
    elif _moved_by(row / norm * 1e4) <= 2.001:  # however long
        reason = _SAME_WAY
    else:
        reason = _TOO_WEAK
    return Verdict(False, reason.format(moved=moved, norm=norm))


_BROKEN = (
    "your record moved the result by {moved:.1f}·C. Had each row been clipped, it could not have moved it by more than "
    "C. Noise that is made for C does not hide such a record."
)
_ADDS_NOTHING = "the result moved by {moved:.2f}·C: a row of zeros adds nothing to the sum."
_TOO_SHORT = (
    "the result moved by {moved:.2f}·C, which is not more than 2·C. Clipping never moves two points further apart, so "
    "a row of norm {norm:.2g} moves the result by {norm:.2g} at most. Nothing limits your row: make it longer."
)
_SAME_WAY = (
    "the result moved by {moved:.2f}·C, which is not more than 2·C. Your row points nearly where the mean points "
    "already. "
    "The mean had norm 1.5 and was cut to 1: a longer one is cut to the same 1. Choose another direction."
)
_TOO_WEAK = (
    "the result moved by {moved:.2f}·C, which is not more than 2·C. The direction will do, but the eight other "
    "records hold against it: the mean still points nearly where it did. Make the row longer."
)

_BREAK_THE_MEAN = Exercise(
    "2.2",
    hint="The sum of the eight rows is (12, 0). What must you add so that the mean points the other way, and is still "
    "long enough to be clipped?",
    reference=torch.tensor([-24.0, 0.0]),
    examine=_examine_ninth,
    wrong=(
        Wrong(torch.tensor([0.0, 0.0]), _ADDS_NOTHING.format(moved=0)),
        Wrong(torch.tensor([-1.0, 0.0]), _TOO_SHORT.format(moved=0, norm=1)),
        Wrong(torch.tensor([100.0, 0.0]), _SAME_WAY.format(moved=0)),
        Wrong(torch.tensor([-3.0, 0.0]), _TOO_WEAK.format(moved=0)),
    ),
    solution="```python\nanswer_2_2 = torch.tensor([-24.0, 0.0])\n```\n\n"
    "The sum was (12, 0) and is now (-12, 0). The mean was cut to (1, 0) and is now cut to (-1, 0). Scaled "
    "back to a sum, that is from (8, 0) to (-8, 0): a move of 16·C, made by one record. With B records it "
    "would be 2·B·C. Many other rows work too, for example (0, 12).",
)


_REPLACE_ONE = value(
    "2.3",
    hint="The old record leaves, a new one comes. How far does each of the two move the sum, at most? In which case "
    "do both moves go in the same direction?",
    answer=1.0,
    rtol=0.001,
    wrong=(
        Wrong(
            0.5,
            "that is C: the most that *adding* or *removing* one record moves the sum. A replacement does "
            "both, and both moves can go in the same direction.",
        ),
        Wrong(
            0.5 / 256,
            "you divided C by the batch size: that is the mean, and for add/remove. The noise is added to the sum.",
        ),
        Wrong(
            1.0 / 256,
            "that is the right distance for the *mean*. The question is about the sum, which gets the "
            "noise: do not divide by 256.",
        ),
        Wrong(
            math.inf, "without clipping there would be no limit. But both records are clipped: each has norm C at most."
        ),
        Wrong(
            0.5 * math.sqrt(2),
            "√2·C is the distance of two gradients at a right angle. The worst case is two that "
            "point in opposite directions.",
        ),
        Wrong(0.0, "a replacement keeps the number of records, but not the sum: the new record has another gradient."),
        Wrong(128.0, "B·C bounds the whole sum, with all 256 records. Only one record is replaced here."),
        Wrong(256.0, "2·B·C is what one record can do if you clip the *mean*. Here each row is clipped."),
        Wrong(
            0.55, "σ·C is the standard deviation of the noise. The question is how far the sum moves before any noise."
        ),
        Wrong(
            1.1,
            "that is σ, or the standard deviation of noise made for a distance of 2·C. The question is about "
            "the distance itself.",
        ),
    ),
    praise="the old record takes away up to C, and the new one adds up to C in the opposite direction: 2·C = 1.0.",
    solution="**1.0**, which is 2·C. The sum moves by (new clipped row) − (old clipped row). Each has norm 0.5 at "
    "most; the difference is longest where they point in opposite directions. The batch size and σ do not "
    "matter.",
)


def clip_layers(grads, sizes, max_grad_norm):
    """Clip each layer's part of each row, so that a whole row has a norm of at most max_grad_norm."""
    share = max_grad_norm / len(sizes) ** 0.5  # L parts of norm C / √L have a total norm of C
    return torch.cat([dpteach.clip(part, share) for part in grads.split(sizes, dim=1)], dim=1)


def _each_layer_to_c(grads, sizes, max_grad_norm):
    return torch.cat([clip(part, max_grad_norm) for part in grads.split(sizes, dim=1)], dim=1)


def _each_layer_to_c_over_l(grads, sizes, max_grad_norm):
    return torch.cat([clip(part, max_grad_norm / len(sizes)) for part in grads.split(sizes, dim=1)], dim=1)


def _flat(grads, sizes, max_grad_norm):
    return clip(grads, max_grad_norm)


def _flat_share(grads, sizes, max_grad_norm):
    return clip(grads, max_grad_norm / len(sizes) ** 0.5)


def _share_by_size(grads, sizes, max_grad_norm):
    parts = grads.split(sizes, dim=1)
    return torch.cat([clip(part, max_grad_norm * part.shape[1] / grads.shape[1]) for part in parts], dim=1)


def _layers_of_the_batch(grads, sizes, max_grad_norm):
    share = max_grad_norm / len(sizes) ** 0.5
    return torch.cat([_whole_matrix(part, share) for part in grads.split(sizes, dim=1)], dim=1)


_CLIP_LAYERS = coding(
    "2.4",
    hint="`grads.split(sizes, dim=1)` gives the layers' parts, `torch.cat(parts, dim=1)` puts them together again. If "
    "each of L parts has norm c, the whole has norm c·√L. Which c makes that C?",
    reference=clip_layers,
    inputs=(
        lambda: (_some_gradients(6, 12, seed=2), (6, 3, 3), 1.0),
        lambda: (_some_gradients(5, 8, seed=3) * torch.tensor([10.0] * 2 + [0.1] * 6), (2, 6), 0.5),
        lambda: (_some_gradients(4, 7, seed=5), [7], 0.8),  # one layer
        lambda: (torch.tensor([[0.0, 0.0, 3.0, 4.0], [0.1, 0.1, 0.0, 0.0]]), [2, 1, 1], 2.0),
    ),
    wrong=(
        Wrong(
            _each_layer_to_c,
            "you clipped each layer to C. A row whose L layers are all at the bound then has norm C·√L, and the "
            "noise that is made for C is too small for it. Give each layer C / √L.",
        ),
        Wrong(
            _each_layer_to_c_over_l,
            "you clipped each layer to C / L. The bound holds, but it is stricter than it has to be: norms add in "
            "squares, so L parts of norm C / √L have a total norm of C.",
        ),
        Wrong(
            _flat,
            "this is flat clipping: one norm over all layers. It bounds the row by C, but the task is a factor for "
            "each layer.",
        ),
        Wrong(
            _flat_share,
            "you clipped the whole row to C / √L. That is the share of one layer: split the row first, then clip "
            "each part.",
        ),
        Wrong(
            _share_by_size,
            "you gave each layer a share of C by its number of parameters. The shares' squares must add up to C², "
            "and the task asks for equal shares: C / √L.",
        ),
        Wrong(
            _layers_of_the_batch,
            "you clipped each layer of the batch as a whole: one factor for all records. Each record needs its own "
            "factor in each layer.",
        ),
    ),
    praise="each layer is clipped by itself, and the parts together are at most C long. Flat clipping has the same "
    "bound for the whole row.",
)


EXERCISES = [_CLIP_ROWS, _BREAK_THE_MEAN, _REPLACE_ONE, _CLIP_LAYERS]
