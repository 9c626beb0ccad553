"""What the live pictures of a training share: one kind of run, one loop that drains it, one price line."""

import functools
import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from torch import nn

from dpteach import models
from dpteach.accounting import epsilon, epsilon_path
from dpteach.data import Data
from dpteach.explorer.accessibility import accessible_box
from dpteach.explorer.controls import button, folded, in_a_row, label_of, menu, number_text, two_columns
from dpteach.explorer.live import LivePicture
from dpteach.explorer.numbers import (
    BANDS,
    band,
    dots,
    epsilon_number,
    most_believed,
    odds_in_words,
    points,
    right_of_100,
    tile,
    tiles,
)
from dpteach.explorer.thread import Job
from dpteach.federated import Round, Worker, WorkerStep
from dpteach.plots import Item, Line, Mark, Panel, Points, Zones, short, svg
from dpteach.plots.items import array, thin
from dpteach.training import Settings, Step

_FRAME = 0.1  # seconds between two frames
_PATIENCE = 2.0  # seconds into a run after which the slower, tighter ε is computed without waiting for the end
_LONG = 20_000  # steps; from there on the path of ε is asked at a few
_MOST_KEPT, _NUMBERED, _GHOSTS = 20, 8, 3  # runs
_TIMED = 0.5  # seconds of a run that tell its speed


@dataclass
class Curve:
    """A curve that grows: a frame must not walk through thousands of records."""

    xs: list[float] = field(default_factory=list)
    ys: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """One more point."""
        self.xs.append(x)
        self.ys.append(y)

    def line(self, role: str, label: str, dashed: bool = False) -> Line:
        """As it is now, for a panel: it may grow in another thread, x first."""
        n = len(self.ys)
        return Line(self.xs[:n], self.ys[:n], role, label, dashed)

    def ghost(self, role: str) -> Line:
        """As it ended, pale and short, to stand behind the runs that follow."""
        return Line(*thin(array(self.xs), array(self.ys)), role, ghost=True)


@dataclass
class Run:
    """A training as far as it has come: all that its pictures, its price line and its summary need.

    An explorer's run has one worker and one round. The run without privacy beside it is a run too.
    """

    settings: Settings  # of all workers, but for a σ of their own
    values: dict[str, Any] = field(default_factory=dict)  # that bring it back, by control or setting
    workers: list[Worker] = field(default_factory=list)  # who trains, and pays; none before the first run
    rounds: int = 1
    model: Any = None  # made when it begins
    history: list[Any] = field(default_factory=list)  # the Steps, or the Rounds
    latest: Step | WorkerStep | Round | None = None
    steps_done: int = 0  # of all workers
    losses: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))  # by worker's name
    epsilons: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))  # spent so far, by RDP
    accuracies: Curve = field(default_factory=Curve)  # at the end of an epoch, or a round
    exact: dict[str, float] | None = None  # ε of the whole run by worker's name, by PRV
    baseline: "Run | None" = None  # without privacy
    boundary: tuple[np.ndarray, np.ndarray] | None = None  # between two classes in the plane, where the run is over
    duration: str = ""  # a sentence, where it is worth one
    ended: str = ""  # why, before its last step
    before: tuple[float | None, float, float] | None = None  # the numbers of the run before it

    @property
    def steps(self) -> int:
        """How many the whole run has, of all workers."""
        return self.rounds * sum(worker.steps_per_round for worker in self.workers)

    @property
    def private(self) -> bool:
        """Whether somebody trains privately, so that there is a price."""
        return any(worker.method != "sgd" for worker in self.workers)

    @property
    def complete(self) -> bool:
        """Whether the run went to its last step: it was not stopped, and did not diverge."""
        return 0 < self.steps == self.steps_done and not self.ended

    @property
    def accuracy(self) -> float | None:
        """The last one that is known."""
        return self.accuracies.ys[-1] if self.accuracies.ys else None

    @functools.cached_property
    def bound(self) -> dict[str, float]:
        """ε of the whole run by worker's name, by RDP: quick, an upper bound."""
        return self.price("rdp")

    @functools.cached_property
    def most_believed(self) -> float:
        """What an attacker can believe of a record of the worker who pays most: :func:`.numbers.most_believed`."""
        return max(
            most_believed(
                noise_multiplier=0 if worker.method == "sgd" else worker.settings.noise_multiplier,
                sample_rate=worker.sample_rate,
                steps=self.rounds * worker.steps_per_round,
            )
            for worker in self.workers
        )

    @functools.cached_property
    def path(self) -> Curve:
        """ε of the first worker after each of some steps, by RDP: known before a step has run."""
        worker = self.workers[0]
        steps = self.rounds * worker.steps_per_round
        if worker.method == "sgd" or steps > _LONG:
            at = sorted({int(t) for t in np.linspace(1, steps, 10)})
            return Curve([float(t) for t in at], [self.price("rdp", steps=t)[worker.name] for t in at])
        run: dict[str, Any] = {
            "noise_multiplier": worker.settings.noise_multiplier,
            "target_delta": worker.settings.target_delta,
        }
        return Curve(
            [float(t) for t in range(1, steps + 1)],
            list(epsilon_path(**run, sample_rate=worker.sample_rate, steps=steps)),
        )

    @property
    def numbers(self) -> tuple[float | None, float, float]:
        """The three big ones: accuracy, ε of the whole run (the highest, by the best that is known), the odds."""
        return self.accuracy, max((self.exact or self.bound).values()), self.most_believed

    def price(self, accountant: str, steps: int | None = None) -> dict[str, float]:
        """ε of the whole run by worker's name, or of so many steps; inf for one who trains without privacy."""
        return {
            worker.name: epsilon(
                noise_multiplier=0 if worker.method == "sgd" else worker.settings.noise_multiplier,
                sample_rate=worker.sample_rate,
                steps=steps or self.rounds * worker.steps_per_round,
                target_delta=worker.settings.target_delta,
                accountant=accountant,
            )
            for worker in self.workers
        }

    def add_step(self, worker: str, x: float, loss: float) -> None:
        """Take in a step of a worker, which lies at ``x`` on the curve of its losses."""
        self.steps_done += 1
        self.losses[worker].add(x, loss)

    def add_record(self, record: Step | Round, x: float, epsilons: dict[str, float]) -> None:
        """Take in what :attr:`history` keeps: a step, or a round; ``x``: where it lies on the curve of the budget."""
        self.history.append(record)
        for worker, value in epsilons.items():
            self.epsilons[worker].add(x, value)
        if record.accuracy is not None:
            self.accuracies.add(getattr(record, "epoch", x), record.accuracy)


@dataclass(frozen=True)
class Kept:
    """A run that went to its end: a numbered dot in the trade-off.

    Attributes:
        number: 1, 2, …
        settings: its :class:`~dpteach.Settings`; of a federation what all workers share.
        values: what brings it back: a value by the name of a control or a setting.
        epsilon, exact: ε by RDP and by PRV, of the worker who pays most; ``inf`` without privacy.
        accuracy, without_privacy: that of the run, and that of the run without privacy beside it, or None.
        how: method and optimizer.
    """

    number: int
    settings: Settings
    values: dict[str, Any]
    epsilon: float
    exact: float
    accuracy: float
    without_privacy: float | None
    how: str

    def __str__(self) -> str:
        told = {label_of(k): number_text(v) if isinstance(v, (int, float)) else v for k, v in self.values.items()}
        said = ", ".join(f"{name} {value}" for name, value in told.items())
        return f"Run {self.number}: {self.accuracy:.1%} at ε = {short(self.exact)}; {said}; {self.how}"


class LiveTraining(LivePicture):
    """A live picture of a training. One training runs at a time: a new one stops the one before it.

    A subclass says what to train, trains it step by step, and puts it into words and panels.

    Attributes:
        run: the current :class:`Run`, as far as it has come.
        kept: the last 20 runs that went to their end, as :class:`Kept`: what the trade-off shows.
    """

    _accuracy_of, _epsilon_of = "test accuracy", "ε of the whole run (RDP bound)"
    _classes: int
    _presets: dict[str, dict[str, Any]] = {}  # offered beside the runs that were kept
    _pricing = threading.Lock()  # the slow, tight ε is computed for one run at a time

    def __init__(self, controls: dict[str, Any], settings: Settings, make_model: Callable[[], nn.Module]):
        super().__init__(controls, "dpteach-train", alone=True)
        self._make_model = make_model
        self.run = Run(settings)
        self._numbers, self._price_line, self._dots = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._price_line.add_class("dpteach-small")
        self._before: tuple[float | None, float, float] | None = None  # the numbers of the last complete run
        self._drawn_at = -math.inf
        self.kept: list[Kept] = []
        self._ghosts: list[list[list[Line]]] = []  # losses, ε and accuracy of the last runs
        self._back = menu("bring back", [("choose …", 0)])
        self._back.add_class("dpteach-back")
        self._offer()
        self._back.observe(lambda change: self._set(self._offered[change["new"] or 0]), "value")

    def _lay_out(self, controls: list[widgets.Widget], below: Sequence[widgets.Widget] = ()) -> None:
        """Controls left, with what stands below them; numbers, status and pictures right."""
        start = button("Start", "play", "Train again from the beginning", self.start)
        stop = button("Stop", "stop", "Stop training", self.stop)
        reset = button("Reset", "undo", "Put every control back where it started", self.reset)
        left = [
            *controls,
            in_a_row(start, stop, reset),
            self._price_line,
            folded("The odds as 100 dots", [self._dots]),
            *below,
        ]
        self._numbers.add_class("dpteach-top")
        page = two_columns(left, [self._numbers, self._status_line, self._picture])
        self.widget = accessible_box([page, self._spoken])

    def _new_run(self, values: dict[str, Any]) -> Run:
        """A run with its workers, by the controls' values; its model comes later."""
        raise NotImplementedError

    def _steps_of(self, run: Run, values: dict[str, Any]) -> Generator[None, None, None]:
        """Train ``run``, a step of a worker at a time, and keep its record."""
        raise NotImplementedError

    def _panels_of(self, run: Run, plan: Run | None = None) -> list[Panel]:
        """What ``run`` has done; what is known beforehand is that of ``plan``, a run which may follow it."""
        raise NotImplementedError

    def _price_of(self, run: Run) -> str:
        """The price line, by ``run.exact`` or, before that is known, by ``run.bound``."""
        raise NotImplementedError

    def _progress_of(self, run: Run, to_go: str) -> str:
        """The status line while it trains; ``to_go``: ", about 3 minutes to go", or nothing."""
        raise NotImplementedError

    def _place_of(self, run: Run) -> str:
        """Where it stands: "step 3"."""
        raise NotImplementedError

    def _result_of(self, run: Run) -> str:
        """What it has reached."""
        raise NotImplementedError

    def start(self) -> None:
        """Train from the beginning with the settings that the sliders show."""
        self._thread.request(force=True)

    def stop(self) -> None:
        """Stop training; what has been drawn stays."""
        self._halt(f"Stopped at {self._place_of(self.run)}. Press Start to train again.")

    def _panels(self) -> list[Panel]:
        return self._panels_of(self.run)

    def _work(self, job: Job) -> None:
        # What is known before any training is shown while the slider moves: as often as a frame, of the newest setting
        # at that moment. It is shown even if a newer one has come meanwhile, as one would each time; not after a Stop.
        job.wait_until(lambda: False, max(0.0, self._drawn_at + _FRAME - time.perf_counter()))
        if job.over:
            return
        self._drawn_at = time.perf_counter()
        run = self._new_run(job.values)
        run.before = self._before
        price, picture = escape(self._price_of(run)), self._drawn(self.run, run)
        with self._thread.lock:
            if not self._thread.stopped:
                self._picture.value, self._price_line.value = picture, price
                self._say("It trains as soon as the slider rests.", aloud=False)
        if job.comes_to_rest():
            self._drain(run, job)

    def _drain(self, run: Run, job: Job) -> None:
        """Take the run's steps one by one, and draw: at most ten frames a second, until it ends or the job is over."""
        run.model = models.start(self._make_model, run.settings.seed)
        with self._thread.lock:
            if job.over:
                return
            self.run = run
        timer, pricing = _Timer(), None
        next_frame = timer.began
        with closing(self._steps_of(run, job.values)) as steps:
            for _ in steps:
                to_go = timer.to_go(run)
                if to_go and not run.duration:
                    self._announce(run, to_go, job)
                if run.ended:
                    break
                if job.over:
                    return
                now = time.perf_counter()
                if now >= next_frame:
                    status = self._progress_of(run, f", {to_go} to go" if to_go else "")
                    if not self._show(job, self._drawn(run), status, progress=True):
                        return
                    next_frame = time.perf_counter() + _FRAME
                if run.private and pricing is None and now - timer.began > _PATIENCE:
                    pricing = self._price_beside(run, job)
        if run.private:
            pricing = pricing or self._price_beside(run, job)
            job.wait_until(pricing.is_set)
        if run.complete:
            self._keep(run)
        self._show(job, self._drawn(run), run.ended or f"Finished: {self._result_of(run)}.")

    def _keep(self, run: Run) -> None:
        """Remember a complete run, for the ones that follow."""
        self._before = run.numbers
        curves = [[curve.ghost(role) for curve, role in kind] for kind in self._curves_of(run)]
        self._ghosts = [*self._ghosts[-_GHOSTS:], curves]
        how = f"{run.workers[0].method}, {run.workers[0].optimizer}"
        if run.accuracy is None or any((kept.values, kept.how) == (run.values, how) for kept in self.kept):
            return
        number = self.kept[-1].number + 1 if self.kept else 1
        bound, exact = (max(price.values()) for price in (run.bound, run.exact or run.bound))
        without = run.baseline.accuracy if run.baseline is not None else None
        kept = Kept(number, run.settings, run.values, bound, exact, run.accuracy, without, how)
        self.kept = [*self.kept[1 - _MOST_KEPT :], kept]
        self._offer()

    def _offer(self) -> None:
        """The menu: the runs that were kept, and settings worth a try."""
        names = {f"run {k.number}: ε ≤ {short(k.epsilon)}, {k.accuracy:.0%}": k.values for k in reversed(self.kept)}
        offered = {"choose …": {}, **names, **self._presets}
        self._offered = list(offered.values())
        self._back.options = [(name, k) for k, name in enumerate(offered)]

    def _set(self, values: dict[str, Any]) -> None:
        """Set the controls to these values."""
        for name in self.controls.keys() & values.keys():
            self.controls[name].value = values[name]
        self._back.value = 0  # what was chosen can be chosen again

    def _expected(self, run: Run) -> float | None:
        """The accuracy that a run of these settings has reached elsewhere, where that is known."""
        return None

    def _curves_of(self, run: Run) -> list[list[tuple[Curve, str]]]:
        """The run's curves of loss, of ε and of accuracy, each with its role."""
        raise NotImplementedError

    def _ghosts_of(self, run: Run, which: int) -> list[Line]:
        """The last runs' curves; where ``run`` itself is the last one, those before it."""
        over = self._ghosts[:-1] if run.complete else self._ghosts
        return [line for ghosts in over[-_GHOSTS:] for line in ghosts[which]]

    def _trade_off_panel(self, run: Run, plan: Run, *more: Item) -> Panel:
        """Accuracy by ε, all by RDP: what was reached, and where the run that trains is now."""
        bound = max(plan.bound.values(), default=math.inf)
        items: list[Item] = [bands(across=True), *more, Mark("budget", x=_on_axis(bound))]
        if run.baseline is not None and run.baseline.accuracy is not None:
            items.append(Mark("non-private", "without privacy", y=run.baseline.accuracy))
        kept = sorted(self.kept, key=lambda k: k.epsilon)
        best = list(itertools.accumulate((k.accuracy for k in kept), max))
        if len(kept) > 1:  # a staircase: nothing in between was reached
            xs = np.repeat([_on_axis(k.epsilon) for k in kept], 2)[1:]
            items.append(Line(xs, np.repeat(best, 2)[:-1], "private", "best so far"))
        # Many names would hide each other.
        for some, named in ((self.kept[:-_NUMBERED], False), (self.kept[-_NUMBERED:], True)):
            names, tips = ([str(k.number) for k in some], [str(k) for k in some]) if named else ([], [])
            at = [_on_axis(k.epsilon) for k in some], [k.accuracy for k in some]
            items.append(Points(*at, "private", names=names, tips=tips))
        if plan is not run and (expected := self._expected(plan)) is not None:
            items.append(Points([_on_axis(bound)], [expected], "private", names="?"))
        spent = [curve.ys[-1] for curve in run.epsilons.values() if curve.ys]
        if spent and run.accuracy is not None and not run.complete and plan is run:
            items.append(Points([_on_axis(max(spent))], [run.accuracy], "private", names="…"))
        told = "; ".join(f"run {k.number}: {k.accuracy:.0%} at ε {short(k.epsilon)}" for k in self.kept[-6:])
        alt = (
            f"{self._accuracy_of.capitalize()} by ε: {told or 'no run has ended'}. This run: at most ε {short(bound)}."
        )
        words = "Privacy against accuracy", self._epsilon_of, self._accuracy_of
        return Panel(*words, items, alt, EPSILONS, (1 / self._classes, 1), x_log=True)

    def _drawn(self, run: Run, plan: Run | None = None) -> str:
        """The pictures, as by :meth:`_panels_of`; the big numbers are put on the page."""
        self._numbers.value = self._numbers_of(plan or run)
        self._dots.value = dots((plan or run).most_believed)
        return svg(self._panels_of(run, plan))

    def _numbers_of(self, run: Run) -> str:
        accuracy, epsilon, most = run.numbers
        was = run.before
        without = run.baseline.accuracy if run.baseline is not None else None
        beside = ""
        if accuracy is not None and without is not None:
            beside = f"{points(round(accuracy, 2) - round(without, 2))} than without privacy ({without:.0%})."
            beside = beside.replace("as much than", "as much as")
        if accuracy is None and (expected := self._expected(run)) is not None:
            accuracy, beside = expected, "expected: the mean of the nearest cell of the surface"
        elif accuracy is None and was and was[0] is not None:  # nothing goes blank
            accuracy, beside = was[0], "by the run before; this one has none yet"
        known = "" if accuracy is None else f"{accuracy:.0%}"
        delta = number_text(run.settings.target_delta)
        worth = f"{band(epsilon).capitalize()}: at δ = {delta}, by {'PRV' if run.exact else 'RDP'}."
        if math.isinf(epsilon):
            worth = "No guarantee: no noise hides anybody."
        return tiles(
            tile(self._accuracy_of, known or "–", beside, f"{was[0]:.0%}" if was and was[0] is not None else ""),
            tile("ε of the whole run", epsilon_number(epsilon, bool(run.exact)), worth, short(was[1]) if was else ""),
            tile("odds", f"{right_of_100(most)} of 100", odds_in_words(most), f"{right_of_100(was[2])}" if was else ""),
        )

    def _show_price(self, run: Run, job: Job) -> None:
        price = escape(self._price_of(run) + run.duration)
        with self._thread.lock:
            if not job.over:
                self._price_line.value = price

    def _announce(self, run: Run, duration: str, job: Job) -> None:
        """Say once that a run takes long."""
        run.duration = f" This run has {run.steps:,} steps and takes {duration}. Stop ends it."
        with self._thread.lock:
            if not job.over:
                self._spoken.value = escape(run.duration.strip())
        self._show_price(run, job)

    def _price_beside(self, run: Run, job: Job) -> threading.Event:
        """The exact price, in a thread of its own; the event that it is known.

        PRV can take seconds and can't be interrupted, so neither a frame nor a Stop waits for it. Nothing is computed
        for a job that is over.
        """
        done = threading.Event()

        def work():
            try:
                with LiveTraining._pricing:
                    if not job.over:
                        run.exact = run.price("prv")
                        self._show_price(run, job)
            except Exception as error:  # a learner never meets a traceback from inside a widget
                self._fail(job, error)
            finally:
                with self._thread.lock:
                    done.set()
                    self._thread.lock.notify_all()

        threading.Thread(target=work, name="dpteach-price", daemon=True).start()
        return done


class _Timer:
    """How long a run takes, by the speed of its first half second, without its first step: that may load things."""

    def __init__(self):
        self.began = time.perf_counter()
        self._first: tuple[float, int] | None = None  # when, and after how many steps

    def to_go(self, run: Run) -> str:
        """About how long is left: "about 3 minutes"; empty where it is a minute or less, or not known yet."""
        now = time.perf_counter()
        first, skipped = self._first = self._first or (now, run.steps_done)
        if now - first < _TIMED or run.steps_done == skipped:
            return ""
        minutes = (now - first) / (run.steps_done - skipped) * (run.steps - run.steps_done) / 60
        return f"about {round(minutes)} minute{'s' if round(minutes) > 1 else ''}" if minutes > 1 else ""


EPSILONS = (0.01, 1e4)  # the ends of every axis of ε


def bands(across: bool = False) -> Zones:
    """The words behind an axis of ε."""
    ends = [EPSILONS[0], *list(BANDS)[:-1], EPSILONS[1]]
    return Zones(ends, list(BANDS.values()), ["budget", "", "attacker"], across)


def budget_panel(items: list, x_label: str, y_label: str, end: float, alt: str) -> Panel:
    """What has been spent: every run on the same logarithmic axis."""
    return Panel("Privacy budget spent", x_label, y_label, [bands(), *items], alt, (0, end), EPSILONS, y_log=True)


def loss_panel(items: list, x_label: str, end: float, alt: str, classes: int) -> Panel:
    """The loss, up to twice that of a model that knows nothing: log of the number of classes."""
    y_range = (0, 2 * math.log(classes))
    return Panel("Training loss", x_label, "loss (batch mean)", items, alt, (0, end), y_range)


def class_count(data: Data) -> int:
    """How many classes the labels name, at least two."""
    return max(2, int(data.y.max()) + 1)


def _on_axis(epsilon: float) -> float:
    """An ε beyond the axis stands near its end, where its dot is whole."""
    return min(max(epsilon, 1.3 * EPSILONS[0]), EPSILONS[1] / 1.3)


@torch.no_grad()
def diverged(model: nn.Module, data: Data) -> bool:
    """Whether the model's scores are not all finite numbers any more."""
    return not bool(model(data.X[:32].to(next(model.parameters()).device)).isfinite().all())
