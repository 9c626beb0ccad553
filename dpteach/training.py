"""One generator for every way to train: plain SGD, DP-SGD from the four moves, and Opacus.

``for step in train(...)`` is the whole interface. A notebook loops over it, a test takes three steps of it, an explorer
drains it in a thread. Nobody passes callbacks.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import choice, number, whole
from dpteach.accounting import epsilon_path
from dpteach.data import Data
from dpteach.mechanism import add_noise, clipped_sum_and_losses, poisson_batches

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
        max_grad_norm: C > 0, the bound on the L2 norm of a sample's gradient; ``inf`` only where σ = 0.
        epochs: passes over the data, >= 1. One epoch is ⌈n / batch_size⌉ steps.
        batch_size: >= 1 and at most the number of records. Under Poisson sampling each record takes part in a step
            with probability q = 1 / ⌈n / batch_size⌉, so the *expected* batch is n·q, the sizes vary.
        lr: learning rate > 0.
        target_delta: δ in (0, 1), the one at which ε is reported.
        seed: >= 0; the same seed repeats the run bit for bit on one machine.

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
    seed: int = 0

    def __post_init__(self):
        number("noise_multiplier", self.noise_multiplier, low=0)
        number("max_grad_norm", self.max_grad_norm, low=0, above=True, below=False)
        if math.isinf(self.max_grad_norm) and self.noise_multiplier > 0:
            raise ValueError("max_grad_norm must be finite where noise_multiplier > 0, got inf: the noise is σ·C")
        number("lr", self.lr, low=0, above=True)
        number("target_delta", self.target_delta, low=0, above=True, high=1)
        for name, low in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), low=low))  # 10.0, as a slider says, is 10

    def steps_per_epoch(self, n: int) -> int:
        """⌈n / batch_size⌉ for ``n`` records. ValueError if the batch is larger than the data."""
        if self.batch_size > n:
            raise ValueError(f"batch_size must be at most the number of records ({n}), got {self.batch_size}")
        return math.ceil(n / self.batch_size)

    def sample_rate(self, n: int) -> float:
        """q for ``n`` records: one over the number of steps in an epoch, as in Opacus."""
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
        model: maps ``(B, ...)`` records to ``(B, classes)`` scores; the loss is cross-entropy. On whichever device it is.
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
        ValueError: at the call, if an argument is out of its range.

    Warns:
        UserWarning: if δ is 1/n or more: such a δ allows a mechanism that publishes one of the n records outright.

    Source: Abadi et al. 2016, Algorithm 1.
    """
    choice("method", method, METHODS)
    choice("optimizer", optimizer, OPTIMIZERS)
    settings.steps_per_epoch(len(data))
    if method != "sgd" and settings.target_delta >= 1 / len(data):
        warnings.warn(delta_warning(settings, len(data)), stacklevel=2)
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
        np.full(steps, math.inf) if updates is _sgd
        else epsilon_path(noise_multiplier=settings.noise_multiplier, sample_rate=settings.sample_rate(len(data)),
                          steps=steps, target_delta=settings.target_delta)
    )
    model.train()
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
    device = next(model.parameters()).device
    model.eval()
    right = sum(
        int((model(X.to(device)).argmax(1) == y.to(device)).sum())
        for X, y in zip(data.X.split(1000), data.y.split(1000))
    )
    model.train()
    return right / len(data)


def _generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """One for the sampling and one for the noise: the same seed in both would tie the two together."""
    seeds = np.random.SeedSequence(seed).generate_state(2, dtype=np.uint64)
    sampling, noise = (torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in seeds)
    return sampling, noise


def _sgd(model, data, settings, optimizer) -> Iterator[float]:
    sampling, _ = _generators(settings.seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(data), generator=sampling).split(settings.batch_size):
            X, y = data[batch]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()
            yield loss.item()


def _dpsgd(model, data, settings, optimizer) -> Iterator[float]:
    n, C = len(data), settings.max_grad_norm
    q = settings.sample_rate(n)
    sampling, noise = _generators(settings.seed)
    for batch in poisson_batches(n, q, settings.epochs * settings.steps_per_epoch(n), sampling):
        X, y = data[batch]
        summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)
        gradient = add_noise(summed, settings.noise_multiplier, C, noise) / (n * q)
        _set_gradient(model, gradient)
        optimizer.step()
        yield losses.mean().item()  # NaN for an empty batch


def _set_gradient(model: nn.Module, gradient: Tensor) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p, part in zip(trainable, gradient.split([p.numel() for p in trainable])):
        p.grad = part.view_as(p)


def _opacus(model, data, settings, optimizer) -> Iterator[float]:
    from opacus import PrivacyEngine  # 1 s to import, and only this method needs it

    n, device = len(data), data.X.device
    sampling, noise = _generators(settings.seed)
    if noise.device != device:  # Opacus draws the noise where the model is
        noise = torch.Generator(device).manual_seed(noise.initial_seed())
    loader = torch.utils.data.DataLoader(
        data, batch_size=settings.batch_size, generator=sampling, collate_fn=lambda batch: batch
    )
    with warnings.catch_warnings():  # known here (see add_noise); to a reader's own PrivacyEngine it is still said
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_generator=noise,
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=min(settings.max_grad_norm, torch.finfo(torch.float32).max),  # σ·C would be 0·inf = NaN
    )
    # Opacus rounds 1/q and n·q down: 92 steps where 93 were meant, a batch of 3 for 10/3, and of 0 for 49 · (1/49).
    loader.batch_sampler.steps = settings.steps_per_epoch(n)
    optimizer.expected_batch_size = n * settings.sample_rate(n)
    # No input asks for a gradient, and the parameters' gradients are right all the same. A filter that stays, since a
    # generator cannot hold warnings.catch_warnings open between its steps.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    try:
        for _ in range(settings.epochs):
            for X, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(private(X), y)
                loss.backward()
                optimizer.step()
                yield loss.item()
    finally:
        private.to_standard_module()
