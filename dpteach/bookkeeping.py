"""The sum of clipped per-sample gradients without the per-sample gradients, for plain stacks of known layers.

One backward pass goes to the layers' outputs only. A sample's norm follows from each layer's input and output gradient;
then one weighted sum makes the result. A linear layer's per-sample gradients are never built, a convolution's one layer
at a time.

Source: Bu et al. 2022, *Differentially Private Optimization on Large Model at Small Cost*.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What is known to treat each sample alone and to leave its input as it was. Anything else goes the general way.
# fmt: off
_WITHOUT_PARAMETERS = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)
# fmt: on
_WITH_PARAMETERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
_CHUNK = 1 << 19  # numbers: two MB, what a core's cache holds
NORM_AT_MOST = 1e15  # beyond, float32 products overflow or underflow on their way: the general way can cope


def known_layers(model: nn.Module) -> list[nn.Module] | None:
    """The model's layers in order, if every one is known to treat each sample alone and no hook is set; else None."""
    anywhere = torch.nn.modules.module
    hooked = (
        anywhere._global_forward_hooks
        or anywhere._global_forward_pre_hooks
        or anywhere._global_backward_hooks
        or anywhere._global_backward_pre_hooks
    )
    return None if hooked else _in_order(model)


def plain_layers(model: nn.Module) -> list[nn.Module] | None:
    """The model's layers in order, if all are known, none is used twice and all is trained; else None.

    What these are, ``guards.check_model`` has nothing to say against.
    """
    layers, seen = known_layers(model), set()
    for layer in layers or ():
        for p in layer._parameters.values():
            if p is None:
                continue
            if id(p) in seen or not p.requires_grad or p._backward_hooks or p._post_accumulate_grad_hooks:
                return None
            seen.add(id(p))
    return layers if seen else None


def draws(model: nn.Module) -> bool:
    """Whether the model may draw random numbers in training: it has a layer that does, or one that is not known."""
    layers = known_layers(model)
    return layers is None or any(type(layer) is nn.Dropout for layer in layers)


def clipped_sum_of_layers(
    layers: list[nn.Module], X: Tensor, losses_of: Callable[[Tensor], Tensor], max_grad_norm: float
) -> tuple[Tensor, Tensor] | None:
    """``(P,)`` in float32 or float64, and the losses ``(B,)``; None where the general way must be taken.

    Args:
        layers: from :func:`plain_layers`.
        X: ``(B, ...)``, B >= 1.
        losses_of: the model's outputs -> each sample's loss.
        max_grad_norm: C.
    """
    taps: list[tuple[type[_Tape], nn.Module, Tensor, Tensor]] = []
    h = X
    for layer in layers:
        inputs, h = h, layer(h)
        if isinstance(layer, _WITH_PARAMETERS):
            kind = _tape_for(layer, inputs)
            if kind is None:  # also without a parameter: a LayerNorm over the first dimension would mix the samples
                return None
            if layer.weight is not None or layer.bias is not None:
                taps.append((kind, layer, inputs.detach(), h))
    losses = losses_of(h)
    output_grads = [_wide(g) for g in torch.autograd.grad(losses.sum(), [output for *_, output in taps])]
    taken, losses = [tap[:3] for tap in taps], losses.detach()
    del taps, h  # the outputs, and what autograd kept: room for the gradients
    with torch.no_grad(), without_autocast(X.device.type):
        tapes = [kind(layer, _wide(a), g) for (kind, layer, a), g in zip(taken, output_grads)]
        squares = tapes[0].squared_norms
        for tape in tapes[1:]:
            squares = squares + tape.squared_norms
        norms = squares.sqrt()
        if not bool((norms <= NORM_AT_MOST).all()):  # NaN too
            return None
        weights = clip_factors(norms, max_grad_norm, output_grads[0].dtype)
        return torch.cat([part for tape in tapes for part in tape.weighted_sum(weights)]), losses


class _Tape:
    """What one layer's backward pass leaves behind: enough for its samples' norms and for their weighted sum."""

    squared_norms: Tensor  # (B,) float64

    def __init__(self, layer: Any, a: Tensor, g: Tensor):
        """``a``: the layer's input, ``g``: the gradient at its output, each with one sample a row."""
        raise NotImplementedError

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Σ wᵢ·gradientᵢ of the layer's parameters, flattened, in the order in which the layer has them."""
        raise NotImplementedError


class _Outer(_Tape):
    """A linear layer on ``(B, features)``: the gradient g·aᵀ has rank one and is never built."""

    def __init__(self, layer: nn.Linear, a: Tensor, g: Tensor):
        self.a, self.g, self.names = a, g, _trained(layer)
        g2, a2 = squared_norms(g), squared_norms(a)
        self.squared_norms = g2 * a2  # ‖g aᵀ‖² = ‖g‖²·‖a‖²
        self.squared_norms[a2 > NORM_AT_MOST**2] = math.inf  # g may be too small for its type: the general way can cope
        if layer.bias is not None:
            self.squared_norms += g2

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        g = self.g * weights.unsqueeze(1)
        return [(g.mT @ self.a).flatten() if name == "weight" else g.sum(0) for name in self.names]


class _Places(_Tape):
    """A linear layer that a sample passes at many places, ``(B, ..., features)``: its gradient is a sum over them."""

    def __init__(self, layer: nn.Linear, a: Tensor, g: Tensor):
        self.a, self.g, self.names = a.flatten(1, -2), g.flatten(1, -2), _trained(layer)
        self.some = max(1, _CHUNK // (g.shape[-1] * a.shape[-1]))
        parts = zip(self.g.split(self.some), self.a.split(self.some))
        self.squared_norms = torch.cat([squared_norms((g_.mT @ a_).flatten(1)) for g_, a_ in parts])
        if layer.bias is not None:
            self.squared_norms += squared_norms(self.g.sum(1))

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        # Sample by sample, as for the norms: huge places of one that cancel would wipe out the others in one sum.
        total = self.g.new_zeros(self.g.shape[-1] * self.a.shape[-1])
        for w, g, a in zip(*(rows.split(self.some) for rows in (weights, self.g, self.a))):
            total += w @ (g.mT @ a).flatten(1)
        return [total if name == "weight" else weights @ self.g.sum(1) for name in self.names]


class _Rows(_Tape):
    """A layer whose per-sample gradients are built, ``(B, n)`` for each parameter: they are small."""

    def __init__(self, layer: nn.Module, a: Tensor, g: Tensor):
        grads = self.gradients(layer, a, g)
        self.grads = [grads[name] for name in _trained(layer)]
        self.squared_norms = torch.stack([squared_norms(rows) for rows in self.grads]).sum(0)

    def gradients(self, layer: Any, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """``(B, n)`` for each name of a parameter."""
        if isinstance(layer, nn.LayerNorm):
            places, normal = (
                g.shape[1 : -len(layer.normalized_shape)],
                F.layer_norm(a, layer.normalized_shape, eps=layer.eps),
            )
            rows = (len(g), math.prod(places), -1)
            return {"weight": (g * normal).reshape(rows).sum(1), "bias": g.reshape(rows).sum(1)}
        normal = F.group_norm(a, layer.num_groups, eps=layer.eps)
        rows = (len(g), layer.num_channels, -1)
        return {"weight": (g * normal).reshape(rows).sum(2), "bias": g.reshape(rows).sum(2)}

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        return [weights @ rows for rows in self.grads]


class _Convolution(_Rows):
    """A convolution: what each kernel saw, times the gradients there, in chunks that stay in the processor's cache."""

    def gradients(self, layer: Any, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        g = g.flatten(2)  # (B, O, L)
        K = layer.weight[0].numel()
        grads = g.new_empty(len(g), g.shape[1], K)
        some = max(1, _CHUNK // (K * g.shape[2]))
        for part, g_, a_ in zip(grads.split(some), g.split(some), a.split(some)):
            torch.bmm(g_, _patches(layer, a_).mT, out=part)
        return {"weight": grads.flatten(1), "bias": g.sum(2)}


class _Words(_Tape):
    """An embedding: a sample's gradient has a row for each word that it holds, the sum over its places."""

    def __init__(self, layer: nn.Embedding, a: Tensor, g: Tensor):
        words, g = a.reshape(len(a), -1), g.reshape(len(g), -1, g.shape[-1])
        if layer.padding_idx is not None:
            g = g * (words != layer.padding_idx).unsqueeze(2)
        sample = torch.arange(len(words), device=words.device).unsqueeze(1)
        keys, place = (sample * layer.num_embeddings + words).flatten().unique(return_inverse=True)
        self.rows = g.new_zeros(len(keys), g.shape[-1]).index_add_(0, place, g.flatten(0, 1))
        self.sample, self.word = keys // layer.num_embeddings, keys % layer.num_embeddings
        self.shape = layer.weight.shape
        squares = torch.zeros(len(words), dtype=torch.float64, device=g.device)
        self.squared_norms = squares.index_add_(0, self.sample, squared_norms(self.rows))

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        rows = self.rows * weights[self.sample].unsqueeze(1)
        return [rows.new_zeros(self.shape).index_add_(0, self.word, rows).flatten()]


def _tape_for(layer: nn.Module, inputs: Tensor) -> type[_Tape] | None:
    """Which tape fits; None where the first dimension of the input is not the batch's (one image alone)."""
    if isinstance(layer, nn.Linear):
        return None if inputs.dim() < 2 else _Outer if inputs.dim() == 2 else _Places
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return _Convolution if inputs.dim() == len(layer.kernel_size) + 2 else None
    if isinstance(layer, nn.Embedding):
        return _Words
    if isinstance(layer, nn.LayerNorm):
        return _Rows if inputs.dim() > len(layer.normalized_shape) else None
    return _Rows if inputs.dim() >= 2 else None


def _patches(layer: Any, a: Tensor) -> Tensor:
    """``(b, K, L)``: the input under each place of the kernel, as ``F.unfold`` gives it, by one strided copy."""
    padded = F.pad(a, [side for p in reversed(layer.padding) for side in (p, p)]).contiguous()
    batch, channel, *along = padded.stride()
    spans = zip(padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride)
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in spans]
    inside = [step * d for step, d in zip(along, layer.dilation)]
    across = [step * s for step, s in zip(along, layer.stride)]
    sizes = (len(a), a.shape[1], *layer.kernel_size, *places)
    windows = padded.as_strided(sizes, (batch, channel, *inside, *across))
    return windows.reshape(len(a), -1, math.prod(places))


def _trained(layer: nn.Module) -> list[str]:
    return [name for name, p in layer._parameters.items() if p is not None]


def squared_norms(rows: Tensor) -> Tensor:
    """``(B,)`` float64: float32's squares overflow at 2e19, vanish at 1e-23, lose digits over millions of entries."""
    if rows.numel() > _CHUNK and len(rows) > 1:  # so that the float64 copy stays small, and in the cache
        return torch.cat([squared_norms(part) for part in rows.split(max(1, _CHUNK // rows.shape[1]))])
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square_()


def clip_factors(norms: Tensor, max_grad_norm: float | Tensor, dtype: torch.dtype) -> Tensor:
    """What to multiply gradients of these norms by, all finite: C/norm, a hair less since ``dtype`` rounds; at most 1.

    ``dtype`` is the factors' own.
    """
    factors: Tensor = max_grad_norm * (1 - max(8 * torch.finfo(dtype).eps, 1e-11)) / norms
    return factors.clamp_(max=1).to(dtype)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Under autocast the sums would be in half precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _in_order(model: nn.Module) -> list[nn.Module] | None:
    if type(model) is not nn.Sequential or _hooked(model):
        return None
    layers: list[nn.Module] = []
    for layer in model:
        if type(layer) is nn.Sequential:
            inner = _in_order(layer)
            if inner is None:
                return None
            layers += inner
        elif _known(layer) and not _hooked(layer):
            layers.append(layer)
        else:
            return None
    return layers


def _hooked(layer: nn.Module) -> bool:
    """Whether a hook, or a ``forward`` set on the instance, could change what the layer does."""
    own = vars(layer)
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def _known(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind is nn.Linear:  # the most frequent
        return set(layer._parameters) == {"weight", "bias"}
    if vars(layer).get("inplace"):  # getattr would take longer than all the rest
        return False
    if isinstance(layer, nn.Flatten) and kind is nn.Flatten:
        return layer.start_dim >= 1
    if kind is nn.Unflatten:
        return isinstance(layer.dim, int) and layer.dim >= 1
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return False
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        return False
    if kind in _WITH_PARAMETERS:
        # Under weight_norm, spectral_norm or pruning the trained parameter is another one than the weight.
        return set(layer._parameters) == ({"weight"} if kind is nn.Embedding else {"weight", "bias"})
    return kind in _WITHOUT_PARAMETERS
