"""What a model must be so that private training releases the noisy gradients and nothing else."""

import array
import collections
import copy
import io
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpteach.randomness import RANDOM_STATE

Shape = tuple[tuple[Any, ...], ...]  # see shape_of
_PROBED: "weakref.WeakKeyDictionary[nn.Module, Shape]" = weakref.WeakKeyDictionary()


def check_trainable(model: nn.Module) -> None:
    """ValueError if there is nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have at least one trainable parameter, got none")


def check_model(model: nn.Module) -> None:
    """Refuse what can be seen without a record: nothing to train, a layer known to mix samples or to keep them.

    Raises:
        ValueError: names the layer and what to use instead.
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
    now = shape_of(model)
    if len(X) == 0 or (model in _PROBED and same_shape(_PROBED[model], now)):
        return
    trained = {id(p) for p in model.parameters()}
    loose = [
        path
        for path, tensor in _tensors(model)
        if tensor.requires_grad and tensor.is_leaf and id(tensor) not in trained
    ]
    if loose:
        raise ValueError(
            f"model must hold what it trains in model.parameters(), but {loose[0]!r} asks for a gradient and is not "
            "there: it would be left with one that has no noise. Use nn.Parameter, nn.ModuleList, nn.ParameterList"
        )
    finite = X.reshape(len(X), -1).isfinite().all(1).nonzero().squeeze(1)
    if len(finite) == 0:
        return
    records = X[finite[torch.linspace(0, len(finite) - 1, min(8, len(finite))).long()]].clone()
    before = dict(_leaves(model))
    with RANDOM_STATE, _random_state_kept(), torch.no_grad(), torch.autocast(X.device.type, enabled=False):
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
    with RANDOM_STATE, _random_state_kept(), torch.no_grad():
        model(
            records[:2].clone()
        )  # what the first pass makes, once for all: under vmap it would be of no use afterwards
    vouch(model)


def vouch(model: nn.Module) -> None:
    """Take the model as probed, as it is now."""
    _PROBED[model] = shape_of(model)


def _kept(model: nn.Module, records: Tensor) -> str:
    """The name of what a forward pass leaves behind that depends on the records; empty if there is none."""
    half = max(1, len(records) // 2)
    copies, groups = [copied(model) for _ in range(3)], [records[:half], records[-half:], records[:half]]
    for twin, group in zip(copies, groups):
        for _ in range(2):
            _outputs(twin, group)
    first, other, again = (dict(_leaves(twin)) for twin in copies)
    state = {
        name: dict(_leaves(model))[name] for name in (*dict(model.named_parameters()), *dict(model.named_buffers()))
    }
    moved = [name for name, value in state.items() if first.get(name) != value]
    # What differs with the same records too (the order of a set, a time) is no record's doing.
    depends = [
        name
        for name in first.keys() | other.keys()
        if first.get(name) != other.get(name) and first.get(name) == again.get(name)
    ]
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
        twin, cast, tolerance = _precise(model, records, perturbed)
        if twin is None:
            continue
        for k in {0, len(records) // 2, len(records) - 1}:
            one, others = cast(records[k : k + 1]), [cast(_beside(records, k + shift)) for shift in (1, 2, 4)]
            invented = [cast(rows) for rows in unlike]
            together = [_outputs(twin, torch.cat([one, rows])) for rows in others]
            if any(len(output) != 4 for output in together):
                return f"it gives {len(together[0])} outputs for 4 samples"
            if _near(together[0], _outputs(twin, torch.cat([one, others[0]])), tolerance):
                together += [
                    output for rows in invented if (output := _tried(twin, torch.cat([one, rows]))) is not None
                ]
                if not all(_near(together[0][:1], output[:1], tolerance) for output in together[1:]):
                    return depends
            modes = {layer: layer.training for layer in twin.modules()}
            for layer in modes:
                if isinstance(layer, RANDOM_LAYERS):
                    layer.training = False
            calm = _calm(twin, torch.cat([one, others[0]]), tolerance)
            if not calm:  # something else draws: at rest it may not
                twin.eval()
                calm = _calm(twin, torch.cat([one, others[0]]), tolerance)
            many = _beside(records, k, batch - 1)
            alone = _outputs(twin, one)
            beside = [_outputs(twin, torch.cat([one, rows])) for rows in (*others, cast(many))]
            beside += [output for rows in invented if (output := _tried(twin, torch.cat([one, rows]))) is not None]
            if calm and not all(_near(alone, output[:1], tolerance) for output in beside):
                return depends
            for layer, mode in modes.items():
                layer.training = mode
    return ""


def _beside(records: Tensor, start: int, count: int = 3) -> Tensor:
    return records[torch.arange(start, start + count) % len(records)]


def _precise(
    model: nn.Module, records: Tensor, perturbed: bool
) -> tuple[nn.Module | None, Callable[[Tensor], Tensor], float]:
    """A copy in float64, where rounding is not taken for mixing; in its own precision if it can't run there."""
    for dtype, tolerance in ((torch.float64, 1e-7), (None, 1e-3)):
        twin = copied(model)
        if perturbed:
            generator = torch.Generator().manual_seed(2)
            for p in twin.parameters():
                if p.is_floating_point():
                    scale = 0.1 / (p[0].numel() ** 0.5 if p.dim() > 1 else 1)
                    p.add_(scale * torch.randn(p.shape, generator=generator).to(p))
        twin = twin if dtype is None else twin.to(dtype)

        def cast(x: Tensor, dtype: torch.dtype | None = dtype) -> Tensor:
            return x.to(dtype) if dtype is not None and x.is_floating_point() else x

        if _tried(twin, cast(records[:1])) is not None:
            return twin, cast, tolerance
    return None, lambda x: x, 0.0


def _outputs(model: nn.Module, x: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    output = model(x.clone())
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ValueError(f"model must return a tensor with one row a sample, got {type(output).__name__}")
    return output


def _tried(model: nn.Module, x: Tensor) -> Tensor | None:
    """The outputs; None where the model can't take what was invented."""
    try:
        return _outputs(model, x)
    except Exception:
        return None


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
    """A deep copy, also of a model that holds computed tensors, as pruning and the old weight_norm leave them.

    Raises:
        ValueError: if it can't be copied.
    """
    computed = {id(tensor): tensor.detach().clone() for _, tensor in _tensors(model) if not tensor.is_leaf}
    try:
        twin = copy.deepcopy(model, computed)
        if model in _PROBED and same_shape(_PROBED[model], shape_of(model)):
            vouch(twin)
        return twin
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model must be one that copy.deepcopy can copy, got: {str(error).splitlines()[0]}") from error


@contextmanager
def kept_still(model: nn.Module) -> Iterator[None]:
    """Put back, and refuse, whatever the block changes in the model's parameters and buffers: no noise covers it.

    Raises:
        ValueError: names what has moved.
    """
    before = [
        (f"{path}.{key}".removeprefix("."), place, key, value, value.detach().clone())
        for path, layer in model.named_modules()
        for place in (layer._buffers, layer._parameters)
        for key, value in place.items()
        if value is not None
    ]
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
        known = {(id(place), key) for _, place, key, _, _ in before}
        for path, layer in model.named_modules():
            for place in (layer._buffers, layer._parameters):
                for key in [key for key, value in place.items() if value is not None and (id(place), key) not in known]:
                    moved.append(f"{path}.{key}".removeprefix("."))
                    del place[key]
    if moved:
        raise ValueError(
            f"model must change by its noisy gradient only, but a training step changed {moved[0]!r} in its forward "
            "pass, which no noise covers (it is put back). Take that out of the model."
        )


def shape_of(model: nn.Module) -> Shape:
    """The layers a model is made of, their modes, options and hooks: a change of these is another model."""
    return tuple(
        (
            weakref.ref(layer),
            type(layer),
            layer.training,
            "forward" in vars(layer),
            _options(layer),
            *(tuple(getattr(layer, name)) for name in HOOKS),
        )
        for layer in model.modules()
    )


def _options(layer: nn.Module) -> Shape:
    if not type(layer).__module__.startswith("torch.nn"):  # a counter of the reader's own is no option
        return ()
    return tuple(
        (key, value) for key, value in vars(layer).items() if isinstance(value, (int, float, str)) and key != "training"
    )


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two answers of :func:`shape_of` are of one model that has stayed what it was."""
    return len(a) == len(b) and all(x[0]() is y[0]() is not None and x[1:] == y[1:] for x, y in zip(a, b))


RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


# What holds no record, or nothing that can be looked at.
_NO_STATE = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    weakref.ref,
    torch.Generator,
)


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
    elif id(value) in seen or depth > 20 or isinstance(value, _NO_STATE):
        return
    else:
        seen.add(id(value))
        if isinstance(value, dict):
            inner = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, collections.deque)):
            inner = [(f"{path}[{k}]", item) for k, item in enumerate(value)]
        elif isinstance(value, (set, frozenset)):
            inner = [(f"{path}{{{k}}}", item) for k, item in enumerate(value)]
        elif isinstance(value, nn.Module):
            parts = {**value._modules, **value._parameters, **value._buffers}
            own = {
                key: item
                for key, item in vars(value).items()
                if key not in ("_modules", "_parameters", "_buffers", *HOOKS)
            }
            inner = [(f"{path}.{key}".removeprefix("."), item) for key, item in {**parts, **own}.items()]
        else:
            slots = [
                key for kind in type(value).__mro__ for key in getattr(kind, "__slots__", ()) if hasattr(value, key)
            ]
            own = {
                **{key: getattr(value, key) for key in slots if isinstance(key, str)},
                **getattr(value, "__dict__", {}),
            }
            inner = [(f"{path}.{key}".removeprefix("."), item) for key, item in own.items()]
        for name, item in inner:
            yield from _walk(item, name, seen, depth + 1)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((path, value) for path, value in _walk(model) if isinstance(value, Tensor))


def _leaves(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, value in _walk(model):
        if isinstance(value, Tensor):
            value = value.detach().cpu().resolve_conj()
            value = value.to_dense() if value.layout != torch.strided else value
            yield (
                path,
                (
                    str(value.dtype),
                    tuple(value.shape),
                    value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr(value.item()),
                ),
            )
        elif isinstance(value, np.ndarray):
            yield path, (value.dtype.str, value.shape, value.tobytes())
        else:
            yield path, repr(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(a.abs().max() + b.abs().max()) + 1e-12
