"""The four moves of DP-SGD: sample a batch, take each sample's gradient, clip it, add noise to the sum.

``clipped_sum`` makes the second and third move at once, without the matrix of per-sample gradients.

Source: Abadi et al. 2016, *Deep Learning with Differential Privacy*, Algorithm 1.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dpteach._checks import clipping_norm, number, whole
from dpteach.bookkeeping import clipped_sum_of_layers, plain_layers
from dpteach.guards import check_alone, check_model
from dpteach.perceptrons import clipped_sum_by_hand
from dpteach.randomness import Random, SystemRandom

LossFn = Callable[[Tensor, Tensor], Tensor]


def poisson_batches(n: int, sample_rate: float, steps: int, generator: Random | None = None) -> Iterator[Tensor]:
    """Batches in which every record takes part with probability ``sample_rate``, each record and each step on its own.

    The size varies from batch to batch around ``n * sample_rate``, and a batch may be empty. The accountants assume
    this sampling: shuffled batches of a fixed size do not have the ε that they report.

    Args:
        n: number of records.
        sample_rate: q in (0, 1].
        steps: number of batches.
        generator: where the randomness comes from: a ``torch.Generator``, or ``SystemRandom()`` for a release;
            PyTorch's global one if not given.

    Yields:
        ``(b,)`` int64: the indices of the records in the batch, ascending; ``b`` may be 0.

    Raises:
        ValueError: if an argument is out of its range.
    """
    n, steps = whole("n", n, low=1), whole("steps", steps, low=0)
    sample_rate = number("sample_rate", sample_rate, low=0, above=True, high=1, below=False)
    return (torch.nonzero(_with_probability(sample_rate, n, generator)).squeeze(1) for _ in range(steps))


def _with_probability(q: float, n: int, generator: Random | None) -> Tensor:
    """``(n,)`` bool, each True with probability q exactly.

    Uniform numbers lie on a grid of 2⁻⁵³, and q need not: one in the cell that q cuts is decided by another draw.
    """
    u = (
        generator.uniform(n)
        if isinstance(generator, SystemRandom)
        else torch.rand(n, generator=generator, dtype=torch.float64)
    )
    cell, rest = divmod(q * 2.0**53, 1)
    taken, undecided = u * 2.0**53 < cell, u * 2.0**53 == cell
    if rest and bool(undecided.any()):
        taken[undecided] = _with_probability(rest, int(undecided.sum()), generator)
    return taken


def per_sample_gradients(model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor) -> Tensor:
    """Each sample's own gradient: that of ``loss_fn`` on the sample alone.

    Args:
        model: any module whose output for a sample depends on that sample only.
        loss_fn: ``loss_fn(outputs, targets) -> scalar``, the mean over the batch, as PyTorch's losses are.
        X: ``(B, ...)``.
        y: ``(B, ...)``.

    Returns:
        ``(B, P)``: a flattened gradient per row, over the model's trainable parameters in the order of
        ``model.parameters()``. ``(0, P)`` for an empty batch.

    Raises:
        ValueError: if a layer mixes the samples of a batch (BatchNorm) or keeps something of them, or the model has no
            trainable parameter.
    """
    return _gradients_and_losses(model, loss_fn, X, y)[0]


def _gradients_and_losses(model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    check_model(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if len(X) == 0:
        one = next(iter(parameters.values()))
        return one.new_zeros(0, _size(model)), one.new_zeros(0)
    check_alone(model, X)
    X = X.clone()  # a layer that works in place must not change the caller's records

    def loss_of_one(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        placed = {place: parameters[name] for place, name in _places(model)}
        output = functional_call(model, placed, (x.unsqueeze(0),), tie_weights=False)
        return _one_number(loss_fn(output, target.unsqueeze(0)))

    try:
        grads, losses = vmap(grad_and_value(loss_of_one), in_dims=(None, 0, 0), randomness="different")(
            parameters, X, y
        )
    except RuntimeError:  # vmap can't run some layers, nn.GRU for one
        return _one_by_one(model, loss_fn, X, y)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1), losses


def _one_by_one(model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    trained, grads, losses = [p for p in model.parameters() if p.requires_grad], [], []
    for x, target in zip(X, y):
        loss = _one_number(loss_fn(model(x.unsqueeze(0)), target.unsqueeze(0)))
        parts = torch.autograd.grad(loss, trained, materialize_grads=True)
        grads.append(torch.cat([part.flatten() for part in parts]))
        losses.append(loss.detach())
    return torch.stack(grads), torch.stack(losses)


def clip(per_sample_grads: Tensor, max_grad_norm: float) -> Tensor:
    """Scale each sample's gradient down to an L2 norm of at most ``max_grad_norm`` (C).

    Args:
        per_sample_grads: ``(B, P)``: one flattened gradient per row.
        max_grad_norm: C >= 1e-20, in the gradient's own units. ``math.inf`` clips nothing.

    Returns:
        ``(B, P)``, float32 where the input is of half precision. A row whose norm is at most C is unchanged. A row with
        a NaN or an infinity becomes zero: whatever a record does to its gradient, it moves the sum by at most C.

    Raises:
        ValueError: if C is out of its range, or the gradients are not ``(B, P)``.

    Source: Abadi et al. 2016, Algorithm 1, "Clip gradient".

    >>> clip(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), max_grad_norm=1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if per_sample_grads.dim() != 2:
        raise ValueError(
            f"per_sample_grads must have shape (B, P), one flattened gradient a row, got "
            f"{tuple(per_sample_grads.shape)}: use flatten(1)"
        )
    if per_sample_grads.dtype in (torch.float16, torch.bfloat16):
        per_sample_grads = per_sample_grads.float()
    factors = _clip_factors(_norms(per_sample_grads), max_grad_norm, per_sample_grads.dtype).unsqueeze(1)
    clipped = per_sample_grads * factors.to(per_sample_grads.dtype)
    hard = (factors < 1e-30).squeeze(1)  # not finite, or float32 can hardly hold the factor
    if bool(hard.any()):
        clipped[hard] = torch.where(factors[hard] > 0, per_sample_grads[hard] * factors[hard], 0.0).to(clipped.dtype)
    return clipped


def _norms(rows: Tensor) -> Tensor:
    """``(B,)`` float64: float32's squares overflow at 2e19, vanish at 1e-23, lose digits over millions of entries."""
    scale = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    if rows.dtype == torch.float64 and rows.numel():
        scale = rows.abs().amax(1).clamp(min=torch.finfo(rows.dtype).tiny)
        rows = rows / scale.unsqueeze(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return scale * norms


def clipped_sum(model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor, max_grad_norm: float) -> Tensor:
    """The sum of the clipped per-sample gradients: ``clip(per_sample_gradients(...), C).sum(0)``, faster.

    Args and errors as for :func:`per_sample_gradients` and :func:`clip`.

    Returns:
        ``(P,)``, float32 for a model of half precision; zeros for an empty batch.

    Source: Bu et al. 2022, *Differentially Private Optimization on Large Model at Small Cost* (book-keeping).
    """
    return clipped_sum_and_losses(model, loss_fn, X, y, max_grad_norm)[0]


def clipped_sum_and_losses(
    model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """:func:`clipped_sum`, and beside it each sample's loss, ``(B,)``: they come from the same forward pass.

    A plain stack of known layers goes the quick way (see :mod:`dpteach.bookkeeping`), any other model the general one.
    """
    C = clipping_norm(max_grad_norm)
    layers = plain_layers(model) if len(X) and C > 1e-12 else None  # below, float32 loses squares
    quick = None
    if layers and loss_fn is F.cross_entropy:
        quick = clipped_sum_by_hand(layers, X, y, C)
    if layers and not quick:
        quick = clipped_sum_of_layers(layers, X, lambda outputs: sample_losses(loss_fn, outputs, y), C)
    if quick:
        return quick
    grads, losses = _gradients_and_losses(model, loss_fn, X, y)
    return clip(grads, C).sum(0), losses


def add_noise(summed: Tensor, noise_multiplier: float, max_grad_norm: float, generator: Random | None = None) -> Tensor:
    """Add Gaussian noise of standard deviation σ·C to every coordinate of the *sum* of clipped gradients.

    Divide by the *expected* batch size afterwards, not before. An empty batch's sum (zeros) gets noise too.

    Args:
        summed: ``(P,)``: the sum over the batch.
        noise_multiplier: σ >= 0, without a unit.
        max_grad_norm: C > 0, the norm that each sample was clipped to.
        generator: where the randomness comes from: a ``torch.Generator``, which is right for learning, or
            ``SystemRandom()`` for a release; PyTorch's global one if not given.

    Returns:
        ``(P,)``, a new tensor.

    Raises:
        ValueError: if σ or C is out of its range, or C is infinite while σ > 0.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise".
    """
    noise_multiplier = number("noise_multiplier", noise_multiplier, low=0)
    max_grad_norm = clipping_norm(max_grad_norm)
    if noise_multiplier == 0:
        return summed.clone()
    if math.isinf(max_grad_norm):
        raise ValueError("max_grad_norm must be finite where noise_multiplier > 0, got inf: the noise is σ·C")
    if isinstance(generator, SystemRandom):
        noise = generator.normal(summed.numel()).view(summed.shape).to(summed.device)
        return (summed.double() + noise_multiplier * max_grad_norm * noise).to(summed.dtype)
    noise = torch.randn(summed.shape, generator=generator, dtype=summed.dtype).to(summed.device)
    return noise.mul_(noise_multiplier * max_grad_norm).add_(summed)


def _clip_factors(norms: Tensor, max_grad_norm: float, dtype: torch.dtype) -> Tensor:
    """What to multiply rows of these norms by: C/norm, a hair less since ``dtype`` rounds, at most 1; 0 for NaN."""
    C = clipping_norm(max_grad_norm)
    if math.isinf(C):
        return norms.isfinite().double()
    factors = torch.where(norms > C, C * (1 - max(8 * torch.finfo(dtype).eps, 1e-11)) / norms, 1.0)
    return torch.where(norms.isfinite(), factors, 0.0)


def sample_losses(loss_fn: LossFn, outputs: Tensor, y: Tensor) -> Tensor:
    """``(B,)``: ``loss_fn`` of each sample alone: a loss that sums or weights over the batch can't couple them."""
    if loss_fn is F.cross_entropy and outputs.dim() == 2:
        return F.cross_entropy(outputs, y, reduction="none")
    return vmap(lambda output, target: _one_number(loss_fn(output.unsqueeze(0), target.unsqueeze(0))))(outputs, y)


def _one_number(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must give one number, got shape {tuple(loss.shape)}: take the mean (reduction='mean')"
        )
    return loss.reshape(())


def _places(model: nn.Module) -> list[tuple[str, str]]:
    """Each place that holds a trained parameter, once, and the name of that parameter.

    ``functional_call`` could tie them itself, but leaves a layer that the model uses twice with a dead tensor for its
    weight (PyTorch issue 164759).
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    return [
        (f"{path}.{key}".removeprefix("."), names[id(p)])
        for path, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in names
    ]


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
