"""What a model must be so that private training releases the noisy gradients and nothing else."""

import array
import collections
import copy
import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpteach.randomness import RANDOM_STATE

RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What holds no record, or nothing that can be looked at.
_NO_STATE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, weakref.ref, torch.Generator)

Shape = tuple[tuple[Any, ...], ...]  # see shape_of
_PROBED: "weakref.WeakKeyDictionary[nn.Module, Shape]" = weakref.WeakKeyDictionary()


def check_trainable(model: nn.Module) -> None:
    """ValueError if there is nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have at least one trainable parameter, got none")


def check_model(model: nn.Module) -> None:
    """Refuse what can be seen without a record: nothing to train, a layer known to mix samples or to keep them.

    The ValueError names the layer and what to use instead.
    """
    check_trainable(model)
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"model must have no hooks on its parameters, got one on {name!r}: it would see gradients without noise"
            )
    for name, layer in model.named_modules():
        got = f"got {type(layer).__name__} at {name or 'its root'!r}"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or not layer.track_running_stats):
            raise ValueError(
                f"model must treat each sample alone, {got}: it mixes the samples of a batch, so no sample has a "
                "gradient of its own. Use GroupNorm or LayerNorm instead."
            )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats and layer.training:
            raise ValueError(
                f"model must not keep statistics of its records, {got} with track_running_stats: they leave with the "
                "model, and no noise covers them. Use track_running_stats=False."
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise ValueError(
                f"model must change by its noisy gradient only, {got} with max_norm: it rescales the rows that a batch "
                "looks up, and no noise covers that. Use max_norm=None."
            )


def check_alone(model: nn.Module, X: Tensor, batch: int = 9) -> None:
    """Refuse a model that mixes the samples of a batch, or keeps something of them: a probe on a few records.

    Made once a model. Copies of it run on one record alone, beside others, and beside others again, with the same
    random numbers. The output for the record must stay what it was. Two copies that saw different records must hold
    the same afterwards, in all their attributes. A probe finds what shows on these records; it is no proof.

    Args:
        model: left as it was, but for what its first pass makes whatever the records are (a mask that it keeps).
        X: ``(n, ...)``, n >= 1: the records to choose from.
        batch: also beside so many.

    Raises:
        ValueError: says what was seen.
    """
    if len(X) == 0 or _vouched(model):
        return
    trained = {id(p) for p in model.parameters()}
    leaves = ((path, tensor) for path, tensor in _tensors(model) if tensor.requires_grad and tensor.is_leaf)
    if loose := [path for path, tensor in leaves if id(tensor) not in trained]:
        raise ValueError(
            f"model must hold what it trains in model.parameters(), but {loose[0]!r} asks for a gradient and is not "
            "there: it would be left with one that has no noise. Use nn.Parameter, nn.ModuleList, nn.ParameterList"
        )
    finite = X.reshape(len(X), -1).isfinite().all(1).nonzero().squeeze(1)
    if len(finite) == 0:
        return
    records = X[finite[torch.linspace(0, len(finite) - 1, min(8, len(finite))).long()]].clone()
    before = dict(_leaves(model))
    with _apart(), torch.autocast(X.device.type, enabled=False):
        kept = _kept(model, records)
        mixed = "" if kept else _mixed(model, records, batch)
        if dict(_leaves(model)) != before and not kept:
            kept = "something outside of it, by a hook or a global"
    if kept:
        raise ValueError(
            f"model must change by its noisy gradient only, but its forward pass changes {kept}: what it keeps of the "
            "records would leave with it, and no noise covers it. Take that out of the model."
        )
    if mixed:
        raise ValueError(
            f"model must treat each sample alone, but {mixed}: then no sample has a gradient of its own, and clipping "
            "bounds nothing. Find the layer that works along the first dimension."
        )
    with _apart():  # what the first pass makes, once for all: under vmap it would be of no use afterwards
        model(records[:2].clone())
    vouch(model)


def vouch(model: nn.Module) -> None:
    """Take the model as probed, as it is now."""
    _PROBED[model] = shape_of(model)


def _vouched(model: nn.Module) -> bool:
    return model in _PROBED and same_shape(_PROBED[model], shape_of(model))


@contextmanager
def _apart() -> Iterator[None]:
    """Without gradients, and with the random state of before at the end."""
    with RANDOM_STATE, torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        yield


def _kept(model: nn.Module, records: Tensor) -> str:
    """The name of what a forward pass leaves behind that depends on the records; empty if there is none."""
    half = max(1, len(records) // 2)
    copies = [copied(model) for _ in range(3)]
    for twin, group in zip(copies, [records[:half], records[-half:], records[:half]]):
        for _ in range(2):
            _outputs(twin, group)
    before, first, other, again = (dict(_leaves(twin)) for twin in (model, *copies))
    state = (*dict(model.named_parameters()), *dict(model.named_buffers()))
    moved = [name for name in state if first.get(name) != before[name]]
    unlike = [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]
    # What differs with the same records too (the order of a set, a time) is no record's doing.
    depends = [name for name in unlike if first.get(name) == again.get(name)]
    return repr(min(moved or depends)) if moved or depends else ""


def _mixed(model: nn.Module, records: Tensor, batch: int) -> str:
    """How an output depends on the other records of a batch; empty if it doesn't, on these records."""
    generator, flat = torch.Generator().manual_seed(1), records.reshape(len(records), -1)
    rows = [torch.randint(len(flat), (3, flat.shape[1]), generator=generator).to(flat.device) for _ in range(2)]
    unlike = [flat.gather(0, pick).reshape(3, *records.shape[1:]) for pick in rows]  # each number from another record
    if records.is_floating_point() and records.device.type == "cpu":  # a GPU would not forgive an index out of range
        drawn = torch.randn(3, *records.shape[1:], generator=generator, dtype=torch.float64).to(records)
        unlike += [10 * drawn, drawn, 1 - 2 * _beside(records, 1)]
    depends = "its output for one sample depends on the others in the batch"
    for perturbed in (False, True):  # a head of zeros would hide what stands before it
        twin, dtype, tolerance = _precise(model, records, perturbed)
        if twin is None:
            continue
        modes = {layer: layer.training for layer in twin.modules()}
        for k in {0, len(records) // 2, len(records) - 1}:
            one = records[k : k + 1]
            three = [_batch(dtype, one, _beside(records, k + shift)) for shift in (1, 2, 4)]
            invented = [_batch(dtype, one, rows) for rows in unlike]
            together = [_outputs(twin, x) for x in three]
            if any(len(output) != 4 for output in together):
                return f"it gives {len(together[0])} outputs for 4 samples"
            if _near(together[0], _outputs(twin, three[0]), tolerance):
                together += _tried(twin, invented)
                if not all(_near(together[0][:1], output[:1], tolerance) for output in together[1:]):
                    return depends
            put_modes({layer: False for layer in modes if isinstance(layer, RANDOM_LAYERS)})
            calm = _calm(twin, three[0], tolerance)
            if not calm:  # something else draws: at rest it may not
                twin.eval()
                calm = _calm(twin, three[0], tolerance)
            many = _batch(dtype, one, _beside(records, k, batch - 1))
            alone = _outputs(twin, _batch(dtype, one))
            beside = [_outputs(twin, x) for x in (*three, many)] + _tried(twin, invented)
            if calm and not all(_near(alone, output[:1], tolerance) for output in beside):
                return depends
            put_modes(modes)
    return ""


def _beside(records: Tensor, start: int, count: int = 3) -> Tensor:
    return records[torch.arange(start, start + count) % len(records)]


def _batch(dtype: torch.dtype | None, *rows: Tensor) -> Tensor:
    x = torch.cat(rows)
    return x.to(dtype) if dtype and x.is_floating_point() else x


def _precise(model: nn.Module, records: Tensor, perturbed: bool) -> tuple[nn.Module | None, torch.dtype | None, float]:
    """A copy in float64, where rounding is not taken for mixing; in its own precision if it can't run there."""
    for dtype, tolerance in ((torch.float64, 1e-7), (None, 1e-3)):
        twin = copied(model)
        if perturbed:
            generator = torch.Generator().manual_seed(2)
            for p in twin.parameters():
                if p.is_floating_point():
                    scale = 0.1 / (p[0].numel() ** 0.5 if p.dim() > 1 else 1)
                    p.add_(scale * torch.randn(p.shape, generator=generator).to(p))
        twin = twin.to(dtype) if dtype else twin
        if _tried(twin, [_batch(dtype, records[:1])]):
            return twin, dtype, tolerance
    return None, None, 0.0


def _outputs(model: nn.Module, x: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    output = model(x.clone())
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ValueError(f"model must return a tensor with one row a sample, got {type(output).__name__}")
    return output


def _tried(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """The outputs for the batches that the model can take: some are invented."""
    outputs = []
    for x in batches:
        with suppress(Exception):
            outputs.append(_outputs(model, x))
    return outputs


def _calm(model: nn.Module, x: Tensor, tolerance: float) -> bool:
    return _near(_outputs(model, x), _outputs(model, x, seed=4), tolerance)


def training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Put the model in training mode, but for BatchNorm that is frozen; the modes before, for :func:`put_modes`."""
    modes = {layer: layer.training for layer in model.modules()}
    frozen = [layer for layer in modes if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.training]
    model.train()
    put_modes(dict.fromkeys(frozen, False))
    return modes


def put_modes(modes: dict[nn.Module, bool]) -> None:
    """Each layer's own ``training``, as it was."""
    for layer, mode in modes.items():
        layer.training = mode


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of computed tensors, as pruning and the old weight_norm leave them; else a ValueError."""
    computed = {id(tensor): tensor.detach().clone() for _, tensor in _tensors(model) if not tensor.is_leaf}
    try:
        twin = copy.deepcopy(model, computed)
        if _vouched(model):
            vouch(twin)
        return twin
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model must be one that copy.deepcopy can copy, got: {str(error).splitlines()[0]}") from error


@contextmanager
def kept_still(model: nn.Module) -> Iterator[None]:
    """Put back, and refuse by name, what the block changes in the model's parameters and buffers: a ValueError."""
    before = [(*held, held[-1].detach().clone()) for held in _held(model)]
    known = {(id(place), key) for _, place, key, _, _ in before}
    moved = []
    try:
        yield
    finally:
        with torch.no_grad():
            for name, place, key, value, old in before:
                if place.get(key) is not value or not _same(value, old):
                    moved.append(name)
                    place[key] = value
                    value.copy_(old)
        for name, place, key, _ in list(_held(model)):
            if (id(place), key) not in known:
                moved.append(name)
                del place[key]
    if moved:
        raise ValueError(
            f"model must change by its noisy gradient only, but a training step changed {moved[0]!r} in its forward "
            "pass, which no noise covers (it is put back). Take that out of the model."
        )


def _held(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Each buffer and parameter: its name, the dict that holds it and the key there, itself."""
    for path, layer in model.named_modules():
        for place in (layer._buffers, layer._parameters):
            for key, value in place.items():
                if value is not None:
                    yield f"{path}.{key}".removeprefix("."), place, key, value


def shape_of(model: nn.Module) -> Shape:
    """The layers a model is made of, their modes, options and hooks: a change of these is another model."""
    return tuple(map(_shape_of_layer, model.modules()))


def _shape_of_layer(layer: nn.Module) -> tuple[Any, ...]:
    options = [(key, value) for key, value in vars(layer).items() if isinstance(value, (int, float, str))]
    if not type(layer).__module__.startswith("torch.nn"):  # a counter of the reader's own is no option
        options = []
    hooks = [tuple(getattr(layer, name)) for name in HOOKS]
    return weakref.ref(layer), type(layer), layer.training, "forward" in vars(layer), tuple(options), *hooks


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two answers of :func:`shape_of` are of one model that has stayed what it was."""
    return len(a) == len(b) and all(x[0]() is y[0]() is not None and x[1:] == y[1:] for x, y in zip(a, b))


def _walk(value: Any, path: str = "", seen: set[int] | None = None, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All that hangs on an object, by path: ``(path, value)`` for each tensor, array, number and text."""
    seen = set() if seen is None else seen
    if isinstance(value, (Tensor, np.ndarray, int, float, complex, str, bytes)):
        yield path, value
        if isinstance(value, nn.Parameter) and vars(value):
            yield from _walk(dict(vars(value)), path, seen, depth + 1)
    elif isinstance(value, (bytearray, array.array, memoryview)):
        yield path, bytes(value)
    elif isinstance(value, io.BytesIO):
        yield path, value.getvalue()
    elif id(value) not in seen and depth <= 20 and not isinstance(value, _NO_STATE):
        seen.add(id(value))
        if isinstance(value, dict):
            inner = [(f"[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, collections.deque)):
            inner = [(f"[{k}]", item) for k, item in enumerate(value)]
        elif isinstance(value, (set, frozenset)):
            inner = [(f"{{{k}}}", item) for k, item in enumerate(value)]
        else:
            inner = [(f".{key}", item) for key, item in _attributes(value).items()]
        for name, item in inner:
            yield from _walk(item, f"{path}{name}".removeprefix("."), seen, depth + 1)


def _attributes(value: Any) -> dict[Any, Any]:
    if isinstance(value, nn.Module):
        elsewhere = ("_modules", "_parameters", "_buffers", *HOOKS)
        own = {key: item for key, item in vars(value).items() if key not in elsewhere}
        return {**value._modules, **value._parameters, **value._buffers, **own}
    slots = [key for kind in type(value).__mro__ for key in getattr(kind, "__slots__", ()) if hasattr(value, key)]
    return {**{key: getattr(value, key) for key in slots}, **getattr(value, "__dict__", {})}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((path, value) for path, value in _walk(model) if isinstance(value, Tensor))


def _leaves(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, value in _walk(model):
        if isinstance(value, Tensor):
            value = value.detach().cpu().resolve_conj()
            value = value.to_dense() if value.layout != torch.strided else value
            content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr(value.item())
            yield path, (str(value.dtype), tuple(value.shape), content)
        elif isinstance(value, np.ndarray):
            yield path, (value.dtype.str, value.shape, value.tobytes())
        else:
            yield path, repr(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(a.abs().max() + b.abs().max()) + 1e-12
