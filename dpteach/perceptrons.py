"""Book-keeping for perceptrons without autograd: one model, or a whole stack of equal ones at once.

On a small perceptron a step's time goes into calls, not into arithmetic. Here they are few, and one call serves the
whole stack. A sample is a column: sums over a layer's features then run along whole vectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach.bookkeeping import NORM_AT_MOST, clip_factors, squared_norms

Weights = Sequence[tuple[Tensor, Tensor | None]]  # of each linear layer: (..., out, in) and (..., out)
Block = tuple[nn.Linear, type | None]  # a linear layer, and the kind of the activation behind it

IGNORED = -100  # the label that F.cross_entropy passes over
_FEW = 16  # numbers a record: below, products are quicker on a transposed copy
_LOST = 1.2e-38  # what a square at most loses where float32 can't hold it
_BLOCK = 32  # float32 adds so few squares with an error that the margin of clipping covers

_aten: Any = torch.ops.aten
# What an activation does, in place, and a gradient's way back through it from its output. This tanh is four times as
# quick as PyTorch's and as near in absolute terms.
_ACTIVATIONS: dict[type, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda g, h: _aten.threshold_backward(g, h, 0)),
    nn.Tanh: (lambda h: h.mul_(2).sigmoid_().mul_(2).sub_(1), _aten.tanh_backward),
    nn.Sigmoid: (torch.sigmoid_, _aten.sigmoid_backward),
}
KINDS = (nn.Linear, nn.Flatten, nn.Identity, *_ACTIVATIONS)  # what a perceptron may be made of


def blocks_of(layers: Sequence[nn.Module]) -> list[Block] | nn.Module:
    """The perceptron that these layers make, or the first layer that fits into none."""
    blocks: list[Block] = []
    for layer in layers:
        kind = type(layer)
        if isinstance(layer, nn.Linear) and kind is nn.Linear and list(layer._parameters) == ["weight", "bias"]:
            blocks.append((layer, None))
        elif kind in _ACTIVATIONS and blocks and blocks[-1][1] is None:
            blocks[-1] = (blocks[-1][0], kind)
        elif kind is not nn.Identity and not (
            isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
        ):
            return layer
    return blocks


def clipped_sum_by_hand(
    layers: Sequence[nn.Module], X: Tensor, y: Tensor, max_grad_norm: float
) -> tuple[Tensor, Tensor] | None:
    """:func:`dpteach.bookkeeping.clipped_sum_of_layers` under cross-entropy; None where another way must be taken."""
    blocks = blocks_of(layers)
    if isinstance(blocks, nn.Module) or torch.is_autocast_enabled(X.device.type):
        return None
    if X.dim() > 2 and isinstance(layers[0], nn.Flatten):
        X = X.flatten(1)
    first = blocks[0][0].weight
    fits = X.dim() == 2 and X.dtype == first.dtype and X.dtype in (torch.float32, torch.float64)
    if not fits or y.dim() != 1 or len(y) != len(X) or y.dtype != torch.int64 or X.shape[1] != first.shape[1]:
        return None
    with torch.no_grad():
        run = Pass([(layer.weight, layer.bias) for layer, _ in blocks], [kind for _, kind in blocks], X, y)
        norms = run.squared_norms(squared_norms(X)).sqrt_()
        if not float(norms.max()) <= NORM_AT_MOST:  # NaN too
            return None
        return run.weighted_sum(clip_factors(norms, max_grad_norm, X.dtype)), run.losses


def forward(weights: Weights, activations: Sequence[type | None], X: Tensor) -> list[Tensor]:
    """``X`` with its samples as columns, then what each layer with its activation makes of it: (..., features, B)."""
    columns = [X.mT.contiguous() if X.shape[-1] < _FEW else X.mT]
    for (weight, bias), kind in zip(weights, activations):
        h = _affine(weight, bias, columns[-1])
        columns.append(_ACTIVATIONS[kind][0](h) if kind else h)
    return columns


class Pass:
    """A forward and a backward pass under cross-entropy, down to the outputs of the linear layers.

    Attributes:
        losses: ``(..., B)``: each sample's; 0 where its label is -100.
        y: as given.
    """

    def __init__(self, weights: Weights, activations: Sequence[type | None], X: Tensor, y: Tensor):
        """Both passes.

        Args:
            weights: of each linear layer; a stack's have its dimension in front.
            activations: what stands behind each.
            X: ``(..., B, features)``; a stack may share one ``(B, features)``.
            y: ``(..., B)`` int64.

        Raises:
            IndexError: if a label is not one of the classes, nor -100.
        """
        columns, *outputs = forward(weights, activations, X)
        self.inputs, self.y = [columns, *outputs[:-1]], y
        log_p = outputs[-1].log_softmax(-2)
        self.losses = F.nll_loss(log_p if log_p.dim() == 3 else log_p.mT, y, reduction="none", ignore_index=IGNORED)
        g = _minus_labels(log_p.exp(), y)
        self.grads: list[Tensor] = []
        for k in reversed(range(len(weights))):
            kind = activations[k]
            g = _ACTIVATIONS[kind][1](g, outputs[k]) if kind else g
            self.grads.insert(0, g)
            g = weights[k][0].mT @ g if k else g
        self.biased = [bias is not None for _, bias in weights]

    def squared_norms(self, of_records: Tensor) -> Tensor:
        """``(..., B)`` float64, of each sample's gradient; ``of_records``: the same of each row of X."""
        total: Tensor | None = None
        for k, (g, biased) in enumerate(zip(self.grads, self.biased)):
            squares = _squared_columns(self.inputs[k]) if k else of_records
            part = _squared_columns(g).mul_(squares + (biased + _LOST))  # ‖g aᵀ‖² = ‖g‖²·‖a‖²
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``(..., P)``: Σ wᵢ·gradientᵢ over the samples, ``weights`` being ``(..., B)``."""
        weights, parts = weights.unsqueeze(-2), []
        for a, g, biased in zip(self.inputs, self.grads, self.biased):
            if a.shape[-2] < g.shape[-2]:  # the smaller of the two is weighted
                parts.append((g @ (a * weights).mT).flatten(-2))
                bias = (g @ weights.mT).squeeze(-1) if biased else None
            else:
                g = g * weights
                parts.append((g @ a.mT).flatten(-2))
                bias = g.sum(-1) if biased else None
            parts += [] if bias is None else [bias]
        return torch.cat(parts, -1)


def _affine(weight: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
    if bias is None:
        return weight @ h
    if h.dim() < weight.dim():  # the stack shares the records: one product
        return (weight @ h).add_(bias.unsqueeze(-1))
    product = torch.addmm if h.dim() == 2 else torch.baddbmm
    return product(bias.unsqueeze(-1), weight, h)


def _minus_labels(p: Tensor, y: Tensor) -> Tensor:
    """The gradient at the scores, ``(..., classes, B)``: probabilities, less 1 at the label; 0 where it is ignored."""
    if int(y.min()) >= 0:
        return p.scatter_(-2, y.unsqueeze(-2), -1, reduce="add")
    counts = (y != IGNORED).to(p.dtype).unsqueeze(-2)
    return p.mul_(counts).scatter_add_(-2, y.clamp(min=0).unsqueeze(-2), -counts)


def _squared_columns(x: Tensor) -> Tensor:
    """``(..., B)`` float64, of ``(..., n, B)``: not too small either, where float32 can't hold a square."""
    squares, n = x.square(), x.shape[-2]
    return (squares.sum(-2) if n <= _BLOCK else squares.sum(-2, dtype=torch.float64)).double().add_(n * _LOST)
