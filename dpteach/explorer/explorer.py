"""An explorer: one training run, live, with the non-private run beside it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from html import escape
from typing import Any
from urllib.parse import parse_qsl, urlencode

import ipywidgets as widgets
import numpy as np
import torch
from torch import nn

from dpteach import models
from dpteach._checks import choice, number
from dpteach.accounting import epsilon
from dpteach.data import Data
from dpteach.explorer.controls import RANGES, Range, Slider, button, folded, label_of, number_text
from dpteach.explorer.explain import explain
from dpteach.explorer.script import opacus_script
from dpteach.explorer.surface import SurfaceExplorer
from dpteach.explorer.training import (
    EPSILONS,
    Curve,
    LiveTraining,
    Run,
    budget_panel,
    class_count,
    diverged,
    loss_panel,
)
from dpteach.federated import Worker
from dpteach.ledger import Ledger
from dpteach.plots import Band, Field, Item, Line, Panel, Pictures, Points, Words, contour, short
from dpteach.training import METHODS, OPTIMIZERS, Settings, Step, begin, check, delta_warning

_NAME = "worker"  # of the only one
_PRESETS: dict[str, dict[str, float]] = {
    "no noise to speak of": {"noise_multiplier": 0.1, "max_grad_norm": 1.0},
    "textbook: σ = 1, C = 1": {"noise_multiplier": 1.0, "max_grad_norm": 1.0},
    "too private": {"noise_multiplier": 10.0, "max_grad_norm": 1.0},
    "C too small": {"noise_multiplier": 1.0, "max_grad_norm": 0.01},
}


class Explorer(LiveTraining):
    """Train live, with sliders for the settings; moving one starts the training again.

    Training starts when the explorer is made. One training runs at a time: a new explorer stops the one before it.
    As the last line of a cell it shows itself; the next cell can hold the saved picture::

        explorer = Explorer(two_moons(2000), models.mlp, Settings(lr=2.0))
        explorer

        explorer.wait(); print(explorer.summary()); explorer.still()

    Args:
        data: the private records. With two numbers a record and two classes, a panel shows what the model believes;
            otherwise the accuracy by epoch.
        make_model: ``make_model() -> nn.Module``, a new model each time; ``models.mlp`` or ``models.cnn``, say.
        settings: where the sliders start, and the settings that have none.
        method, optimizer: as for :func:`dpteach.training.train`.
        sliders: names of the settings to show first; learning rate and batch size can be unfolded below.
        baseline: also train without privacy, for comparison; once for all values of the sliders but epochs: with the
            batch size of ``settings``, and at least as many epochs.
        baseline_lr: that run's learning rate, with plain SGD; by default the one in ``settings``, with ``optimizer``.
            Beside a baseline whose learning rate suits the private run only, privacy seems to help.
        test_data: records for the accuracy; without them it is that on (up to 1,000 of) the training records, and says
            so.
        ranges: other ends for a slider: ``{"epochs": Range(1, 300, whole=True)}``.
        surface: a :class:`SurfaceExplorer` on the same records: its runs lie behind the trade-off, and while a slider
            moves, the accuracy of its nearest cell is said at once.
        challenge: an ε (at the δ of ``settings``) and an accuracy to reach: ``(2.0, 0.9)``. Tries are counted, the
            stopped ones too, with what they would cost together if each had noise of its own (here all have that of
            one seed, so that a setting repeats).

    Attributes:
        controls: the slider widgets by setting name.
        settings: the settings that the sliders show.
        status: the status line's text.
        steps: the :class:`~dpteach.training.Step` records of the current run so far.
        run: all of the current run: :class:`~dpteach.explorer.training.Run`.
        kept: the last 20 runs that went to their end, as :class:`Kept`: what the trade-off shows.
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
        challenge: tuple[float, float] | None = None,
        surface: SurfaceExplorer | None = None,
    ):
        self._challenge, self._tries, self._surface = challenge, Ledger(), surface
        self._delta = settings.target_delta  # the challenge's: another one would be another challenge
        self._data, self._start_settings = data, settings
        self._method, self._optimizer = choice("method", method, METHODS), choice("optimizer", optimizer, OPTIMIZERS)
        self._private = method != "sgd"
        self._role = "private" if self._private else "non-private"  # of the run's own lines
        self._baseline = baseline and self._private
        tuned = baseline_lr is not None
        self._baseline_lr = number("baseline_lr", baseline_lr, low=0, above=True) if tuned else settings.lr
        self._baseline_optimizer = "sgd" if tuned else optimizer
        self._plain: Run | None = None  # the run without privacy, once it is whole
        self._test_data = test_data or data.take(min(1000, len(data)))
        self._accuracy_of = "test accuracy" if test_data else "training accuracy"
        self._classes = class_count(data)
        self._plane = data.X.ndim == 2 and data.X.shape[1] == 2 and self._classes == 2

        adjustable = [f.name for f in dataclasses.fields(Settings) if f.name != "seed"]
        for name in sliders:
            choice("sliders", name, adjustable)
        rest = [name for name in ("lr", "batch_size") if name not in sliders]
        limits = {**RANGES, "batch_size": Range(1, len(data), log=True, whole=True), **(ranges or {})}
        controls = {name: Slider(name, getattr(settings, name), limits[name]) for name in (*sliders, *rest)}
        start = dataclasses.asdict(settings)
        self._presets = {name: start | values for name, values in _PRESETS.items()}
        super().__init__(controls, settings, make_model)
        self._written = ""
        self._code = widgets.Text(description="settings", continuous_update=False, layout=widgets.Layout(width="auto"))
        self._code.observe(lambda change: self._typed(change["new"]), "value")
        layout = widgets.Layout(width="auto", height="180px")
        self._script = widgets.Textarea(description="train_private.py", layout=layout)
        self._script.add_class("dpteach-script")
        self._played, self._why = widgets.HTML(), widgets.HTML()
        for words in (self._played, self._why):
            words.add_class("dpteach-small")
        rows = [self._rows[name] for name in sliders]
        if rest:
            rows.append(folded("More: " + ", ".join(map(label_of, rest)), [self._rows[name] for name in rest]))
        rows += [self._back, folded("Settings as text", [self._code])]
        copy = button("Copy", "copy", "Copy the script below", lambda: None)  # page.js copies
        copy.add_class("dpteach-copy")
        below = [self._played, folded("Explain this run", [self._why])]
        if self._private:
            below.append(folded("Copy as Opacus script", [copy, self._script]))
        self._lay_out(rows, below)
        self._tell_of_tries()
        self.start()

    @property
    def settings(self) -> Settings:
        """The settings that the sliders show now."""
        return dataclasses.replace(self._start_settings, **self.values)

    @property
    def steps(self) -> list[Step]:
        """The records of the current run so far."""
        return list(self.run.history)

    def summary(self) -> str:
        """One sentence about the last run: its settings, its ε, its accuracy beside the non-private one."""
        run, s = self.run, self.run.settings
        if self.error is not None:
            return self.status
        if not run.history:
            return "No training has run yet."
        parts = [f"{s.epochs} epochs at learning rate {number_text(s.lr)}"]
        if self._private:
            parts.insert(0, f"σ = {number_text(s.noise_multiplier)}, C = {number_text(s.max_grad_norm)}")
        parts.append(self._cost(run) if self._private else "no privacy")
        if run.accuracy is not None:
            parts.append(self._result_of(run))
        if not run.complete and not run.ended:
            parts.append(f"only {run.steps_done} of {run.steps} steps have run, and ε is that of all")
        return "; ".join(parts) + "." + (f" {run.ended}" if run.ended else "")

    def _new_run(self, values: dict[str, Any]) -> Run:
        settings = dataclasses.replace(self._start_settings, **values)
        worker = Worker(_NAME, self._data, settings, method=self._method, optimizer=self._optimizer)
        return Run(settings, dataclasses.asdict(settings), [worker])

    def _steps_of(self, run: Run, values: dict[str, Any]) -> Generator[None, None, None]:
        self._written = self.settings_string
        self._code.value = self._written
        baseline = self._baseline_beside(run) if self._baseline else iter(())
        try:
            for step in self._train(run):
                next(baseline, None)
                if math.isnan(step.loss) and diverged(run.model, self._data):  # an empty batch has no loss either
                    why = "the loss is not a number any more. Try a lower learning rate."
                    run.ended = f"Diverged at step {step.step}: {why}"
                yield
        finally:  # a run that was stopped has cost its steps
            if self._private and run.steps_done:
                of = {"noise_multiplier": run.settings.noise_multiplier, "sample_rate": run.workers[0].sample_rate}
                self._tries.charge(**of, steps=run.steps_done)
                self._tell_of_tries()
        for _ in baseline:
            yield

    def _train(self, run: Run) -> Iterator[Step]:
        worker = run.workers[0]
        how = {"method": worker.method, "optimizer": worker.optimizer}
        check(run.model, worker.data, worker.settings, **how)
        for step in begin(run.model, worker.data, worker.settings, **how, test_data=self._test_data):
            run.add_step(_NAME, step.step, step.loss)
            run.add_record(step, step.step, {_NAME: step.epsilon})
            yield step

    def _baseline_beside(self, run: Run) -> Iterator[None]:
        """Train the non-private model in step with ``run``; where it has been trained before, show that run whole."""
        start = self._start_settings
        epochs = max(start.epochs, run.settings.epochs)  # fewer, or larger batches, would make it worse than it can be
        if self._plain is None or self._plain.settings.epochs != epochs:
            self._plain = None
            batch_size = min(start.batch_size, len(self._data))
            changed: dict[str, Any] = {
                "lr": self._baseline_lr,
                "seed": start.seed or 0,
                "epochs": epochs,
                "batch_size": batch_size,
            }
            plain = dataclasses.replace(start, **changed)
            worker = Worker(_NAME, self._data, plain, method="sgd", optimizer=self._baseline_optimizer)
            run.baseline = baseline = Run(plain, {}, [worker], model=models.start(self._make_model, plain.seed))
            for _ in self._train(baseline):
                if not baseline.complete:
                    yield
            believed = self._belief(baseline.model)
            baseline.boundary = None if believed is None else contour(*self._grid[:2], believed, 0.5)
            self._plain = baseline
        run.baseline = self._plain

    def _price_of(self, run: Run) -> str:
        if not self._private:
            return "No privacy: ε = ∞, whatever the settings."
        warning = delta_warning(run.settings, len(self._data))
        return f"Price of the whole run: {self._cost(run)}." + (f" Careful: {warning}." if warning else "")

    def _cost(self, run: Run) -> str:
        delta, bound = f"at δ = {number_text(run.settings.target_delta)}", run.bound[_NAME]
        if run.exact is None:
            return f"ε ≤ {bound:.2f} {delta} (RDP, an upper bound)"
        return f"ε = {run.exact[_NAME]:.2f} {delta} (PRV; the quick RDP bound says {bound:.2f})"

    def _keep(self, run: Run) -> None:
        if self._private:
            try:
                self._script.value = self.script()
            except ValueError as error:
                self._script.value = f"# {error}"
            self._why.value = escape(explain(run, models.start(self._make_model, run.settings.seed)))
        super()._keep(run)
        self._tell_of_tries()

    @property
    def memory(self) -> tuple[Any, ...]:
        """The runs that it kept, and its tries: for :meth:`go_on_from` of another explorer on the same records."""
        return self.kept, self._ghosts, self._tries

    def go_on_from(self, memory: tuple[Any, ...]) -> None:
        """Take over the :attr:`memory` of another explorer on the same records."""
        self.kept, self._ghosts, self._tries = memory
        self._offer()
        self._tell_of_tries()

    def _curves_of(self, run: Run) -> list[list[tuple[Curve, str]]]:
        roles = (run.losses[_NAME], self._role), (run.epsilons[_NAME], "budget"), (run.accuracies, self._role)
        return [[curve] for curve in roles]

    def _set(self, values: dict[str, Any]) -> None:
        without_slider = {name: value for name, value in values.items() if name not in self.controls}
        self._start_settings = dataclasses.replace(self._start_settings, **without_slider)
        super()._set(values)

    @property
    def settings_string(self) -> str:
        """The settings as a line of text that :meth:`bring_back` reads, here or on another machine."""
        return urlencode({k: "" if v is None else f"{v:.12g}" for k, v in dataclasses.asdict(self.settings).items()})

    def _typed(self, text: str) -> None:
        if text != self._written:  # which the sliders may have left behind
            self.bring_back(text)

    def bring_back(self, settings_string: str) -> None:
        """Set the sliders, and the settings that have none, as a :attr:`settings_string` says.

        What it does not name stays. A string that can't be read changes nothing; the status line says why.
        """
        try:
            given = dict(parse_qsl(settings_string.strip().lstrip("?"), keep_blank_values=True, strict_parsing=True))
            values: dict[str, Any] = {k: float(v) if v else None for k, v in given.items()}
            if values.get("seed") is not None:
                values["seed"] = int(values["seed"])
            dataclasses.replace(self.settings, **values)
        except (ValueError, TypeError) as error:
            self._say(f"These settings can't be read: {error}")
            return
        self._set(values)

    def script(self) -> str:
        """The last run as ``train_private.py``: Opacus, the same records, model and settings; it runs as it is.

        Raises:
            ValueError: if no run is complete, it had no privacy, nobody knows what made the records (see
                :class:`~dpteach.data.Data`), or the model is no ``nn.Sequential`` of PyTorch's layers.
        """
        if not (self.run.complete and self._private):
            raise ValueError("a script needs a private run that went to its end: press Start, and wait")
        result = f"ε ≤ {self.run.bound[_NAME]:.2f} (RDP), {self._result_of(self.run)}."
        return opacus_script(self.run, self._test_data, result)

    def _tell_of_tries(self) -> None:
        if self._challenge is None:
            return
        (most, least), delta = self._challenge, self._delta
        met = [k.number for k in self.kept if k.accuracy >= least and self._bound_of(k.settings) <= most]
        text = f"Challenge: ε ≤ {most:g} at δ = {number_text(delta)}, and at least {least:.0%}. "
        text += f"Met by run {met[0]}! " if met else "Not met yet. "
        if count := len(self._tries.charges):
            spent = self._tries.epsilon(target_delta=delta, accountant="rdp")
            text += f"Tries: {count}. With fresh noise in each, who picks the best has spent ε ≤ {short(spent)}, "
            text += "not that of one."
        self._played.value = escape(text)

    def _bound_of(self, settings: Settings) -> float:
        """ε of such a run at the challenge's δ, by RDP."""
        n, sigma = len(self._data), settings.noise_multiplier
        of: dict[str, Any] = {"sample_rate": settings.sample_rate(n), "target_delta": self._delta, "accountant": "rdp"}
        return epsilon(noise_multiplier=sigma, steps=settings.epochs * settings.steps_per_epoch(n), **of)

    def _place_of(self, run: Run) -> str:
        return f"step {run.steps_done}"

    def _progress_of(self, run: Run, to_go: str) -> str:
        step = run.history[-1]
        loss = "an empty batch" if math.isnan(step.loss) else f"loss {step.loss:.2f}"
        so_far = "" if math.isinf(step.epsilon) else f", ε so far at most {step.epsilon:.2f}"
        return f"Training: step {step.step} of {step.steps}{to_go}, {loss}{so_far}"

    def _result_of(self, run: Run) -> str:
        if run.accuracy is None:
            return ""
        text = f"{self._accuracy_of} {run.accuracy:.0%}"
        if run.baseline is not None and run.baseline.accuracy is not None:
            text += f", without privacy {run.baseline.accuracy:.0%}"
            if run.baseline.settings.lr != run.settings.lr:
                text += f" at learning rate {number_text(run.baseline.settings.lr)}"
        return text

    def _panels_of(self, run: Run, plan: Run | None = None) -> list[Panel]:
        if not run.workers:
            run = plan or run
        plan = plan or run
        images = tuple(self._test_data.X.shape[1:]) == (1, 28, 28)
        reached = (self._boundary_panel if self._plane else self._digits_panel if images else self._accuracy_panel)(run)
        panels = [reached, self._loss_panel(run)]
        if self._private:
            behind: list[Item] = [] if self._challenge is None else [_goal(*self._challenge)]
            behind += [] if self._surface is None else [dataclasses.replace(self._surface.cloud, label="")]
            panels = [self._trade_off_panel(run, plan, *behind), *panels, self._budget_panel(run, plan)]
        s = plan.settings
        setting = f"Learning rate {number_text(s.lr)}"
        if self._private:
            setting = f"σ = {number_text(s.noise_multiplier)}, C = {number_text(s.max_grad_norm)}"
        panels[0] = dataclasses.replace(panels[0], alt=f"{setting}, {s.epochs} epochs. {panels[0].alt}")
        return panels

    def _expected(self, run: Run) -> float | None:
        return None if self._surface is None else self._surface.expected(run.settings)

    def _curves(self, run: Run, curve_of: Callable[[Run], Any], label: str) -> list[Line]:
        """A curve of the run, and below it the one of the run without privacy."""
        lines = []
        if run.baseline is not None:
            lines.append(curve_of(run.baseline).line("non-private", "without privacy", dashed=True))
        return [*lines, curve_of(run).line(self._role, "with privacy" if self._private else label)]

    def _loss_panel(self, run: Run) -> Panel:
        alt = f"Loss by step: {_late_loss(run)} at the end"
        alt += "." if run.baseline is None else f", {_late_loss(run.baseline)} without privacy."
        items = self._ghosts_of(run, 0) + self._curves(run, lambda run: run.losses[_NAME], "loss")
        return loss_panel(items, "step", run.steps, alt, self._classes)

    def _budget_panel(self, run: Run, plan: Run) -> Panel:
        bound, spent = plan.bound[_NAME], run.epsilons[_NAME] if plan is run else Curve()
        items: list[Any] = self._ghosts_of(plan, 1)
        if math.isfinite(bound):
            items.append(plan.path.line("budget", f"whole run {short(bound)}", dashed=True))
        items.append(spent.line("budget", "so far"))
        so_far = f"{spent.ys[-1]:.2f}" if spent.ys else "0"
        alt = f"ε by step: at most {so_far} after step {len(spent.ys)} of {plan.steps}."
        return budget_panel(items, "step", "ε (RDP bound)", plan.steps, alt)

    def _boundary_panel(self, run: Run) -> Panel:
        xs, ys, _ = self._grid
        believed = self._belief(run.model) if run.model is not None else None
        items: list[Any] = [] if believed is None else [Field(xs, ys, believed)]
        items += self._points
        if run.baseline is not None and run.baseline.boundary is not None:
            items.append(Line(*run.baseline.boundary, "non-private", "without privacy", dashed=True))
        if believed is not None:
            items.append(
                Line(*contour(xs, ys, believed, 0.5), self._role, "with privacy" if self._private else "model")
            )
        alt = "Decision boundary between the two classes"
        alt += "." if run.accuracy is None else f"; {self._accuracy_of} {run.accuracy:.0%}."
        return Panel("What the model believes", "first coordinate", "second coordinate", items, alt, *self._window)

    def _accuracy_panel(self, run: Run) -> Panel:
        title = self._accuracy_of.capitalize()
        alt = f"{title} by epoch" + ("" if run.accuracy is None else f": {run.accuracy:.0%} at the end")
        without = run.baseline.accuracy if run.baseline is not None else None
        alt += "." if without is None else f", {without:.0%} without privacy."
        items = self._ghosts_of(run, 2) + self._curves(run, lambda run: run.accuracies, "accuracy")
        x_range = (0, max(run.settings.epochs, 2))
        return Panel(title, "epoch", "share right", items, alt, x_range, y_range=(1 / self._classes, 1))

    def _digits_panel(self, run: Run) -> Panel:
        """Sixteen test records and what the model says they are; a mistake has the attacker's colour, and a cross."""
        shown = self._test_data.take(range(min(16, len(self._test_data))))
        said = shown.y
        if run.model is not None:
            with torch.no_grad():
                said = run.model(shown.X.to(next(run.model.parameters()).device)).argmax(1).cpu()
        items: list[Item] = []
        right = said == shown.y
        for top, row in ((3.0, slice(0, 8)), (1.4, slice(8, 16))):
            for role, sign, these in (("private", "", right), ("attacker", "✗ ", ~right)):
                items.append(Pictures((shown.X[row, 0] * these[row, None, None]).numpy(), 8, top, role))
                words = [f"{sign}{label}" if this else "" for label, this in zip(said[row].tolist(), these[row])]
                items.append(Words(np.arange(len(words)) + 0.5, np.full(len(words), top - 1.3), words, role))
        title, alt = self._accuracy_of.capitalize(), "Sixteen test digits, with what the model says they are; "
        alt += f"{title.lower()} " + ("not known yet" if run.accuracy is None else f"{run.accuracy:.0%}")
        without = run.baseline.accuracy if run.baseline is not None else None
        alt += "." if without is None else f", {without:.0%} without privacy."
        return Panel("What the model says", "", "", items, alt, (0, 8), (0, 3), bare=True)

    def _belief(self, model: nn.Module) -> np.ndarray | None:
        """Of each place of the grid: the probability of class 1, by the model."""
        if not self._plane:
            return None
        xs, ys, grid = self._grid
        with torch.no_grad():
            scores = model(grid.to(next(model.parameters()).device))
        believed = scores.softmax(1)[:, 1].cpu().numpy().reshape(len(ys), len(xs))
        return believed if np.isfinite(believed).all() else None

    @functools.cached_property
    def _points(self) -> list[Points]:
        shown = self._data.take(min(200, len(self._data)))
        places = [shown.X[shown.y == label].T.cpu().numpy() for label in (0, 1)]
        return [Points(xs, ys, f"class {k}", f"class {k}", cross=k == 1) for k, (xs, ys) in enumerate(places)]

    @functools.cached_property
    def _window(self) -> tuple[tuple[float, float], tuple[float, float]]:
        low, high = self._data.X.min(0).values.tolist(), self._data.X.max(0).values.tolist()
        return (low[0], high[0]), (low[1], high[1])

    @functools.cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        xs, ys = (np.linspace(*ends, 40) for ends in self._window)
        return xs, ys, torch.tensor(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2), dtype=torch.float32)


def _goal(most: float, least: float) -> Band:
    return Band([EPSILONS[0], most], [least] * 2, [1, 1], "budget")


def _late_loss(run: Run) -> str:
    """The mean loss of the last epoch that has run, coarsely: one batch's loss says little."""
    if not run.history:
        return "none"
    last_epoch = itertools.takewhile(lambda step: step.epoch == run.history[-1].epoch, reversed(run.history))
    losses = [step.loss for step in last_epoch if math.isfinite(step.loss)]
    return f"{sum(losses) / len(losses):.1f}" if losses else "none"
