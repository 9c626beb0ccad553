"""What a panel is made of. An item says what of the axes it needs, and draws itself on a canvas, in pixels.

A canvas is one of those in ``canvas``: SVG text, or matplotlib. Nothing here knows which.
"""

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
    "class 0": "#987CC1",
    "class 1": "#B98D12",
    "first worker": "#A4367B",
    "second worker": "#B98D12",
    "other worker": "#787878",
}

Values = Sequence[float] | np.ndarray
_MOST_POINTS = 150
_GHOST = 0.3  # opacity


class Item:
    """Something on a panel. ``role``: a key of :data:`COLOURS`. ``label``: its name in the key; ``""`` for no name."""

    role: str
    label: str

    @property
    def dash(self) -> tuple[float, ...]:
        """On and off, in pixels; nothing for a solid line."""
        return ()

    @property
    def colour(self) -> str:
        """As ``"#RRGGBB"``."""
        return COLOURS[self.role]

    @property
    def look(self) -> tuple:
        """What the eye tells it by: two items of the same look can't be told apart."""
        return type(self), self.colour, self.dash

    @property
    def end(self) -> float | None:
        """The height of its right end, where its name can stand; None where it has no such end."""
        return None

    def extent(self) -> tuple[Values, Values]:
        """The xs and the ys that the axes are to hold."""
        return [], []

    def draw(self, canvas, axes) -> None:
        """Draw on a canvas, inside the frame of ``axes``: :class:`~dpteach.plots.painters.Axes`."""
        raise NotImplementedError

    def sign(self, canvas, x: float, y: float) -> None:
        """The sign beside its name, from ``x`` on and around the height ``y``."""
        canvas.line(np.array([[x, y], [x + 13, y]]), self.colour, 3, self.dash)


@dataclass(frozen=True)
class Line(Item):
    """A curve. ``xs`` and ``ys``: equally long; a NaN makes a gap. ``ghost``: pale, of a run that is over."""

    xs: Values
    ys: Values
    role: str
    label: str = ""
    dashed: bool = False
    ghost: bool = False

    @property
    def dash(self) -> tuple[float, ...]:
        return (5, 4) if self.dashed else ()

    @property
    def end(self) -> float | None:
        return next((float(y) for y in reversed(self.ys) if math.isfinite(y)), None)

    def extent(self) -> tuple[Values, Values]:
        return self.xs, self.ys

    def draw(self, canvas, axes) -> None:
        for piece in _pieces(axes.at(*thin(array(self.xs), array(self.ys)))):
            canvas.line(piece, self.colour, 1.8, self.dash, _GHOST if self.ghost else 1)


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

    def draw(self, canvas, axes) -> None:
        there, back = _pieces(axes.at(self.xs, self.low)), _pieces(axes.at(self.xs, self.high))
        if there and back:
            canvas.area(np.concatenate([there[0], back[0][::-1]]), self.colour, 0.2)


@dataclass(frozen=True)
class Zones(Item):
    """Named stretches of one axis, behind everything else: ``names[i]`` lies between ``ends[i]`` and ``ends[i + 1]``.

    Args:
        ends: ascending.
        names: what they are called; one less than the ends.
        roles: the colour of each; ``""`` for none.
        across: of the horizontal axis; otherwise of the upright one.
    """

    ends: Values
    names: Sequence[str]
    roles: Sequence[str]
    across: bool = False
    role: str = "non-private"
    label: str = ""

    def draw(self, canvas, axes) -> None:
        edges = axes.x(self.ends) if self.across else axes.y(self.ends)
        for start, stop, name, role in zip(edges, edges[1:], self.names, self.roles):
            x, y = ([start, stop], [axes.top, axes.bottom]) if self.across else ([axes.left, axes.right], [start, stop])
            if role:
                corners = [[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]]
                canvas.area(np.array(corners), COLOURS[role], 0.11)
            at, anchor = ((start + stop) / 2, "middle") if self.across else (axes.left + 6, "start")
            canvas.text(at, axes.bottom - 6 if self.across else min(y) + 11, name, size=9.5, anchor=anchor, faint=True)


@dataclass(frozen=True)
class Field(Item):
    """A value at every place, as two colours that grow pale where it is near a half: a model's confidence.

    Args:
        xs, ys: (k,) and (m,), the grid's coordinates, ascending and evenly spaced.
        values: (m, k), each in [0, 1].
        roles: the colour at 0 and the one at 1.
    """

    xs: Values
    ys: Values
    values: np.ndarray
    roles: tuple[str, str] = ("class 0", "class 1")
    role: str = "class 0"
    label: str = ""

    def extent(self) -> tuple[Values, Values]:
        return self.xs, self.ys

    def draw(self, canvas, axes) -> None:
        ends = np.array([_rgb(COLOURS[role]) for role in self.roles], dtype=np.uint8)
        values = np.nan_to_num(np.asarray(self.values, dtype=np.float64), nan=0.5)[::-1]
        opacity = (20 + 85 * np.abs(2 * values - 1)).astype(np.uint8)
        (left, bottom), (right, top) = axes.at([self.xs[0], self.xs[-1]], [self.ys[0], self.ys[-1]])
        rgba = np.dstack([ends[(values > 0.5).astype(int)], opacity])
        canvas.image(rgba, left, top, right - left, bottom - top)


@dataclass(frozen=True)
class Pictures(Item):
    """Small images in rows, as ink of one colour: they can be seen on a light page and on a dark one.

    Args:
        images: (n, h, w); no ink at 0, full ink at 1 and beyond. A NaN is drawn as 0.
        columns: how many stand in a row. On the axes each is one unit wide and one high.
        top: the upper edge of the first row; the left edge is at 0.
    """

    images: np.ndarray
    columns: int
    top: float
    role: str
    label: str = ""

    def extent(self) -> tuple[Values, Values]:
        return [0, self.columns], [self.top - math.ceil(len(self.images) / self.columns), self.top]

    def draw(self, canvas, axes) -> None:
        n, h, w = np.shape(self.images)
        rows = math.ceil(n / self.columns)
        ink = np.zeros((rows * self.columns, h, w))
        ink[:n] = np.clip(np.nan_to_num(np.asarray(self.images)), 0, 1)
        ink = ink.reshape(rows, self.columns, h, w).swapaxes(1, 2).reshape(rows * h, self.columns * w)
        rgba = np.dstack([*(np.full(ink.shape, part) for part in _rgb(self.colour)), 255 * ink]).astype(np.uint8)
        (left, top), (right, bottom) = axes.at([0, self.columns], [self.top, self.top - rows])
        canvas.image(rgba, left, top, right - left, bottom - top)


@dataclass(frozen=True)
class Words(Item):
    """A short text at each place, with its middle there."""

    xs: Values
    ys: Values
    texts: Sequence[str]
    role: str
    label: str = ""

    def draw(self, canvas, axes) -> None:
        for (x, y), words in zip(axes.at(self.xs, self.ys), self.texts):
            if words:
                canvas.text(x, y + 4, words, size=13, anchor="middle", bold=True, colour=self.colour)


@dataclass(frozen=True)
class Points(Item):
    """Dots, or crosses: a second sign beside the colour. ``names``: a short text on each, for a few large dots.

    ``tips``: what a mouse that rests on each reads, for dots with a name.
    """

    xs: Values
    ys: Values
    role: str
    label: str = ""
    cross: bool = False
    names: Sequence[str] = ()
    ghost: bool = False
    tips: Sequence[str] = ()

    @property
    def look(self) -> tuple:
        return type(self), self.colour, self.cross

    def extent(self) -> tuple[Values, Values]:
        return self.xs, self.ys

    def draw(self, canvas, axes) -> None:
        spots = axes.at(self.xs, self.ys)
        spots = spots[np.isfinite(spots).all(axis=1)]
        size = 15 if self.names else 5 if len(spots) > 30 else 8
        if len(spots):
            (canvas.crosses if self.cross else canvas.dots)(spots, self.colour, size, _GHOST if self.ghost else 1)
        for (x, y), name in zip(spots, self.names):
            canvas.text(x, y + 3.5, name, size=10, anchor="middle", bold=True, colour="#FFFFFF")
        for (x, y), name, words in zip(spots, self.names, self.tips):
            canvas.tip(x, y, size, words, name)

    def sign(self, canvas, x: float, y: float) -> None:
        (canvas.crosses if self.cross else canvas.dots)(np.array([[x + 7, y]]), self.colour, 8)


@dataclass(frozen=True)
class Bars(Item):
    """A histogram: ``edges`` has one value more than ``heights``. ``sideways``: it stands on the upright axis."""

    edges: Values
    heights: Values
    role: str
    label: str = ""
    sideways: bool = False

    def extent(self) -> tuple[Values, Values]:
        sides = self.edges, np.append(array(self.heights), 0.0)
        return sides[::-1] if self.sideways else sides

    def draw(self, canvas, axes) -> None:
        along, up, base = (axes.y, axes.x, axes.left) if self.sideways else (axes.x, axes.y, axes.bottom)
        edges = along(self.edges)
        for left, right, top in zip(edges, edges[1:], up(self.heights)):
            if math.isfinite(top):
                corners = np.array([[left, base], [left, top], [right, top], [right, base]])
                corners = corners[:, ::-1] if self.sideways else corners
                canvas.area(corners, self.colour, 0.45)
                canvas.line(corners, self.colour, 1)


@dataclass(frozen=True)
class Mark(Item):
    """A straight line across the panel, at ``x`` (upright) or at ``y`` (level)."""

    role: str
    label: str = ""
    x: float | None = None
    y: float | None = None

    @property
    def dash(self) -> tuple[float, ...]:
        return (2, 2)

    @property
    def end(self) -> float | None:
        return self.y

    def extent(self) -> tuple[Values, Values]:
        return [] if self.x is None else [self.x], [] if self.y is None else [self.y]

    def draw(self, canvas, axes) -> None:
        if self.x is not None:
            x = axes.x([self.x])[0]
            way = [[x, axes.top], [x, axes.bottom]]
        else:
            y = axes.y([self.y])[0]
            way = [[axes.left, y], [axes.right, y]]
        if np.isfinite(way).all():
            canvas.line(np.array(way), self.colour, 1.8, self.dash)


@dataclass(frozen=True)
class Heat(Item):
    """A table of shares, a cell each: the fuller its colour the larger, and the number in percent on it.

    Args:
        xs, ys: (k,) and (m,), the cells' middles, ascending; a border lies half way between two, on the axis as drawn.
        values: (m, k), each in [0, 1]; NaN for a cell that is not known yet.
        low, high: the shares that are palest and fullest.
    """

    xs: Values
    ys: Values
    values: np.ndarray
    low: float = 0.5
    high: float = 1.0
    role: str = "private"
    label: str = ""

    def opacity(self, value: float) -> float:
        """Of a cell's colour; text in the page's own colour stays readable on the fullest."""
        return 0.02 + 0.6 * min(max((value - self.low) / (self.high - self.low), 0), 1) ** 3

    def draw(self, canvas, axes) -> None:
        columns, rows = _borders(axes.x(self.xs)), _borders(axes.y(self.ys))
        for y0, y1, row in zip(rows, rows[1:], np.asarray(self.values)):
            for x0, x1, value in zip(columns, columns[1:], row):
                if math.isfinite(value):
                    corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
                    canvas.area(np.array(corners), self.colour, round(self.opacity(value), 3))
                    canvas.text((x0 + x1) / 2, (y0 + y1) / 2 + 3, f"{100 * value:.0f}", size=9, anchor="middle")


@dataclass(frozen=True)
class Level(Mark):
    """An upright :class:`Mark` with its ``name`` at its head."""

    name: str = ""

    def draw(self, canvas, axes) -> None:
        super().draw(canvas, axes)
        canvas.text(axes.x([self.x])[0] + 3, axes.top + 10, self.name, size=9.5)


@dataclass(frozen=True)
class Arrows(Item):
    """An arrow from each of ``tails`` to each of ``tips``, (n, 2) both; ``wide`` makes them bolder.

    ``ghost``: pale, of what is no more.
    """

    tails: np.ndarray
    tips: np.ndarray
    role: str
    label: str = ""
    wide: bool = False
    ghost: bool = False

    @property
    def look(self) -> tuple:
        return type(self), self.colour, self.wide, self.ghost

    def extent(self) -> tuple[Values, Values]:
        return np.vstack([self.tails, self.tips]).T

    def draw(self, canvas, axes) -> None:
        ends = (axes.at(*np.asarray(e, dtype=np.float64).reshape(-1, 2).T) for e in (self.tails, self.tips))
        for tail, tip in zip(*ends):
            length = math.dist(tail, tip)
            if length > 0.5:  # shorter than that, it has no direction that could be seen
                along = (tip - tail) / length * min(length, 11 if self.wide else 7)
                side = np.array([-along[1], along[0]]) * 0.45
                opacity = _GHOST if self.ghost else 1
                canvas.line(np.array([tail, tip - 0.6 * along]), self.colour, 3 if self.wide else 1.4, (), opacity)
                canvas.area(np.array([tip, tip - along + side, tip - along - side]), self.colour, opacity)

    def sign(self, canvas, x: float, y: float) -> None:
        canvas.line(np.array([[x, y], [x + 9, y]]), self.colour, 3 if self.wide else 1.4)
        canvas.area(np.array([[x + 14, y], [x + 7, y - 4], [x + 7, y + 4]]), self.colour, 1)


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


def _borders(middles: np.ndarray) -> np.ndarray:
    """Half way between each two, and as far outside of the first and the last; of one alone, ten pixels off."""
    steps = np.diff(middles) / 2 if len(middles) > 1 else np.array([10.0])
    return np.append(middles - np.append(steps[:1], steps)[: len(middles)], middles[-1] + steps[-1])


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def array(values) -> np.ndarray:
    """As a flat float64 array."""
    return np.asarray(values, dtype=np.float64).ravel()


def thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _pieces(pixels: np.ndarray) -> list[np.ndarray]:
    """A curve in pixels, cut where it has a gap."""
    known = np.isfinite(pixels).all(axis=1)
    if known.all():
        return [pixels] if len(pixels) else []
    cuts = np.flatnonzero(np.diff(known.astype(int))) + 1
    return [part for part, good in zip(np.split(pixels, cuts), np.split(known, cuts)) if len(part) and good[0]]
