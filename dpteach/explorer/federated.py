"""Federated averaging, live: each worker's loss and ε by round, and the accuracy of the average."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import nn

from dpteach._checks import choice
from dpteach.data import Data, split
from dpteach.explorer.controls import RANGES, Range, Slider, menu, number_text
from dpteach.explorer.training import Curve, LiveTraining, Run, budget_panel, class_count, diverged, loss_panel
from dpteach.federated import WEIGHTS, Round, Worker, WorkerStep, train_steps
from dpteach.plots import Panel
from dpteach.training import Settings

_NOISE = Range(0.3, 10, log=True)  # narrower than where one trains alone


class FederatedExplorer(LiveTraining):
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
        run: all of the current run: :class:`~dpteach.explorer.training.Run`.
        error: the exception that ended the last run, or None.

    Raises:
        ValueError: if there are fewer than two workers, or not one noise multiplier for each.
    """

    _epsilon_of = "highest ε of a worker (RDP bound)"

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
        self._data, self._settings, self._names, self._test_data = data, settings, names, test_data
        self._classes = class_count(data)
        self._sigma_of = {name: f"noise_multiplier_{name}" if len(names) <= 3 else "noise_multiplier" for name in names}

        controls: dict[str, Any] = {}
        for name, sigma in zip(names, sigmas):
            label = f"σ of {name}" if len(names) <= 3 else "σ of every worker"
            controls.setdefault(self._sigma_of[name], Slider("noise_multiplier", sigma, _NOISE, label))
        controls["rounds"] = Slider("rounds", rounds, RANGES["rounds"])
        controls["share"] = Slider("share", 1 / len(names), RANGES["share"], f"{names[0]}'s share of records")
        controls["skew"] = Slider("skew", skew, RANGES["skew"], "label skew")
        averages = [("weighted by records", "size"), ("all the same", "equal")]
        controls["weights"] = menu("average", averages, value=choice("weights", weights, WEIGHTS))
        super().__init__(controls, settings, make_model)
        self._lay_out([*self._rows.values(), self._back])
        self.start()

    @property
    def workers(self) -> list[Worker]:
        """Those of the current run."""
        return list(self.run.workers)

    @property
    def rounds(self) -> list[Round]:
        """The rounds of the current run that are done."""
        return list(self.run.history)

    def summary(self) -> str:
        """One sentence about the last run: each worker's records, σ and ε, and the accuracy of the average."""
        run = self.run
        if self.error is not None:
            return self.status
        if not run.history:
            return "No round has been trained yet."
        paid = "; ".join(
            f"{w.name} ({len(w.data):,} records, σ = {number_text(w.settings.noise_multiplier)}): {self._cost(run, w)}"
            for w in run.workers
        )
        reached = f"Test accuracy of the average {run.accuracy:.0%}."
        return f"{len(run.history)} rounds. {paid}. {reached} {run.ended}".strip()

    def _new_run(self, values: dict[str, Any]) -> Run:
        others = len(self._names) - 1
        shares = [values["share"]] + [(1 - values["share"]) / others] * others
        parts = split(self._data, others + 1, values["skew"], shares, seed=self._settings.seed or 0)
        workers = []
        for name, part in zip(self._names, parts):
            sigma, batch_size = values[self._sigma_of[name]], min(self._settings.batch_size, len(part))
            settings = dataclasses.replace(self._settings, noise_multiplier=sigma, batch_size=batch_size)
            workers.append(Worker(name, part, settings))
        run = Run(self._settings, values, workers, values["rounds"])
        for name in self._names:
            run.epsilons[name].add(0, 0.0)
        return run

    def _steps_of(self, run: Run, values: dict[str, Any]) -> Generator[None, None, None]:
        events = train_steps(run.workers, run.model, run.rounds, weights=values["weights"], test_data=self._test_data)
        for event in events:
            run.latest = event
            if isinstance(event, WorkerStep):
                run.add_step(event.worker, event.round - 1 + event.step.step / event.step.steps, event.step.loss)
            else:
                run.add_record(event, event.round, event.epsilons)
                if diverged(run.model, self._test_data):
                    why = "the average is not a number any more. Try a lower learning rate."
                    run.ended = f"Diverged in round {event.round}: {why}"
            yield

    def _curves_of(self, run: Run) -> list[list[tuple[Curve, str]]]:
        roles = dict(zip(self._names, ("first worker", "second worker", *["other worker"] * len(self._names))))
        by_worker = [[(curves[n], role) for n, role in roles.items()] for curves in (run.losses, run.epsilons)]
        return [*by_worker, [(run.accuracies, "private")]]

    def _price_of(self, run: Run) -> str:
        costs = "; ".join(f"{worker.name} {self._cost(run, worker)}" for worker in run.workers)
        delta = self._settings.target_delta
        text = f"Price of all {run.rounds} rounds at δ = {number_text(delta)}: {costs}. "
        text += "One for each worker: never their sum or mean."
        tiny = [worker.name for worker in run.workers if delta >= 1 / len(worker.data)]
        return text + (f" Careful: δ is 1/n or more for {', '.join(tiny)}." if tiny else "")

    def _cost(self, run: Run, worker: Worker) -> str:
        if run.exact is None:
            return f"ε ≤ {run.bound[worker.name]:.2f} (RDP)"
        return f"ε = {run.exact[worker.name]:.2f} (PRV)"

    def _place_of(self, run: Run) -> str:
        return f"round {min(len(run.history) + 1, run.rounds)} of {run.rounds}"

    def _progress_of(self, run: Run, to_go: str) -> str:
        event = run.latest
        if isinstance(event, WorkerStep):
            step = f"{event.worker}'s step {event.step.step} of {event.step.steps}"
            return f"Training: round {event.round} of {run.rounds}, {step}{to_go}"
        return f"Round {len(run.history)} of {run.rounds} averaged: test accuracy {run.accuracy:.0%}"

    def _result_of(self, run: Run) -> str:
        return f"test accuracy of the average {run.accuracy:.0%}"

    def _panels_of(self, run: Run, plan: Run | None = None) -> list[Panel]:
        if not run.workers and plan:
            run = plan
        last = run.history[-1] if run.history else None
        losses = "; ".join(f"{name} {loss:.1f}" for name, loss in last.losses.items()) if last else "no round is done"
        paid = "; ".join(f"{name} {value:.2f}" for name, value in last.epsilons.items()) if last else "nothing yet"
        reached = ", ".join(f"{accuracy:.0%}" for accuracy in run.accuracies.ys) or "none yet"
        loss_alt = f"Loss by round: {losses} in the last round."
        spent_alt = f"ε by round and worker: {paid} after round {len(run.history)} of {run.rounds}."
        reached_alt = f"Test accuracy of the average by round: {reached}."
        average, end = run.accuracies.line("private", "federated"), run.rounds
        loss, spent, accuracy = (self._ghosts_of(run, k) for k in range(3))
        y_range = (1 / self._classes, 1)
        words = "Accuracy of the average", "round", "share of test records right"
        return [
            self._trade_off_panel(run, plan or run),
            Panel(*words, [*accuracy, average], reached_alt, (0, end), y_range),
            loss_panel([*loss, *self._lines(run, run.losses)], "round", end, loss_alt, self._classes),
            budget_panel(
                [*spent, *self._lines(run, run.epsilons)], "round", "ε of each worker (RDP bound)", end, spent_alt
            ),
        ]

    def _lines(self, run: Run, curves: dict) -> list:
        """One a worker: the first two with a colour and a label of their own, the others as one kind."""
        looks = [("first worker", self._names[0]), ("second worker", self._names[1]), ("other worker", "the others")]
        looks += [("other worker", "")] * len(self._names)
        return [
            curves[worker.name].line(*look, dashed=k % 2 == 1)
            for k, (worker, look) in enumerate(zip(run.workers, looks))
            if worker.name in curves
        ]
