"""The four moves of DP-SGD: sample a batch, take each sample's gradient, clip it, add noise to the sum.

``clipped_sum`` makes the second and third move at once, without the matrix of per-sample gradients.

Source: Abadi et al. 2016, *Deep Learning with Differential Privacy*, Algorithm 1.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpteach._checks import number, whole

LossFn = Callable[[Tensor, Tensor], Tensor]


def poisson_batches(n: int, sample_rate: float, steps: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Batches in which every record takes part with probability ``sample_rate``, each record and each step on its own.

    The size varies from batch to batch around ``n * sample_rate``, and a batch may be empty. The accountants assume
    this sampling: shuffled batches of a fixed size do not have the ε that they report.

    Args:
        n: number of records.
        sample_rate: q in (0, 1].
        steps: number of batches.
        generator: where the randomness comes from; PyTorch's global one if not given.

    Yields:
        ``(b,)`` int64: the indices of the records in the batch, ascending; ``b`` may be 0.

    Raises:
        ValueError: if an argument is out of its range.
    """
    n, steps = whole("n", n, low=1), whole("steps", steps, low=0)
    sample_rate = number("sample_rate", sample_rate, low=0, above=True, high=1, below=False)
    return (torch.nonzero(torch.rand(n, generator=generator) < sample_rate).squeeze(1) for _ in range(steps))


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
        ValueError: if a layer mixes the samples of a batch (BatchNorm), or the model has no trainable parameter.
    """
    _check_model(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if len(X) == 0:
        return next(iter(parameters.values())).new_zeros(0, _size(model))

    def loss_of_one(parameters, x, target):
        placed = {place: parameters[name] for place, name in _places(model)}
        output = functional_call(model, placed, (x.unsqueeze(0),), tie_weights=False)
        return loss_fn(output, target.unsqueeze(0))

    grads = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")(parameters, X, y)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def clip(per_sample_grads: Tensor, max_grad_norm: float) -> Tensor:
    """Scale each sample's gradient down to an L2 norm of at most ``max_grad_norm`` (C).

    Args:
        per_sample_grads: ``(B, P)``: one flattened gradient per row.
        max_grad_norm: C > 0, in the gradient's own units. ``math.inf`` clips nothing.

    Returns:
        ``(B, P)``. A row whose norm is at most C is unchanged. A row with a NaN or an infinity becomes zero: whatever
        a record does to its gradient, it moves the sum by at most C.

    Raises:
        ValueError: if C is not a positive number.

    Source: Abadi et al. 2016, Algorithm 1, "Clip gradient".

    >>> clip(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), max_grad_norm=1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    norms = torch.linalg.vector_norm(per_sample_grads, dim=1, keepdim=True)
    factors = _clip_factors(norms, max_grad_norm)
    return torch.where(factors > 0, per_sample_grads * factors, 0.0)


def clipped_sum(model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor, max_grad_norm: float) -> Tensor:
    """The sum over the batch of the clipped per-sample gradients: ``clip(per_sample_gradients(...), C).sum(0)``, faster.

    Args and errors as for :func:`per_sample_gradients` and :func:`clip`.

    Returns:
        ``(P,)``; zeros for an empty batch.

    Source: Bu et al. 2022, *Differentially Private Optimization on Large Model at Small Cost* (book-keeping).
    """
    return clipped_sum_and_losses(model, loss_fn, X, y, max_grad_norm)[0]


def clipped_sum_and_losses(
    model: nn.Module, loss_fn: LossFn, X: Tensor, y: Tensor, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """:func:`clipped_sum`, and beside it each sample's loss, ``(B,)``: they come from the same forward pass.

    For an ``nn.Sequential`` of ``Linear`` and ``Conv2d`` layers and layers without parameters, one backward pass goes
    to the layers' outputs only. A sample's norm follows from each layer's input and output gradient; then one weighted
    sum makes the result. A linear layer's per-sample gradients are never built, a convolution's only one layer at a
    time. Any other model takes the general way.
    """
    number("max_grad_norm", max_grad_norm, low=0, above=True, below=False)
    _check_model(model)
    if len(X) == 0:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        return parameter.new_zeros(_size(model)), parameter.new_zeros(0)
    taps, h = [], X
    for layer in _plain_layers(model) or ():
        inputs, h = h, layer(h)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            taps.append((layer, inputs.detach(), h))
    # A linear layer that a sample passes at many places (B, T, features) has no rank-one gradient.
    if not taps or any(isinstance(layer, nn.Linear) and inputs.dim() != 2 for layer, inputs, _ in taps):
        grads = clip(per_sample_gradients(model, loss_fn, X, y), max_grad_norm)
        with torch.no_grad():
            return grads.sum(0), _losses(loss_fn, model(X), y)
    losses = _losses(loss_fn, h, y)
    output_grads = torch.autograd.grad(losses.sum(), [output for _, _, output in taps])

    with torch.no_grad():
        records = [_Record(layer, a, g) for (layer, a, _), g in zip(taps, output_grads)]
        norms = sum(record.squared_norms for record in records).sqrt()
        factors = _clip_factors(norms, max_grad_norm)
        return torch.cat([part for record in records for part in record.weighted_sum(factors)]), losses.detach()


def add_noise(
    summed: Tensor, noise_multiplier: float, max_grad_norm: float, generator: torch.Generator | None = None
) -> Tensor:
    """Add Gaussian noise of standard deviation σ·C to every coordinate of the *sum* of clipped gradients.

    Divide by the *expected* batch size afterwards, not before. An empty batch's sum (zeros) gets noise too.

    Args:
        summed: ``(P,)``: the sum over the batch.
        noise_multiplier: σ >= 0, without a unit.
        max_grad_norm: C > 0, the norm that each sample was clipped to.
        generator: where the randomness comes from; PyTorch's global one if not given. Ordinary random numbers: right
            for learning, not for a release (Opacus' ``secure_mode`` is).

    Returns:
        ``(P,)``, a new tensor.

    Raises:
        ValueError: if σ or C is out of its range, or C is infinite while σ > 0.

    Source: Abadi et al. 2016, Algorithm 1, "Add noise".
    """
    noise_multiplier = number("noise_multiplier", noise_multiplier, low=0)
    max_grad_norm = number("max_grad_norm", max_grad_norm, low=0, above=True, below=False)
    if noise_multiplier == 0:
        return summed.clone()
    if math.isinf(max_grad_norm):
        raise ValueError("max_grad_norm must be finite where noise_multiplier > 0, got inf: the noise is σ·C")
    noise = torch.randn(summed.shape, generator=generator, dtype=summed.dtype)
    return summed + noise_multiplier * max_grad_norm * noise.to(summed.device)


class _Record:
    """What one layer's backward pass leaves behind: enough for its samples' norms and for their weighted sum."""

    def __init__(self, layer: nn.Module, inputs: Tensor, output_grads: Tensor):
        self.layer, self.a, self.g = layer, inputs, output_grads
        if isinstance(layer, nn.Conv2d):
            self.a = F.unfold(self.a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, K, L)
            self.g = self.g.flatten(2)  # (B, O, L)
            self.grads = self.g @ self.a.mT  # (B, O, K)
            self.bias_grads = self.g.sum(2)  # (B, O)
            self.squared_norms = self.grads.square().sum((1, 2)) + self._bias(self.bias_grads.square().sum(1))
        else:
            g2 = self.g.square().sum(1)
            self.squared_norms = g2 * self.a.square().sum(1) + self._bias(g2)  # ‖g aᵀ‖² = ‖g‖²·‖a‖²

    def _bias(self, value):
        return 0.0 if self.layer.bias is None else value

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Σ wᵢ·gradientᵢ of the layer's weight and of its bias, flattened. A sample of weight 0 leaves no trace."""
        column = weights.unsqueeze(1)
        if isinstance(self.layer, nn.Conv2d):
            grads = torch.where(column > 0, self.grads.flatten(1) * column, 0.0)
            parts = [grads.sum(0), torch.where(column > 0, self.bias_grads * column, 0.0).sum(0)]
        else:
            g = torch.where(column > 0, self.g * column, 0.0)
            parts = [(g.mT @ torch.where(column > 0, self.a, 0.0)).flatten(), g.sum(0)]
        return parts if self.layer.bias is not None else parts[:1]


def _clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    C = number("max_grad_norm", max_grad_norm, low=0, above=True, below=False)
    return torch.where(norms.isfinite(), (C / norms).clamp(max=1.0), 0.0)


def _losses(loss_fn: LossFn, outputs: Tensor, y: Tensor) -> Tensor:
    # One sample at a time, so that a loss that sums or weights over the batch cannot couple the samples.
    if loss_fn is F.cross_entropy:
        return F.cross_entropy(outputs, y, reduction="none")
    return vmap(lambda output, target: loss_fn(output.unsqueeze(0), target.unsqueeze(0)))(outputs, y)


def _plain_layers(model: nn.Module) -> list[nn.Module] | None:
    """The model's layers in order, if book-keeping holds for them; else None."""
    if type(model) is not nn.Sequential:
        return None
    layers: list[nn.Module] = []
    for layer in model:
        inner = _plain_layers(layer) if type(layer) is nn.Sequential else [layer]
        if inner is None:
            return None
        layers += inner
    taught = [layer for layer in layers if any(True for _ in layer.parameters())]
    plain = all(
        type(layer) is nn.Linear
        or type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        for layer in taught
    )
    # Under weight_norm, spectral_norm or pruning the trained parameter is another one than the weight.
    plain = plain and all(isinstance(layer.weight, nn.Parameter) for layer in taught)
    alone = len({id(p) for layer in taught for p in layer.parameters()}) == sum(1 for layer in taught for _ in layer.parameters())
    free = all(p.requires_grad for p in model.parameters()) and not any(getattr(layer, "inplace", False) for layer in layers)
    return layers if plain and alone and free and taught else None


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


def _check_model(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have at least one trainable parameter, got none")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or not layer.track_running_stats):
            raise ValueError(
                f"model must treat each sample alone, got {type(layer).__name__} at {name or 'its root'!r}: it mixes the "
                "samples of a batch, so no sample has a gradient of its own. Use GroupNorm or LayerNorm instead."
            )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
