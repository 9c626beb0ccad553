"""Notebook 02: clip each record's gradient, break what clips the mean, reason about who may change."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dpteach
from dpteach import models
from dpteach.exercises.core import Complaint, Wrong, changed, coding, open_ended, value, with_model
from dpteach.mechanism import clip

# 2.1: clip each row


def clip_rows(grads, max_grad_norm):
    """Scale each row of grads (B, P) down to a norm of at most max_grad_norm."""
    norms = grads.norm(dim=1, keepdim=True)  # (B, 1): one norm per record
    factors = (max_grad_norm / norms).clamp(max=1.0)  # C / 0 is inf, and becomes 1: a row of zeros stays
    return grads * factors


def scaled(norm):
    """An answer that clips by another norm."""
    return lambda grads, C: grads * (C / norm(grads)).clamp(max=1.0)


def _norms(grads):
    return grads.norm(dim=1, keepdim=True)


def _some_gradients(B: int, P: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 2, B).unsqueeze(1)  # from well within C to far beyond it
    return sizes * torch.randn(B, P, generator=generator) / math.sqrt(P)


exercise_2_1 = coding(
    "2.1",
    hint="`grads.norm(dim=1, keepdim=True)` has shape (B, 1), so it can be multiplied row by row. The factor is C / "
    "norm, but never more than 1: `tensor.clamp(max=1.0)`. What is C / 0 in PyTorch, and what does `clamp` make of it?",
    reference=clip_rows,
    inputs=[
        lambda: (torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 8.0]]), 1.0),
        lambda: (_some_gradients(6, 5, seed=0), 2.0),
        lambda: (_some_gradients(4, 30, seed=1), 0.5),
        lambda: (torch.tensor([[0.2, -0.1, 0.2]]), 10.0),
        lambda: (torch.tensor([[3.0], [-0.5], [0.0]]), 1.5),
        lambda: (torch.tensor([[0.03, 0.0], [1e9, 1e9], [0.0, 0.08]]), 0.05),
        lambda: (_some_gradients(5, 5, seed=4).double(), 3.0),
    ],
    wrong=[
        Wrong(
            scaled(lambda grads: grads.norm()),
            "you clipped the batch as a whole, by the norm of the whole matrix: one factor for every row. One record "
            "with a huge gradient then shrinks everybody else's, so it changes the sum by more than its own row. Take "
            "one norm per row.",
        ),
        Wrong(
            scaled(lambda grads: grads.sum(0).norm()),
            "you took one factor, from the norm of the *sum* of the rows. The sum is then at most C, but one record "
            "decides which way it points, and with it what is left of all the others. Take one norm per row, before "
            "you add.",
        ),
        Wrong(
            scaled(lambda grads: grads.mean(0).norm()),
            "you clipped by the norm of the *mean* gradient: one outlier still turns the mean as it likes, and a row "
            "may stay far above C. Each record needs a factor of its own.",
        ),
        Wrong(
            lambda grads, C: clip_rows(grads, C).sum(0),
            "the rows are clipped rightly, but you returned their sum. This function returns all rows, (B, P); the sum "
            "is the next move.",
        ),
        Wrong(
            lambda grads, C: clip_rows(grads, C).mean(0),
            "the rows are clipped rightly, but you returned their mean. This function returns all rows, (B, P). In "
            "DP-SGD the sum gets its noise first; the division comes last.",
        ),
        Wrong(
            lambda grads, C: grads.clamp(-C, C),
            "you clipped each coordinate between -C and C. A row of P coordinates can still have a norm of C·√P, and "
            "the row's direction changes. Scale the row as a whole.",
        ),
        Wrong(
            lambda grads, C: grads * C / _norms(grads).clamp(min=1e-12),
            "you scaled every row to norm C, also the rows that were shorter. The bound holds (the method has a name: "
            "automatic clipping), but a record that the model knows well now pulls as hard as one that it gets wrong. "
            "Clipping leaves a row within C as it is.",
        ),
        Wrong(
            lambda grads, C: grads * (C / _norms(grads)),
            "you scaled every row to norm C. A row of zeros became NaN (inf · 0), and one NaN row makes the whole sum "
            "NaN; and rows shorter than C grew. Let the factor be at most 1.",
        ),
        Wrong(
            lambda grads, C: grads / _norms(grads) * _norms(grads).clamp(max=C),
            "almost: a row of zeros became NaN, because you divide it by its norm, 0 / 0. One NaN row makes the whole "
            "sum NaN. Compute the factor first and limit it to 1.",
        ),
        Wrong(
            scaled(lambda grads: _norms(grads) ** 2),
            "you divided by the *squared* norm: the square root is missing. A row of norm 10 at C = 1 comes out with "
            "norm 0.1 instead of 1.",
        ),
        Wrong(
            lambda grads, C: grads * (_norms(grads) / C).clamp(max=1.0),
            "your factor is norm / C: upside down. It leaves the long rows as they are, and makes the short ones "
            "shorter. The factor is C / norm.",
        ),
        Wrong(
            lambda grads, C: grads * (_norms(grads) / C).clamp(min=1.0),
            "you multiply by max(1, norm / C): long rows become longer. The paper *divides* by it: g / max(1, norm / "
            "C).",
        ),
        Wrong(
            lambda grads, C: grads * (C / _norms(grads).clamp(min=1e-12)).clamp(min=1.0),
            "you limit the factor from below (min=1) and not from above (max=1): short rows grow to C, and long rows "
            "stay long.",
        ),
        Wrong(
            lambda grads, C: torch.where(_norms(grads) > C, grads / _norms(grads), grads),
            "your long rows come out with norm 1, whatever C is: multiply the direction by C.",
        ),
        Wrong(
            scaled(lambda grads: _norms(grads).max()),
            "you divided every row by the largest norm in the batch. The bound holds, but the factor of one record "
            "depends on another: adding one long row changes the whole sum, by more than C. Each row's factor comes "
            "from that row alone.",
        ),
        Wrong(
            scaled(lambda grads: grads.norm(dim=0, keepdim=True)),
            "you took the norm down the columns (dim=0): that is one norm per parameter, over all records. A record is "
            "a row: dim=1.",
        ),
        Wrong(
            scaled(lambda grads: grads.abs().sum(1, keepdim=True)),
            "you used the L1 norm, the sum of absolute values. The noise of DP-SGD is made for the L2 norm: square, "
            "add, take the root. L1 is larger, so you clip more than is needed.",
        ),
        Wrong(
            scaled(lambda grads: grads.abs().amax(1, keepdim=True)),
            "you used the largest coordinate as the norm. A row of many middle-sized coordinates then stays far above "
            "C in L2 norm, and the noise does not cover it.",
        ),
        Wrong(
            lambda grads, C: torch.where(_norms(grads) <= C, grads, 0.0),
            "you removed the rows above C. The bound holds, but the records that the model gets wrong are the ones "
            "with long gradients: they would teach nothing. Shorten them.",
        ),
        Wrong(
            changed(clip_rows, max_grad_norm=lambda run: run.max_grad_norm / len(run.grads)),
            "you clipped each row to C / B. C is the bound for one record, not for the batch: B records may add up to "
            "B·C.",
        ),
        Wrong(lambda grads, C: grads.clone(), "nothing was clipped: the rows came back as they were."),
    ],
    praise="each row is at most C long, keeps its direction, and its factor comes from that row alone. Rows within C, "
    "and rows of zeros, are as they were.",
)

# 2.2: break what clips the mean

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


def _ninth(given: Any) -> tuple[str, dict[str, float]]:
    try:
        row = torch.as_tensor(given).detach()
        if row.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise Complaint(f"the answer must be a tensor of two numbers, got a {type(given).__name__}.") from None
    if row.shape != (2,):
        raise Complaint(f"the answer must be a tensor of two numbers, shape (2,), got shape {tuple(row.shape)}.")
    row = row.float()
    if not row.isfinite().all():
        raise Complaint("use finite numbers: they are enough. (What a NaN does is one of the sharp edges below.)")
    moved, norm = _moved_by(row), row.norm().item()
    if moved > 2.001:  # more than 2C, and not by rounding
        kind = "right"
    elif norm == 0:
        kind = "adds nothing"
    elif norm <= 2:
        kind = "too short"
    elif _moved_by(row / norm * 1e4) <= 2.001:  # however long
        kind = "same way"
    else:
        kind = "too weak"
    return kind, {"moved": moved, "norm": norm}


exercise_2_2 = open_ended(
    "2.2",
    hint="The sum of the eight rows is (12, 0). What must you add so that the mean points the other way, and is still "
    "long enough to be clipped?",
    reference=torch.tensor([-24.0, 0.0]),
    describe=_ninth,
    wrong={
        "adds nothing": Wrong(
            torch.tensor([0.0, 0.0]), "the result moved by {moved:.2f}·C: a row of zeros adds nothing to the sum."
        ),
        "too short": Wrong(
            torch.tensor([-1.0, 0.0]),
            "the result moved by {moved:.2f}·C, which is not more than 2·C. Clipping never moves two points further "
            "apart, so a row of norm {norm:.2g} moves the result by {norm:.2g} at most. Nothing limits your row: make "
            "it longer.",
        ),
        "same way": Wrong(
            torch.tensor([100.0, 0.0]),
            "the result moved by {moved:.2f}·C, which is not more than 2·C. Your row points nearly where the mean "
            "points already. The mean had norm 1.5 and was cut to 1: a longer one is cut to the same 1. Choose another "
            "direction.",
        ),
        "too weak": Wrong(
            torch.tensor([-3.0, 0.0]),
            "the result moved by {moved:.2f}·C, which is not more than 2·C. The direction will do, but the eight other "
            "records hold against it: the mean still points nearly where it did. Make the row longer.",
        ),
    },
    praise="your record moved the result by {moved:.1f}·C. Had each row been clipped, it could not have moved it by "
    "more than C, wherever it points.",
    solution="```python\nanswer_2_2 = torch.tensor([-24.0, 0.0])\n```\n\nThe sum was (12, 0) and is now (-12, 0). The "
    "mean was cut to (1, 0) and is now cut to (-1, 0). Scaled back to a sum, that is from (8, 0) to (-8, 0): a move of "
    "16·C, made by one record. With B records it would be 2·B·C. Many other rows work too, for example (0, 12).",
)

# 2.3: one record is replaced

exercise_2_3 = value(
    "2.3",
    hint="The old record leaves, a new one comes. How far does each of the two move the sum, at most? In which case do "
    "both moves go in the same direction?",
    answer=1.0,
    rtol=0.001,
    wrong=[
        Wrong(
            0.5,
            "that is C: the most that *adding* or *removing* one record moves the sum. A replacement does both, and "
            "both moves can go in the same direction.",
        ),
        Wrong(
            0.5 / 256,
            "you divided C by the batch size: that is the mean, and for add/remove. The question is about the sum.",
        ),
        Wrong(
            1.0 / 256, "that is the right distance for the *mean*. The question is about the sum: do not divide by 256."
        ),
        Wrong(
            math.inf, "without clipping there would be no limit. But both records are clipped: each has norm C at most."
        ),
        Wrong(
            0.5 * math.sqrt(2),
            "√2·C is the distance of two gradients at a right angle. The worst case is two that point in opposite "
            "directions.",
        ),
        Wrong(0.0, "a replacement keeps the number of records, but not the sum: the new record has another gradient."),
        Wrong(128.0, "B·C bounds the whole sum, with all 256 records. Only one record is replaced here."),
        Wrong(256.0, "2·B·C is what one record can do if you clip the *mean*. Here each row is clipped."),
        Wrong(
            0.1,
            "you multiplied by the learning rate. That comes later, when the step is taken. The question is how far "
            "the sum moves.",
        ),
    ],
    praise="the old record takes away up to C, and the new one adds up to C in the opposite direction: 2·C = 1.0.",
    solution="**1.0**, which is 2·C. The sum moves by (new clipped row) − (old clipped row). Each has norm 0.5 at "
    "most; the difference is longest where they point in opposite directions. Nothing else counts.",
)

# 2.4: one gradient for each record


def gradient_rows(model, X, y):
    rows = []
    for i in range(len(X)):
        loss = cross_entropy(model(X[i : i + 1]), y[i : i + 1])  # one record, still a batch: (1, ...)
        gradients = torch.autograd.grad(loss, model.parameters())
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def _batch(seed: int, size: int, inputs: int = 5) -> tuple:
    """A model and a batch of records; some of them it knows well."""
    generator, model = torch.Generator().manual_seed(seed), models.mlp(inputs, 4, 3, seed=seed)
    for p in model.parameters():
        p.grad = torch.ones(p.shape)  # left from an earlier step
    X = 3 * torch.randn(size, inputs, generator=generator)
    return model, X, torch.randint(0, 3, (size,), generator=generator)


def _accumulated(model, X, y):
    model.zero_grad()
    rows = []
    for i in range(len(X)):
        cross_entropy(model(X[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


def _mean_gradient(model, X, y):
    return gradient_rows(model, X, y).mean(0)


exercise_2_4 = coding(
    "2.4",
    hint="`X[i : i + 1]` is record i as a batch of one. Its loss has a gradient, `torch.autograd.grad(loss, "
    "model.parameters())`: flatten the parts and join them, as in exercise 1.1. `torch.stack` makes rows of vectors.",
    reference=gradient_rows,
    inputs=[lambda: _batch(0, 6), lambda: _batch(1, 1), lambda: _batch(2, 4)],
    observe=with_model,
    rtol=1e-5,
    atol=1e-6,
    wrong=[
        Wrong(
            _mean_gradient,
            "this is the gradient of the whole batch: the records are already mixed in it. Take the loss of one record "
            "at a time, and keep one row for each.",
        ),
        Wrong(
            lambda model, X, y: _mean_gradient(model, X, y).expand(len(X), -1),
            "all of your rows are the same: each is the gradient of the whole batch. In row i, only record i counts.",
        ),
        Wrong(
            lambda model, X, y: gradient_rows(model, X, y) / len(X),
            "your rows are too short, by the number of records: you divided by it. A record's own gradient is that of "
            "its own loss, and the mean comes last.",
        ),
        Wrong(
            _accumulated,
            "each of your rows has all rows before it in it: `backward()` adds to what is there. Call "
            "`model.zero_grad()` before each record, or use `torch.autograd.grad`.",
        ),
        Wrong(
            lambda model, X, y: _accumulated(model, X, y) + 1,
            "your rows have what an earlier step left in the model, and each has all rows before it: `backward()` adds "
            "to what is there. Use `torch.autograd.grad`.",
        ),
        Wrong(
            lambda model, X, y: gradient_rows(model, X, y).T,
            "rows and columns are swapped: one row for each record, one column for each weight.",
        ),
        Wrong(
            lambda model, X, y: dpteach.clip(gradient_rows(model, X, y), 1.0),
            "you clipped the rows to norm 1. That is the next move: this function returns them as they are.",
        ),
        Wrong(
            lambda model, X, y: gradient_rows(model, X, y).sum(0),
            "you added the rows up. That is the move after the next: clipping needs them apart.",
        ),
    ],
    praise="one row for each record. It is slow, one pass for each, and it is exactly what the quick ways compute.",
)

# 2.5: the clipped sum


def my_clipped_sum(model, X, y, max_grad_norm):
    total = torch.zeros(sum(p.numel() for p in model.parameters()))  # what an empty batch adds up to
    for i in range(len(X)):
        loss = cross_entropy(model(X[i : i + 1]), y[i : i + 1])
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        total = total + row * (max_grad_norm / row.norm()).clamp(max=1.0)
    return total


def _from_rows(result):
    """An answer that makes something else of the rows: ``result(rows, C, sizes)``."""

    def answer(model, X, y, C):
        if len(X) == 0:
            return my_clipped_sum(model, X, y, C)
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model if [*layer.parameters()]]
        return result(gradient_rows(model, X, y), C, layers)

    return answer


exercise_2_5 = coding(
    "2.5",
    hint="`clip_rows(gradient_rows(model, X, y), max_grad_norm).sum(0)` is nearly all of it. What does it do with a "
    "batch of no records? Or keep only the sum: start with zeros, and add one clipped gradient after the other.",
    reference=my_clipped_sum,
    inputs=[
        lambda: (*_batch(0, 6), 1.0),
        lambda: (*_batch(1, 9), 0.5),
        lambda: (*_batch(2, 4), 50.0),
        lambda: (*_batch(3, 0, inputs=2), 1.0),
    ],
    observe=with_model,
    rtol=1e-5,
    atol=1e-6,
    wrong=[
        Wrong(
            _from_rows(lambda rows, C, layers: rows.sum(0)),
            "nothing was clipped: this is the plain sum, and one record can move it as far as it likes.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: clip(rows.sum(0, keepdim=True), C)[0]),
            "you clipped the sum, and not the records: all of them together have the length C now, and one loud record "
            "decides where it points. Clip each row, then add.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: clip_the_mean(rows, C, len(rows))),
            "you clipped the mean and scaled it back: one record still moves that by up to 2·B·C. Clip each row, then "
            "add.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: clip(rows, C).mean(0)),
            "the rows are clipped rightly, but you returned their mean: it is too short, by the number of records. "
            "Return the sum. The division comes last, after the noise of notebook 03.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: clip(rows, C / len(rows)).sum(0)),
            "you clipped each row to C / B. C is the bound for one record, not for the batch: B records may add up to "
            "B·C.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: scaled(Tensor.norm)(rows, C).sum(0)),
            "you took one factor for the whole batch. Each record needs a factor of its own, from its own norm.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: (rows * C / _norms(rows)).sum(0)),
            "you made every row C long, also the rows that were shorter. Clipping leaves a row within C as it is.",
        ),
        Wrong(
            _from_rows(lambda rows, C, layers: torch.cat([clip(part, C).sum(0) for part in rows.split(layers, dim=1)])),
            "you clipped each layer's part to C. A row whose L layers are all at the bound is then √L·C long, here "
            "1.41·C. Join the parts to one row first, or give each layer C / √L.",
        ),
    ],
    praise="the whole of this notebook in one function: no record moves this sum by more than C, when it joins or when "
    "it leaves. An empty batch adds up to nothing, and that is an answer too: notebook 03 meets such batches.",
)

EXERCISES = [exercise_2_1, exercise_2_2, exercise_2_3, exercise_2_4, exercise_2_5]
