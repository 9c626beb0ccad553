"""What a model must be so that private training releases the noisy gradients and nothing else."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PROBED: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def check_trainable(model: nn.Module) -> None:
    """ValueError if there is nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have at least one trainable parameter, got none")


def check_model(model: nn.Module) -> None:
    """Refuse what can be seen without a record: nothing to train, or a layer that is known to mix samples or to keep them.

    Raises:
        ValueError: names the layer and what to use instead.
    """
    check_trainable(model)
    for name, layer in model.named_modules():
        got = f"got {type(layer).__name__} at {name or 'its root'!r}"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or not layer.track_running_stats):
            raise ValueError(
                f"model must treat each sample alone, {got}: it mixes the samples of a batch, so no sample has a gradient of its "
                "own. Use GroupNorm or LayerNorm instead."
            )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats and layer.training:
            raise ValueError(
                f"model must not keep statistics of its records, {got} with track_running_stats: they leave with the model, and "
                "no noise covers them. Use track_running_stats=False."
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise ValueError(
                f"model must change by its noisy gradient only, {got} with max_norm: it rescales the rows that a batch looks up, "
                "and no noise covers that. Use max_norm=None."
            )


def check_alone(model: nn.Module, X: Tensor) -> None:
    """Refuse a model that mixes the samples of a batch, or keeps something of them: a probe on a few records, once a model.

    The model runs on one record alone, beside others, and beside others again that are different. Its output for the record
    must stay what it was, and so must its parameters, its buffers and the tensors that its layers hold. A probe finds what
    shows on these records; it is no proof.

    Args:
        model: left as it was.
        X: ``(B, ...)``, B >= 1.

    Raises:
        ValueError: says what was seen.
    """
    shape = tuple((id(layer), layer.training) for layer in model.modules())
    if len(X) == 0 or _PROBED.get(model) == shape:
        return
    one, others = X[:1], (X[1:4] if len(X) > 1 else X[:1])
    unlike = 1 - 2 * others if X.is_floating_point() else X[-3:].flip(0)
    modes = {layer: layer.training for layer in model.modules()}
    state = _Kept(model, parameters=True)
    random = torch.get_rng_state()
    try:
        for layer in modes:
            if isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RReLU)):
                layer.training = False
        with torch.no_grad():
            outputs = _outputs(model, one, others, unlike)
            if isinstance(outputs[0], Tensor) and not _near(*outputs[:2]):  # something else draws random numbers: try it at rest
                model.eval()
                outputs = _outputs(model, one, others, unlike)
        held, later = outputs[4:]
        changed = state.moved()
        changed += [name for name in later if name not in held or not _same(later[name], held[name])]
    finally:
        torch.set_rng_state(random)
        for layer, mode in modes.items():
            layer.training = mode
        state.put_back()
    if changed:
        raise ValueError(
            f"model must change by its noisy gradient only, but its forward pass changes {changed[0]!r}: what it keeps of the "
            "records would leave with it, and no noise covers it. Take that out of the model."
        )
    together, again, alone, beside = outputs[:4]
    if not isinstance(together, Tensor) or together.dim() == 0:
        raise ValueError(f"model must return a tensor with one row a sample, got {type(together).__name__}")
    if len(together) != 1 + len(others) or len(alone) != 1:
        raise ValueError(
            f"model must treat each sample alone, but it gives {len(together)} outputs for {1 + len(others)} samples: it mixes them"
        )
    if _near(together, again) and not (_near(together[:1], alone) and _near(together[:1], beside[:1])):
        raise ValueError(
            "model must treat each sample alone, but its output for one sample depends on the others in the batch: then no sample "
            "has a gradient of its own, and clipping bounds nothing. Find the layer that works along the first dimension."
        )
    _PROBED[model] = shape


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back, and refuse, whatever the block changes in the model's buffers: no noise covers them.

    Raises:
        ValueError: names the buffer.
    """
    state = _Kept(model)
    yield
    moved = state.moved()
    state.put_back()
    if moved:
        raise ValueError(
            f"model must change by its noisy gradient only, but a training step changed its buffer {moved[0]!r}, which no noise "
            "covers (it is put back). Take the buffer out of the model, or keep it from moving."
        )


class _Kept:
    """A model's buffers, and its parameters if asked for, as they are now."""

    def __init__(self, model: nn.Module, parameters: bool = False):
        self._places = [
            (f"{path}.{key}".removeprefix("."), place, key, value, value.detach().clone())
            for path, layer in model.named_modules()
            for place in ((layer._buffers, layer._parameters) if parameters else (layer._buffers,))
            for key, value in place.items() if value is not None
        ]

    def moved(self) -> list[str]:
        """The names of those that are another tensor now, or hold other values."""
        return [name for name, place, key, value, before in self._places if place[key] is not value or not _same(value, before)]

    @torch.no_grad()
    def put_back(self) -> None:
        for _, place, key, value, before in self._places:
            place[key] = value
            if not _same(value, before):
                value.copy_(before)


def _outputs(model: nn.Module, one: Tensor, others: Tensor, unlike: Tensor) -> tuple:
    """What the model gives for the record beside others (twice), alone, and beside other ones; what it held first and last."""
    together = model(torch.cat([one, others]))
    held = _held(model)
    return together, model(torch.cat([one, others])), model(one), model(torch.cat([one, unlike])), held, _held(model)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the layers hold beside parameters and buffers: ``self.last = x``, ``self.seen.append(x)``."""

    def tensors(name, value):
        if isinstance(value, Tensor):
            yield name, value.detach().clone()
        elif isinstance(value, (list, tuple)):
            for k, inner in enumerate(value):
                yield from tensors(f"{name}[{k}]", inner)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from tensors(f"{name}[{key!r}]", inner)

    own = {"_parameters", "_buffers", "_modules"}
    found = {}
    for path, layer in model.named_modules():
        for key, value in vars(layer).items():
            if key not in own:
                found |= dict(tensors(f"{path}.{key}".removeprefix("."), value))
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _near(a: Tensor, b: Tensor) -> bool:
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-4 * float(a.abs().max() + b.abs().max()) + 1e-12
