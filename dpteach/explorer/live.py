"""What every live picture shares: sliders, a picture, a status line, and one thread that works on the newest setting."""

import dataclasses
import math
import sys
import threading
import time
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
_MEASURED = 0.5  # seconds of a run that tell its speed
_TURN_AT_PYTHON = 0.0005  # seconds; Python's own value is 0.005

_CLOSE = 1e-10  # relative: more than a page changes a number by taking its logarithm and back
_DRAGGED = 3  # significant digits of a value that was dragged, not typed
_GONE = "The kernel was restarted or has ended. Run this cell again, and the cells above it first."

_FOCUS = ", ".join(f".dpteach {part}:focus-visible" for part in (".noUi-handle", ".widget-readout", "button", "select"))
# ipywidgets cuts a long label, shows no focus on a slider's handle, gives it no name, reads out the logarithm of a
# logarithmic slider's value, and says "null" where the mouse rests on a label. It also replaces the inside of a text at
# each change, and a screen reader wants to know the place before the words come: so the place is marked, not the words.
# A slider without stops has no step for an arrow key either: a key types the next number. The script does nothing else;
# where a page refuses it, a key moves a tenth of the slider. When the kernel is gone, ipywidgets marks every control as
# broken: one sentence is left instead.
_FOR_EVERYBODY = f"""
<style>
{_FOCUS} {{outline: 2px solid currentColor !important; outline-offset: 2px}}
.dpteach .widget-inline-hbox > .widget-label {{white-space: normal; line-height: 1.2; height: auto; align-self: center}}
.dpteach .widget-html, .dpteach .widget-html-content {{min-width: 0; max-width: 100%}}
.dpteach .widget-html-content {{line-height: 1.4 !important; align-self: center}}
.dpteach .dpteach-spoken {{position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap}}
.dpteach .dpteach-gone, .dpteach.jupyter-widgets-disconnected > :not(.dpteach-last) {{display: none}}
.dpteach.jupyter-widgets-disconnected .dpteach-gone {{display: block}}
.dpteach.jupyter-widgets-disconnected::before, .dpteach .jupyter-widgets-disconnected::before {{content: none}}
@media (forced-colors: active) {{
  .dpteach .noUi-target, .dpteach .ui-slider {{outline: 1px solid}}
  .dpteach button {{border: 1px solid}}
  .dpteach button.mod-active {{border-width: 3px}}
}}
@media (prefers-reduced-motion: reduce) {{
  .dpteach * {{transition: none !important; animation: none !important}}
}}
</style>
<p class="dpteach-gone">{_GONE}</p>
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
  const key = event => {{
    const way = {{ArrowRight: 1, ArrowUp: 1, PageUp: 5, ArrowLeft: -1, ArrowDown: -1, PageDown: -5}}[event.key];
    const slider = event.target.closest('[class*=dpteach-by-]');
    if (!way || !slider || !event.target.matches('[role=slider], .ui-slider-handle')) return;
    event.preventDefault();
    event.stopPropagation();
    const number = slider.querySelector('.widget-readout'), now = parseFloat(number.textContent);
    const by = /dpteach-by-([^ ]+)/.exec(slider.className)[1];
    let next = by === 'log' ? 10 ** (Math.round(20 * Math.log10(now) + way) / 20) : Math.round(now / by + way) * by;
    const whole = Math.round(next);
    if (!/[.e]/.test(number.textContent)) next = way < 0 ? Math.min(now - 1, whole) : Math.max(now + 1, whole);
    number.textContent = by === 'log' ? next.toPrecision({_DRAGGED}) : next.toPrecision(6);
    number.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', keyCode: 13, bubbles: true}}));
  }};
  const begin = () => {{
    const box = this.closest('.dpteach');
    if (!box) return setTimeout(begin, 100);
    if (!box.parentElement.closest('.dpteach')) box.addEventListener('keydown', key, true);
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
    "noise_multiplier": "noise multiplier σ",
    "max_grad_norm": "clipping norm C",
    "epochs": "epochs",
    "lr": "learning rate",
    "batch_size": "batch size",
    "target_delta": "δ",
    "sample_rate": "sample rate q",
    "steps": "steps",
    "prior": "prior",
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
        self._asked: dict[str, Any] | None = None  # what the sliders said last; it outlives a Stop
        self._wanted: dict[str, Any] | None = None  # what is to be worked on; None after a Stop
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
        """The sliders' values by setting name, exactly as the readouts show them."""
        return {name: read(control) for name, control in self.controls.items()}

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
        with self._changed:
            values = self.values
            # A page answers a value with its own rounding of it, at any time, also while another explorer is at work.
            if values == self._asked and not force:
                return
            self._asked = values
        for name, control in self.controls.items():
            show_digits(control, values[name])
        self._begin()

    def _begin(self) -> None:
        with self._changed:
            self._wanted = self._asked
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
                self._say(f"Can't go on: {(str(error).splitlines() or [type(error).__name__])[0]}")

    def _changes_within(self, seconds: float, generation: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._generation != generation, seconds)

    def _show(
        self, generation: int, *, picture: str | None = None, status: str | None = None, progress: bool = False
    ) -> bool:
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
        # Ten times a second is for the eye. What is read out has a line of its own: that a run began, and how it ended.
        # The line for the eye must not look like one that is read out, not even like one that is switched off: of two
        # such lines with the same words the Orca screen reader takes the first, and says nothing.
        self._status_line.value = f'<span class="dpteach-status">{escape(sentence)}</span>'
        if sentence and not (progress and self._in_progress):
            self._spoken.value = escape(sentence)
        self._in_progress = progress


class Pace:
    """How long a run takes, by the speed of its first half second, without its very first step: that may load things."""

    def __init__(self):
        self._first: tuple[float, int] | None = None  # when, and after how many steps

    def minutes_left(self, done: int, total: int) -> int:
        """After ``done`` of ``total`` steps; 0 where it is a minute or less, or not known yet."""
        now = time.perf_counter()
        began, skipped = self._first = self._first or (now, done)
        if now - began < _MEASURED or done == skipped:
            return 0
        seconds = (now - began) / (done - skipped) * (total - done)
        return round(seconds / 60) if seconds > 60 else 0


def minutes(count: int) -> str:
    return f"about {count} minute{'s' if count > 1 else ''}"


class Trainer(Live):
    """A live picture of a training. One training runs at a time: a new one stops the one before it."""

    _thread_name = "dpteach-train"
    _turn = threading.RLock()
    _latest: "Trainer | None" = None
    _pricing = threading.Lock()  # the slow, tight ε is computed for one run at a time
    _at_work = 0  # threads inside _loop: for a moment there can be two
    _interval_before: float

    def _loop(self) -> None:
        # A training step leaves the interpreter many times. Beside a busy cell it waits one switch interval for each
        # return, and a picture that came ten times a second comes once a second. With a shorter one it comes six times
        # a second.
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

    def _begin(self) -> None:
        with Trainer._turn:
            before, Trainer._latest = Trainer._latest, self
        if before is not None and before is not self:
            before._halt("Stopped, because another explorer started. Press Start to train again.")
            before.wait()
        super()._begin()

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

    def _foretell(self, run, generation: int, left: int, steps: int) -> bool:
        """Say once that a run will take long, where it will: whether it was said now."""
        if run.takes or not left:
            return False
        run.takes = f" This run has {steps:,} steps and takes {minutes(left)}. Stop ends it."
        with self._changed:
            if generation == self._generation:
                self._spoken.value = escape(run.takes.strip())
        return True

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


def new_model(make_model: Callable[[], nn.Module], seed: int | None) -> nn.Module:
    """``make_model()``, the same each time, also where it draws from PyTorch's global generator (``models`` does not).
    With ``seed`` None, a run that nobody is to repeat, it draws from that generator as it stands.
    """
    if seed is None:
        return make_model()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        return make_model()


def for_everybody(rows: list[widgets.Widget]) -> widgets.VBox:
    """The rows in a box in which each control has a visible focus, and a name for a screen reader."""
    last = widgets.HTML(_FOR_EVERYBODY)
    last.add_class("dpteach-last")
    box = widgets.VBox([*rows, last])
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
    button = widgets.ToggleButton(
        description=said, icon="caret-right", tooltip="Show or hide these sliders", layout=widgets.Layout(width="auto")
    )

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
    display(
        {
            "application/vnd.jupyter.widget-view+json": {
                "model_id": box.model_id,
                "version_major": 2,
                "version_minor": 0,
            },
            "text/plain": f"{words}. Run this cell to use it; a still picture follows.",
        },
        raw=True,
    )


def words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def control_style() -> dict[str, Any]:
    """How wide a control and its label are."""
    return {
        "style": {"description_width": "150px"},
        "layout": widgets.Layout(width="480px", max_width="calc(100% - 4px)"),
    }


def slider_for(name: str, value: float, limits: Range, said: str = "") -> widgets.Widget:
    """A slider that starts at exactly ``value``. It has no stops: a page moves a typed or set value to the nearest one."""
    said = said or words(name)
    limits = dataclasses.replace(limits, low=min(limits.low, value), high=max(limits.high, value))
    low, high = limits.low, limits.high
    more = {"value": value, "description": said, **control_style()}
    no_stops = {"step": None if widgets.FloatSlider.step.allow_none else 1e-5}  # ipywidgets 7 must have a step
    if limits.log:
        if low <= 0:
            raise ValueError(f"{name} must be > 0 for a logarithmic slider, got {value!r}")
        slider = widgets.FloatLogSlider(min=math.log10(low), max=math.log10(high), **no_stops, **more)
        slider.add_class("dpteach-by-log")
    elif limits.whole:
        slider = widgets.IntSlider(min=int(low), max=int(high), **more)
    else:
        slider = widgets.FloatSlider(min=low, max=high, **no_stops, **more)
        slider.add_class(f"dpteach-by-{10.0 ** -_decimals(limits):g}")
    slider.limits, slider.start = limits, value
    show_digits(slider, value)
    return slider


def _decimals(limits: Range) -> int:
    """Of a slider that is not logarithmic: a hundred places from one end to the other, or some more."""
    return max(0, 2 - round(math.log10(limits.high - limits.low)))


def read(control: widgets.Widget) -> Any:
    """A control's value as its readout shows it: the start value, or up to six digits, as it is; a dragged one rounded."""
    value = control.value
    if not hasattr(control, "limits"):  # a menu
        return value
    limits = control.limits
    if limits.whole:
        return int(round(min(max(value, limits.low), limits.high)))
    near_zero = 0.0 if limits.log else _CLOSE * (limits.high - limits.low)
    for exact in (control.start, float(f"{value:.6g}") if limits.log else round(value, 6)):
        if math.isclose(value, exact, rel_tol=_CLOSE, abs_tol=near_zero):
            return exact
    value = float(f"{value:.{_DRAGGED}g}") if limits.log else round(value, _decimals(limits))
    return min(max(value, limits.low), limits.high)


def show_digits(control: widgets.Widget, value: Any) -> None:
    """Let the readout show every digit of ``value``, and of a slider at rest no fewer than usual."""
    if not hasattr(control, "limits"):
        return
    if control.limits.whole:
        control.readout_format = ".0f" if control.limits.log else "d"
    elif control.limits.log:
        digits = len(f"{value:.5e}".split("e")[0].rstrip("0").replace(".", ""))
        control.readout_format = f".{digits - 1}e" if control.limits.high < 0.1 else f".{max(_DRAGGED, digits)}g"
    else:
        decimals = len(f"{value:.6f}".rstrip("0").split(".")[1])
        control.readout_format = f".{max(_decimals(control.limits), decimals)}f"


def figure(value: float) -> str:
    """A setting's value as a readout shows it, without zeros at its end: "1.12e-5"."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
