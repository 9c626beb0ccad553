"""One generator for every way to train: plain SGD, DP-SGD from the four moves, and Opacus.

``for step in train(...)`` is the whole interface. A notebook loops over it, a test takes three steps of it, an explorer
drains it in a thread. Nobody passes callbacks.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import choice, clipping_norm, number, whole
from dpteach.accounting import epsilon_path
from dpteach.bookkeeping import draws, known_layers
from dpteach.data import Data
from dpteach.guards import (
    RANDOM_STATE,
    check_alone,
    check_model,
    check_trainable,
    copied,
    kept_still,
    put_modes,
    same_shape,
    shape_of,
    training_modes,
    vouch,
)
from dpteach.mechanism import (
    Random,
    add_noise,
    clipped_sum_and_losses,
    per_sample_gradients,
    poisson_batches,
    sample_losses,
)
from dpteach.randomness import SystemRandom

METHODS = ("sgd", "dpsgd", "opacus")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": torch.optim.Adam,
}


class _SGD:
    """``torch.optim.SGD``, to the bit. The first optimizer from ``torch.optim`` imports PyTorch's compiler: 150 MB, and seconds
    before the first step of a learner's first run.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.0):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.velocities: dict[Tensor, Tensor] = {}

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            if p.grad is None:
                continue
            change = p.grad
            if self.momentum:
                before = self.velocities.get(p)
                change = change.clone() if before is None else before.mul_(self.momentum).add_(change)
                self.velocities[p] = change
            p.add_(change, alpha=-self.lr)


WITHOUT_IMPORTS = {"sgd": _SGD, "momentum": lambda parameters, lr: _SGD(parameters, lr, momentum=0.9)}


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Frozen; ``dataclasses.replace`` makes a changed copy.

    Args:
        noise_multiplier: σ >= 0. The noise on the clipped sum has standard deviation σ·C.
        max_grad_norm: C >= 1e-20, the bound on the L2 norm of a sample's gradient; ``inf`` only where σ = 0.
        epochs: passes over the data, >= 1. One epoch is ⌈n / batch_size⌉ steps.
        batch_size: >= 1 and at most the number of records. Under Poisson sampling each record takes part in a step
            with probability q = 1 / ⌈n / batch_size⌉, so the *expected* batch is n·q, the sizes vary.
        lr: learning rate > 0.
        target_delta: δ in (0, 1), the one at which ε is reported.
        seed: >= 0; the same seed repeats the run bit for bit on one machine: for a lesson. None draws sampling and
            noise from the operating system's cryptographic random numbers, which nobody can repeat: for a release.

    Raises:
        ValueError: names the argument, its value and what it may be.

    >>> Settings(max_grad_norm=-1.0)
    Traceback (most recent call last):
    ValueError: max_grad_norm must be a number > 0, got -1.0
    """

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.5
    target_delta: float = 1e-5
    seed: int | None = 0

    def __post_init__(self):
        number("noise_multiplier", self.noise_multiplier, low=0)
        clipping_norm(self.max_grad_norm)
        if math.isinf(self.max_grad_norm) and self.noise_multiplier > 0:
            raise ValueError("max_grad_norm must be finite where noise_multiplier > 0, got inf: the noise is σ·C")
        number("lr", self.lr, low=0, above=True)
        number("target_delta", self.target_delta, low=0, above=True, high=1)
        for name, low in (("epochs", 1), ("batch_size", 1), *([] if self.seed is None else [("seed", 0)])):
            object.__setattr__(self, name, whole(name, getattr(self, name), low=low))  # 10.0, as a slider says, is 10

    def steps_per_epoch(self, n: int) -> int:
        """⌈n / batch_size⌉ for ``n`` records. ValueError if the batch is larger than the data."""
        if self.batch_size > n:
            raise ValueError(f"batch_size must be at most the number of records ({n}), got {self.batch_size}")
        return math.ceil(n / self.batch_size)

    def sample_rate(self, n: int) -> float:
        """Q for ``n`` records: one over the number of steps in an epoch, as in Opacus."""
        return 1 / self.steps_per_epoch(n)


@dataclass(frozen=True)
class Step:
    """One step of a run, as it happened.

    Attributes:
        step: 1, 2, … ``steps``.
        steps: how many the whole run has.
        epoch: 1, 2, … ``epochs``.
        loss: mean loss over the step's batch, before its update; NaN for an empty batch. It is computed from private
            data, and ε does not cover showing it.
        epsilon: ε of all steps so far, at ``target_delta``, by RDP (an upper bound); ``inf`` for ``"sgd"`` or σ = 0.
        accuracy: share of ``test_data`` that is classified rightly, at the end of an epoch; otherwise None.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    epsilon: float
    accuracy: float | None = None


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    *,
    method: str = "dpsgd",
    optimizer: str = "sgd",
    test_data: Data | None = None,
) -> Iterator[Step]:
    """Train ``model`` in place, one :class:`Step` at a time. Nothing runs until the first step is asked for.

    Args:
        model: maps ``(B, ...)`` records to ``(B, classes)`` scores; the loss is cross-entropy. On whichever device it
            is.
        data: the private records; copied to the model's device.
        settings: σ, C, epochs, and so on.
        method: ``"sgd"`` (shuffled batches, no privacy), ``"dpsgd"`` (the four moves of ``mechanism``), or ``"opacus"``
            (``PrivacyEngine.make_private``). The private two have the same sampling, noise, division and ε; their
            random numbers differ.
        optimizer: ``"sgd"``, ``"momentum"`` (0.9) or ``"adam"``; takes the step from the (private) gradient.
        test_data: records for ``Step.accuracy``; without them it stays None.

    Yields:
        :class:`Step`, ``epochs * steps_per_epoch`` of them.

    Raises:
        ValueError: at the call, if an argument is out of its range, or the model can't be trained privately: it has
            nothing to train, mixes the samples of a batch, or keeps something of the records that no noise covers (see
            :mod:`dpteach.guards`).

    Warns:
        UserWarning: if δ is 1/n or more: such a δ allows a mechanism that publishes one of the n records outright.

    Source: Abadi et al. 2016, Algorithm 1.
    """
    check(model, data, settings, method=method, optimizer=optimizer)
    return begin(model, data, settings, method=method, optimizer=optimizer, test_data=test_data)


def check(model: nn.Module, data: Data, settings: Settings, *, method: str = "dpsgd", optimizer: str = "sgd") -> None:
    """Raise what :func:`train` would raise at its call, and what its first step would: nothing is trained."""
    choice("method", method, METHODS)
    choice("optimizer", optimizer, OPTIMIZERS)
    settings.steps_per_epoch(len(data))
    check_trainable(model)
    if method == "sgd":
        return
    device, modes = next(model.parameters()).device, training_modes(model)
    try:
        check_model(model)
        if known_layers(model) is None:
            check_alone(model, data.X.to(device), settings.batch_size if method == "opacus" else 9)
        few = data.take(torch.linspace(0, len(data) - 1, min(3, len(data))).long())
        few = Data(few.X.to(device), few.y.to(device))
        with RANDOM_STATE, torch.random.fork_rng(), torch.no_grad():
            sample_losses(
                F.cross_entropy, model(few.X.clone()), few.y
            )  # a record that doesn't fit, before anything is charged
        if method == "opacus":
            _check_gradients(model, few.X, few.y)
    finally:
        put_modes(modes)


def begin(model, data, settings, *, method: str, optimizer: str, test_data: Data | None = None) -> Iterator[Step]:
    """:func:`train`, for what :func:`check` has passed."""
    if method != "sgd" and settings.target_delta >= 1 / len(data):
        warnings.warn(delta_warning(settings, len(data)), stacklevel=3)
    updates = {"sgd": _sgd, "dpsgd": _dpsgd, "opacus": _opacus}[method]
    make_optimizer = OPTIMIZERS[optimizer]
    if method != "opacus":  # Opacus takes torch.optim's only
        make_optimizer = WITHOUT_IMPORTS.get(optimizer, make_optimizer)
    return _run(model, data, settings, updates, make_optimizer, test_data)


def delta_warning(settings: Settings, n: int) -> str:
    """The sentence for a δ of 1/n or more on ``n`` records; empty where δ is below."""
    if settings.target_delta < 1 / n:
        return ""
    return (
        f"target_delta should be below 1/n = {1 / n:.1g} for {n} records, got {settings.target_delta:g}: "
        "a mechanism that publishes one random record outright would also meet it"
    )


def _run(model, data, settings, updates, make_optimizer, test_data) -> Iterator[Step]:
    per_epoch = settings.steps_per_epoch(len(data))
    steps = settings.epochs * per_epoch
    device = next(model.parameters()).device
    data = Data(data.X.to(device), data.y.to(device))
    path = (
        np.full(steps, math.inf)
        if updates is _sgd
        else epsilon_path(
            noise_multiplier=settings.noise_multiplier,
            sample_rate=settings.sample_rate(len(data)),
            steps=steps,
            target_delta=settings.target_delta,
        )
    )
    if updates is _sgd:
        model.train()
    else:
        training_modes(model)
    model.zero_grad(set_to_none=True)  # an old gradient may be a private one
    optimizer = make_optimizer(model.parameters(), lr=settings.lr)
    losses = updates(model, data, settings, optimizer)
    try:
        for step, loss in enumerate(losses, start=1):
            reached = accuracy(model, test_data) if test_data is not None and step % per_epoch == 0 else None
            yield Step(step, steps, (step - 1) // per_epoch + 1, loss, float(path[step - 1]), reached)
    finally:
        losses.close()  # a run that is given up leaves no hook behind


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of ``data`` that ``model`` classifies rightly, in [0, 1]."""
    device, modes = next(model.parameters()).device, {layer: layer.training for layer in model.modules()}
    model.eval()
    try:
        right = sum(
            int((model(X.to(device)).argmax(1) == y.to(device)).sum())
            for X, y in zip(data.X.split(1000), data.y.split(1000))
        )
    finally:
        put_modes(modes)
    return right / len(data)


def _generators(seed: int | None) -> tuple[Random, Random]:
    """One for the sampling and one for the noise: the same seed in both would tie the two together."""
    if seed is None:
        return SystemRandom(), SystemRandom()
    sampling, noise, _ = _seeds(seed)
    return torch.Generator().manual_seed(sampling), torch.Generator().manual_seed(noise)


def _seeds(seed: int | None) -> list[int]:
    return [int(s >> np.uint64(1)) for s in np.random.SeedSequence(seed).generate_state(3, dtype=np.uint64)]


def _own_random_numbers(model: nn.Module, seed: int | None):
    """A context for each forward pass: Dropout draws from the run's own stream, and the reader's global one stays where it was.

    PyTorch's layers know the global stream only, so it is swapped, where the model may draw at all, by one run at a
    time. Code of the reader's that draws from the global stream in another thread at that moment gets the run's
    numbers.
    """
    device = next(model.parameters()).device
    own = {"cpu": torch.Generator().manual_seed(_seeds(seed)[2]).get_state()}
    if device.type == "cuda":
        own["cuda"] = torch.Generator(device).manual_seed(_seeds(seed)[2]).get_state()
    get = {"cpu": torch.get_rng_state, "cuda": lambda: torch.cuda.get_rng_state(device)}
    put = {"cpu": torch.set_rng_state, "cuda": lambda state: torch.cuda.set_rng_state(state, device)}

    @contextmanager
    def swapped():
        with RANDOM_STATE:
            outside = {kind: get[kind]() for kind in own}
            try:
                for kind, state in own.items():
                    put[kind](state)
                yield
            finally:
                for kind, state in outside.items():
                    own[kind] = get[kind]()
                    put[kind](state)

    return swapped if draws(model) else nullcontext


def _sgd(model, data, settings, optimizer) -> Iterator[float]:
    sampling = torch.Generator().manual_seed(_seeds(settings.seed)[0])
    own_random_numbers = _own_random_numbers(model, settings.seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(data), generator=sampling).split(settings.batch_size):
            X, y = data[batch]
            optimizer.zero_grad()
            with own_random_numbers():
                loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()
            yield loss.item()


def _dpsgd(model, data, settings, optimizer) -> Iterator[float]:
    n, C = len(data), settings.max_grad_norm
    q = settings.sample_rate(n)
    sampling, noise = _generators(settings.seed)
    own_random_numbers = _own_random_numbers(model, settings.seed)
    for batch in poisson_batches(n, q, settings.epochs * settings.steps_per_epoch(n), sampling):
        X, y = data[batch]
        still = kept_still if known_layers(model) is None else nullcontext
        with still(model), own_random_numbers():
            summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)
        gradient = add_noise(summed, settings.noise_multiplier, C, noise) / (n * q)
        _set_gradient(model, gradient)
        optimizer.step()
        model.zero_grad(set_to_none=True)  # no gradient stays for a later step, or leaves with the model
        yield losses.mean().item()  # NaN for an empty batch


def _set_gradient(model: nn.Module, gradient: Tensor) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p, part in zip(trainable, gradient.split([p.numel() for p in trainable])):
        p.grad = part.view_as(p).to(p.dtype)


def _opacus(model, data, settings, optimizer) -> Iterator[float]:
    from opacus import PrivacyEngine  # 1 s to import, and only this method needs it

    n, device = len(data), data.X.device
    sampling, noise = _generators(settings.seed)
    own_random_numbers = _own_random_numbers(model, settings.seed)
    seeded = None if settings.seed is None else noise
    if seeded and device.type != "cpu":  # Opacus draws the noise where the model is
        seeded = torch.Generator(device).manual_seed(noise.initial_seed())
    # No input asks for a gradient, and the parameters' gradients are right all the same. A filter that stays, since a
    # generator cannot hold warnings.catch_warnings open between its steps.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    loader = torch.utils.data.DataLoader(data, batch_size=settings.batch_size)
    with warnings.catch_warnings():  # known here (see SystemRandom); to a reader's own PrivacyEngine it is still said
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        engine = PrivacyEngine(accountant="rdp")
    private, optimizer, _ = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_generator=seeded,
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=min(settings.max_grad_norm, torch.finfo(torch.float32).max),  # σ·C would be 0·inf = NaN
    )
    # Opacus rounds n·q down, to 3 for 10/3 and to 0 for 49 · (1/49). Its loader, which is not used here, rounds 1/q
    # down (92 steps where 93 were meant) and draws q on a grid of 2⁻²⁴.
    q = settings.sample_rate(n)
    optimizer.expected_batch_size = n * q
    if settings.seed is None:
        optimizer.add_noise = lambda: _noise_from_the_system(optimizer, noise)
    shape = shape_of(model)
    try:
        for batch in poisson_batches(n, q, settings.epochs * settings.steps_per_epoch(n), sampling):
            X, y = data[batch]
            if not same_shape(shape, shape_of(model)):
                raise ValueError(
                    "model must stay as it is while Opacus trains it: a layer or a hook has changed since the run began"
                )
            if len(batch):
                with kept_still(model):
                    with own_random_numbers():
                        losses = sample_losses(F.cross_entropy, private(X), y)
                    # Opacus multiplies by the batch's size; cross_entropy's own mean would divide by the labels that it
                    # does not ignore.
                    (losses.sum() / len(X)).backward()
                _check_rows(optimizer, len(X))
            else:  # some layers can't run on nothing, and that would tell
                losses = X.new_zeros(0)
                for p in optimizer.params:
                    p.grad_sample = p.new_zeros(0, *p.shape)
            optimizer.step()
            optimizer.zero_grad(
                set_to_none=True
            )  # the clipped sum, without noise, is kept on the parameters until then
            yield losses.mean().item()
    finally:
        private.to_standard_module()
        model.zero_grad(set_to_none=True)
        for part, names in (
            (model.parameters(), ("grad_sample", "summed_grad")),
            (model.modules(), ("activations", "max_batch_len")),
        ):
            for holder in part:
                for name in names:  # of the records, and pickled with a whole model
                    if name in vars(holder):
                        delattr(holder, name)


def _check_gradients(model: nn.Module, X: Tensor, y: Tensor) -> None:
    """Opacus' gradients of a few records must be those of each record alone: it takes the first dimension of each layer's input,
    whatever the model has made of it, for the records.
    """
    from opacus import GradSampleModule

    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise ValueError(
            "model must be float32 or float64 with method='opacus', which sums in the model's precision: use "
            "model.float()"
        )
    finite = X.reshape(len(X), -1).isfinite().all(1)
    X, y = X[finite], y[finite]
    if len(X) == 0:
        return
    still = copied(model)
    for layer in still.modules():  # nothing draws; Opacus looks at layers with parameters of their own in training only
        layer.training &= any(p.requires_grad for p in layer.parameters(recurse=False))
    vouch(still)
    rows = per_sample_gradients(still, F.cross_entropy, X, y)
    wrapped = GradSampleModule(copied(still))
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # as in _opacus
    with torch.enable_grad():
        (sample_losses(F.cross_entropy, wrapped(X.clone()), y).sum() / len(X)).backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    theirs = [
        p.grad_sample.flatten(1) if p.grad_sample is not None else p.new_zeros(len(X), p.numel()) for p in trained
    ]
    if any(len(part) != len(X) for part in theirs) or not torch.allclose(
        torch.cat(theirs, 1), rows, rtol=1e-3, atol=1e-4 * float(rows.nan_to_num().abs().max()) + 1e-12, equal_nan=True
    ):
        raise ValueError(
            "model must treat each sample alone along the first dimension in every layer, but Opacus' gradients of "
            "three records are "
            "not those of each record alone: clipping would bound something else. Use method='dpsgd', which takes "
            "each record alone."
        )


def _check_rows(optimizer, records: int) -> None:
    """One gradient a record, and finite: Opacus turns an infinity into a model of NaN, which tells that the record took part. It
    counts as zero, as in ``clip``.
    """
    for p in optimizer.params:
        if p.grad_sample is None:  # a parameter that this batch did not use
            p.grad_sample = p.new_zeros(records, *p.shape)
        if len(p.grad_sample) != records:
            raise ValueError(
                f"model must treat each sample alone, but Opacus found {len(p.grad_sample)} gradients for {records} "
                "records: a layer sees "
                "another first dimension. Use method='dpsgd', which takes each record alone."
            )
    finite = torch.stack([p.grad_sample.flatten(1).isfinite().all(1) for p in optimizer.params]).all(0)
    if not bool(finite.all()):
        for p in optimizer.params:
            p.grad_sample[~finite] = 0.0


def _noise_from_the_system(optimizer, noise: SystemRandom) -> None:
    for p in optimizer.params:
        p.grad = add_noise(p.summed_grad, optimizer.noise_multiplier, optimizer.max_grad_norm, noise).view_as(p)
