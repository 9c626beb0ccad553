"""Sliders over real training.

An :class:`Explorer` trains in one background thread and draws at most ten frames a second; moving a slider starts the
training again with the new setting. A :class:`Viewer` does the same for a picture that is computed, not trained.

Why a thread: a loop inside the cell never hears the sliders, and an event loop stands still while another cell runs.
Why SVG text in an ``HTML`` widget: a frame costs about a millisecond, follows the page's theme, and needs no JavaScript
of our own, so it works wherever ipywidgets 7.7 or 8 does.
"""

import dataclasses
import functools
import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display
from torch import nn

from dpteach._checks import choice
from dpteach.accounting import epsilon
from dpteach.data import Data
from dpteach.plots import Line, Mark, Panel, Points, alt_text, contour, still, svg
from dpteach.training import METHODS, OPTIMIZERS, Settings, Step, delta_warning, train

_DEBOUNCE = 0.08  # seconds without another change before a run starts
_FRAME = 0.1  # seconds between two frames
_PATIENCE = 2.0  # seconds into a run after which the slower, tighter ε is computed without waiting for the end


@dataclass(frozen=True)
class Range:
    """Where a slider runs: from ``low`` to ``high``, on a logarithmic scale or over whole numbers if said."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


RANGES = {
    "noise_multiplier": Range(0.1, 10, log=True),
    "max_grad_norm": Range(0.01, 100, log=True),
    "epochs": Range(1, 100, whole=True),
    "lr": Range(0.01, 10, log=True),
    "batch_size": Range(16, 4096, log=True, whole=True),
    "target_delta": Range(1e-8, 1e-2, log=True),
    "sample_rate": Range(0.001, 1, log=True),
    "steps": Range(1, 10_000, log=True, whole=True),
    "prior": Range(0.01, 0.99),
}

_WORDS = {
    "noise_multiplier": "noise multiplier σ", "max_grad_norm": "clipping norm C", "epochs": "epochs",
    "lr": "learning rate", "batch_size": "batch size", "target_delta": "δ", "sample_rate": "sample rate q",
    "steps": "steps", "prior": "prior",
}


class _Live:
    """Sliders, a picture, and one thread that always works on the newest setting.

    Every change raises a generation number under a lock. The worker drops whatever belongs to an older generation, and
    ends when nothing is wanted any more.
    """

    _thread_name: str

    def __init__(self, controls: dict[str, widgets.Widget], rows: Callable[[], list[widgets.Widget]]):
        self.controls = controls
        self.error: Exception | None = None
        self._picture, self._status_line = widgets.HTML(), widgets.HTML()
        self._status = ""
        self._changed = threading.Condition(threading.RLock())
        self._generation = 0
        self._wanted: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._box = widgets.VBox(rows())
        for control in controls.values():
            # Called on the main thread or on a JupyterLab subshell's thread.
            control.observe(lambda _: self._request(), "value")

    # What a subclass does with a setting. It gives up, without a word, where ``self._show`` says False.
    def _work_on(self, values: dict[str, Any], generation: int) -> None:
        raise NotImplementedError

    def _preview(self, values: dict[str, Any], generation: int) -> None:
        """What can be said at once, before the slider has come to rest."""

    @property
    def status(self) -> str:
        """What the status line says, as plain text."""
        return self._status

    @property
    def values(self) -> dict[str, Any]:
        """The sliders' values by setting name."""
        values = {}
        for name, control in self.controls.items():
            now, before = control.value, (self._wanted or {}).get(name)
            # The browser answers a value with its own rounding of it: 1.0 with 1.0000000000000002, and one between two
            # stops of the slider with the nearest stop. That is no change.
            if before is not None and abs(control.place(now) - control.place(before)) <= 0.51 * control.step:
                values[name] = before
            else:
                now = min(max(now, control.limits.low), control.limits.high)
                values[name] = int(round(now)) if control.limits.whole else float(f"{now:.6g}")
        return values

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the current run has ended, by itself or by Stop.

        Args:
            timeout: seconds; no limit if not given.

        Raises:
            TimeoutError: if it has not ended by then. It goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout):
                raise TimeoutError(f"still at work after {timeout} s: {self.status}")

    def still(self):
        """The picture as a matplotlib figure; a notebook shows it as a PNG."""
        return still(self._panels())

    def _panels(self) -> list[Panel]:
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        _show_widget(self._box, f"{type(self).__name__} with sliders for {', '.join(map(_words, self.controls))}")

    def _request(self, force: bool = False) -> None:
        values = self.values
        with self._changed:
            if values == self._wanted and not force:
                return
            self._wanted = values
            self._generation += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._thread_name, daemon=True)
                self._thread.start()

    def _halt(self, sentence: str) -> None:
        with self._changed:
            running = self._thread is not None
            self._generation += 1
            self._wanted = None
            if running:
                self._say(sentence)
            self._changed.notify_all()

    def _loop(self) -> None:
        done = 0
        while True:
            with self._changed:
                if self._wanted is None or self._generation == done:
                    self._thread = None
                    self._changed.notify_all()
                    return
                generation, values = self._generation, self._wanted
            try:
                self._preview(values, generation)
                # The very first run starts at once: nobody is dragging yet.
                if generation > 1 and self._changes_within(_DEBOUNCE, generation):
                    continue
                self.error = None
                self._work_on(values, generation)
            except Exception as error:  # a learner never meets a traceback from inside a widget
                self.error = error
                self._show(generation, status=f"Can't go on: {error}")
            done = generation

    def _changes_within(self, seconds: float, generation: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._generation != generation, seconds)

    def _show(self, generation: int, *, picture: str | None = None, status: str | None = None) -> bool:
        """Put a picture and a status on the page, if the generation is still the newest; else return False."""
        with self._changed:
            if generation != self._generation:
                return False
            if picture is not None:
                self._picture.value = picture
            if status is not None:
                self._say(status)
            return True

    def _say(self, sentence: str) -> None:
        self._status = sentence
        self._status_line.value = f'<span role="status">{escape(sentence)}</span>'


@dataclass
class _Run:
    """What a run has come to so far: all that its pictures and its summary need."""

    settings: Settings
    price: float  # RDP
    model: nn.Module | None = None
    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the steps: a frame must not walk through thousands of records
    epsilons: list[float] = field(default_factory=list)
    baseline: list[Step] = field(default_factory=list)
    baseline_losses: list[float] = field(default_factory=list)
    baseline_boundary: tuple | None = None
    exact: float | None = None  # PRV
    ended: str = ""


class Explorer(_Live):
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
        baseline: also train without privacy, for comparison; once for all values of σ and C.
        test_data: records for the accuracy; without them it is that on (up to 1,000 of) the training records, and says so.
        ranges: other ends for a slider: ``{"epochs": Range(1, 300, whole=True)}``.

    Attributes:
        controls: the slider widgets by setting name.
        settings: the settings that the sliders show.
        status: the status line's text.
        steps: the :class:`~dpteach.training.Step` records of the current run so far.
        error: the exception that ended the last run, or None.

    Raises:
        ValueError: if a slider's name is not a setting, or the method is not known.
    """

    _thread_name = "dpteach-train"
    _turn = threading.RLock()
    _latest: "Explorer | None" = None

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
        test_data: Data | None = None,
        ranges: dict[str, Range] | None = None,
    ):
        self._data, self._make_model, self._start_settings = data, make_model, settings
        self._method, self._optimizer = choice("method", method, METHODS), choice("optimizer", optimizer, OPTIMIZERS)
        self._baseline = baseline and method != "sgd"
        self._baselines: dict[tuple, _Run] = {}
        self._test_data = test_data or data.take(min(1000, len(data)))
        self._accuracy_of = "test accuracy" if test_data else "training accuracy"
        self._plane = data.X.ndim == 2 and data.X.shape[1] == 2
        self._run = _Run(settings, math.inf)
        shown = data.take(min(200, len(data)))
        self._records = [
            Points(*shown.X[shown.y == label].T.numpy(), "data", f"class {label}", cross=bool(label)) for label in (0, 1)
        ] if self._plane else []

        adjustable = [f.name for f in dataclasses.fields(Settings) if f.name != "seed"]
        for name in sliders:
            choice("sliders", name, adjustable)
        folded = [name for name in ("lr", "batch_size") if name not in sliders]
        limits = {**RANGES, "batch_size": Range(1, len(data), log=True, whole=True), **(ranges or {})}
        controls = {
            name: _slider(name, getattr(settings, name), limits[name]) for name in (*sliders, *folded)
        }
        self._price_line = widgets.HTML()
        start = widgets.Button(description="Start", icon="play", tooltip="Train again from the beginning")
        stop = widgets.Button(description="Stop", icon="stop", tooltip="Stop training")
        start.on_click(lambda _: self.start())
        stop.on_click(lambda _: self.stop())

        def rows():
            more = widgets.Accordion(children=[widgets.VBox([controls[name] for name in folded])], selected_index=None)
            more.set_title(0, "More: " + ", ".join(_words(name) for name in folded))
            return [
                *(controls[name] for name in sliders), *([more] if folded else []),
                widgets.HBox([start, stop, self._status_line]), self._price_line, self._picture,
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

    def start(self) -> None:
        """Train from the beginning with the settings that the sliders show."""
        self._request(force=True)

    def stop(self) -> None:
        """Stop training; what has been drawn stays."""
        self._halt(f"Stopped at step {len(self._run.steps)}. Press Start to train again.")

    def summary(self) -> str:
        """One sentence about the last run: its settings, its ε, its accuracy beside the non-private one."""
        run = self._run
        s = run.settings
        if self.error is not None:
            return self.status
        if not run.steps:
            return "No training has run yet."
        parts = [f"{s.epochs} epochs at learning rate {s.lr:.3g}"]
        if self._method == "sgd":
            parts.append("no privacy (ε = ∞)")
        else:
            parts.insert(0, f"σ = {s.noise_multiplier:.3g}, C = {s.max_grad_norm:.3g}")
            parts.append(self._cost(run))
        if self._reached(run):
            parts.append(self._reached(run))
        return "; ".join(parts) + "." + (f" {run.ended}" if run.ended else "")

    def _reached(self, run: _Run) -> str:
        accuracy, without = _last_accuracy(run.steps), _last_accuracy(run.baseline)
        if accuracy is None:
            return ""
        return f"{self._accuracy_of} {accuracy:.0%}" + (f", without privacy {without:.0%}" if without is not None else "")

    def _request(self, force: bool = False) -> None:
        with Explorer._turn:
            before, Explorer._latest = Explorer._latest, self
        if before is not None and before is not self:
            before._halt("Stopped, because another explorer started. Press Start to train again.")
            before.wait()
        super()._request(force)

    def _preview(self, values: dict[str, Any], generation: int) -> None:
        settings = dataclasses.replace(self._start_settings, **values)
        self._show_price(_Run(settings, self._whole_price(settings, "rdp")), generation)

    def _whole_price(self, settings: Settings, accountant: str) -> float:
        if self._method == "sgd":
            return math.inf
        n = len(self._data)
        return epsilon(
            noise_multiplier=settings.noise_multiplier, sample_rate=settings.sample_rate(n), accountant=accountant,
            steps=settings.epochs * settings.steps_per_epoch(n), target_delta=settings.target_delta,
        )

    def _cost(self, run: _Run) -> str:
        delta = f"at δ = {run.settings.target_delta:.0e}".replace("e-0", "e-")
        if run.exact is None:
            return f"ε ≤ {run.price:.2f} {delta} (RDP, an upper bound)"
        return f"ε = {run.exact:.2f} {delta} (PRV; the quick RDP bound says {run.price:.2f})"

    def _show_price(self, run: _Run, generation: int) -> None:
        if self._method == "sgd":
            text = "No privacy: ε = ∞, whatever the settings."
        else:
            text = f"Price of the whole run: {self._cost(run)}."
            warning = delta_warning(run.settings, len(self._data))
            text += f" Careful: {warning}." if warning else ""
        with self._changed:
            if generation == self._generation:
                self._price_line.value = escape(text)

    def _work_on(self, values: dict[str, Any], generation: int) -> None:
        settings = dataclasses.replace(self._start_settings, **values)
        run = _Run(settings, self._whole_price(settings, "rdp"))
        run.model = self._new_model(settings)
        steps = self._train(run.model, settings, self._method)
        beside = self._baseline_beside(run)
        began = time.perf_counter()
        next_frame = began
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
                if math.isnan(step.loss) and self._diverged(run.model):  # an empty batch has no loss either
                    run.ended = f"Diverged at step {step.step}: the loss is not a number any more. Try a lower learning rate."
                    break
                if generation != self._generation:
                    return
                if now >= next_frame:
                    if not self._show(generation, picture=svg(self._panels_of(run)), status=self._progress(step)):
                        return
                    next_frame = time.perf_counter() + _FRAME
                if run.exact is None and now - began > _PATIENCE and self._method != "sgd":
                    self._make_exact(run, generation)
        finally:
            steps.close()
        if run.exact is None and self._method != "sgd":
            self._make_exact(run, generation)
        self._show(generation, picture=svg(self._panels_of(run)), status=run.ended or f"Finished: {self._reached(run)}.")

    def _train(self, model: nn.Module, settings: Settings, method: str) -> Iterator[Step]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a δ of 1/n or more: the price line says it
            return train(model, self._data, settings, method=method, optimizer=self._optimizer, test_data=self._test_data)

    @torch.no_grad()
    def _diverged(self, model: nn.Module) -> bool:
        return not model(self._data.X[:32]).isfinite().all()

    def _make_exact(self, run: _Run, generation: int) -> None:
        run.exact = self._whole_price(run.settings, "prv")
        self._show_price(run, generation)

    def _progress(self, step: Step) -> str:
        so_far = "" if math.isinf(step.epsilon) else f", ε so far at most {step.epsilon:.2f}"
        return f"Training: step {step.step} of {step.steps}, loss {step.loss:.2f}{so_far}"

    def _new_model(self, settings: Settings) -> nn.Module:
        # For a make_model that draws from the global generator; dpteach.models does not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return self._make_model()

    def _baseline_beside(self, run: _Run) -> Iterator[None]:
        """Train the non-private model in step with ``run``; where it has been trained before, show that run whole."""
        if not self._baseline:
            return
        s = run.settings
        key = (s.lr, s.batch_size, s.epochs, s.seed)
        if key not in self._baselines:
            model = self._new_model(s)
            for step in self._train(model, s, "sgd"):
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
            scores = model(grid).numpy()
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

    def _panels_of(self, run: _Run) -> list[Panel]:
        own = "non-private" if self._method == "sgd" else "private"
        panels = [self._loss_panel(run, own)]
        if self._method != "sgd":
            panels.append(self._epsilon_panel(run))
        panels.append(self._boundary_panel(run, own) if self._plane else self._accuracy_panel(run, own))
        return panels

    def _loss_panel(self, run: _Run, own: str) -> Panel:
        items = [_line(run.baseline_losses, "non-private", "without privacy", dashed=True)] if run.baseline else []
        items.append(_line(run.losses, own, "with privacy" if own == "private" else "loss"))
        total = run.steps[-1].steps if run.steps else 1
        s = run.settings
        told = f"Learning rate {s.lr:.3g}" if own == "non-private" else f"σ = {s.noise_multiplier:.3g}, C = {s.max_grad_norm:.3g}"
        alt = f"{told}, {s.epochs} epochs. Loss by step: {_late_loss(run.steps)} at the end"
        alt += f", {_late_loss(run.baseline)} without privacy." if run.baseline else "."
        return Panel("Training loss", "step", "loss (batch mean)", items, alt, x_range=(0, total))

    def _epsilon_panel(self, run: _Run) -> Panel:
        total = run.steps[-1].steps if run.steps else 1
        items = [_line(run.epsilons, "budget", "spent (RDP bound)")]
        top = run.price
        if run.exact is not None and math.isfinite(run.exact):
            items.append(Mark("budget", "whole run, tighter (PRV)", y=run.exact))
            top = max(top, run.exact)
        so_far = f"{run.steps[-1].epsilon:.2f}" if run.steps else "0"
        alt = f"ε by step: at most {so_far} after step {run.steps[-1].step if run.steps else 0} of {total}."
        return Panel("Privacy budget spent", "step", "ε", items, alt, x_range=(0, total),
                     y_range=(0, top * 1.08) if math.isfinite(top) and top > 0 else (0, 1))

    def _boundary_panel(self, run: _Run, own: str) -> Panel:
        items: list[Any] = [*self._records]
        if run.baseline_boundary is not None:
            items.append(Line(*run.baseline_boundary, "non-private", dashed=True))
        boundary = self._boundary(run.model) if run.model is not None else None
        if boundary is not None:
            items.append(Line(*boundary, own))
        accuracy = _last_accuracy(run.steps)
        alt = "Decision boundary between the two classes" + (
            f"; {self._accuracy_of} {accuracy:.0%}." if accuracy is not None else "."
        )
        x_range, y_range = self._window
        return Panel("Decision boundary", "first coordinate", "second coordinate", items, alt, x_range, y_range)

    def _accuracy_panel(self, run: _Run, own: str) -> Panel:
        def curve(steps, *style, **more):
            known = [s for s in steps if s.accuracy is not None]
            return Line([s.epoch for s in known], [s.accuracy for s in known], *style, **more)

        items = [curve(run.baseline, "non-private", "without privacy", dashed=True)] if run.baseline else []
        items.append(curve(run.steps, own, "with privacy" if own == "private" else "accuracy"))
        accuracy, without = _last_accuracy(run.steps), _last_accuracy(run.baseline)
        alt = f"{self._accuracy_of.capitalize()} by epoch" + (f": {accuracy:.0%} at the end" if accuracy is not None else "")
        alt += f", {without:.0%} without privacy." if without is not None else "."
        return Panel(self._accuracy_of.capitalize(), "epoch", "share right", items, alt,
                     x_range=(0, max(run.settings.epochs, 2)), y_range=(0, 1))


class Viewer(_Live):
    """Sliders over a picture that is computed, not trained.

    Args:
        draw: ``draw(**values) -> list of Panel``, called with the sliders' values; at most some 30 ms, to keep up.
        ranges: ends of a slider whose name has none in :data:`RANGES`, or other ends for one that has.
        values: each slider's name and the value that it starts at.

    Attributes:
        controls: the slider widgets by name.
        values: their values by name.
        error: the exception that ``draw`` raised last, or None.

    Raises:
        ValueError: if a name has no range.
    """

    _thread_name = "dpteach-draw"

    def __init__(self, draw: Callable[..., list[Panel]], *, ranges: dict[str, Range] | None = None, **values: float):
        limits = {**RANGES, **(ranges or {})}
        for name in values:
            choice("ranges", name, limits)
        self._draw = draw
        controls = {name: _slider(name, value, limits[name]) for name, value in values.items()}
        super().__init__(controls, lambda: [*controls.values(), self._status_line, self._picture])
        self._request(force=True)

    def summary(self) -> str:
        """The picture in words."""
        return alt_text(self._panels())

    def _panels(self) -> list[Panel]:
        return self._draw(**self.values)

    def _changes_within(self, seconds: float, generation: int) -> bool:
        return generation != self._generation  # a computed picture follows the slider; only the newest is drawn

    def _work_on(self, values: dict[str, Any], generation: int) -> None:
        self._show(generation, picture=svg(self._draw(**values)), status="")


@dataclass(frozen=True)
class Scene:
    """Something to train on: the arguments of an :class:`Explorer`."""

    data: Data
    make_model: Callable[[], nn.Module]
    settings: Settings
    test_data: Data


@dataclass(frozen=True)
class Pin:
    """A run that was kept for comparison: what it was, what it cost and what it reached."""

    scene: str
    method: str
    optimizer: str
    settings: Settings
    epsilon: float
    accuracy: float
    accuracy_without_privacy: float


class Playground:
    """An :class:`Explorer` with every slider, a choice of data, method and optimizer, and runs kept for comparison.

    Args:
        scenes: what to choose from, by the name that the menu shows.

    Attributes:
        explorer: the explorer that is open now.
        pinned: the runs that were kept, as :class:`Pin`.

    Raises:
        ValueError: if there is no scene.
    """

    def __init__(self, scenes: dict[str, Scene]):
        if not scenes:
            raise ValueError("scenes must hold at least one scene, got none")
        self._scenes = scenes
        self.pinned: list[Pin] = []

        def menu(words, options):
            return widgets.Dropdown(options=options, description=words, style={"description_width": "150px"},
                                    layout=widgets.Layout(width="480px", max_width="100%"))

        self.menus = {
            "scene": menu("data and model", list(scenes)),
            "method": menu("method", [("DP-SGD from the four moves", "dpsgd"), ("DP-SGD by Opacus", "opacus")]),
            "optimizer": menu("optimizer", list(OPTIMIZERS)),
        }
        pin = widgets.Button(description="Pin this run", icon="thumb-tack", tooltip="Keep the run's ε and accuracy")
        clear = widgets.Button(description="Unpin all", icon="trash", tooltip="Forget the runs that were kept")
        pin.on_click(lambda _: self.pin())
        clear.on_click(lambda _: self._unpin())
        self._note, self._kept, self._place = widgets.HTML(), widgets.HTML(), widgets.VBox()
        self._box = widgets.VBox(
            [*self.menus.values(), self._place, widgets.HBox([pin, clear, self._note]), self._kept]
        )
        for choice_ in self.menus.values():
            choice_.observe(lambda _: self._open(), "value")
        self._open()

    def _open(self) -> None:
        scene = self._scenes[self.menus["scene"].value]
        self.explorer = Explorer(
            scene.data, scene.make_model, scene.settings, method=self.menus["method"].value,
            optimizer=self.menus["optimizer"].value, test_data=scene.test_data,
            sliders=("noise_multiplier", "max_grad_norm", "epochs", "lr", "batch_size", "target_delta"),
        )
        for old in self._place.children:
            old.close()
        self._place.children = [self.explorer._box]

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`Explorer.wait`."""
        self.explorer.wait(timeout)

    def pin(self) -> None:
        """Keep the run that has just finished; where it has not, a sentence beside the button says so."""
        run = self.explorer._run
        accuracy, without = _last_accuracy(run.steps), _last_accuracy(run.baseline)
        if self.explorer._thread is not None or run.exact is None or accuracy is None or without is None:
            self._note.value = "Nothing to pin yet: wait until a run has finished."
            return
        self.pinned.append(Pin(
            self.menus["scene"].value, self.menus["method"].value, self.menus["optimizer"].value, run.settings, run.exact,
            accuracy, without,
        ))
        self._note.value = ""
        self._draw()

    def _unpin(self) -> None:
        self.pinned.clear()
        self._draw()

    def _draw(self) -> None:
        rows = "".join(
            f"<tr><td>{i}</td><td>{escape(p.scene)}</td><td>{p.method}, {p.optimizer}</td><td>{p.settings.noise_multiplier:.3g}</td>"
            f"<td>{p.settings.max_grad_norm:.3g}</td><td>{p.settings.epochs}</td><td>{p.settings.lr:.3g}</td>"
            f"<td>{p.settings.batch_size}</td><td>{p.epsilon:.2f}</td><td>{p.accuracy:.1%}</td>"
            f"<td>{p.accuracy_without_privacy:.1%}</td></tr>"
            for i, p in enumerate(self.pinned, start=1)
        )
        heads = "".join(f"<th>{h}</th>" for h in ("run", "data and model", "method", "σ", "C", "epochs", "learning rate",
                                                  "batch", "ε (PRV)", "accuracy", "without privacy"))
        table = f'<table style="line-height:1.3;border-spacing:8px 2px"><tr>{heads}</tr>{rows}</table>'
        self._kept.value = f'<div style="max-width:420px">{svg(self._panels())}</div>{table}' if self.pinned else ""

    def _panels(self) -> list[Panel]:
        # Accuracies on different data cannot be compared: the picture shows the data of the last pin, the table all.
        scene = self.pinned[-1].scene if self.pinned else ""
        pins = [p for p in self.pinned if p.scene == scene and math.isfinite(p.epsilon)]
        items: list[Any] = [Points([p.epsilon for p in pins], [p.accuracy for p in pins], "private", "with privacy")]
        if pins:
            items.append(Mark("non-private", "without privacy", y=max(p.accuracy_without_privacy for p in pins)))
        told = "; ".join(f"ε {p.epsilon:.2f}: {p.accuracy:.0%}" for p in pins)
        return [Panel(f"Pinned runs: {scene}", "ε of the whole run", "test accuracy", items,
                      f"Test accuracy of the pinned runs on {scene}, by ε. {told}." if told else "No run is pinned.", x_log=True)]

    def still(self):
        """The pinned runs as a matplotlib figure, ε across and accuracy upward."""
        return still(self._panels())

    def summary(self) -> str:
        """The pinned runs in words."""
        return alt_text(self._panels())

    def _ipython_display_(self) -> None:
        _show_widget(self._box, "Playground with a choice of data, method and optimizer, and a slider for every setting")


def _show_widget(box: widgets.Widget, words: str) -> None:
    # The view by hand, so that the saved text is one sentence and not the widget's whole inside.
    display({
        "application/vnd.jupyter.widget-view+json": {"model_id": box.model_id, "version_major": 2, "version_minor": 0},
        "text/plain": f"{words}. Run this cell to use it; a still picture follows.",
    }, raw=True)


def _words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _slider(name: str, value: float, limits: Range) -> widgets.Widget:
    limits = dataclasses.replace(limits, low=min(limits.low, value), high=max(limits.high, value))
    low, high = limits.low, limits.high
    style = {"description_width": "150px"}
    layout = widgets.Layout(width="480px", max_width="100%")
    if limits.log:
        if low <= 0:
            raise ValueError(f"{name} must be > 0 for a logarithmic slider, got {value!r}")
        step, start = 0.002, math.log10(value)  # the stops are laid so that the start value is one of them
        slider = widgets.FloatLogSlider(
            value=value, step=step, style=style, layout=layout,
            min=start - step * round((start - math.log10(low)) / step), max=start + step * round((math.log10(high) - start) / step),
            description=_words(name), readout_format=".0f" if limits.whole else ".0e" if limits.high < 0.1 else ".3g",
        )
    elif limits.whole:
        slider = widgets.IntSlider(value=value, min=int(low), max=int(high), style=style, layout=layout, description=_words(name))
    else:
        slider = widgets.FloatSlider(value=value, min=low, max=high, step=(high - low) / 200, style=style, layout=layout,
                                     description=_words(name))
    slider.limits = limits
    slider.place = math.log10 if limits.log else float  # where a value lies, in units of the slider's step
    return slider


def _line(values: list[float], role: str, label: str, dashed: bool = False) -> Line:
    return Line(np.arange(1, len(values) + 1), np.array(values), role, label, dashed)


def _last_accuracy(steps: list[Step]) -> float | None:
    return next((s.accuracy for s in reversed(steps) if s.accuracy is not None), None)


def _late_loss(steps: list[Step]) -> str:
    """The mean loss of the last epoch that has run, coarsely: one batch's loss says little."""
    last_epoch = itertools.takewhile(lambda s: s.epoch == steps[-1].epoch, reversed(steps))
    losses = [s.loss for s in last_epoch if math.isfinite(s.loss)]
    return f"{sum(losses) / len(losses):.1f}" if losses else "none"
