"""The two painters: frame, ticks and key. What stands inside the frame, each item draws itself."""

import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from dpteach.plots.items import array
from dpteach.plots.panel import Panel, alt_text, tick_text, ticks

_WIDTH, _HEIGHT = 330, 250  # of one panel, in SVG units; the picture scales to its page
_NARROWEST = 260  # pixels of one panel, before the next one goes below it
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 48, 38  # between the panel's edge and the axes' frame


class SvgAxes:
    """A panel's frame in SVG units, and the way from its values to them."""

    left, top, width, height = _LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bottom = top + height

    def __init__(self, panel: Panel):
        self.x_range, self.y_range = panel.ranges()
        self.x_log, self.y_log = panel.x_log, panel.y_log

    def x(self, values) -> np.ndarray:
        """Where values lie across."""
        return _scaled(values, *self.x_range, self.x_log, self.left, self.width)

    def y(self, values) -> np.ndarray:
        """Where values lie upright."""
        return _scaled(values, *self.y_range, self.y_log, self.bottom, -self.height)


def _scaled(values, low: float, high: float, log: bool, start: float, length: float) -> np.ndarray:
    values = array(values)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values, low, high = np.log10(np.where(values > 0, values, np.nan)), math.log10(low), math.log10(high)
    pixels = start + (values - low) / (high - low) * length
    return np.minimum(np.maximum(pixels, -9999), 9999)  # far outside is outside; keeps NaN


def svg(panels: Sequence[Panel]) -> str:
    """One ``<svg>`` for each panel, side by side or, on a narrow page, below each other.

    Text has the page's own colour; each panel has its sentence, for a screen reader.
    """
    pictures = "".join(
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(panel.alt, quote=True)}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'style="flex:1 1 {_NARROWEST}px;min-width:0;max-width:{_WIDTH}px;height:auto" '
        f'font-family="system-ui,sans-serif" font-size="11" fill="currentColor">'
        f"<title>{escape(panel.alt)}</title>{_svg_panel(panel)}</svg>"
        for panel in panels
    )
    return f'<div style="display:flex;flex-wrap:wrap">{pictures}</div>'


def _svg_panel(panel: Panel) -> str:
    axes = SvgAxes(panel)
    left, top, width, height = axes.left, axes.top, axes.width, axes.height
    frame = f'<rect x="{left}" y="{top}" width="{width}" height="{height}"'
    clip_id = f"c{abs(hash((panel.title, *axes.x_range, *axes.y_range))) % 10**9}"
    out = [
        f'<clipPath id="{clip_id}">{frame}/></clipPath>',
        f'<text x="{left}" y="14" font-size="13" font-weight="600">{escape(panel.title)}</text>',
        f'{frame} fill="none" stroke="currentColor" stroke-opacity=".35"/>',
    ]
    for value in ticks(*axes.x_range, panel.x_log, 5):
        x = axes.x([value])[0]
        out.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tick_text(value)}</text>')
        out.append(f'<path d="M{x:.1f},{axes.bottom}v-4" stroke="currentColor" stroke-opacity=".5"/>')
    for value in ticks(*axes.y_range, panel.y_log, 5):
        y = axes.y([value])[0]
        out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
        out.append(f'<path d="M{left},{y:.1f}h{width}" stroke="currentColor" stroke-opacity=".12"/>')
    turned = f'transform="translate(11,{top + height / 2}) rotate(-90)"'
    out += [
        f'<text x="{left + width / 2}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(panel.x_label)}</text>',
        f'<text {turned} text-anchor="middle">{escape(panel.y_label)}</text>',
        f'<g clip-path="url(#{clip_id})">',
        *(item.svg(axes) for item in panel.items),
        "</g>",
    ]
    x = left
    for item in panel.items:
        if item.label:
            out.append(f'{item.svg_key(x, top - 14)}<text x="{x + 18}" y="{top - 10}">{escape(item.label)}</text>')
            x += 30 + 6 * len(item.label)
    return "".join(out)


def still(panels: Sequence[Panel]):
    """The panels side by side as a matplotlib figure; a notebook shows a PNG, and the alt sentence as plain text."""
    from matplotlib.figure import Figure

    class Still(Figure):
        def __repr__(self):
            return alt_text(panels)

        def _repr_png_(self):
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=100)
            return png.getvalue()

    figure = Still(figsize=(3.3 * len(panels), 2.7), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        _matplotlib_panel(axes, panel)
    return figure


def _matplotlib_panel(axes, panel: Panel) -> None:
    for item in panel.items:
        item.matplotlib(axes, color=item.colour, label=item.label or None)
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log")
    x_range, y_range = panel.ranges()
    axes.set(xlim=x_range, ylim=y_range)
    for axis, log, ends in ((axes.xaxis, panel.x_log, x_range), (axes.yaxis, panel.y_log, y_range)):
        if log:  # matplotlib's own labels overlap on an axis of less than a decade
            values = ticks(*ends, True, 5)
            axis.set_ticks(values, [tick_text(value) for value in values])
            axis.set_ticks([], minor=True)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    if any(item.label for item in panel.items):
        axes.legend(fontsize=8, loc="best")
