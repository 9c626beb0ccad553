"""What a panel is made of. Each item says where it lies, and draws itself: as SVG, with matplotlib, and in the key."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: At least 3 : 1 against JupyterLab's light and dark page, and any two can be told apart with every common
#: colour-vision deficiency; tests/test_colours.py computes both.
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

Values = Sequence[float] | np.ndarray
_MOST_POINTS = 150


class Item:
    """Something on a panel. ``role``: a key of :data:`COLOURS`. ``label``: its name in the key; ``""`` for no name."""

    role: str
    label: str

    @property
    def dash(self) -> str:
        """SVG's stroke-dasharray."""
        return "none"

    @property
    def colour(self) -> str:
        """As ``"#RRGGBB"``."""
        return COLOURS[self.role]

    @property
    def look(self) -> tuple:
        """What the eye tells it by: two items of the same look can't be told apart."""
        return type(self), self.colour, self.dash

    def extent(self) -> tuple[Values, Values]:
        """The xs and the ys that the axes are to hold."""
        raise NotImplementedError

    def svg(self, axes) -> str:
        """SVG elements, inside the axes' frame. ``axes``: :class:`~dpteach.plots.painters.SvgAxes`."""
        raise NotImplementedError

    def svg_key(self, x: float, y: float) -> str:
        """The sign beside its name in the key, from ``x`` on and around the height ``y``."""
        return f'<path d="M{x},{y}h14" stroke="{self.colour}" stroke-width="3" stroke-dasharray="{self.dash}"/>'

    def matplotlib(self, axes, **style) -> None:
        """Draw on a matplotlib ``Axes``. ``style``: its ``color`` and ``label``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Line(Item):
    """A curve. ``xs`` and ``ys``: equally long; a NaN makes a gap. ``role``: a key of :data:`COLOURS`."""

    xs: Values
    ys: Values
    role: str
    label: str = ""
    dashed: bool = False

    def extent(self) -> tuple[Values, Values]:
        return self.xs, self.ys

    @property
    def dash(self) -> str:
        return "5 4" if self.dashed else "none"

    def svg(self, axes) -> str:
        dash = f' stroke-dasharray="{self.dash}"' if self.dashed else ""
        return "".join(
            f'<polyline points="{piece}" fill="none" stroke="{self.colour}" stroke-width="1.8"{dash}/>'
            for piece in _pieces(axes, *_thin(array(self.xs), array(self.ys)))
        )

    def matplotlib(self, axes, **style) -> None:
        xs, ys = _thin(array(self.xs), array(self.ys))
        axes.plot(xs, ys, linestyle="--" if self.dashed else "-", linewidth=1.5, **style)


@dataclass(frozen=True)
class Band(Item):
    """The area between ``low`` and ``high`` over ``xs``."""

    xs: Values
    low: Values
    high: Values
    role: str
    label: str = ""

    def extent(self) -> tuple[Values, Values]:
        return self.xs, np.append(array(self.low), array(self.high))

    def svg(self, axes) -> str:
        xs, low, high = array(self.xs), array(self.low), array(self.high)
        there, back = _pieces(axes, xs, low), _pieces(axes, xs[::-1], high[::-1])
        if not there or not back:
            return ""
        return f'<polygon points="{there[0]} {back[0]}" fill="{self.colour}" fill-opacity=".2"/>'

    def matplotlib(self, axes, **style) -> None:
        axes.fill_between(array(self.xs), array(self.low), array(self.high), alpha=0.2, linewidth=0, **style)


@dataclass(frozen=True)
class Points(Item):
    """Dots, or crosses: a second sign beside the colour."""

    xs: Values
    ys: Values
    role: str
    label: str = ""
    cross: bool = False

    def extent(self) -> tuple[Values, Values]:
        return self.xs, self.ys

    @property
    def look(self) -> tuple:
        return type(self), self.colour, self.cross

    def svg(self, axes) -> str:
        spots = np.column_stack([axes.x(self.xs), axes.y(self.ys)])
        shape = "M%.0f,%.0fm-2,-2l4,4m0,-4l-4,4" if self.cross else "M%.0f,%.0fh.01"
        path = _filled(shape, spots[np.isfinite(spots).all(axis=1)])
        width = 1.2 if self.cross else 4 if len(spots) > 30 else 7
        line = f'stroke="{self.colour}" stroke-linecap="round" stroke-width="{width}"'
        return f'<path d="{path}" fill="none" {line}/>'

    def svg_key(self, x: float, y: float) -> str:
        if self.cross:
            return f'<path d="M{x + 6},{y}m-3,-3l6,6m0,-6l-6,6" stroke="{self.colour}" stroke-width="1.6"/>'
        return f'<circle cx="{x + 9}" cy="{y}" r="3" fill="{self.colour}"/>'

    def matplotlib(self, axes, **style) -> None:
        if self.cross:
            axes.scatter(self.xs, self.ys, s=14, marker="x", linewidths=1, **style)
        else:
            axes.scatter(self.xs, self.ys, s=8 if len(self.xs) > 30 else 28, marker="o", linewidths=0, **style)


@dataclass(frozen=True)
class Bars(Item):
    """A histogram: ``edges`` has one value more than ``heights``."""

    edges: Values
    heights: Values
    role: str
    label: str = ""

    def extent(self) -> tuple[Values, Values]:
        return self.edges, np.append(array(self.heights), 0.0)

    def svg(self, axes) -> str:
        edges, base = axes.x(self.edges), axes.bottom
        return "".join(
            f'<path d="M{left:.1f},{base}V{top:.1f}H{right:.1f}V{base}" stroke="{self.colour}" fill="{self.colour}" '
            'fill-opacity=".45"/>'
            for left, right, top in zip(edges, edges[1:], axes.y(self.heights))
            if math.isfinite(top)
        )

    def matplotlib(self, axes, **style) -> None:
        axes.stairs(self.heights, self.edges, fill=True, alpha=0.45, **style)
        axes.stairs(self.heights, self.edges, linewidth=1, color=style["color"])


@dataclass(frozen=True)
class Mark(Item):
    """A straight line across the panel, at ``x`` (upright) or at ``y`` (level)."""

    role: str
    label: str = ""
    x: float | None = None
    y: float | None = None

    @property
    def dash(self) -> str:
        return "2 2"

    def extent(self) -> tuple[Values, Values]:
        return [] if self.x is None else [self.x], [] if self.y is None else [self.y]

    def svg(self, axes) -> str:
        if self.x is not None:
            way = f"M{axes.x([self.x])[0]:.1f},{axes.top}v{axes.height}"
        else:
            way = f"M{axes.left},{axes.y([self.y])[0]:.1f}h{axes.width}"
        return f'<path d="{way}" stroke="{self.colour}" stroke-width="1.8" stroke-dasharray="{self.dash}"/>'

    def matplotlib(self, axes, **style) -> None:
        draw, at = (axes.axvline, self.x) if self.x is not None else (axes.axhline, self.y)
        draw(at, linestyle=":", linewidth=1.5, **style)


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


def array(values) -> np.ndarray:
    """As a flat float64 array."""
    return np.asarray(values, dtype=np.float64).ravel()


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


def _pieces(axes, xs: np.ndarray, ys: np.ndarray) -> list[str]:
    """The curve in pixels, cut where it has a gap."""
    pixels = np.column_stack([axes.x(xs), axes.y(ys)])
    known = np.isfinite(pixels).all(axis=1)
    if known.all():
        return [_filled("%.1f,%.1f ", pixels)] if len(pixels) else []
    cuts = np.flatnonzero(np.diff(known.astype(int))) + 1
    parts = zip(np.split(pixels, cuts), np.split(known, cuts))
    return [_filled("%.1f,%.1f ", part) for part, good in parts if len(part) and good[0]]


def _filled(shape: str, rows: np.ndarray) -> str:
    """``shape`` once for every row: one call of ``%`` is three times as quick as one a row."""
    return (shape * len(rows)) % tuple(rows.ravel().tolist())
