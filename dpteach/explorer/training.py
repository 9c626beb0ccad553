"""An explorer: one training run, live, with the non-private run beside it."""

import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from torch import nn

from dpteach._checks import choice, number
from dpteach.accounting import epsilon
from dpteach.data import Data
from dpteach.explorer.live import (
    RANGES,
    Pace,
    Range,
    Trainer,
    diverged,
    figure,
    folded,
    minutes,
    new_model,
    slider_for,
    words,
)
from dpteach.plots import Line, Mark, Panel, Points, contour, svg
from dpteach.training import METHODS, OPTIMIZERS, Settings, Step, delta_warning, train

_FRAME = 0.1  # seconds between two frames
_PATIENCE = 2.0  # seconds into a run after which the slower, tighter ε is computed without waiting for the end


@dataclass
class Run:
    """What a run has come to so far: all that its pictures and its summary need."""

    settings: Settings
    price: float  # RDP
    baseline_lr: float = 0.0
    model: nn.Module | None = None
    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(
        default_factory=list
    )  # of the steps: a frame must not walk through thousands of records
    epsilons: list[float] = field(default_factory=list)
    baseline: list[Step] = field(default_factory=list)
    baseline_losses: list[float] = field(default_factory=list)
    baseline_boundary: tuple | None = None
    exact: float | None = None  # PRV
    takes: str = ""  # how long, where that is worth a sentence
    ended: str = ""

    @property
    def complete(self) -> bool:
        """Whether the run went to its last step: it was not stopped, and did not diverge."""
        return bool(self.steps) and self.steps[-1].step == self.steps[-1].steps and not self.ended


class Explorer(Trainer):
    """Train live, with sliders for the settings; moving one starts the training again.

    Training starts when the explorer is made. One training runs at a time: a new explorer stops the one before it.
    As the last line of a cell it shows itself; the next cell can hold the saved picture::

        explorer = Explorer(two_moons(2000), models.mlp, Settings(lr=2.0))
        explorer

        explorer.wait(); print(explorer.summary()); explorer.still()

    Args:
        data: the private records. With two numbers a record, a third panel shows the decision boundary; otherwise the
            accuracy by epoch.
        make_model: ``make_model() -> nn.Module``, a new model each time; ``models.mlp`` or ``models.cnn``, say.
        settings: where the sliders start, and the settings that have none.
        method, optimizer: as for :func:`dpteach.training.train`.
        sliders: names of the settings to show first; learning rate and batch size can be unfolded below.
        baseline: also train without privacy, for comparison; once for all values of the sliders of σ, C and lr.
        baseline_lr: that run's learning rate, with plain SGD; by default the one in ``settings``, with ``optimizer``.
            Beside a baseline whose learning rate suits the private run only, privacy seems to help.
        test_data: records for the accuracy; without them it is that on (up to 1,000 of) the training records, and says
            so.
        ranges: other ends for a slider: ``{"epochs": Range(1, 300, whole=True)}``.

    Attributes:
        controls: the slider widgets by setting name.
        settings: the settings that the sliders show.
        status: the status line's text.
        steps: the :class:`~dpteach.training.Step` records of the current run so far.
        error: the exception that ended the last run, or None.

    Raises:
        ValueError: if a slider's name is not a setting, the method is not known, or ``baseline_lr`` is not above 0.
    """

    def __init__(
        self,
        data: Data,
        make_model: Callable[[], nn.Module],
        settings: Settings = Settings(),
        *,
        method: str = "dpsgd",
        optimizer: str = "sgd",
        sliders: Sequence[str] = ("noise_multiplier", "max_grad_norm", "epochs"),
        baseline: bool = True,
        baseline_lr: float | None = None,
        test_data: Data | None = None,
        ranges: dict[str, Range] | None = None,
    ):
        self._data, self._make_model, self._start_settings = data, make_model, settings
        self._method, self._optimizer = choice("method", method, METHODS), choice("optimizer", optimizer, OPTIMIZERS)
        self._baseline = baseline and method != "sgd"
        own = baseline_lr is not None
        self._baseline_lr = number("baseline_lr", baseline_lr, low=0, above=True) if own else settings.lr
        self._baseline_optimizer = "sgd" if own else optimizer
        self._baselines: dict[tuple, Run] = {}
        self._test_data = test_data or data.take(min(1000, len(data)))
        self._accuracy_of = "test accuracy" if test_data else "training accuracy"
        self._plane = data.X.ndim == 2 and data.X.shape[1] == 2
        self._run = Run(settings, math.inf)
        shown = data.take(min(200, len(data)))
        self._records = (
            [
                Points(*shown.X[shown.y == label].T.cpu().numpy(), "data", f"class {label}", cross=bool(label))
                for label in (0, 1)
            ]
            if self._plane
            else []
        )

        adjustable = [f.name for f in dataclasses.fields(Settings) if f.name != "seed"]
        for name in sliders:
            choice("sliders", name, adjustable)
        rest = [name for name in ("lr", "batch_size") if name not in sliders]
        limits = {**RANGES, "batch_size": Range(1, len(data), log=True, whole=True), **(ranges or {})}
        controls = {name: slider_for(name, getattr(settings, name), limits[name]) for name in (*sliders, *rest)}
        self._price_line = widgets.HTML()

        def rows():
            more = [folded("More: " + ", ".join(map(words, rest)), [controls[name] for name in rest])] if rest else []
            return [
                *(controls[name] for name in sliders),
                *more,
                self._start_and_stop(),
                self._price_line,
                self._picture,
            ]

        super().__init__(controls, rows)
        self.start()

    @property
    def settings(self) -> Settings:
        """The settings that the sliders show now."""
        return dataclasses.replace(self._start_settings, **self.values)

    @property
    def steps(self) -> list[Step]:
        """The records of the current run so far."""
        return list(self._run.steps)

    def _so_far(self) -> str:
        return f"step {len(self._run.steps)}"

    def summary(self) -> str:
        """One sentence about the last run: its settings, its ε, its accuracy beside the non-private one."""
        run = self._run
        s = run.settings
        if self.error is not None:
            return self.status
        if not run.steps:
            return "No training has run yet."
        parts = [f"{s.epochs} epochs at learning rate {figure(s.lr)}"]
        if self._method == "sgd":
            parts.append("no privacy (ε = ∞)")
        else:
            parts.insert(0, f"σ = {figure(s.noise_multiplier)}, C = {figure(s.max_grad_norm)}")
            parts.append(self._cost(run))
        if self._reached(run):
            parts.append(self._reached(run))
        if not run.complete and not run.ended:
            parts.append(f"only {len(run.steps)} of {run.steps[-1].steps} steps have run, and ε is that of all")
        return "; ".join(parts) + "." + (f" {run.ended}" if run.ended else "")

    def _reached(self, run: Run) -> str:
        accuracy, without = last_accuracy(run.steps), last_accuracy(run.baseline)
        if accuracy is None:
            return ""
        told = f"{self._accuracy_of} {accuracy:.0%}"
        if without is not None:
            told += f", without privacy {without:.0%}"
            if run.baseline_lr != run.settings.lr:
                told += f" at learning rate {figure(run.baseline_lr)}"
        return told

    def _preview(self, values: dict[str, Any], generation: int) -> None:
        settings = dataclasses.replace(self._start_settings, **values)
        self._show_price(Run(settings, self._whole_price(settings, "rdp")), generation)

    def _whole_price(self, settings: Settings, accountant: str) -> float:
        if self._method == "sgd":
            return math.inf
        n = len(self._data)
        return epsilon(
            noise_multiplier=settings.noise_multiplier,
            sample_rate=settings.sample_rate(n),
            accountant=accountant,
            steps=settings.epochs * settings.steps_per_epoch(n),
            target_delta=settings.target_delta,
        )

    def _cost(self, run: Run) -> str:
        delta = f"at δ = {figure(run.settings.target_delta)}"
        if run.exact is None:
            return f"ε ≤ {run.price:.2f} {delta} (RDP, an upper bound)"
        return f"ε = {run.exact:.2f} {delta} (PRV; the quick RDP bound says {run.price:.2f})"

    def _show_price(self, run: Run, generation: int) -> None:
        if self._method == "sgd":
            text = "No privacy: ε = ∞, whatever the settings."
        else:
            text = f"Price of the whole run: {self._cost(run)}."
            warning = delta_warning(run.settings, len(self._data))
            text += f" Careful: {warning}." if warning else ""
        text += run.takes
        with self._changed:
            if generation == self._generation:
                self._price_line.value = escape(text)

    def _work_on(self, values: dict[str, Any], generation: int) -> None:
        settings = dataclasses.replace(self._start_settings, **values)
        run = Run(settings, self._whole_price(settings, "rdp"), self._baseline_lr)
        run.model = new_model(self._make_model, settings.seed)
        steps = self._train(run.model, settings, self._method, self._optimizer)
        beside, pace = self._baseline_beside(run), Pace()
        began = time.perf_counter()
        next_frame, priced = began, None
        with self._changed:
            if generation != self._generation:
                return
            self._run = run
        try:
            for step in steps:
                run.steps.append(step)
                run.losses.append(step.loss)
                run.epsilons.append(step.epsilon)
                next(beside, None)
                now = time.perf_counter()
                left = pace.minutes_left(step.step, step.steps)
                if self._foretell(run, generation, left, step.steps):
                    self._show_price(run, generation)
                if math.isnan(step.loss) and diverged(run.model, self._data):  # an empty batch has no loss either
                    run.ended = (
                        f"Diverged at step {step.step}: the loss is not a number any more. Try a lower learning rate."
                    )
                    break
                if generation != self._generation:
                    return
                if now >= next_frame:
                    picture, status = svg(self._panels_of(run)), self._progress(step, left)
                    if not self._show(generation, picture=picture, status=status, progress=True):
                        return
                    next_frame = time.perf_counter() + _FRAME
                if priced is None and now - began > _PATIENCE and self._method != "sgd":
                    priced = self._price(generation, lambda: self._make_exact(run, generation))
        finally:
            steps.close()
        if self._method != "sgd":
            priced = priced or self._price(generation, lambda: self._make_exact(run, generation))
            self._until(priced.is_set, generation)
        self._show(
            generation, picture=svg(self._panels_of(run)), status=run.ended or f"Finished: {self._reached(run)}."
        )

    def _train(self, model: nn.Module, settings: Settings, method: str, optimizer: str) -> Iterator[Step]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a δ of 1/n or more: the price line says it
            return train(model, self._data, settings, method=method, optimizer=optimizer, test_data=self._test_data)

    def _make_exact(self, run: Run, generation: int) -> None:
        run.exact = self._whole_price(run.settings, "prv")
        self._show_price(run, generation)

    def _progress(self, step: Step, left: int) -> str:
        loss = "an empty batch" if math.isnan(step.loss) else f"loss {step.loss:.2f}"
        so_far = "" if math.isinf(step.epsilon) else f", ε so far at most {step.epsilon:.2f}"
        to_go = f", {minutes(left)} to go" if left else ""
        return f"Training: step {step.step} of {step.steps}{to_go}, {loss}{so_far}"

    def _baseline_beside(self, run: Run) -> Iterator[None]:
        """Train the non-private model in step with ``run``; where it has been trained before, show that run whole."""
        if not self._baseline:
            return
        plain = dataclasses.replace(run.settings, lr=run.baseline_lr, seed=run.settings.seed or 0)
        key = (plain.batch_size, plain.epochs)
        if key not in self._baselines:
            model = new_model(self._make_model, plain.seed)
            for step in self._train(model, plain, "sgd", self._baseline_optimizer):
                run.baseline.append(step)
                run.baseline_losses.append(step.loss)
                if step.step < step.steps:
                    yield
            run.baseline_boundary = self._boundary(model)
            self._baselines = {key: run}
        trained = self._baselines[key]
        run.baseline, run.baseline_losses = trained.baseline, trained.baseline_losses
        run.baseline_boundary = trained.baseline_boundary

    def _boundary(self, model: nn.Module) -> tuple | None:
        if not self._plane:
            return None
        xs, ys, grid = self._grid
        with torch.no_grad():
            scores = model(grid.to(next(model.parameters()).device)).cpu().numpy()
        margin = (scores[:, 1] - scores[:, 0]).reshape(len(ys), len(xs))
        return contour(xs, ys, margin, 0.0) if np.isfinite(margin).all() else None

    @functools.cached_property
    def _window(self) -> tuple[tuple[float, float], tuple[float, float]]:
        low, high = self._data.X.min(0).values.tolist(), self._data.X.max(0).values.tolist()
        return (low[0], high[0]), (low[1], high[1])

    @functools.cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        xs, ys = (np.linspace(*ends, 40) for ends in self._window)
        return xs, ys, torch.tensor(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2), dtype=torch.float32)

    def _panels(self) -> list[Panel]:
        return self._panels_of(self._run)

    def _panels_of(self, run: Run) -> list[Panel]:
        own = "non-private" if self._method == "sgd" else "private"
        panels = [self._loss_panel(run, own)]
        if self._method != "sgd":
            panels.append(self._epsilon_panel(run))
        panels.append(self._boundary_panel(run, own) if self._plane else self._accuracy_panel(run, own))
        return panels

    def _loss_panel(self, run: Run, own: str) -> Panel:
        items = [curve_line(run.baseline_losses, "non-private", "without privacy", dashed=True)] if run.baseline else []
        items.append(curve_line(run.losses, own, "with privacy" if own == "private" else "loss"))
        total = run.steps[-1].steps if run.steps else 1
        s = run.settings
        told = (
            f"Learning rate {figure(s.lr)}"
            if own == "non-private"
            else f"σ = {figure(s.noise_multiplier)}, C = {figure(s.max_grad_norm)}"
        )
        alt = f"{told}, {s.epochs} epochs. Loss by step: {_late_loss(run.steps)} at the end"
        alt += f", {_late_loss(run.baseline)} without privacy." if run.baseline else "."
        return Panel("Training loss", "step", "loss (batch mean)", items, alt, x_range=(0, total))

    def _epsilon_panel(self, run: Run) -> Panel:
        total = run.steps[-1].steps if run.steps else 1
        items = [curve_line(run.epsilons, "budget", "spent (RDP bound)")]
        top = run.price
        if math.isfinite(
            top
        ):  # by the curve's accountant: it would cross a tighter one's line, as if the run overspent
            items.append(Mark("budget", "whole run (RDP)", y=top))
        so_far = f"{run.steps[-1].epsilon:.2f}" if run.steps else "0"
        alt = f"ε by step: at most {so_far} after step {run.steps[-1].step if run.steps else 0} of {total}."
        return Panel(
            "Privacy budget spent",
            "step",
            "ε",
            items,
            alt,
            x_range=(0, total),
            y_range=(0, top * 1.08) if math.isfinite(top) and top > 0 else (0, 1),
        )

    def _boundary_panel(self, run: Run, own: str) -> Panel:
        items: list[Any] = [*self._records]
        if run.baseline_boundary is not None:
            items.append(Line(*run.baseline_boundary, "non-private", dashed=True))
        boundary = self._boundary(run.model) if run.model is not None else None
        if boundary is not None:
            items.append(Line(*boundary, own))
        accuracy = last_accuracy(run.steps)
        alt = "Decision boundary between the two classes" + (
            f"; {self._accuracy_of} {accuracy:.0%}." if accuracy is not None else "."
        )
        x_range, y_range = self._window
        return Panel("Decision boundary", "first coordinate", "second coordinate", items, alt, x_range, y_range)

    def _accuracy_panel(self, run: Run, own: str) -> Panel:
        def curve(steps, *style, **more):
            known = [s for s in steps if s.accuracy is not None]
            return Line([s.epoch for s in known], [s.accuracy for s in known], *style, **more)

        items = [curve(run.baseline, "non-private", "without privacy", dashed=True)] if run.baseline else []
        items.append(curve(run.steps, own, "with privacy" if own == "private" else "accuracy"))
        accuracy, without = last_accuracy(run.steps), last_accuracy(run.baseline)
        alt = f"{self._accuracy_of.capitalize()} by epoch" + (
            f": {accuracy:.0%} at the end" if accuracy is not None else ""
        )
        alt += f", {without:.0%} without privacy." if without is not None else "."
        return Panel(
            self._accuracy_of.capitalize(),
            "epoch",
            "share right",
            items,
            alt,
            x_range=(0, max(run.settings.epochs, 2)),
            y_range=(0, 1),
        )


def curve_line(values: list[float], role: str, label: str, dashed: bool = False) -> Line:
    return Line(np.arange(1, len(values) + 1), np.array(values), role, label, dashed)


def last_accuracy(steps: list[Step]) -> float | None:
    return next((s.accuracy for s in reversed(steps) if s.accuracy is not None), None)


def _late_loss(steps: list[Step]) -> str:
    """The mean loss of the last epoch that has run, coarsely: one batch's loss says little."""
    last_epoch = itertools.takewhile(lambda s: s.epoch == steps[-1].epoch, reversed(steps))
    losses = [s.loss for s in last_epoch if math.isfinite(s.loss)]
    return f"{sum(losses) / len(losses):.1f}" if losses else "none"
