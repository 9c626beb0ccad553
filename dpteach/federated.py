"""Federated averaging over workers that each train privately on their own records.

The privacy unit is one record of one worker (sample-level): each worker clips and noises by itself, so its update is
private before anybody sees it, the server and the other workers included. What a worker has spent stands in its own
:class:`~dpteach.ledger.Ledger`. Workers without a common record compose in parallel: their ε are never added, and
never averaged.

Source: McMahan et al. 2017 (federated averaging); Abadi et al. 2016 (what each worker does).
"""

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpteach._checks import choice, number, whole
from dpteach.data import Data
from dpteach.guards import copied
from dpteach.ledger import Ledger
from dpteach.settings import Settings
from dpteach.training import Step, accuracy, begin, check, delta_warning

WEIGHTS = ("size", "equal")


@dataclass(frozen=True)
class Worker:
    """Somebody with records of their own, who trains privately and keeps the count.

    Args:
        name: unlike the other workers' names.
        data: the worker's private records.
        settings: σ, C, batch size, learning rate, δ; ``epochs`` is the number of local epochs in *one* round. ``seed``
            may be the same for all workers: name, ledger and charge go into the random numbers too. None draws from the
            operating system, as a release must.
        ledger: what these records have cost so far; a new one, in memory, if not given.
        method, optimizer: as for :func:`dpteach.training.train`. The optimizer starts anew in each round.

    Raises:
        ValueError: if the name is empty, or the batch is larger than the worker's data.
    """

    name: str
    data: Data
    settings: Settings
    ledger: Ledger = field(default_factory=Ledger)
    method: str = "dpsgd"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a text that is not empty, got {self.name!r}")
        self.settings.steps_per_epoch(len(self.data))

    @property
    def sample_rate(self) -> float:
        """q: the probability that one of the worker's records takes part in a step."""
        return self.settings.sample_rate(len(self.data))

    @property
    def steps_per_round(self) -> int:
        """How many steps a round has: local epochs times steps in an epoch."""
        return self.settings.epochs * self.settings.steps_per_epoch(len(self.data))

    def train_round(self, model: nn.Module) -> Iterator[Step]:
        """Train ``model`` in place for one round. The whole round is charged before its first step.

        Yields:
            :class:`~dpteach.training.Step`; its ``epsilon`` is that of *all* charges, this round's included.

        Raises:
            ValueError: as :func:`dpteach.training.train`, or if the ledger is damaged. Then nothing has been trained.

        Warns:
            UserWarning: if δ is 1/n or more, as :func:`dpteach.training.train`.
        """
        steps = self._round(model)
        self._warn_of_delta()
        return steps

    def _warn_of_delta(self) -> None:
        if self.method != "sgd" and (sentence := delta_warning(self.settings, len(self.data))):
            warnings.warn(sentence, stacklevel=3)

    def _check(self, model: nn.Module) -> None:
        check(model, self.data, self.settings, method=self.method, optimizer=self.optimizer)

    def _round(self, model: nn.Module) -> Iterator[Step]:
        self._check(model)
        sigma = 0.0 if self.method == "sgd" else self.settings.noise_multiplier
        charge = self.ledger.charge(noise_multiplier=sigma, sample_rate=self.sample_rate, steps=self.steps_per_round)
        settings, spent = dataclasses.replace(self.settings, seed=self._seed_of(charge)), self.epsilon("rdp")
        steps = begin(model, self.data, settings, method=self.method, optimizer=self.optimizer)
        return (dataclasses.replace(step, epsilon=spent) for step in steps)

    def _seed_of(self, charge: int) -> int | None:
        """One seed for each charge of each ledger: noise that is drawn twice can be subtracted.

        So it differs in a second run, after a round that was killed, and between two processes that charge at the same
        time.
        """
        if self.settings.seed is None:
            return None
        text = json.dumps([self.settings.seed, self.name, self.ledger.id, charge])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def epsilon(self, accountant: str = "prv") -> float:
        """ε of everything in the worker's ledger, at the settings' ``target_delta``."""
        return self.ledger.epsilon(target_delta=self.settings.target_delta, accountant=accountant)


@dataclass(frozen=True)
class WorkerStep:
    """One step of one worker in one round."""

    round: int  # 1, 2, … ``rounds``
    worker: str  # its name
    step: Step


@dataclass(frozen=True)
class Round:
    """What a round has come to, after the average.

    Attributes:
        round: 1, 2, … ``rounds``.
        rounds: how many there are.
        losses: by worker's name: the mean loss of its batches in this round, NaN where all were empty. Computed from
            private data; ε does not cover showing it.
        epsilons: by worker's name: ε of everything in its ledger, by RDP. One number a worker: not to be summed or
            averaged.
        accuracy: of the averaged model on ``test_data``; None without.
    """

    round: int
    rounds: int
    losses: dict[str, float]
    epsilons: dict[str, float]
    accuracy: float | None = None


def federated_average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of the models' parameters: a state dict for ``model.load_state_dict``.

    Args:
        models: at least one; all with the same names and shapes. A model that Opacus has wrapped has names that begin
            with ``_module.``: hand in its ``_module``.
        weights: a number >= 0 a model, not all zero; only their proportions count. All the same if not given. Weights
            by the number of records publish these numbers: take them as public, or weigh all the same.

    Returns:
        Names to tensors. What is the same in all models (a buffer, a frozen parameter) stays so to the bit.

    Raises:
        ValueError: if there is no model, the weights do not fit, the names or shapes differ, or a buffer differs: a
            buffer that training moves (BatchNorm's running mean) holds statistics of the records, and no noise covers
            them.

    Source: McMahan et al. 2017, Algorithm 1.

    >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = nn.init.constant_(a.weight, 0.0), nn.init.constant_(b.weight, 4.0)
    >>> federated_average([a, b], weights=[3, 1])["weight"]
    tensor([[1.]])
    """
    states, n = [model.state_dict() for model in models], len(models)
    if n == 0:
        raise ValueError("models must hold at least one model, got none")
    weights = [1.0] * n if weights is None else [number("weights", w, low=0) for w in weights]
    if len(weights) != n or sum(weights) == 0:
        raise ValueError(f"weights must hold one number for each of the {n} models, not all zero, got {weights!r}")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for k, other in enumerate(shapes[1:], start=1):
        if other != shapes[0]:
            unlike = sorted(name for name in {**shapes[0], **other} if shapes[0].get(name) != other.get(name))
            raise ValueError(
                f"models must have the same names and shapes, got a model {k} that differs from model 0 at "
                f"{unlike[0]!r}. (Opacus' wrapper adds '_module.': hand in model._module.)"
            )
    for name in states[0].keys() - dict(models[0].named_parameters(remove_duplicate=False)).keys():
        if not all(torch.equal(states[0][name], state[name]) for state in states[1:]):
            raise ValueError(
                f"models must have the same buffers, got different ones at {name!r}: they hold statistics of the "
                "records that no noise covers. Use GroupNorm or LayerNorm, or copy the first model's buffers into the "
                "others to release only these."
            )
    total = sum(w / max(weights) for w in weights)
    shares = [w / max(weights) / total for w in weights]

    def mean(values: list[Tensor]) -> Tensor:
        if all(torch.equal(value, values[0]) for value in values[1:]):
            return values[0].clone()
        return functools.reduce(torch.add, map(torch.mul, values, shares))

    return {name: mean([state[name] for state in states]) for name in states[0]}


def train_steps(
    workers: Sequence[Worker], model: nn.Module, rounds: int, *, weights: str = "size", test_data: Data | None = None
) -> Iterator[WorkerStep | Round]:
    """As :func:`train_rounds`, with every worker's steps in between: for a live picture, or to stop at once.

    Without its warning: where there is a picture, the sentence can stand beside it.
    """
    rounds, _ = whole("rounds", rounds, low=1), choice("weights", weights, WEIGHTS)
    names = [worker.name for worker in workers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"workers must be at least one, each with a name of its own, got {names!r}")
    shares = [len(worker.data) if weights == "size" else 1.0 for worker in workers]
    return _worker_steps(workers, model, rounds, shares, test_data)


def _worker_steps(
    workers: Sequence[Worker], model: nn.Module, rounds: int, weights: list[float], test_data: Data | None
) -> Iterator[WorkerStep | Round]:
    for worker in workers:  # before anybody is charged
        worker._check(model)
    for k in range(1, rounds + 1):
        copies = {worker.name: copied(model) for worker in workers}
        losses: dict[str, list[float]] = {worker.name: [] for worker in workers}
        at_work = {worker.name: worker._round(copies[worker.name]) for worker in workers}
        while at_work:  # one step each in turn, as if at the same time
            for name in list(at_work):
                step = next(at_work[name], None)
                if step is None:
                    del at_work[name]
                    continue
                losses[name].append(step.loss)
                yield WorkerStep(k, name, step)
        model.load_state_dict(federated_average(list(copies.values()), weights))
        means = {name: torch.tensor(values, dtype=torch.float64).nanmean().item() for name, values in losses.items()}
        spent = {worker.name: worker.epsilon("rdp") for worker in workers}
        yield Round(k, rounds, means, spent, accuracy(model, test_data) if test_data is not None else None)


def train_rounds(
    workers: Sequence[Worker], model: nn.Module, rounds: int, *, weights: str = "size", test_data: Data | None = None
) -> Iterator[Round]:
    """Federated averaging, one :class:`Round` at a time. ``model`` becomes the average, in place, round by round.

    In each round every worker starts from the same model, trains a copy for its local epochs, and the copies are
    averaged.

    Args:
        workers: at least one; two, three or ten work alike. Their records must be disjoint for "ε per worker" to hold.
        model: the common start.
        rounds: >= 1.
        weights: ``"size"`` weighs a worker by its number of records, as in the paper; ``"equal"`` weighs all the same.
        test_data: for ``Round.accuracy``.

    Yields:
        :class:`Round`, ``rounds`` of them. Nothing runs, and nothing is charged, until the first is asked for.

    Raises:
        ValueError: at the call, if an argument is out of its range.

    Warns:
        UserWarning: if a worker's δ is 1/n or more, as :func:`dpteach.training.train`.

    Source: McMahan et al. 2017, Algorithm 1, with every client in every round.
    """
    events = train_steps(workers, model, rounds, weights=weights, test_data=test_data)
    for worker in workers:
        worker._warn_of_delta()
    return (event for event in events if isinstance(event, Round))
