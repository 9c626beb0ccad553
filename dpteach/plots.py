"""Pictures, described once and drawn twice: as a live SVG string and as a matplotlib still.

A :class:`Panel` says what a picture shows, with a sentence for those who can't see it. :func:`svg` draws it in about a
millisecond, for ten frames a second; :func:`still` draws the same for the saved notebook. A colour means the same
everywhere: see :data:`COLOURS`.
"""

import inspect
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

#: At least 3 : 1 against JupyterLab's light and dark page, and any two can be told apart with every common colour-vision
#: deficiency; tests/test_colours.py computes both.
COLOURS = {
    "private": "#006BAD",
    "non-private": "#787878",
    "budget": "#028F5E",
    "attacker": "#BF500D",
    "data": "#987CC1",
    "first worker": "#A4367B",
    "second worker": "#B98D12",
    "other worker": "#787878",
}

_WIDTH, _HEIGHT = 330, 250  # of one panel, in SVG units; the picture scales to its page
_NARROWEST = 260  # pixels of one panel, before the next one goes below it
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 48, 38
_MOST_POINTS = 150


@dataclass(frozen=True)
class Line:
    """A curve. ``xs`` and ``ys``: equally long; a NaN makes a gap. ``role``: a key of :data:`COLOURS`."""

    xs: Sequence[float]
    ys: Sequence[float]
    role: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """The area between ``low`` and ``high`` over ``xs``."""

    xs: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    role: str
    label: str = ""


@dataclass(frozen=True)
class Points:
    """Dots, or crosses: a second sign beside the colour."""

    xs: Sequence[float]
    ys: Sequence[float]
    role: str
    label: str = ""
    cross: bool = False


@dataclass(frozen=True)
class Bars:
    """A histogram: ``edges`` has one value more than ``heights``."""

    edges: Sequence[float]
    heights: Sequence[float]
    role: str
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A straight line across the panel, at ``x`` (upright) or at ``y`` (level)."""

    role: str
    label: str = ""
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn on it.

    Args:
        title, x_label, y_label: in words, with the unit.
        items: :class:`Line`, :class:`Band`, :class:`Points`, :class:`Bars` and :class:`Mark`, drawn in this order.
        alt: a sentence that says what the picture shows, with its figures.
        x_range, y_range: (low, high); from the items if not given.
        x_log, y_log: draw on a logarithmic axis; values that are not positive are left out.

    Raises:
        ValueError: if two items with a label look the same: the same sign in the same colour.
    """

    title: str
    x_label: str
    y_label: str
    items: Sequence[Line | Band | Points | Bars | Mark]
    alt: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_log: bool = False
    y_log: bool = False

    def __post_init__(self):
        seen: dict[tuple, str] = {}
        for item in self.items:
            look = (type(item), COLOURS[item.role], getattr(item, "dashed", False), getattr(item, "cross", False))
            if item.label and seen.setdefault(look, item.label) != item.label:
                raise ValueError(
                    f"items must look different, got {seen[look]!r} and {item.label!r} as the same sign in the "
                    f"same colour in {self.title!r}; give one another role, or dashed=True, or cross=True"
                )

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of both axes: as given, or around every finite value of the items."""
        xs: list[np.ndarray] = []
        ys: list[np.ndarray] = []
        for item in self.items:
            if isinstance(item, Bars):
                xs.append(_array(item.edges))
                ys += [_array(item.heights), np.zeros(0 if self.y_log else 1)]
            elif isinstance(item, Band):
                xs.append(_array(item.xs))
                ys += [_array(item.low), _array(item.high)]
            elif isinstance(item, Mark):
                xs += [] if item.x is None else [_array([item.x])]
                ys += [] if item.y is None else [_array([item.y])]
            else:
                xs.append(_array(item.xs))
                ys.append(_array(item.ys))
        return self.x_range or _span(xs, self.x_log, 0.0), self.y_range or _span(ys, self.y_log, 0.05)


def alt_text(panels: Sequence[Panel]) -> str:
    """The panels' sentences, one after the other."""
    return " ".join(panel.alt for panel in panels)


def svg(panels: Sequence[Panel]) -> str:
    """One ``<svg>`` for each panel, side by side or, on a narrow page, below each other: text in the page's own colour, and
    the panel's sentence for a screen reader.
    """
    pictures = "".join(
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(panel.alt, quote=True)}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="flex:1 1 {_NARROWEST}px;min-width:0;max-width:{_WIDTH}px;height:auto" '
        f'font-family="system-ui,sans-serif" font-size="11" fill="currentColor">'
        f"<title>{escape(panel.alt)}</title>{_svg_panel(panel)}</svg>"
        for panel in panels
    )
    return f'<div style="display:flex;flex-wrap:wrap">{pictures}</div>'


def still(panels: Sequence[Panel]):
    """The panels side by side as a matplotlib figure. A notebook shows it as a PNG, and its alt sentence as plain text."""
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


def contour(xs: np.ndarray, ys: np.ndarray, z: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The line where ``z`` crosses ``level``: two arrays for a :class:`Line`, with a NaN between the pieces.

    Args:
        xs: (k,) and ys: (m,), the grid's coordinates.
        z: (m, k), the values on the grid.
        level: the value to follow.
    """
    import contourpy

    pieces = contourpy.contour_generator(xs, ys, z).lines(level)
    gap = np.full((1, 2), np.nan)
    joined = np.concatenate([part for piece in pieces for part in (piece, gap)]) if pieces else gap
    return joined[:, 0], joined[:, 1]


def _array(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).ravel()


def _span(arrays: list[np.ndarray], log: bool, margin: float) -> tuple[float, float]:
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if len(values) == 0:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        return (low / 1.15, high * 1.15)
    if low == high:
        return (low - 0.5, high + 0.5)
    pad = (high - low) * margin
    return (low - (pad if low != 0 else 0.0), high + pad)


def _ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, (last - first) // most)
        ticks = [10.0**e for e in range(first, last + 1, stride)]
        if sum(low <= t <= high for t in ticks) < 2:
            ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        if sum(low <= t <= high for t in ticks) < 2:
            return _ticks(low, high, False, most)
    else:
        raw = (high - low) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
        ticks = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)] if log else ticks


def _tick_text(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 150 points: each the mean of its neighbours; the last one is kept as it is."""
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    starts = np.arange(0, len(xs) - 1, math.ceil(len(xs) / _MOST_POINTS))
    counts = np.diff(np.append(starts, len(xs) - 1))

    def means(values):
        known = np.isfinite(values[:-1])
        totals = np.add.reduceat(np.where(known, values[:-1], 0.0), starts)
        n = np.add.reduceat(known.astype(float), starts)
        return np.append(np.divide(totals, n, out=np.full(len(counts), np.nan), where=n > 0), values[-1])

    return means(xs), means(ys)


def _svg_panel(panel: Panel) -> str:
    (x0, x1), (y0, y1) = panel.ranges()
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def scale(values, low, high, log, start, length):
        values = _array(values)
        if log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values, low, high = np.log10(np.where(values > 0, values, np.nan)), math.log10(low), math.log10(high)
        pixels = start + (values - low) / (high - low) * length
        return np.minimum(np.maximum(pixels, -9999), 9999)  # far outside is outside; keeps NaN

    def px(values):
        return scale(values, x0, x1, panel.x_log, _LEFT, inner_w)

    def py(values):
        return scale(values, y0, y1, panel.y_log, _TOP + inner_h, -inner_h)

    clip_id = f"c{abs(hash((panel.title, x0, x1, y0, y1))) % 10**9}"
    out = [
        f'<clipPath id="{clip_id}"><rect x="{_LEFT}" y="{_TOP}" width="{inner_w}" height="{inner_h}"/></clipPath>',
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="600">{escape(panel.title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{inner_w}" height="{inner_h}" fill="none" stroke="currentColor" stroke-opacity=".35"/>',
    ]
    for value in _ticks(x0, x1, panel.x_log, 5):
        x = px([value])[0]
        out.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{_tick_text(value)}</text>')
        out.append(f'<path d="M{x:.1f},{_TOP + inner_h}v-4" stroke="currentColor" stroke-opacity=".5"/>')
    for value in _ticks(y0, y1, panel.y_log, 5):
        y = py([value])[0]
        out.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(value)}</text>')
        out.append(f'<path d="M{_LEFT},{y:.1f}h{inner_w}" stroke="currentColor" stroke-opacity=".12"/>')
    out.append(f'<text x="{_LEFT + inner_w / 2}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(panel.x_label)}</text>')
    out.append(
        f'<text transform="translate(11,{_TOP + inner_h / 2}) rotate(-90)" text-anchor="middle">{escape(panel.y_label)}</text>'
    )
    out.append(f'<g clip-path="url(#{clip_id})">')
    for item in panel.items:
        colour = COLOURS[item.role]
        if isinstance(item, Line):
            dash = ' stroke-dasharray="5 4"' if item.dashed else ""
            for piece in _pieces(*_thin(_array(item.xs), _array(item.ys)), px, py):
                out.append(f'<polyline points="{piece}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        elif isinstance(item, Band):
            there = _pieces(_array(item.xs), _array(item.low), px, py)
            back = _pieces(_array(item.xs)[::-1], _array(item.high)[::-1], px, py)
            if there and back:
                out.append(f'<polygon points="{there[0]} {back[0]}" fill="{colour}" fill-opacity=".2"/>')
        elif isinstance(item, Points):
            spots = np.column_stack([px(item.xs), py(item.ys)])
            shape = "M%.0f,%.0fm-2,-2l4,4m0,-4l-4,4" if item.cross else "M%.0f,%.0fh.01"
            path = _filled(shape, spots[np.isfinite(spots).all(axis=1)])
            out.append(
                f'<path d="{path}" fill="none" stroke="{colour}" stroke-linecap="round" '
                f'stroke-width="{1.2 if item.cross else 4 if len(spots) > 30 else 7}"/>'
            )
        elif isinstance(item, Bars):
            edges, base = px(item.edges), _TOP + inner_h
            for left, right, top in zip(edges, edges[1:], py(item.heights)):
                if math.isfinite(top):
                    out.append(
                        f'<path d="M{left:.1f},{base}V{top:.1f}H{right:.1f}V{base}" stroke="{colour}" fill="{colour}" fill-opacity=".45"/>'
                    )
        elif item.x is not None:
            out.append(
                f'<path d="M{px([item.x])[0]:.1f},{_TOP}v{inner_h}" stroke="{colour}" stroke-width="1.8" stroke-dasharray="2 2"/>'
            )
        else:
            out.append(
                f'<path d="M{_LEFT},{py([item.y])[0]:.1f}h{inner_w}" stroke="{colour}" stroke-width="1.8" stroke-dasharray="2 2"/>'
            )
    out.append("</g>")
    x = _LEFT
    for item in panel.items:
        if item.label:
            dash = "5 4" if getattr(item, "dashed", False) else "2 2" if isinstance(item, Mark) else "none"
            colour, y = COLOURS[item.role], _TOP - 14
            if not isinstance(item, Points):
                sign = f'<path d="M{x},{y}h14" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/>'
            elif item.cross:
                sign = f'<path d="M{x + 6},{y}m-3,-3l6,6m0,-6l-6,6" stroke="{colour}" stroke-width="1.6"/>'
            else:
                sign = f'<circle cx="{x + 9}" cy="{y}" r="3" fill="{colour}"/>'
            out.append(f'{sign}<text x="{x + 18}" y="{_TOP - 10}">{escape(item.label)}</text>')
            x += 30 + 6 * len(item.label)
    return "".join(out)


def _pieces(xs: np.ndarray, ys: np.ndarray, px, py) -> list[str]:
    pixels = np.column_stack([px(xs), py(ys)])
    known = np.isfinite(pixels).all(axis=1)
    if known.all():
        return [_filled("%.1f,%.1f ", pixels)] if len(pixels) else []
    cuts = np.flatnonzero(np.diff(known.astype(int))) + 1
    return [
        _filled("%.1f,%.1f ", part)
        for part, good in zip(np.split(pixels, cuts), np.split(known, cuts))
        if len(part) and good[0]
    ]


def _filled(shape: str, rows: np.ndarray) -> str:
    """``shape`` once for every row: one call of ``%`` is three times as quick as one a row."""
    return (shape * len(rows)) % tuple(rows.ravel().tolist())


def _matplotlib_panel(axes, panel: Panel) -> None:
    (x0, x1), (y0, y1) = panel.ranges()
    for item in panel.items:
        style = {"color": COLOURS[item.role], "label": item.label or None}
        if isinstance(item, Line):
            axes.plot(
                *_thin(_array(item.xs), _array(item.ys)), linestyle="--" if item.dashed else "-", linewidth=1.5, **style
            )
        elif isinstance(item, Band):
            axes.fill_between(_array(item.xs), _array(item.low), _array(item.high), alpha=0.2, linewidth=0, **style)
        elif isinstance(item, Points):
            size = 14 if item.cross else 8 if len(item.xs) > 30 else 28
            axes.scatter(
                item.xs, item.ys, s=size, marker="x" if item.cross else "o", linewidths=1 if item.cross else 0, **style
            )
        elif isinstance(item, Bars):
            axes.stairs(item.heights, item.edges, fill=True, alpha=0.45, **style)
            axes.stairs(item.heights, item.edges, linewidth=1, color=style["color"])
        elif item.x is not None:
            axes.axvline(item.x, linestyle=":", linewidth=1.5, **style)
        else:
            axes.axhline(item.y, linestyle=":", linewidth=1.5, **style)
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log")
    axes.set(xlim=(x0, x1), ylim=(y0, y1))
    for axis, log, ends in ((axes.xaxis, panel.x_log, (x0, x1)), (axes.yaxis, panel.y_log, (y0, y1))):
        if log:  # matplotlib's own labels overlap on an axis of less than a decade
            ticks = _ticks(*ends, True, 5)
            axis.set_ticks(ticks, [_tick_text(tick) for tick in ticks])
            axis.set_ticks([], minor=True)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    if any(item.label for item in panel.items):
        axes.legend(fontsize=8, loc="best")


class Source(str):
    """Python code that a notebook shows with its colours."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def source(function) -> Source:
    """The source code of a function of the package, for a notebook to show: nothing is copied that could drift."""
    return Source(textwrap.dedent(inspect.getsource(function)).strip())
