"""From panels to a picture: where the frame, the ticks and the names stand. The strokes are the canvas'."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from dpteach.plots.canvas import FigureCanvas, SvgCanvas
from dpteach.plots.items import Item, array
from dpteach.plots.panel import Panel, alt_text, short, tick_text, ticks

WIDTH, HEIGHT = 420, 270  # of one panel, in pixels; on a page it grows and shrinks
_NARROWEST, _WIDEST = 300, 760  # on a page, before the next one goes below it; and where it stops growing
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 26, 38  # between the panel's edge and the axes' frame
_COUNTED = ("round", "rounds", "epoch", "epochs")  # half a round is no place for a number
_KEY, _LETTER, _LINE = 18, 5.7, 12  # the height of a key above the frame; a letter's width; a line of text


class Axes:
    """A panel's frame in pixels, and the way from its values to them."""

    def __init__(self, panel: Panel):
        labelled = [item for item in panel.items if item.label]
        # A name stands at the right end of its line. Dots, bars and uprights have none: then all names stand in a key.
        direct = all(item.end is not None for item in labelled)
        self.names = [(item, textwrap.wrap(item.label, 13)) for item in labelled] if direct else []
        self.key: list[Item] = [] if direct else labelled
        letters = max((len(line) for _, lines in self.names for line in lines), default=0)
        self.left, self.top = _RIGHT if panel.bare else _LEFT, _TOP + (_KEY if self.key else 0)
        self.right = WIDTH - _RIGHT - (letters * _LETTER + 20 if letters else 0)
        self.bottom = HEIGHT - (_RIGHT if panel.bare else _BOTTOM)
        self.width, self.height = self.right - self.left, self.bottom - self.top
        self.x_range, self.y_range = panel.ranges()
        self.x_log, self.y_log = panel.x_log, panel.y_log

    def x(self, values) -> np.ndarray:
        """Where values lie across."""
        return _scaled(values, *self.x_range, self.x_log, self.left, self.width)

    def y(self, values) -> np.ndarray:
        """Where values lie upright."""
        return _scaled(values, *self.y_range, self.y_log, self.bottom, -self.height)

    def at(self, xs, ys) -> np.ndarray:
        """(n, 2): where pairs of values lie."""
        return np.column_stack([self.x(xs), self.y(ys)])


def _scaled(values, low: float, high: float, log: bool, start: float, length: float) -> np.ndarray:
    values = array(values)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values, low, high = np.log10(np.where(values > 0, values, np.nan)), math.log10(low), math.log10(high)
    pixels = start + (values - low) / (high - low) * length
    return np.minimum(np.maximum(pixels, -9999), 9999)  # far outside is outside; keeps NaN


def paint(canvas: SvgCanvas | FigureCanvas, panel: Panel) -> None:
    """Draw a panel on a canvas."""
    axes = Axes(panel)
    left, right, top, bottom = axes.left, axes.right, axes.top, axes.bottom
    canvas.text(left, 15, panel.title, size=13, bold=True)
    if not panel.bare:
        _scales(canvas, panel, axes)
    with canvas.clipped(left, top, axes.width, axes.height):
        for item in panel.items:
            item.draw(canvas, axes)
    if not panel.bare:
        canvas.line(np.array([[left, top], [left, bottom], [right, bottom]]), None, 1, opacity=0.45)
    _names(canvas, axes)
    at: float = left
    for item in axes.key:
        item.sign(canvas, at, top - 12)
        canvas.text(at + 17, top - 8, item.label)
        at += 29 + _LETTER * len(item.label)


def _scales(canvas: SvgCanvas | FigureCanvas, panel: Panel, axes: Axes) -> None:
    """The ticks, and what the axes are called."""
    left, right, top, bottom = axes.left, axes.right, axes.top, axes.bottom
    for value in ticks(*axes.x_range, panel.x_log, 6):
        if panel.x_label in _COUNTED and value % 1:
            continue
        x = axes.x([value])[0]
        canvas.text(x, bottom + 14, tick_text(value), anchor="middle")
        canvas.line(np.array([[x, bottom], [x, bottom - 4]]), None, 1, opacity=0.5)
    for value in ticks(*axes.y_range, panel.y_log, 6):
        y = axes.y([value])[0]
        canvas.text(left - 5, y + 4, tick_text(value), anchor="end")
        canvas.line(np.array([[left, y], [right, y]]), None, 1, opacity=0.1)
    canvas.text((left + right) / 2, HEIGHT - 7, panel.x_label, anchor="middle")
    canvas.text(12, (top + bottom) / 2, panel.y_label, anchor="middle", turned=True)


@dataclass
class _Name:
    """A line's name at the height where it is to stand."""

    y: float
    item: Item
    lines: list[str]


def _names(canvas: SvgCanvas | FigureCanvas, axes: Axes) -> None:
    """Each line's name at its right end; where two would touch, the lower one gives way. A value outside is said."""
    placed: list[_Name] = []
    low, high = axes.y_range
    for item, lines in axes.names:
        end = item.end if item.end is not None else low
        outside = f"▲ {short(end)}" if end > high * 1.0001 else ""
        if end < low and not axes.y_log:
            outside = f"▼ {short(end)}"
        y = float(np.nan_to_num(axes.y([end])[0], nan=axes.bottom))
        placed.append(_Name(min(max(y, axes.top), axes.bottom), item, [*lines, outside] if outside else lines))
    placed.sort(key=lambda name: name.y)
    free = axes.top - _LINE / 2
    for name in placed:  # downward, each below the one before
        name.y = max(name.y, free + _LINE / 2)
        free = name.y + _LINE * (len(name.lines) - 0.5)
    floor: float = axes.bottom + _LINE
    for name in reversed(placed):  # and up again where the last one fell out
        name.y = min(name.y, floor - _LINE * (len(name.lines) - 0.5))
        floor = name.y - _LINE / 2
    for name in placed:
        name.item.sign(canvas, axes.right + 4, name.y)
        for k, line in enumerate(name.lines):
            canvas.text(axes.right + 21, name.y + 4 + _LINE * k, line)


def svg(panels: Sequence[Panel]) -> str:
    """One ``<svg>`` for each panel, side by side or, on a narrow page, below each other.

    Text has the page's own colour; each panel has its sentence, for a screen reader.
    """
    columns = _columns(panels)
    pictures = []
    for panel in panels:
        canvas, alt = SvgCanvas(), escape(panel.alt, quote=True)
        paint(canvas, panel)
        pictures.append(
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{alt}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'style="flex:1 1 max({_NARROWEST}px,{100 // columns - 1}%);min-width:0;max-width:{_WIDEST}px;height:auto" '
            'font-family="system-ui,sans-serif" font-size="11" fill="currentColor">'
            f"<title>{alt}</title>{''.join(canvas.out)}</svg>"
        )
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(pictures)}</div>'


def _columns(panels: Sequence[Panel]) -> int:
    """Of so many panels beside each other: four are two by two."""
    return 2 if len(panels) == 4 else min(len(panels), 3)


def still(panels: Sequence[Panel], words: str = ""):
    """The same as a matplotlib figure; a notebook shows a PNG, 200 dots an inch, and the alt sentence as plain text.

    Args:
        panels: what to draw.
        words: a sentence to stand under the picture.
    """
    from matplotlib.figure import Figure

    columns = _columns(panels)
    width, rows = WIDTH * columns, math.ceil(len(panels) / columns)
    lines = textwrap.wrap(words, int(width / 6.2))
    height = HEIGHT * rows + (17 * len(lines) + 10 if lines else 0)

    class Still(Figure):
        def __repr__(self):
            return alt_text(panels)

        def _repr_png_(self):
            from PIL import Image

            drawn, png = io.BytesIO(), io.BytesIO()
            self.savefig(drawn, format="png", dpi=200)
            # As few bytes as a picture of a few colours needs: it is stored in a notebook.
            Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, "png", optimize=True)
            return png.getvalue(), {"width": width, "height": height}  # pixels of a page: sharp on a fine screen

    figure = Still(figsize=(width / 100, height / 100), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.autoscale(False)
    for k, panel in enumerate(panels):
        paint(FigureCanvas(axes, k % columns * WIDTH, k // columns * HEIGHT), panel)
    below = FigureCanvas(axes, 0, HEIGHT * rows)
    for k, line in enumerate(lines):
        below.text(14, 14 + 17 * k, line, size=12)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure
