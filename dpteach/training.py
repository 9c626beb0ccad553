"""One generator for every way to train: plain SGD, DP-SGD from the four moves, and Opacus.

``for step in train(...)`` is the whole interface. A notebook loops over it, a test takes three steps of it, an explorer
drains it in a thread. Nobody passes callbacks.
"""

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import choice
from dpteach.accounting import epsilon_path
from dpteach.bookkeeping import draws, known_layers
from dpteach.data import Data
from dpteach.guards import check_alone, check_model, check_trainable, kept_still, put_modes, training_modes
from dpteach.mechanism import add_noise, clipped_sum_and_losses, poisson_batches, sample_losses
from dpteach.optim import FOR_OPACUS, OPTIMIZERS
from dpteach.randomness import RANDOM_STATE, generators, own_stream, seeds
from dpteach.settings import Settings

__all__ = ["METHODS", "OPTIMIZERS", "Settings", "Step", "accuracy", "dpsgd_steps", "sgd_steps", "train"]

METHODS = ("sgd", "dpsgd", "opacus")


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
    if method != "sgd" and delta_warning(settings, len(data)):
        warnings.warn(delta_warning(settings, len(data)), stacklevel=2)
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
            from dpteach.with_opacus import check_gradients

            check_gradients(model, few.X, few.y)
    finally:
        put_modes(modes)


def begin(
    model: nn.Module, data: Data, settings: Settings, *, method: str, optimizer: str, test_data: Data | None = None
) -> Iterator[Step]:
    """:func:`train`, for what :func:`check` has passed, and without a word on δ."""
    per_epoch = settings.steps_per_epoch(len(data))
    steps = settings.epochs * per_epoch
    path = np.full(steps, math.inf)
    if method != "sgd":
        path = epsilon_path(
            noise_multiplier=settings.noise_multiplier,
            sample_rate=settings.sample_rate(len(data)),
            steps=steps,
            target_delta=settings.target_delta,
        )
    return _run(model, data, settings, method, optimizer, path, test_data)


def _run(
    model: nn.Module,
    data: Data,
    settings: Settings,
    method: str,
    optimizer: str,
    path: np.ndarray,
    test_data: Data | None,
) -> Iterator[Step]:
    device, per_epoch = next(model.parameters()).device, settings.steps_per_epoch(len(data))
    data = Data(data.X.to(device), data.y.to(device))
    model.train() if method == "sgd" else training_modes(model)
    model.zero_grad()  # an old gradient may be a private one
    updates = {"sgd": sgd_steps, "dpsgd": dpsgd_steps, "opacus": _opacus_steps}[method]
    make_optimizer = (FOR_OPACUS if method == "opacus" else OPTIMIZERS)[optimizer]
    losses = updates(model, data, settings, make_optimizer(model.parameters(), lr=settings.lr))
    try:
        for step, loss in enumerate(losses, start=1):
            reached = accuracy(model, test_data) if test_data is not None and step % per_epoch == 0 else None
            yield Step(step, len(path), (step - 1) // per_epoch + 1, loss, float(path[step - 1]), reached)
    finally:
        losses.close()  # a run that is given up leaves no hook behind


def sgd_steps(model: nn.Module, data: Data, settings: Settings, optimizer: Any) -> Generator[float, None, None]:
    """The ordinary loop: shuffled batches, their mean gradient, no privacy. Yields each batch's loss."""
    sampling = torch.Generator().manual_seed(seeds(settings.seed)[0])
    forward_pass = _forward_pass(model, settings.seed)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(data), generator=sampling).split(settings.batch_size):
            X, y = data[batch]
            optimizer.zero_grad()
            with forward_pass():
                loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()
            yield loss.item()


def dpsgd_steps(model: nn.Module, data: Data, settings: Settings, optimizer: Any) -> Generator[float, None, None]:
    """DP-SGD, from the four moves of :mod:`dpteach.mechanism`. Yields each batch's loss, before its update.

    The number of records, n, counts as public, as in Opacus: the sum is divided by n·q.
    """
    n, C, q = len(data), settings.max_grad_norm, settings.sample_rate(len(data))
    steps = settings.epochs * settings.steps_per_epoch(n)
    sampling, noise = generators(settings.seed)
    parameters = list(model.parameters())
    forward_pass = _forward_pass(model, settings.seed, private=True)
    for batch in poisson_batches(n, q, steps, sampling):  # move 1
        X, y = data[batch]
        with forward_pass():
            summed, losses = clipped_sum_and_losses(model, F.cross_entropy, X, y, C)  # moves 2 and 3
        noisy = add_noise(summed, settings.noise_multiplier, C, noise)  # move 4
        set_gradient(parameters, noisy / (n * q))
        optimizer.step()
        optimizer.zero_grad()  # no gradient stays for a later step, or leaves with the model
        yield losses.mean().item()  # NaN for an empty batch


def _opacus_steps(model: nn.Module, data: Data, settings: Settings, optimizer: Any) -> Generator[float, None, None]:
    from dpteach.with_opacus import opacus_steps  # 1 s to import, and only this method needs it

    yield from opacus_steps(model, data, settings, optimizer)


def set_gradient(parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """Hand a flat gradient ``(P,)`` to those of the parameters that are trained now, in their order."""
    trained = [p for p in parameters if p.requires_grad]
    for p, part in zip(trained, gradient.split([p.numel() for p in trained])):
        p.grad = part.view_as(p).to(p.dtype)


def _forward_pass(
    model: nn.Module, seed: int | None, private: bool = False
) -> Callable[[], AbstractContextManager[None]]:
    """A context for each forward pass: what the model draws comes from the run's own stream.

    Where the run is private, nothing of the records stays in the model.
    """
    device = next(model.parameters()).device
    stream = own_stream(device, seed) if draws(model) else nullcontext
    guarded = private and known_layers(model) is None

    @contextmanager
    def forward_pass() -> Iterator[None]:
        with kept_still(model) if guarded else nullcontext(), stream():
            yield

    return forward_pass


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


def delta_warning(settings: Settings, n: int) -> str:
    """The sentence for a δ of 1/n or more on ``n`` records; empty where δ is below."""
    if settings.target_delta < 1 / n:
        return ""
    return (
        f"target_delta should be below 1/n = {1 / n:.1g} for {n} records, got {settings.target_delta:g}: a mechanism "
        "that publishes one random record outright would also meet it"
    )
