"""The sum of clipped per-sample gradients without the per-sample gradients, for plain stacks of known layers.

One backward pass goes to the layers' outputs only. A sample's norm follows from each layer's input and output gradient;
then one weighted sum makes the result. A linear layer's per-sample gradients are never built, a convolution's one layer
at a time.

Source: Bu et al. 2022, *Differentially Private Optimization on Large Model at Small Cost*.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What is known to treat each sample alone and to leave its input as it was. Anything else goes the general way.
_WITHOUT_PARAMETERS = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_NORM_AT_MOST = 1e15  # beyond, float32 products overflow or underflow on their way: the general way can cope


def known_layers(model: nn.Module) -> list[nn.Module] | None:
    """The model's layers in order, if every one is known to treat each sample alone and no hook is set; else None."""
    layers = _in_order(model)
    return layers if layers is not None and not _hooked(model) and all(map(_known, layers)) else None


def plain_layers(model: nn.Module) -> list[nn.Module] | None:
    """The model's layers in order, if all are known, none is used twice and all is trained; else None."""
    layers = known_layers(model)
    taught = [p for layer in layers or () for p in layer.parameters()]
    return (
        layers
        if taught and len({id(p) for p in taught}) == len(taught) and all(p.requires_grad for p in taught)
        else None
    )


def draws(model: nn.Module) -> bool:
    """Whether the model may draw random numbers in training: it has a layer that does, or one that is not known."""
    layers = known_layers(model)
    return layers is None or any(type(layer) is nn.Dropout for layer in layers)


def clipped_sum_of_layers(
    layers: list[nn.Module], X: Tensor, losses_of: Callable[[Tensor], Tensor], factors_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """``(P,)`` in float32 or float64, and the losses ``(B,)``; None where the general way must be taken.

    Args:
        layers: from :func:`plain_layers`.
        X: ``(B, ...)``, B >= 1.
        losses_of: the model's outputs -> each sample's loss.
        factors_of: the gradients' norms, ``(B,)`` float64 -> what to multiply each by.
    """
    taps, h = [], X
    for layer in layers:
        inputs, h = h, layer(h)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            # A linear layer that a sample passes at many places (B, T, features) has no rank-one gradient; a
            # convolution takes (C, H, W) for one image.
            if inputs.dim() != (2 if isinstance(layer, nn.Linear) else 4):
                return None
            taps.append((layer, inputs.detach(), h))
    losses = losses_of(h)
    output_grads = torch.autograd.grad(losses.sum(), [output for _, _, output in taps])
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):  # which would sum in half precision
        tapes = [_LayerTape(layer, _wide(a), _wide(g)) for (layer, a, _), g in zip(taps, output_grads)]
        norms = torch.stack([tape.squared_norms for tape in tapes]).sum(0).sqrt()
        if not bool((norms <= _NORM_AT_MOST).all()):  # NaN too
            return None
        factors = factors_of(norms)
        return torch.cat(
            [part for tape in tapes for part in tape.weighted_sum(factors.to(tape.g.dtype))]
        ), losses.detach()


class _LayerTape:
    """What one layer's backward pass leaves behind: enough for its samples' norms and for their weighted sum."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, inputs: Tensor, output_grads: Tensor):
        self.layer, self.a, self.g = layer, inputs, output_grads
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)  # see _known
            self.a = F.unfold(self.a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, K, L)
            self.g = self.g.flatten(2)  # (B, O, L)
            self.grads = self.g @ self.a.mT  # (B, O, K)
            self.bias_grads = self.g.sum(2)  # (B, O)
            self.squared_norms = _squared(self.grads.flatten(1)) + self._bias(_squared(self.bias_grads))
        else:
            g2 = _squared(self.g)
            self.squared_norms = g2 * _squared(self.a) + self._bias(g2)  # ‖g aᵀ‖² = ‖g‖²·‖a‖²

    def _bias(self, value: Tensor) -> Tensor | float:
        return 0.0 if self.layer.bias is None else value

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Σ wᵢ·gradientᵢ of the layer's parameters, flattened, in the order in which the layer has them."""
        column = weights.unsqueeze(1)
        if isinstance(self.layer, nn.Conv2d):
            parts = {"weight": (self.grads.flatten(1) * column).sum(0), "bias": (self.bias_grads * column).sum(0)}
        else:
            g = self.g * column
            parts = {"weight": (g.mT @ self.a).flatten(), "bias": g.sum(0)}
        return [parts[name] for name, _ in self.layer.named_parameters()]


def _squared(rows: Tensor) -> Tensor:
    """``(B,)`` float64: float32's squares overflow at 2e19, vanish at 1e-23, lose digits over millions of entries."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _hooked(model: nn.Module) -> bool:
    """Whether a hook, or a ``forward`` set on an instance, could change what any layer does."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = (getattr(torch.nn.modules.module, f"_global{name}") for name in names)
    return any(everywhere) or any(
        any(getattr(layer, name) for name in names) or "forward" in vars(layer) for layer in model.modules()
    )


def _in_order(model: nn.Module) -> list[nn.Module] | None:
    if type(model) is not nn.Sequential:
        return None
    layers: list[nn.Module] = []
    for layer in model:
        inner = _in_order(layer) if type(layer) is nn.Sequential else [layer]
        if inner is None:
            return None
        layers += inner
    return layers


def _known(layer: nn.Module) -> bool:
    kind = type(layer)
    if getattr(layer, "inplace", False):
        return False
    if isinstance(layer, nn.Flatten) and kind is nn.Flatten:
        return layer.start_dim >= 1
    if kind is nn.Unflatten:
        return isinstance(layer.dim, int) and layer.dim >= 1
    if kind is nn.Conv2d and (layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    if kind in (nn.Linear, nn.Conv2d):
        # Under weight_norm, spectral_norm or pruning the trained parameter is another one than the weight.
        return isinstance(layer.weight, nn.Parameter)
    return kind in _WITHOUT_PARAMETERS
