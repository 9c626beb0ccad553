"""What every live picture shares: sliders, a picture, a status line, and one thread that works on the newest setting."""

import dataclasses
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from torch import nn

from dpteach._checks import choice
from dpteach.data import Data
from dpteach.plots import Panel, alt_text, still, svg

_DEBOUNCE = 0.08  # seconds without another change before a run starts
_TURN_AT_PYTHON = 0.0005  # seconds; Python's own value is 0.005

_FOCUS = ", ".join(f".dpteach {part}:focus-visible" for part in (".noUi-handle", ".widget-readout", "button", "select"))
# ipywidgets cuts a long label, shows no focus on a slider's handle, gives it no name, reads out the logarithm of a
# logarithmic slider's value, and says "null" where the mouse rests on a label. It also replaces the inside of a text at each
# change, and a screen reader wants to know the place before the words come: so the place is marked, not the words. The script
# does nothing else, and nothing but that is missing where a page refuses it.
_FOR_EVERYBODY = f"""
<style>
{_FOCUS} {{outline: 2px solid currentColor !important; outline-offset: 2px}}
.dpteach .widget-inline-hbox > .widget-label {{white-space: normal; line-height: 1.2; height: auto; align-self: center}}
.dpteach .widget-html, .dpteach .widget-html-content {{min-width: 0; max-width: 100%}}
.dpteach .widget-html-content {{line-height: 1.4 !important; align-self: center}}
.dpteach .dpteach-spoken {{position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap}}
@media (forced-colors: active) {{
  .dpteach .noUi-target, .dpteach .ui-slider {{outline: 1px solid}}
  .dpteach button {{border: 1px solid}}
  .dpteach button.mod-active {{border-width: 3px}}
}}
@media (prefers-reduced-motion: reduce) {{
  .dpteach * {{transition: none !important; animation: none !important}}
}}
</style>
<img alt="" src="data:," style="display:none" onerror="
  const set = (at, name, value) => {{ if (at && at.getAttribute(name) !== String(value)) at.setAttribute(name, value); }};
  const name = box => {{
    box.querySelectorAll('.widget-slider').forEach(slider => {{
      const words = slider.querySelector('.widget-label').textContent, number = slider.querySelector('.widget-readout');
      const handle = slider.querySelector('[role=slider], .ui-slider-handle');
      set(handle, 'aria-label', words);
      set(handle, 'aria-valuetext', number.textContent);
      set(number, 'role', 'textbox');
      set(number, 'aria-label', words + ', typed');
    }});
    box.querySelectorAll('[title=null]').forEach(label => label.removeAttribute('title'));
    box.querySelectorAll('.widget-toggle-button').forEach(button => set(button, 'aria-expanded', button.matches('.mod-active')));
    box.querySelectorAll('.dpteach-aloud').forEach(place => set(place, 'aria-live', 'polite'));
  }};
  const begin = () => {{
    const box = this.closest('.dpteach');
    if (!box) return setTimeout(begin, 100);
    new MutationObserver(() => name(box)).observe(box, {{subtree: true, childList: true, attributes: true, attributeFilter: ['aria-valuetext']}});
    name(box);
  }};
  begin();
">"""


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


class Live:
    """Sliders, a picture, and one thread that always works on the newest setting.

    Every change raises a generation number under a lock. The worker drops whatever belongs to an older generation, and
    ends when nothing is wanted any more.
    """

    _thread_name: str

    def __init__(self, controls: dict[str, widgets.Widget], rows: Callable[[], list[widgets.Widget]]):
        self.controls = controls
        self.error: Exception | None = None
        self._picture, self._status_line, self._spoken = widgets.HTML(), widgets.HTML(), read_aloud(widgets.HTML())
        self._spoken.add_class("dpteach-spoken")
        self._status, self._in_progress = "", False
        self._changed = threading.Condition(threading.RLock())
        self._generation = 0
        self._wanted: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._box = for_everybody([*rows(), self._spoken])
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
            if not hasattr(control, "limits"):  # a menu
                values[name] = now
                continue
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
        show_widget(self._box, f"{type(self).__name__} with sliders for {', '.join(map(words, self.controls))}")

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
                self._fail(generation, error)
            done = generation

    def _fail(self, generation: int, error: Exception) -> None:
        with self._changed:
            if generation == self._generation:
                self.error = error
                self._say(f"Can't go on: {error}")

    def _changes_within(self, seconds: float, generation: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._generation != generation, seconds)

    def _show(self, generation: int, *, picture: str | None = None, status: str | None = None, progress: bool = False) -> bool:
        """Put a picture and a status on the page, if the generation is still the newest; else return False.

        ``progress``: the status is one of many in a row. A screen reader hears the first.
        """
        with self._changed:
            if generation != self._generation:
                return False
            if picture is not None:
                self._picture.value = picture
            if status is not None:
                self._say(status, progress)
            return True

    def _say(self, sentence: str, progress: bool = False) -> None:
        self._status = sentence
        # Ten times a second is for the eye. What is read out has a line of its own: that a run began, and how it ended. The
        # line for the eye must not look like one that is read out, not even like one that is switched off: of two such lines
        # with the same words the Orca screen reader takes the first, and says nothing.
        self._status_line.value = f'<span class="dpteach-status">{escape(sentence)}</span>'
        if sentence and not (progress and self._in_progress):
            self._spoken.value = escape(sentence)
        self._in_progress = progress


class Trainer(Live):
    """A live picture of a training. One training runs at a time: a new one stops the one before it."""

    _thread_name = "dpteach-train"
    _turn = threading.RLock()
    _latest: "Trainer | None" = None
    _pricing = threading.Lock()  # the slow, tight ε is computed for one run at a time
    _at_work = 0  # threads inside _loop: for a moment there can be two
    _interval_before: float

    def _loop(self) -> None:
        # A training step leaves the interpreter many times. Beside a busy cell it waits one switch interval for each return,
        # and a picture that came ten times a second comes once a second. With a shorter one it comes six times a second.
        with Trainer._turn:
            if Trainer._at_work == 0:
                Trainer._interval_before = sys.getswitchinterval()
                sys.setswitchinterval(min(_TURN_AT_PYTHON, Trainer._interval_before))
            Trainer._at_work += 1
        try:
            super()._loop()
        finally:
            with Trainer._turn:
                Trainer._at_work -= 1
                if Trainer._at_work == 0:
                    sys.setswitchinterval(Trainer._interval_before)

    def _so_far(self) -> str:
        """Where the training stands, in words: "step 3"."""
        raise NotImplementedError

    def start(self) -> None:
        """Train from the beginning with the settings that the sliders show."""
        self._request(force=True)

    def stop(self) -> None:
        """Stop training; what has been drawn stays."""
        self._halt(f"Stopped at {self._so_far()}. Press Start to train again.")

    def _start_and_stop(self) -> widgets.Widget:
        start = widgets.Button(description="Start", icon="play", tooltip="Train again from the beginning")
        stop = widgets.Button(description="Stop", icon="stop", tooltip="Stop training")
        start.on_click(lambda _: self.start())
        stop.on_click(lambda _: self.stop())
        return in_a_row(start, stop, self._status_line)

    def _request(self, force: bool = False) -> None:
        with Trainer._turn:
            before, Trainer._latest = Trainer._latest, self
        if before is not None and before is not self:
            before._halt("Stopped, because another explorer started. Press Start to train again.")
            before.wait()
        super()._request(force)

    def _price(self, generation: int, compute: Callable[[], None]) -> threading.Event:
        """``compute()`` in a thread of its own; the event that it is done. PRV can take seconds and can't be interrupted, so
        neither a frame nor a Stop waits for it. Nothing is computed for a generation that is over.
        """
        done = threading.Event()

        def work():
            try:
                with Trainer._pricing:
                    if generation == self._generation:
                        compute()
            except Exception as error:  # a learner never meets a traceback from inside a widget
                self._fail(generation, error)
            finally:
                with self._changed:
                    done.set()
                    self._changed.notify_all()

        threading.Thread(target=work, name="dpteach-price", daemon=True).start()
        return done

    def _until(self, condition: Callable[[], bool], generation: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or generation != self._generation)


class Viewer(Live):
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
        controls = {name: slider_for(name, value, limits[name]) for name, value in values.items()}
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


@torch.no_grad()
def diverged(model: nn.Module, data: Data) -> bool:
    """Whether the model's scores are not all finite numbers any more."""
    return not bool(model(data.X[:32].to(next(model.parameters()).device)).isfinite().all())


def new_model(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``make_model()``, the same each time, also where it draws from PyTorch's global generator (``dpteach.models`` does not)."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        return make_model()


def for_everybody(rows: list[widgets.Widget]) -> widgets.VBox:
    """The rows in a box in which each control has a visible focus, and a name for a screen reader."""
    box = widgets.VBox([*rows, widgets.HTML(_FOR_EVERYBODY)])
    box.add_class("dpteach")
    return box


def read_aloud(place: widgets.HTML) -> widgets.HTML:
    """A place whose new words a screen reader says when it has finished its sentence."""
    place.add_class("dpteach-aloud")
    return place


def in_a_row(*parts: widgets.Widget) -> widgets.HBox:
    """Side by side, and below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def folded(said: str, rows: list[widgets.Widget]) -> widgets.VBox:
    """Rows that a button shows and hides. A keyboard reaches it; it does not reach the head of an ``Accordion``."""
    inside = widgets.VBox(rows, layout=widgets.Layout(display="none"))
    button = widgets.ToggleButton(description=said, icon="caret-right", tooltip="Show or hide these sliders",
                                  layout=widgets.Layout(width="auto"))

    def turn(change):
        inside.layout.display = "flex" if change["new"] else "none"
        button.icon = "caret-down" if change["new"] else "caret-right"

    button.observe(turn, "value")
    return widgets.VBox([widgets.HBox([button]), inside])


def put_away(widget: widgets.Widget) -> None:
    """Close a widget with all that is in it: the kernel holds every widget until it is closed, and a box closes only itself."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if isinstance(part, widgets.DOMWidget):
            put_away(part)
        elif part is not None:
            part.close()
    widget.close()


def show_widget(box: widgets.Widget, words: str) -> None:
    # The view by hand, so that the saved text is one sentence and not the widget's whole inside.
    display({
        "application/vnd.jupyter.widget-view+json": {"model_id": box.model_id, "version_major": 2, "version_minor": 0},
        "text/plain": f"{words}. Run this cell to use it; a still picture follows.",
    }, raw=True)


def words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def control_style() -> dict[str, Any]:
    """How wide a control and its label are."""
    return {"style": {"description_width": "150px"}, "layout": widgets.Layout(width="480px", max_width="calc(100% - 4px)")}


def slider_for(name: str, value: float, limits: Range, said: str = "") -> widgets.Widget:
    said = said or words(name)
    limits = dataclasses.replace(limits, low=min(limits.low, value), high=max(limits.high, value))
    low, high = limits.low, limits.high
    if limits.log:
        if low <= 0:
            raise ValueError(f"{name} must be > 0 for a logarithmic slider, got {value!r}")
        step, start = 0.002, math.log10(value)  # the stops are laid so that the start value is one of them
        slider = widgets.FloatLogSlider(
            value=value, step=step, **control_style(),
            min=start - step * round((start - math.log10(low)) / step), max=start + step * round((math.log10(high) - start) / step),
            description=said, readout_format=".0f" if limits.whole else ".0e" if limits.high < 0.1 else ".3g",
        )
    elif limits.whole:
        slider = widgets.IntSlider(value=value, min=int(low), max=int(high), **control_style(), description=said)
    else:
        slider = widgets.FloatSlider(value=value, min=low, max=high, step=(high - low) / 200, **control_style(),
                                     description=said)
    slider.limits = limits
    slider.place = math.log10 if limits.log else float  # where a value lies, in units of the slider's step
    return slider


