"""A guess that is kept: made before the measurement, locked, and seen beside it."""

import math
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
from IPython.display import display

from dpteach.explorer.accessibility import accessible_box, live_region
from dpteach.explorer.controls import Range, Slider, button, close_tree, in_a_row
from dpteach.plots import Line, Panel, still, svg

_MADE: dict[str, "Prediction"] = {}  # by question, in the notebook's order


class Prediction:
    """A question with a slider for each number asked, and a button *Show* that locks the guess.

    Without widgets, give the guess as an argument: it is locked at once.

    Args:
        question: one sentence.
        between: the ends of the slider.
        log: it is logarithmic.
        whole: whole numbers only.
        at: for a curve: where it is asked for. There is a slider for each.
        x: what ``at`` counts, for instance ``"steps"``.
        guess: a number, or for a curve one for each place in ``at``.

    Raises:
        ValueError: if ``guess`` has another length than ``at``.
    """

    def __init__(
        self,
        question: str,
        *,
        between: tuple[float, float],
        log: bool = False,
        whole: bool = False,
        at: Sequence[float] = (),
        x: str = "",
        guess: float | Sequence[float] | None = None,
    ):
        self.question = question
        self._said: list[float] | None = None
        self._at, self._x, self._limits = list(at), x, Range(*between, log=log, whole=whole)
        self._measured: list[float] | None = None
        self._format = "{:,.4g}"
        low, high = between
        middle = math.sqrt(low * high) if log else (low + high) / 2
        if log:
            middle = float(f"{middle:.2g}")
        labels = [f"{x} = {place:g}" for place in self._at] or ["your guess"]
        start = round(middle) if whole else middle
        self._sliders = [Slider(f"guess {label}", start, self._limits, label) for label in labels]
        for slider in self._sliders:
            slider.mark()
        self._button = button("Show", "eye", "Lock the guess, and see it beside what was measured", self._lock)
        self._answer, self._aloud = widgets.HTML(), live_region()
        self._aloud.add_class("dpteach-spoken")
        asked = widgets.HTML(f"<b>Predict.</b> {escape(question)}")
        for slider in self._sliders:
            slider.row.layout = widgets.Layout(flex="1 1 240px", max_width="420px")
        asked_for = in_a_row(*(slider.row for slider in self._sliders), self._button)
        self.widget = accessible_box([asked, asked_for, self._answer, self._aloud])
        if question in _MADE:
            close_tree(_MADE[question].widget)
        _MADE[question] = self
        if guess is not None:
            self._lock(self._numbers("guess", guess))

    @property
    def guess(self) -> float | list[float] | None:
        """What was locked: a number, or for a curve a list; None as long as nothing is."""
        return self._said if self._at or self._said is None else self._said[0]

    def show(self, measured: float | Sequence[float], form: str = "{:,.4g}"):
        """Print what was measured, and the guess beside it; from now on *Show* shows both.

        Args:
            measured: a number, or for a curve one for each place in ``at``.
            form: how to print a number, as for ``str.format``: ``"{:.1%}"``.

        Returns:
            for a curve, its picture; otherwise None.

        Raises:
            ValueError: if ``measured`` is no finite number, or not one for each place.
        """
        self._measured, self._format = self._numbers("measured", measured), form
        self._tell()
        print(self.words())
        return still([self._panel()]) if self._at else None

    def words(self) -> str:
        """The question's answer in one line: what was measured, what was said, and how far off that was."""
        said, true = (", ".join(map(self._format.format, v)) if v else "" for v in (self._said, self._measured))
        if not true:
            return f"you said {said}; not measured yet" if said else "no guess, and not measured yet"
        return f"measured {true}" + (f"; you said {said}: {self._off()}" if said else "")

    def _off(self) -> str:
        """How far the guess is off, where a curve is worst."""
        pairs = list(zip(self._said or [], self._measured or []))
        if all(self._format.format(a) == self._format.format(b) for a, b in pairs):
            return "right"
        if self._limits.log and all(a > 0 and b > 0 for a, b in pairs):
            a, b = max(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1])))
            size = f"{max(a / b, b / a):.3g} times too {'high' if a > b else 'low'}"
        else:
            a, b = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
            size = f"{self._format.format(abs(a - b))} too {'high' if a > b else 'low'}"
        return size + (f" at {self._x} = {self._at[pairs.index((a, b))]:g}" if self._at else "")

    def _numbers(self, name: str, value) -> list[float]:
        values = [float(v) for v in value] if self._at else [float(value)]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be finite, got {value!r}")
        if self._at and len(values) != len(self._at):
            raise ValueError(f"{name} must have {len(self._at)} numbers, one for each place, got {len(values)}")
        return values

    def _panel(self) -> Panel:
        lines = [Line(self._at, self._measured, "private", "measured")] if self._measured else []
        lines += [Line(self._at, self._said, "non-private", "your guess", dashed=True)] if self._said else []
        words, wide = f"{self.question} {self.words()}.", max(self._at) > 30 * min(self._at) > 0
        title = "Your guess, and the measurement" if self._said else "The measurement"
        return Panel(title, self._x, "", lines, words, x_log=wide, y_log=self._limits.log)

    def _lock(self, guess: list[float] | None = None) -> None:
        if self._said is None:
            values = guess or [float(slider.value) for slider in self._sliders]
            for slider, value in zip(self._sliders, values):
                slider.widget.value = min(max(value, self._limits.low), self._limits.high)
            self._said = values
        self._tell()

    def _tell(self) -> None:
        """Show on the page what is known: nothing before the guess is locked."""
        if self._said is None:
            return
        for control in (*(slider.widget for slider in self._sliders), self._button):
            control.disabled = True
        words = self.words() if self._measured else f"Locked: {self.words()}. Go on and measure it."
        picture = f'<div style="max-width:480px">{svg([self._panel()])}</div>' if self._at and self._measured else ""
        self._answer.value = f"<span>{escape(words)}</span>{picture}"
        self._aloud.value = escape(words)
        if self._measured and not self._at:
            self._sliders[0].mark((self._measured[0], "▲"))

    def _ipython_display_(self) -> None:
        view = {"model_id": self.widget.model_id, "version_major": 2, "version_minor": 0}
        text = f"Predict: {self.question} Run this cell to make a guess."
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": text}, raw=True)


def predictions() -> None:
    """Print every prediction of this notebook once more: its question, what was measured, and what you said."""
    for made in _MADE.values():
        print(f"{made.question}\n    {made.words()}")
