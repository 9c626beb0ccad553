"""What a model must be so that private training releases the noisy gradients and nothing else."""

import copy
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

_PROBED: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()
RANDOM_STATE = threading.RLock()  # held by whoever swaps PyTorch's global random state, which all threads share


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

    Copies of the model run on one record alone, beside others, and beside others again that are different, with the same random
    numbers. The output for the record must stay what it was. Two copies that saw different records must hold the same
    afterwards, in all their attributes. A probe finds what shows on these records; it is no proof.

    Args:
        model: left as it was.
        X: ``(B, ...)``, B >= 1.

    Raises:
        ValueError: says what was seen.
    """
    now = shape_of(model)
    if len(X) == 0 or (model in _PROBED and same_shape(_PROBED[model], now)):
        return
    before = dict(_leaves(model))
    loose = [path for path, tensor in _tensors(model) if tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, nn.Parameter)]
    if loose:
        raise ValueError(f"model must hold what it trains as nn.Parameter, but {loose[0]!r} asks for a gradient and is none")
    with RANDOM_STATE, _random_state_kept():
        runs = [_Probe(model, X, perturbed) for perturbed in (True, False)]
    if dict(_leaves(model)) != before:
        raise ValueError("model must not be changed by a copy of it that runs: a hook or a global keeps something of the records")
    kept = [name for run in runs for name in run.kept]
    if kept:
        raise ValueError(
            f"model must change by its noisy gradient only, but its forward pass changes {kept[0]!r}: what it keeps of the "
            "records would leave with it, and no noise covers it. Take that out of the model."
        )
    mixed = [why for run in runs for why in run.mixed]
    if mixed:
        raise ValueError(
            f"model must treat each sample alone, but {mixed[0]}: then no sample has a gradient of its own, and clipping bounds "
            "nothing. Find the layer that works along the first dimension."
        )
    _PROBED[model] = now


class _Probe:
    """What copies of a model do with a record: what they ``kept`` of it, and how it ``mixed`` with others."""

    def __init__(self, model: nn.Module, X: Tensor, perturbed: bool):
        finite = X.flatten(1).isfinite().all(1) if X.is_floating_point() else torch.ones(len(X), dtype=torch.bool)
        X = X[finite.nonzero().squeeze(1)][:4]
        generator = torch.Generator().manual_seed(1)
        if len(X) == 0:
            self.kept = self.mixed = []
            return
        self.one, others = X[:1].clone(), torch.cat([X[1:], X[:1]])
        if X.is_floating_point():
            noise = torch.randn(others.shape, generator=generator, dtype=torch.float64).to(others)
            self.beside = [others, 1 - 2 * others, 10 * noise, others.repeat(8, *[1] * (X.dim() - 1)) + 1]
        else:
            values = X.flatten()
            drawn = torch.randint(len(values), (3, *others.shape), generator=generator).to(values.device)
            self.beside = [others, *values[drawn], others.repeat(8, *[1] * (X.dim() - 1))]
        self.perturbed, self.kept, self.mixed = perturbed, [], []
        first, second = self._copy(model), self._copy(model)
        with torch.no_grad():
            inputs = [torch.cat([self.one, others_]) for others_ in self.beside]
            outputs = [self._run(first, x) for x in inputs]
            for x in inputs:  # the same shapes, other records
                self._run(second, x.flip(0) if not x.is_floating_point() else x.flip(0) * 0.5 + 0.25)
            held, other = dict(_leaves(first)), dict(_leaves(second))
            self.kept = sorted(name for name in held.keys() | other.keys() if held.get(name) != other.get(name))
            if not self.kept:
                self._compare(first, inputs, outputs)

    def _copy(self, model: nn.Module) -> nn.Module:
        made = copied(model)
        if self.perturbed:  # a head of zeros would hide what stands before it
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for p in made.parameters():
                    if p.is_floating_point():
                        p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
        return made

    def _run(self, model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        output = model(x.clone())
        if not isinstance(output, Tensor) or output.dim() == 0:
            raise ValueError(f"model must return a tensor with one row a sample, got {type(output).__name__}")
        return output

    def _compare(self, model: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for x, output in zip(inputs, outputs):
            if len(output) != len(x):
                self.mixed.append(f"it gives {len(output)} outputs for {len(x)} samples")
                return
        depends = "its output for one sample depends on the others in the batch"
        # Beside three others each: what is drawn for the record is the same in all of these.
        if not all(_near(outputs[0][:1], output[:1]) for output in outputs[1:-1] if len(output) == len(outputs[0])):
            self.mixed.append(depends)
        for layer in model.modules():
            if isinstance(layer, RANDOM_LAYERS):
                layer.training = False
        if not _near(self._run(model, inputs[0]), self._run_again(model, inputs[0])):  # something else draws
            model.eval()
        calm = _near(self._run(model, inputs[0]), self._run_again(model, inputs[0]))
        alone = self._run(model, self.one)
        if calm and not all(_near(alone, self._run(model, x)[:1]) for x in inputs):
            self.mixed.append(depends)

    def _run_again(self, model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(4)
        return model(x.clone())


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that holds computed tensors, as pruning and the old weight_norm leave them.

    Raises:
        ValueError: if it can't be copied.
    """
    computed = {id(tensor): tensor.detach().clone() for _, tensor in _tensors(model) if not tensor.is_leaf}
    try:
        return copy.deepcopy(model, computed)
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
        for path, layer in model.named_modules() for place in (layer._buffers, layer._parameters)
        for key, value in place.items() if value is not None
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
    if moved:
        raise ValueError(
            f"model must change by its noisy gradient only, but a training step changed {moved[0]!r} in its forward pass, which no "
            "noise covers (it is put back). Take that out of the model."
        )


def shape_of(model: nn.Module) -> tuple:
    """The layers a model is made of, their modes, and how many hooks they have: a change of these is another model."""
    return tuple(
        (weakref.ref(layer), layer.training, *(tuple(getattr(layer, name)) for name in HOOKS)) for layer in model.modules()
    )


def same_shape(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(x[0]() is y[0]() is not None and x[1:] == y[1:] for x, y in zip(a, b))


RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _walk(value, path="", seen=None, depth=0):
    """All that hangs on an object, by path: ``(path, value)`` for each tensor, array, number and text."""
    seen = set() if seen is None else seen
    if isinstance(value, (Tensor, np.ndarray, int, float, complex, str, bytes)):
        yield path, value
    elif id(value) in seen or depth > 20 or callable(value) and not isinstance(value, nn.Module):
        return
    else:
        seen.add(id(value))
        if isinstance(value, dict):
            inner = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            inner = [(f"{path}[{k}]", item) for k, item in enumerate(value)]
        elif isinstance(value, (set, frozenset)):
            inner = [(f"{path}{{{k}}}", item) for k, item in enumerate(value)]
        elif isinstance(value, nn.Module):
            parts = {**value._modules, **value._parameters, **value._buffers}
            own = {key: item for key, item in vars(value).items() if key not in ("_modules", "_parameters", "_buffers", *HOOKS)}
            inner = [(f"{path}.{key}".removeprefix("."), item) for key, item in {**parts, **own}.items()]
        else:
            inner = [(f"{path}.{key}".removeprefix("."), item) for key, item in getattr(value, "__dict__", {}).items()]
        for name, item in inner:
            yield from _walk(item, name, seen, depth + 1)


def _tensors(model: nn.Module):
    return ((path, value) for path, value in _walk(model) if isinstance(value, Tensor))


def _leaves(model: nn.Module):
    for path, value in _walk(model):
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            yield path, (str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes()
                         if value.dim() else repr(value.item()))
        elif isinstance(value, np.ndarray):
            yield path, (value.dtype.str, value.shape, value.tobytes())
        else:
            yield path, repr(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _near(a: Tensor, b: Tensor) -> bool:
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-4 * float(a.abs().max() + b.abs().max()) + 1e-12
