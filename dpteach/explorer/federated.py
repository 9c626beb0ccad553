"""Federated averaging, live: each worker's loss and ε by round, and the accuracy of the average."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets as widgets
from torch import nn

from dpteach._checks import choice
from dpteach.accounting import epsilon
from dpteach.data import Data, split
from dpteach.explorer.live import Pace, Range, Trainer, control_style, diverged, figure, minutes, new_model, slider_for
from dpteach.federated import WEIGHTS, Round, Worker, WorkerStep, train_steps
from dpteach.plots import Line, Panel, svg
from dpteach.training import Settings

_FRAME = 0.1  # seconds between two frames
_ROLES = ("first worker", "second worker", "other worker")

RANGES = {
    "noise_multiplier": Range(0.3, 10, log=True),
    "rounds": Range(1, 20, whole=True),
    "skew": Range(0, 0.99),
    "share": Range(0.02, 0.98),
}


@dataclass
class _Run:
    """What a run has come to so far."""

    workers: list[Worker]
    rounds: int
    places: dict[str, list[float]] = field(default_factory=dict)  # of each loss: 1.5 is the middle of the second round
    losses: dict[str, list[float]] = field(default_factory=dict)
    made: list[Round] = field(default_factory=list)
    turns: int = 0  # steps of all workers
    takes: str = ""  # how long, where that is worth a sentence
    exact: dict[str, float] | None = None  # PRV
    ended: str = ""

    def price(self, worker: Worker, accountant: str) -> float:
        """ε of all rounds for one worker."""
        s = worker.settings
        return epsilon(
            noise_multiplier=s.noise_multiplier,
            sample_rate=worker.sample_rate,
            target_delta=s.target_delta,
            steps=self.rounds * worker.steps_per_round,
            accountant=accountant,
        )


class FederatedExplorer(Trainer):
    """Train two or more private workers and average them, live; moving a slider starts again.

    The sliders: the noise multiplier σ of each worker (one for all where there are more than three), the number of
    rounds, the first worker's share of the records, how unlike the labels are, and whether the average is weighted.

    Args:
        data: all records; they are dealt out to the workers, each record to one.
        make_model: ``make_model() -> nn.Module``, a new model each time: the common start.
        settings: of every worker, but for its σ; ``epochs`` is the number of local epochs in a round. A worker with
            fewer records than ``batch_size`` trains on all of them in each step.
        workers: their names; two or more.
        noise_multipliers: where the sliders of σ start, one a worker; ``settings.noise_multiplier`` if not given.
        rounds, skew, weights: where these controls start; see :func:`dpteach.data.split` and
            :func:`dpteach.federated.train_rounds`.
        test_data: records for the accuracy of the average.

    Attributes:
        controls: the widgets by name: ``noise_multiplier_alice`` and so on, ``rounds``, ``share``, ``skew``,
            ``weights``.
        status: the status line's text.
        workers: the :class:`~dpteach.federated.Worker` s of the current run, each with its ledger.
        rounds: the :class:`~dpteach.federated.Round` s that are done.
        error: the exception that ended the last run, or None.

    Raises:
        ValueError: if there are fewer than two workers, or not one noise multiplier for each.
    """

    def __init__(
        self,
        data: Data,
        make_model: Callable[[], nn.Module],
        settings: Settings = Settings(),
        *,
        test_data: Data,
        workers: Sequence[str] = ("alice", "bob"),
        noise_multipliers: Sequence[float] | None = None,
        rounds: int = 5,
        skew: float = 0.0,
        weights: str = "size",
    ):
        names = list(workers)
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise ValueError(f"workers must be at least two different names, got {names!r}")
        sigmas = [settings.noise_multiplier] * len(names) if noise_multipliers is None else list(noise_multipliers)
        if len(sigmas) != len(names):
            raise ValueError(
                f"noise_multipliers must hold one number for each of the {len(names)} workers, got {sigmas!r}"
            )
        self._data, self._make_model, self._settings, self._names = data, make_model, settings, names
        self._test_data = test_data
        self._sigma_of = {name: f"noise_multiplier_{name}" if len(names) <= 3 else "noise_multiplier" for name in names}
        self._run = _Run([], rounds)

        controls: dict[str, widgets.Widget] = {}
        for name, sigma in zip(names, sigmas):
            if self._sigma_of[name] not in controls:
                said = f"σ of {name}" if len(names) <= 3 else "σ of every worker"
                controls[self._sigma_of[name]] = slider_for(
                    self._sigma_of[name], sigma, RANGES["noise_multiplier"], said
                )
        controls["rounds"] = slider_for("rounds", rounds, RANGES["rounds"])
        controls["share"] = slider_for("share", 1 / len(names), RANGES["share"], f"{names[0]}'s share of records")
        controls["skew"] = slider_for("skew", skew, RANGES["skew"], "label skew")
        controls["weights"] = widgets.Dropdown(
            options=[("weighted by records", "size"), ("all the same", "equal")],
            value=choice("weights", weights, WEIGHTS),
            description="average",
            **control_style(),
        )
        self._price_line = widgets.HTML()
        super().__init__(
            controls, lambda: [*controls.values(), self._start_and_stop(), self._price_line, self._picture]
        )
        self.start()

    @property
    def workers(self) -> list[Worker]:
        return list(self._run.workers)

    @property
    def rounds(self) -> list[Round]:
        return list(self._run.made)

    def summary(self) -> str:
        """One sentence about the last run: each worker's records, σ and ε, and the accuracy of the average."""
        run = self._run
        if self.error is not None:
            return self.status
        if not run.made:
            return "No round has been trained yet."
        told = "; ".join(
            f"{w.name} ({len(w.data):,} records, σ = {figure(w.settings.noise_multiplier)}): {self._cost(run, w)}"
            for w in run.workers
        )
        return f"{len(run.made)} rounds. {told}. Test accuracy of the average {run.made[-1].accuracy:.0%}. {run.ended}".strip()

    def _so_far(self) -> str:
        return f"round {min(len(self._run.made) + 1, self._run.rounds)} of {self._run.rounds}"

    def _cost(self, run: _Run, worker: Worker) -> str:
        if run.exact is None:
            return f"ε ≤ {run.price(worker, 'rdp'):.2f} (RDP)"
        return f"ε = {run.exact[worker.name]:.2f} (PRV)"

    def _new_run(self, values: dict[str, Any]) -> _Run:
        first = values["share"]
        others = (1 - first) / (len(self._names) - 1)
        parts = split(
            self._data,
            len(self._names),
            values["skew"],
            [first] + [others] * (len(self._names) - 1),
            seed=self._settings.seed or 0,
        )
        return _Run(
            [
                Worker(
                    name,
                    part,
                    dataclasses.replace(
                        self._settings,
                        noise_multiplier=values[self._sigma_of[name]],
                        batch_size=min(self._settings.batch_size, len(part)),
                    ),
                )
                for name, part in zip(self._names, parts)
            ],
            values["rounds"],
        )

    def _preview(self, values: dict[str, Any], generation: int) -> None:
        self._show_price(self._new_run(values), generation)

    def _show_price(self, run: _Run, generation: int) -> None:
        told = "; ".join(f"{w.name} {self._cost(run, w)}" for w in run.workers)
        delta = figure(self._settings.target_delta)
        text = f"Price of all {run.rounds} rounds at δ = {delta}: {told}. One for each worker: never their sum or mean."
        tiny = [w.name for w in run.workers if self._settings.target_delta >= 1 / len(w.data)]
        if tiny:
            text += f" Careful: δ is 1/n or more for {', '.join(tiny)}."
        with self._changed:
            if generation == self._generation:
                self._price_line.value = escape(text + run.takes)

    def _work_on(self, values: dict[str, Any], generation: int) -> None:
        run = self._new_run(values)
        model = new_model(self._make_model, self._settings.seed)
        made_so_far = train_steps(run.workers, model, run.rounds, weights=values["weights"], test_data=self._test_data)
        with self._changed:
            if generation != self._generation:
                return
            self._run = run
        next_frame, pace, steps = 0.0, Pace(), run.rounds * sum(worker.steps_per_round for worker in run.workers)
        priced = self._price(generation, lambda: self._make_exact(run, generation))
        for made in made_so_far:
            if generation != self._generation:
                return
            if isinstance(made, WorkerStep):
                run.turns += 1
                left = pace.minutes_left(run.turns, steps)
                if self._foretell(run, generation, left, steps):
                    self._show_price(run, generation)
                at = made.round - 1 + made.step.step / made.step.steps
                run.places.setdefault(made.worker, []).append(at)
                run.losses.setdefault(made.worker, []).append(made.step.loss)
                status = f"Training: round {made.round} of {run.rounds}, {made.worker}'s step {made.step.step} of {made.step.steps}"
                status += f", {minutes(left)} to go" if left else ""
            else:
                run.made.append(made)
                status = f"Round {made.round} of {run.rounds} averaged: test accuracy {made.accuracy:.0%}"
                if diverged(model, self._test_data):
                    run.ended = f"Diverged in round {made.round}: the average is not a number any more. Try a lower learning rate."
                    break
            if time.perf_counter() >= next_frame:
                if not self._show(generation, picture=svg(self._panels_of(run)), status=status, progress=True):
                    return
                next_frame = time.perf_counter() + _FRAME
        self._until(priced.is_set, generation)
        last = f"Finished: test accuracy of the average {run.made[-1].accuracy:.0%}."
        self._show(generation, picture=svg(self._panels_of(run)), status=run.ended or last)

    def _make_exact(self, run: _Run, generation: int) -> None:
        run.exact = {worker.name: run.price(worker, "prv") for worker in run.workers}
        self._show_price(run, generation)

    def _panels(self) -> list[Panel]:
        return self._panels_of(self._run)

    def _panels_of(self, run: _Run) -> list[Panel]:
        width = (0, run.rounds)
        names = [worker.name for worker in run.workers]

        def look(k: int) -> tuple[str, str, bool]:  # role, label, dashed
            return _ROLES[min(k, 2)], names[k] if k < 2 else "the others" if k == 2 else "", k % 2 == 1

        losses = [
            Line(run.places[name], run.losses[name], *look(k)) for k, name in enumerate(names) if name in run.losses
        ]
        told = "; ".join(f"{name} {loss:.1f}" for name, loss in (run.made[-1].losses.items() if run.made else ()))
        panels = [
            Panel(
                "Training loss",
                "round",
                "loss (batch mean)",
                losses,
                f"Loss by round: {told or 'no round is done'} in the last round.",
                x_range=width,
            )
        ]

        rounds = [0, *(made.round for made in run.made)]
        spent = [
            Line(rounds, [0.0, *(made.epsilons[name] for made in run.made)], *look(k)) for k, name in enumerate(names)
        ]
        told = "; ".join(f"{name} {value:.2f}" for name, value in (run.made[-1].epsilons.items() if run.made else ()))
        top = max((run.price(worker, "rdp") for worker in run.workers), default=1.0)
        panels.append(
            Panel(
                "Privacy budget spent",
                "round",
                "ε of each worker (RDP bound)",
                spent,
                f"ε by round and worker: {told or 'nothing yet'} after round {len(run.made)} of {run.rounds}.",
                x_range=width,
                y_range=(0, top * 1.08) if math.isfinite(top) and top > 0 else (0, 1),
            )
        )

        reached = [made.accuracy for made in run.made]
        panels.append(
            Panel(
                "Accuracy of the average",
                "round",
                "share of test records right",
                [Line(rounds[1:], reached, "private", "federated")],
                f"Test accuracy of the average by round: {', '.join(f'{a:.0%}' for a in reached) or 'none yet'}.",
                x_range=width,
                y_range=(0, 1),
            )
        )
        return panels
