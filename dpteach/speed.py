"""How long a private step takes, how much memory, and how long an epoch: here, and by Opacus, beside the plain step.

``python -m dpteach.experiments speed`` measures all of it and stores the rows.
"""

import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach import models
from dpteach.data import Data, load_mnist
from dpteach.mechanism import add_noise, clipped_sum_and_losses
from dpteach.optim import SGD
from dpteach.settings import Settings
from dpteach.stack import train_many
from dpteach.training import set_gradient, train

Row = dict[str, str | int | float]

BATCH, ROUNDS = 256, 9
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # and a record's shape, and the classes
    "two moons 2-32-2": (lambda: models.mlp(2, 32, 2, activation="tanh"), (2,), 2),
    "perceptron 784-128-10": (lambda: models.mlp(784, 128, 10), (1, 28, 28), 10),
    "cnn": (models.cnn, (1, 28, 28), 10),
}
WAYS = ("plain", "plain and noise", "here", "Opacus hooks", "Opacus ghost")
STACK_WAYS = {"stack, a run": False, "stack of shared batches, a run": True}
MEMORY_WAYS = ("plain", "here", "Opacus hooks", "Opacus ghost")
STACKS = {"two moons 2-32-2": 30, "perceptron 784-128-10": 8}  # runs in a stack
MEMORY_BATCHES = (256, 1024, 4096)
_SETTINGS = Settings(1.0, 1.0, epochs=1, batch_size=BATCH, lr=0.05, target_delta=1e-5)
_AT_LEAST = 0.15  # seconds a measurement: a single step would find the caches and the allocator cold


def rows() -> Iterator[Row]:
    """All of it: some two minutes. See :func:`step_times`, :func:`step_memory`, :func:`epoch_times`."""
    for threads in (1, 2):
        for model in MODELS:
            yield from step_times(model, threads)
    yield from step_memory()
    yield from epoch_times()


def _row(what: str, model: str, way: str, threads: int, batch: int = BATCH, **numbers: float | str) -> Row:
    row: Row = {"what": what, "model": model, "way": way, "threads": threads, "batch": batch}
    row |= {name: numbers.get(name, "") for name in ("ratio", "milliseconds", "megabytes", "seconds")}
    return row | {"processor": _processor(), "python": platform.python_version()}


def step_times(model: str, threads: int) -> Iterator[Row]:
    """A whole step, forward to update, on one batch of random records: a row a way.

    All ways take turns, nine times. ``ratio`` is the median of the nine ratios to the plain step of the same turn. One
    thread is measured in processor seconds, more in seconds. A stack's step is divided by its runs, and holds their
    sampling too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    try:
        steps = {way: (_stepper(model, way, BATCH), 1) for way in WAYS}
        for name, shared in STACK_WAYS.items():
            if model in STACKS:
                steps[name] = _stack_stepper(model, STACKS[model], shared), STACKS[model]
        times = {}
        for way, (step, _) in steps.items():
            step()
            began = clock()
            step()
            times[way] = max(1, int(_AT_LEAST / max(clock() - began, 1e-6)))
        turns = []
        for _ in range(ROUNDS):
            turn = {}
            for way, (step, runs) in steps.items():
                began = clock()
                for _ in range(times[way]):
                    step()
                turn[way] = (clock() - began) / times[way] / runs
            turns.append(turn)
    finally:
        torch.set_num_threads(before)
    for way in steps:
        ratio = statistics.median(turn[way] / turn["plain"] for turn in turns)
        took = statistics.median(turn[way] for turn in turns) * 1000
        yield _row("step", model, way, threads, ratio=round(ratio, 3), milliseconds=round(took, 4))


def _stepper(name: str, way: str, batch: int) -> Callable[[], object]:
    """Something that takes one step at each call, always on the same records."""
    make, shape, classes = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    X, y = torch.rand(batch, *shape, generator=generator), torch.randint(classes, (batch,), generator=generator)
    model = make()
    if way.startswith("Opacus"):
        return _opacus_stepper(model, X, y, way.removeprefix("Opacus "))
    trained = list(model.parameters())
    optimizer, size = SGD(trained, _SETTINGS.lr), sum(p.numel() for p in trained)

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()

    def plain_and_noise() -> None:
        plain()
        torch.randn(size, generator=generator)

    def here() -> None:
        summed, _ = clipped_sum_and_losses(model, F.cross_entropy, X, y, _SETTINGS.max_grad_norm)
        noisy = add_noise(summed, _SETTINGS.noise_multiplier, _SETTINGS.max_grad_norm, generator)
        set_gradient(trained, noisy / batch)
        optimizer.step()
        optimizer.zero_grad()

    return {"plain": plain, "plain and noise": plain_and_noise, "here": here}[way]


def _opacus_stepper(model: nn.Module, X: Tensor, y: Tensor, mode: str) -> Callable[[], object]:
    loader = torch.utils.data.DataLoader(Data(X, y), batch_size=len(X))
    private, optimizer, criterion, _ = _made_private(model, loader, mode, poisson_sampling=False)

    def step() -> None:
        optimizer.zero_grad()
        criterion(private(X), y).backward()
        optimizer.step()

    return step


def _made_private(model: nn.Module, loader: Any, mode: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    from opacus import PrivacyEngine

    warnings.filterwarnings("ignore", message="Secure RNG turned off|Full backward hook is firing|Optimal order is")
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=_SETTINGS.lr),
        data_loader=loader,
        noise_multiplier=_SETTINGS.noise_multiplier,
        max_grad_norm=_SETTINGS.max_grad_norm,
        grad_sample_mode=mode,
        **options,
    )
    return made if mode == "ghost" else (made[0], made[1], F.cross_entropy, made[2])


def _stack_stepper(name: str, runs: int, shared: bool) -> Callable[[], object]:
    make, shape, classes = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    n = 8 * BATCH
    data = Data(torch.rand(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator))
    grid = [Settings(1.0, 1.0, 10**5, BATCH, seed=seed) for seed in range(runs)]
    return train_many(lambda s: make(), data, grid, shared_batches=shared).__next__


def step_memory() -> Iterator[Row]:
    """What a step of the CNN needs beyond what was there before it, at its highest: a process a way. Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return
    for way in MEMORY_WAYS:
        code = f"from dpteach.speed import print_memory; print_memory({way!r})"
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for batch, megabytes in zip(MEMORY_BATCHES, said.split(), strict=True):
            yield _row("memory", "cnn", way, 1, batch, megabytes=float(megabytes))


def print_memory(way: str) -> None:
    """For :func:`step_memory`: megabytes, batch after batch."""
    torch.set_num_threads(1)
    _stepper("cnn", way, 8)()
    steps = [_stepper("cnn", way, batch) for batch in MEMORY_BATCHES]  # all records are there before the first step
    before = _kilobytes("VmRSS")
    for step in steps:  # each needs more than the last, so what the allocator has kept is in its own need
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark is taken anew
        step()
        print(round((_kilobytes("VmHWM") - before) / 1024, 1))


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def epoch_times() -> Iterator[Row]:
    """An epoch of the CNN on MNIST, one thread, in processor seconds: here, and by Opacus as its tutorial writes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = load_mnist()
        for way, epoch in (("here", _epoch_here), ("Opacus hooks", _epoch_of_opacus)):
            began = time.process_time()
            epoch(data)
            yield _row("epoch", "cnn", way, 1, seconds=round(time.process_time() - began, 2))
    finally:
        torch.set_num_threads(before)


def _epoch_here(data: Data) -> None:
    for _ in train(models.cnn(), data, _SETTINGS):
        pass


class _Items(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Image by image, from bytes, as ``datasets.MNIST`` with ``ToTensor`` and ``Normalize`` gives them."""

    def __init__(self, data: Data):
        self.images, self.labels = (data.X * 255).round().to(torch.uint8), data.y.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float().div(255).sub(0.1307).div(0.3081), self.labels[index]


def _epoch_of_opacus(data: Data) -> None:
    """Source: Opacus' MNIST example, without torchvision."""
    loader = torch.utils.data.DataLoader(_Items(data), batch_size=BATCH)
    model, optimizer, criterion, loader = _made_private(models.cnn(), loader, "hooks")
    losses = []
    for X, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
