"""A live picture: controls, a status line, and a thread that draws what the controls say."""

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from dpteach._checks import choice
from dpteach.explorer.accessibility import accessible_box, live_region
from dpteach.explorer.controls import RANGES, Range, Slider, label_of, text_box, two_columns
from dpteach.explorer.thread import Job, WorkerThread
from dpteach.plots import Panel, alt_text, still, svg


class LivePicture:
    """Controls and a picture. A moved control asks the thread, and the thread calls :meth:`_work`.

    A subclass puts the parts that it shows into ``self.widget``, and draws in ``_work``.

    Args:
        controls: by setting name.
        thread_name: of the thread that draws.
        alone: its work ends when that of another one begins.
    """

    widget: widgets.VBox  # what a cell shows

    def __init__(
        self, controls: dict[str, Slider | widgets.Dropdown | widgets.Combobox], thread_name: str, alone: bool = False
    ):
        self._controls = controls
        self.controls = {name: c.widget if isinstance(c, Slider) else c for name, c in controls.items()}
        self._starts = {name: control.value for name, control in self.controls.items()}
        self._rows = {name: c.row if isinstance(c, Slider) else c for name, c in controls.items()}  # what a page shows
        self._picture, self._status_line, self._spoken = widgets.HTML(), widgets.HTML(), live_region()
        self._spoken.add_class("dpteach-spoken")
        self._status, self._in_progress = "", False
        self._thread = WorkerThread(thread_name, self._read, self._work, self._fail, self._halt if alone else None)
        for control in self.controls.values():
            control.observe(lambda _: self._thread.request(), "value")

    def _work(self, job: Job) -> None:
        """Draw what ``job.values`` say. It gives up, without a word, where ``self._show`` says False."""
        raise NotImplementedError

    def _panels(self) -> list[Panel]:
        """The picture as it is now."""
        raise NotImplementedError

    def summary(self) -> str:
        """The picture in words."""
        return alt_text(self._panels())

    @property
    def status(self) -> str:
        """What the status line says, as plain text."""
        return self._status

    @property
    def values(self) -> dict[str, Any]:
        """The controls' values by setting name, exactly as the readouts show them."""
        return {name: control.value for name, control in self._controls.items()}

    @property
    def error(self) -> Exception | None:
        """What ended the last run, if it was an exception."""
        return self._thread.error

    @property
    def busy(self) -> bool:
        """Whether it is at work."""
        return self._thread.busy

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the current run has ended, by itself or by Stop.

        Args:
            timeout: seconds; no limit if not given.

        Raises:
            TimeoutError: if it has not ended by then. It goes on.
        """
        if not self._thread.wait(timeout):
            raise TimeoutError(f"still at work after {timeout} s: {self.status}")

    def reset(self) -> None:
        """Put every control back where it started."""
        for name, value in self._starts.items():
            self.controls[name].value = value

    def still(self):
        """The picture with its summary, as a matplotlib figure; a notebook shows it as a PNG."""
        return still(self._panels(), self.summary())

    def _ipython_display_(self) -> None:
        names = ", ".join(map(label_of, self.controls))
        show_widget(self.widget, f"{type(self).__name__} with sliders for {names}")

    def _read(self) -> dict[str, Any]:
        values = self.values
        for name, control in self._controls.items():
            if isinstance(control, Slider):
                control.show_digits(values[name])
        return values

    def _fail(self, job: Job, error: Exception) -> None:
        with self._thread.lock:
            if not job.over:
                self._thread.error = error
                self._say(f"Can't go on: {(str(error).splitlines() or [type(error).__name__])[0]}")

    def _halt(self, sentence: str = "Stopped, because another explorer started. Press Start to train again.") -> None:
        with self._thread.lock:
            if self._thread.cancel():
                self._say(sentence)

    def _show(self, job: Job, picture: str | None = None, status: str | None = None, progress: bool = False) -> bool:
        """Put a picture and a status on the page, unless the job is over; then return False.

        ``progress``: the status is one of many in a row. A screen reader hears the first.
        """
        with self._thread.lock:
            if job.over:
                return False
            if picture is not None:
                self._picture.value = picture
            if status is not None:
                self._say(status, progress)
            return True

    def _say(self, sentence: str, progress: bool = False, aloud: bool = True) -> None:
        self._status = sentence
        # Ten times a second is for the eye. What is read out has a line of its own: that a run began, and how it ended.
        # The line for the eye must not look like one that is read out, not even like one that is switched off: of two
        # such lines with the same words the Orca screen reader takes the first, and says nothing.
        self._status_line.value = f'<span class="dpteach-status">{escape(sentence)}</span>'
        if not aloud:
            return
        if sentence and not (progress and self._in_progress):
            self._spoken.value = escape(sentence)
        self._in_progress = progress


class Viewer(LivePicture):
    """Sliders over a picture that is computed, not trained.

    Args:
        draw: ``draw(**values) -> list of Panel``, called with the sliders' values; at most some 30 ms, to keep up.
        ranges: ends of a slider whose name has none in :data:`RANGES`, or other ends for one that has.
        values: each slider's name and the value that it starts at; for a text to type or pick, a tuple of suggestions.

    Attributes:
        controls: the widgets by name.
        values: their values by name.
        error: the exception that ``draw`` raised last, or None.

    Raises:
        ValueError: if a name has no range.
    """

    def __init__(self, draw: Callable[..., list[Panel]], *, ranges: dict[str, Range] | None = None, **values: Any):
        limits, texts = {**RANGES, **(ranges or {})}, {name for name in values if isinstance(values[name], tuple)}
        for name in values.keys() - texts:
            choice("ranges", name, limits)
        self._draw = draw
        controls = {
            name: text_box(label_of(name), start) if name in texts else Slider(name, start, limits[name])
            for name, start in values.items()
        }
        super().__init__(controls, "dpteach-draw")
        page = two_columns([*self._rows.values()], [self._status_line, self._picture])
        self.widget = accessible_box([page, self._spoken])
        self._thread.request(force=True)

    def _panels(self) -> list[Panel]:
        return self._draw(**self.values)

    def _work(self, job: Job) -> None:
        # It follows the slider, without waiting for it to come to rest: only the newest is drawn.
        self._show(job, picture=svg(self._draw(**job.values)), status="")


def show_widget(widget: widgets.Widget, text: str) -> None:
    """Show a widget in a cell; a page without it shows ``text``, one sentence and not the widget's whole inside."""
    view = {"model_id": widget.model_id, "version_major": 2, "version_minor": 0}
    text = f"{text}. Run this cell to use it; a still picture follows."
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": text}, raw=True)
