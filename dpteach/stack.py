"""Many runs as one: a stack of perceptrons that differ in σ, C, learning rate and seed, trained by batched products.

Run by run it is the algorithm of :func:`dpteach.training.train`; a whole grid takes seconds.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpteach._checks import choice
from dpteach.accounting import epsilon_path
from dpteach.bookkeeping import NORM_AT_MOST, clip_factors, plain_layers, squared_norms, without_autocast
from dpteach.data import Data
from dpteach.mechanism import _with_probability, add_noise, clipped_sum_and_losses
from dpteach.perceptrons import IGNORED, KINDS, Block, Pass, blocks_of, forward
from dpteach.randomness import Random, SystemRandom, generators, seeds
from dpteach.settings import Settings
from dpteach.training import check, delta_warning

METHODS = ("sgd", "dpsgd")
_CHUNK = 1 << 18  # numbers in a chunk's widest layer: so much stays in the processor's cache


@dataclass(frozen=True)
class StackStep:
    """One step of all runs of a stack. The arrays are ``(R,)`` float64, in the order of the settings.

    Attributes:
        step: 1, 2, … ``steps``.
        steps: how many each run has.
        epoch: 1, 2, … ``epochs``.
        losses: each run's mean loss over its batch, before its update; NaN for an empty batch. They are computed from
            private data, and ε does not cover showing them.
        epsilons: each run's own ε of all steps so far, at its ``target_delta``, by RDP; ``inf`` for ``"sgd"`` or σ = 0.
        accuracies: share of ``test_data`` that each run classifies rightly, at the end of an epoch; otherwise None.
    """

    step: int
    steps: int
    epoch: int
    losses: np.ndarray
    epsilons: np.ndarray
    accuracies: np.ndarray | None = None


def train_many(
    make_model: Callable[[Settings], nn.Module],
    data: Data,
    settings: Sequence[Settings],
    *,
    method: str = "dpsgd",
    shared_batches: bool = False,
    test_data: Data | None = None,
) -> "Stack":
    """Train a run for each of the settings, all at once, one :class:`StackStep` at a time.

    Each run is the one that :func:`dpteach.training.train` makes of its settings: its own Poisson batches and noise,
    from the same random numbers, its own clipping, its own ε. Only rounding differs.

    Releasing one run costs its own ε. Releasing more of them, or the best of them, costs more: they saw the same
    records, and their ε compose (see :mod:`dpteach.ledger`) if each has a seed of its own. Runs of equal seeds have
    equal noise: two of them, subtracted, have none, and no ε covers both.

    Args:
        make_model: makes a run's model from its settings: ``lambda s: models.mlp(seed=s.seed)``. A perceptron: linear
            layers with ReLU, Tanh, Sigmoid or nothing behind each, in an ``nn.Sequential``, all of one shape.
        data: the private records.
        settings: one for each run. ``noise_multiplier``, ``max_grad_norm``, ``lr``, ``target_delta`` and ``seed`` may
            differ.
        method: ``"dpsgd"``, or ``"sgd"`` (shuffled batches, no privacy).
        shared_batches: all runs take the batches of the first one's seed. Quicker for records of many numbers. Each
            run's own ε stays true. Their joint release is another mechanism than with batches of their own: it costs
            the ε of one run of σ = 1/√(Σ 1/σᵢ²), which may be more than their ε composed, if no two seeds are equal.
        test_data: records for ``StackStep.accuracies``.

    Returns:
        A :class:`Stack`: iterate over it for the steps; ``stack.model(k)`` is run k's model as it is now.

    Raises:
        ValueError: at the call: if the settings differ in what can't be stacked, if a model is no perceptron or of
            another shape than the first, and where :func:`dpteach.training.train` would raise.

    Warns:
        UserWarning: if a δ is 1/n or more.

    Source: Abadi et al. 2016, Algorithm 1.
    """
    settings = list(settings)
    choice("method", method, METHODS)
    if not settings:
        raise ValueError("settings must hold at least one Settings, got none")
    for name in ("epochs", "batch_size"):
        values = sorted({getattr(s, name) for s in settings})
        if len(values) > 1:
            raise ValueError(
                f"{name} must be the same for all runs of a stack, got {', '.join(map(str, values))}: make one stack "
                "for each"
            )
    models = [make_model(s) for s in settings]
    blocks = [_perceptron(model, data) for model in models]
    check(models[0], data, settings[0], method=method)
    shapes = [", ".join(f"{layer}{f' {kind.__name__}' if kind else ''}" for layer, kind in parts) for parts in blocks]
    for k, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"make_model must make models of one shape, got {shape} for run {k}, and {shapes[0]} for run 0"
            )
    if method != "sgd":
        for warning in dict.fromkeys(delta_warning(s, len(data)) for s in settings):
            if warning:
                warnings.warn(warning, stacklevel=2)
    return Stack(models, blocks, data, settings, method, shared_batches, test_data)


class Stack(Iterator[StackStep]):
    """Runs that are trained together; see :func:`train_many`. ``len(stack)`` runs; an iterator over their steps."""

    def __init__(
        self,
        models: list[nn.Module],
        blocks: list[list[Block]],
        data: Data,
        settings: list[Settings],
        method: str,
        shared_batches: bool,
        test_data: Data | None,
    ):
        self.settings, self._method, self._shared, self._test = settings, method, shared_batches, test_data
        self._model = copy.deepcopy(models[0]).requires_grad_()
        self._model.zero_grad()
        self._weights = torch.stack([nn.utils.parameters_to_vector(m.parameters()).detach() for m in models])  # (R, P)
        self._layers = [(layer.weight.shape, layer.bias is not None) for layer, _ in blocks[0]]
        self._activations = [kind for _, kind in blocks[0]]
        self._rates = self._weights.new_tensor([s.lr for s in settings]).unsqueeze(1)
        self._records = Data(data.X.to(self._weights.device), data.y.to(self._weights.device))
        self._X = self._records.X.flatten(1)
        self._steps = self._run()

    def __len__(self) -> int:
        return len(self.settings)

    def __next__(self) -> StackStep:
        with without_autocast(self._weights.device.type):
            return next(self._steps)

    def model(self, run: int) -> nn.Module:
        """A copy of the model of run ``run``, as it is now.

        Raises:
            IndexError: if there is no such run.
        """
        model = copy.deepcopy(self._model)
        nn.utils.vector_to_parameters(self._weights[run].clone(), model.parameters())
        return model

    def _run(self) -> Iterator[StackStep]:
        n, first = len(self._records), self.settings[0]
        per_epoch = first.steps_per_epoch(n)
        paths = self._epsilons(first.epochs * per_epoch)
        losses_of_steps = self._sgd() if self._method == "sgd" else self._dpsgd()
        for step, losses in enumerate(losses_of_steps, start=1):
            reached = self._accuracies(self._test) if self._test is not None and step % per_epoch == 0 else None
            epoch = (step - 1) // per_epoch + 1
            yield StackStep(step, paths.shape[1], epoch, losses, paths[:, step - 1].copy(), reached)

    def _epsilons(self, steps: int) -> np.ndarray:
        if self._method == "sgd":
            return np.full((len(self), steps), math.inf)
        q = self.settings[0].sample_rate(len(self._records))
        asked = {(s.noise_multiplier, s.target_delta) for s in self.settings}
        path = {
            (sigma, delta): epsilon_path(noise_multiplier=sigma, sample_rate=q, steps=steps, target_delta=delta)
            for sigma, delta in asked
        }
        return np.stack([path[s.noise_multiplier, s.target_delta] for s in self.settings])

    def _dpsgd(self) -> Iterator[np.ndarray]:
        n, settings, device = len(self._records), self.settings, self._weights.device
        q, steps = settings[0].sample_rate(n), settings[0].epochs * settings[0].steps_per_epoch(n)
        sampling, noise = zip(*(generators(s.seed) for s in settings))
        squares, losses = squared_norms(self._X), np.empty(len(settings))
        for _ in range(steps):
            together = _chosen(n, q, sampling[:1]) if self._shared else None
            for part in self._chunks(n * q):
                taken = _chosen(n, q, sampling[part]) if together is None else together
                batch, real = (t.to(device) for t in _padded(taken))
                sums, totals = self._clipped_sums(part, batch, real, squares)
                noisy = _with_noise(sums, settings[part], noise[part])
                self._weights[part] -= noisy * self._rates[part] / (n * q)
                losses[part] = (totals / real.sum(1)).cpu()
            yield losses.copy()

    def _clipped_sums(self, part: slice, batch: Tensor, real: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """``(r, P)`` and the losses' sums ``(r,)`` for the runs of ``part``."""
        run, batch_ = self._pass(part, batch, torch.where(real, _at(self._records.y, batch), IGNORED))
        norms = run.squared_norms(_at(squares, batch_)).sqrt_()
        C = [s.max_grad_norm for s in self.settings[part]]
        bounds = torch.tensor(C, dtype=norms.dtype, device=norms.device).unsqueeze(1)
        sums, totals = run.weighted_sum(clip_factors(norms, bounds, self._weights.dtype)), run.losses.sum(1)
        fine = (norms.amax(1) <= NORM_AT_MOST) & (bounds.squeeze(1) > 1e-12)
        for k in (~fine).nonzero().flatten().tolist():  # NaN too: what the quick way can't do is done one by one
            row = min(k, len(batch) - 1)
            X, labels = self._records[batch[row][real[row]]]
            sums[k], losses = clipped_sum_and_losses(self.model(part.start + k), F.cross_entropy, X, labels, C[k])
            totals[k] = losses.sum()
        return sums, totals

    def _sgd(self) -> Iterator[np.ndarray]:
        n, device = len(self._records), self._weights.device
        streams = [
            torch.Generator().manual_seed(seeds(s.seed)[0]) for s in self.settings[: 1 if self._shared else None]
        ]
        losses = np.empty(len(self))
        for _ in range(self.settings[0].epochs):
            orders = torch.stack([torch.randperm(n, generator=stream) for stream in streams]).to(device)
            for batches in orders.split(self.settings[0].batch_size, 1):
                for part in self._chunks(batches.shape[1]):
                    batch = batches if self._shared else batches[part]
                    run, _ = self._pass(part, batch, _at(self._records.y, batch))
                    counts = (run.y != IGNORED).sum(1, keepdim=True)
                    mean = run.weighted_sum((1 / counts).to(run.losses).expand_as(run.losses))
                    self._weights[part] -= mean * self._rates[part]
                    losses[part] = (run.losses.sum(1) / counts.squeeze(1)).cpu()
                yield losses.copy()

    def _pass(self, part: slice, batch: Tensor, y: Tensor) -> tuple[Pass, Tensor]:
        """Of the runs of ``part``, on batches ``(r, B)``, or ``(1, B)`` that they share; and the batches as used."""
        if self._shared:
            batch, y = batch[0], y.expand(part.stop - part.start, -1)
        return Pass(self._of_layers(part), self._activations, _at(self._X, batch), y), batch

    def _of_layers(self, part: slice) -> list[tuple[Tensor, Tensor | None]]:
        """The layers' weights, as views of the rows of ``part``."""
        sizes = [
            n for shape, biased in self._layers for n in ([shape.numel(), shape[0]] if biased else [shape.numel()])
        ]
        pieces = iter(self._weights[part].split(sizes, 1))
        return [(next(pieces).unflatten(1, shape), next(pieces) if biased else None) for shape, biased in self._layers]

    def _chunks(self, samples: float) -> list[slice]:
        """Runs that go together: their activations stay in the processor's cache."""
        widest = max(n for shape, _ in self._layers for n in (shape if not self._shared else shape[:1]))
        size = max(1, int(_CHUNK / (samples * widest)))
        return [slice(k, min(k + size, len(self))) for k in range(0, len(self), size)]

    def _accuracies(self, data: Data) -> np.ndarray:
        right, device = np.zeros(len(self)), self._weights.device
        for X, y in zip(data.X.to(device).flatten(1).split(1000), data.y.to(device).split(1000)):
            for k in range(0, len(self), 30):
                part = slice(k, k + 30)
                scores = forward(self._of_layers(part), self._activations, X)[-1]
                right[part] += (scores.max(1).indices == y).sum(1).cpu().numpy()
        return right / len(data)


def _chosen(n: int, q: float, streams: Sequence[Random]) -> Tensor:
    """``(R, n)`` bool: who takes part; each row as ``mechanism.poisson_batches`` draws it from that stream."""
    u = torch.empty(len(streams), n, dtype=torch.float64)
    for row, stream in zip(u, streams):
        if isinstance(stream, SystemRandom):
            row.copy_(stream.uniform(n))
        else:
            torch.rand(n, generator=stream, dtype=torch.float64, out=row)
    cell, rest = divmod(q * 2.0**53, 1)
    taken = u < cell * 2.0**-53
    if rest and bool((undecided := u == cell * 2.0**-53).any()):
        for row, open_, stream in zip(taken, undecided, streams):
            row[open_] = _with_probability(rest, int(open_.sum()), stream)
    return taken


def _at(rows: Tensor, batch: Tensor) -> Tensor:
    """``rows[batch]``, four times as quick."""
    taken: Tensor = rows.index_select(0, batch.flatten()).unflatten(0, batch.shape)
    return taken


def _padded(taken: Tensor) -> tuple[Tensor, Tensor]:
    """``(R, B)``, B >= 1: the records that each row takes, filled up with record 0; and which are taken, bool."""
    sizes = taken.sum(1, keepdim=True)
    real = torch.arange(max(1, int(sizes.max()))) < sizes
    records = torch.from_numpy(np.flatnonzero(taken.numpy())).remainder_(taken.shape[1])
    return torch.zeros(real.shape, dtype=torch.int64).masked_scatter_(real, records), real


def _with_noise(sums: Tensor, settings: Sequence[Settings], streams: Sequence[Random]) -> Tensor:
    """Each row as :func:`dpteach.mechanism.add_noise` makes it noisy, with fewer calls."""
    noise, scales = torch.zeros(sums.shape, dtype=sums.dtype), []
    for k, (s, stream) in enumerate(zip(settings, streams)):
        if s.noise_multiplier > 0 and isinstance(stream, torch.Generator):
            torch.randn(sums.shape[1], generator=stream, dtype=sums.dtype, out=noise[k])
            scales.append(s.noise_multiplier * s.max_grad_norm)
        else:
            sums[k] = add_noise(sums[k], s.noise_multiplier, s.max_grad_norm, stream)
            scales.append(0.0)
    return sums.addcmul_(noise.to(sums.device), sums.new_tensor(scales).unsqueeze(1))


def _perceptron(model: nn.Module, data: Data) -> list[Block]:
    layers = plain_layers(model)
    blocks = blocks_of(layers) if layers else _stranger(model)
    if isinstance(blocks, nn.Module):
        raise ValueError(
            "make_model must make perceptrons: nn.Linear with nn.ReLU, nn.Tanh, nn.Sigmoid or nothing behind each, in "
            f"an nn.Sequential, all trained, none used twice or hooked; got {type(blocks).__name__}: call train for "
            "each run"
        )
    if data.X.dim() > 2 and not isinstance(layers and layers[0], nn.Flatten):
        raise ValueError(
            f"make_model must make models that begin with nn.Flatten, for records of shape {tuple(data.X.shape[1:])}"
        )
    dtype = blocks[0][0].weight.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"make_model must make models of torch.float32 or torch.float64, got {dtype}")
    return blocks


def _stranger(model: nn.Module) -> nn.Module:
    """The layer for which a model is no perceptron."""
    if type(model) is not nn.Sequential:
        return model
    return next((layer for layer in model if type(layer) not in KINDS), model)
