"""Sliders and menus: where they run, what they are called, and how they are read."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from dpteach.plots.panel import tick_text, ticks

_CLOSE = 1e-10  # relative: more than a page changes a number by taking its logarithm and back
_DRAGGED = 3  # significant digits of a value that was dragged, not typed; page.js gives a key's value as many


@dataclass(frozen=True)
class Range:
    """Where a slider runs: from ``low`` to ``high``, logarithmic if ``log``, in whole steps if ``whole``."""

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
    "rounds": Range(1, 20, whole=True),
    "share": Range(0.02, 0.98),
    "skew": Range(0, 0.99),
}

# A badge beside a slider's name.
_CHANGES_EPSILON = dict.fromkeys(("noise_multiplier", "epochs", "batch_size", "target_delta", "rounds"), True)
_CHANGES_EPSILON |= dict.fromkeys(("max_grad_norm", "lr"), False)

_LABELS = {
    "noise_multiplier": "noise multiplier σ",
    "max_grad_norm": "clipping norm C",
    "lr": "learning rate",
    "target_delta": "δ",
    "sample_rate": "sample rate q",
}


def label_of(name: str) -> str:
    """A setting's name as its slider shows it."""
    return _LABELS.get(name, name.replace("_", " "))


def number_text(value: float) -> str:
    """A setting's value as a readout shows it, without zeros at its end: "1.12e-5"."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")


class Slider:
    """A slider that starts at exactly ``start``, and how it is read.

    It has no stops: a page moves a typed or set value to the nearest one.

    Attributes:
        widget: the ipywidgets slider.
        row: the slider with its ticks below it, and a mark at the value that it starts at.
        start: that value.
    """

    def __init__(self, name: str, start: float, limits: Range, label: str = ""):
        self.start = start
        self._limits = dataclasses.replace(limits, low=min(limits.low, start), high=max(limits.high, start))
        low, high = self._limits.low, self._limits.high
        style = {"value": start, "description": label or label_of(name), **_control_style()}
        no_stops = {"step": None if widgets.FloatSlider.step.allow_none else 1e-5}  # ipywidgets 7 must have a step
        if limits.log:
            if low <= 0:
                raise ValueError(f"{name} must be > 0 for a logarithmic slider, got {start!r}")
            self.widget = widgets.FloatLogSlider(min=math.log10(low), max=math.log10(high), **no_stops, **style)
            self.widget.add_class("dpteach-by-log")
        elif limits.whole:
            self.widget = widgets.IntSlider(min=int(low), max=int(high), **style)
        else:
            # A hundred places from one end to the other, or some more.
            self._decimals = max(0, 2 - round(math.log10(high - low)))
            self.widget = widgets.FloatSlider(min=low, max=high, **no_stops, **style)
            self.widget.add_class(f"dpteach-by-{10.0**-self._decimals:g}")
        if name in _CHANGES_EPSILON:
            self.widget.add_class(f"dpteach-{'costs' if _CHANGES_EPSILON[name] else 'free'}")
        self.show_digits(start)
        self._ticks = widgets.HTML()
        self.row = widgets.VBox([self.widget, self._ticks])
        self.mark((start, "▴"))

    def mark(self, *marks: tuple[float, str]) -> None:
        """Show the ticks, and at each of these values its sign; a value outside the slider stands at its end."""
        limits = self._limits
        signs = [(tick, "i", tick_text(tick)) for tick in ticks(limits.low, limits.high, limits.log, 3)]
        signs += [(value, "b", sign) for value, sign in marks]
        scale = math.log10 if limits.log else float
        low, high = scale(limits.low), scale(limits.high)
        spots = [((scale(min(max(x, limits.low), limits.high)) - low) / ((high - low) or 1), t, w) for x, t, w in signs]
        row = "".join(f'<{tag} style="left:{100 * spot:.1f}%">{words}</{tag}>' for spot, tag, words in spots)
        self._ticks.value = f'<div class="dpteach-ticks" aria-hidden="true">{row}</div>'

    @property
    def value(self) -> float:
        """As the readout shows it: the start value, or up to six digits, as it is; a dragged one rounded."""
        value, limits = self.widget.value, self._limits
        if limits.whole:
            return int(round(min(max(value, limits.low), limits.high)))
        near_zero = 0.0 if limits.log else _CLOSE * (limits.high - limits.low)
        for exact in (self.start, float(f"{value:.6g}") if limits.log else round(value, 6)):
            if math.isclose(value, exact, rel_tol=_CLOSE, abs_tol=near_zero):
                return exact
        value = float(f"{value:.{_DRAGGED}g}") if limits.log else round(value, self._decimals)
        return min(max(value, limits.low), limits.high)

    def show_digits(self, value: float) -> None:
        """Let the readout show every digit of ``value``, and no fewer than of a dragged one."""
        if self._limits.whole:
            shown = ".0f" if self._limits.log else "d"
        elif self._limits.log:
            digits = len(f"{value:.5e}".split("e")[0].rstrip("0").replace(".", ""))
            shown = f".{digits - 1}e" if self._limits.high < 0.1 else f".{max(_DRAGGED, digits)}g"
        else:
            shown = f".{max(self._decimals, len(f'{value:.6f}'.rstrip('0').split('.')[1]))}f"
        self.widget.readout_format = shown


def menu(label: str, options: list, **more: Any) -> widgets.Dropdown:
    """A menu; ``options`` and more as for ipywidgets' ``Dropdown``."""
    return widgets.Dropdown(options=options, description=label, **more, **_control_style())


def text_box(label: str, suggestions: tuple[str, ...]) -> widgets.Combobox:
    """A text to type, or to pick from ``suggestions``; it starts with the first."""
    return widgets.Combobox(value=suggestions[0], options=suggestions, description=label, **_control_style())


def _control_style() -> dict[str, Any]:
    """As wide as its column, its label above it: page.css says how."""
    return {"layout": widgets.Layout(width="auto", height="auto")}


def two_columns(controls: list[widgets.Widget], shown: list[widgets.Widget]) -> widgets.HBox:
    """Controls left and pictures right; on a narrow page the pictures come first."""
    columns = widgets.VBox(controls), widgets.VBox(shown)
    for column, name in zip(columns, ("controls", "shown")):
        column.add_class(f"dpteach-{name}")
    row = widgets.HBox(columns)
    row.add_class("dpteach-columns")
    return row


def in_a_row(*parts: widgets.Widget) -> widgets.HBox:
    """Side by side, and below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def folded(label: str, rows: list[widgets.Widget]) -> widgets.VBox:
    """Rows that a button shows and hides. A keyboard reaches it; it does not reach the head of an ``Accordion``."""
    inside = widgets.VBox(rows, layout=widgets.Layout(display="none"))
    layout = widgets.Layout(width="auto")
    tooltip = "Show or hide what is below"
    button = widgets.ToggleButton(description=label, icon="caret-right", tooltip=tooltip, layout=layout)

    def turn(change):
        inside.layout.display = "flex" if change["new"] else "none"
        button.icon = "caret-down" if change["new"] else "caret-right"

    button.observe(turn, "value")
    return widgets.VBox([widgets.HBox([button]), inside])


def button(label: str, icon: str, tooltip: str, action) -> widgets.Button:
    """A button that calls ``action()``."""
    widget = widgets.Button(description=label, icon=icon, tooltip=tooltip)
    widget.on_click(lambda _: action())
    return widget


def close_tree(widget: widgets.Widget) -> None:
    """Close a widget with all that is in it: the kernel holds each until it is closed; a box closes only itself."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if isinstance(part, widgets.DOMWidget):
            close_tree(part)
        elif part is not None:
            part.close()
    widget.close()
