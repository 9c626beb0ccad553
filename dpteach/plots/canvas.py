"""Two canvases with the same strokes: SVG text, about a millisecond a panel, and a matplotlib figure.

Places are (n, 2) arrays of pixels, y downward. ``colour=None`` is the page's own.
"""

import base64
import io
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np


class SvgCanvas:
    """Strokes as SVG elements; ``"".join(canvas.out)`` is the picture."""

    def __init__(self):
        self.out: list[str] = []

    @contextmanager
    def clipped(self, left: float, top: float, width: float, height: float):
        """What is drawn meanwhile ends at this rectangle."""
        name = f"c{left:.0f}-{top:.0f}-{width:.0f}-{height:.0f}"  # the same name is the same rectangle, page-wide
        shape = f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}"/>'
        self.out.append(f'<clipPath id="{name}">{shape}</clipPath><g clip-path="url(#{name})">')
        yield
        self.out.append("</g>")

    def line(self, xy, colour=None, width=1.8, dash=(), opacity=1.0) -> None:
        """A line through these places."""
        more = f' stroke-dasharray="{" ".join(map(str, dash))}"' if dash else ""
        more += f' stroke-opacity="{opacity}"' if opacity < 1 else ""
        way = f'fill="none" stroke="{colour or "currentColor"}" stroke-width="{width}"{more}'
        self.out.append(f'<polyline points="{_filled("%.1f,%.1f ", xy)}" {way}/>')

    def area(self, xy, colour, opacity) -> None:
        """What lies inside these corners."""
        self.out.append(f'<polygon points="{_filled("%.1f,%.1f ", xy)}" fill="{colour}" fill-opacity="{opacity}"/>')

    def dots(self, xy, colour, size, opacity=1.0) -> None:
        """Round dots of this width, with a thin light edge: they may lie on a field of their own colour."""
        self._signs("M%.1f,%.1fh.01", xy, (("#FFFFFF", size + 1.6), (colour, size)), opacity)

    def crosses(self, xy, colour, size, opacity=1.0) -> None:
        """Crosses of this width."""
        arm = 0.4 * size
        shape = f"M%.1f,%.1fm-{arm:g},-{arm:g}l{2 * arm:g},{2 * arm:g}m0,-{2 * arm:g}l-{2 * arm:g},{2 * arm:g}"
        self._signs(shape, xy, (("#FFFFFF", 0.16 * size + 2.2), (colour, 0.16 * size + 0.8)), opacity)

    def _signs(self, shape: str, xy, strokes, opacity) -> None:
        path = _filled(shape, xy)
        self.out += [
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-linecap="round" stroke-width="{width:.1f}" '
            f'stroke-opacity="{opacity}"/>'
            for colour, width in strokes
        ]

    def image(self, rgba, left, top, width, height) -> None:
        """(m, k, 4) bytes, the upper row first, smoothed over this rectangle."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(rgba).save(png, "png", compress_level=1)
        data = base64.b64encode(png.getvalue()).decode()
        self.out.append(
            f'<image x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{data}"/>'
        )

    def tip(self, x, y, size, words, name) -> None:
        """What a mouse that rests on this place reads; a click there finds ``name`` as its ``data-run``."""
        self.out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size / 2 + 2:g}" fill="none" pointer-events="all" '
            f'style="cursor:pointer" data-run="{escape(name)}"><title>{escape(words)}</title></circle>'
        )

    def text(self, x, y, words, size=11, anchor="start", bold=False, turned=False, faint=False, colour=None) -> None:
        """Words on the base line ``y``."""
        place = f'transform="translate({x:.1f},{y:.1f}) rotate(-90)"' if turned else f'x="{x:.1f}" y="{y:.1f}"'
        more = f' font-size="{size}"' if size != 11 else ""
        more += f' text-anchor="{anchor}"' if anchor != "start" else ""
        more += ' font-weight="600"' * bold + ' fill-opacity=".75"' * faint + (f' fill="{colour}"' if colour else "")
        self.out.append(f"<text {place}{more}>{escape(words)}</text>")


def _filled(shape: str, rows: np.ndarray) -> str:
    """``shape`` once for every row: one call of ``%`` is three times as quick as one a row."""
    return (shape * len(rows)) % tuple(rows.ravel().tolist())


class FigureCanvas:
    """The same strokes on a matplotlib ``Axes`` that is as large as its figure, from (``left``, ``top``) on."""

    POINT = 0.72  # a hundred pixels are an inch

    def __init__(self, axes, left: float, top: float):
        self._axes, self._shift = axes, np.array([left, top])
        self._clip: Any = None

    @contextmanager
    def clipped(self, left: float, top: float, width: float, height: float):
        """What is drawn meanwhile ends at this rectangle."""
        from matplotlib.patches import Rectangle

        corner = float(self._shift[0] + left), float(self._shift[1] + top)
        self._clip = Rectangle(corner, width, height, transform=self._axes.transData)
        yield
        self._clip = None

    def _clipped(self, *artists) -> None:
        for artist in artists:
            artist.set_clip_path(self._clip) if self._clip else artist.set_clip_on(False)

    def line(self, xy, colour=None, width=1.8, dash=(), opacity=1.0) -> None:
        """A line through these places."""
        style = (0, tuple(d / width for d in dash)) if dash else "-"
        look = {"color": colour or "black", "linewidth": width * self.POINT, "linestyle": style, "alpha": opacity}
        self._clipped(*self._axes.plot(*(xy + self._shift).T, **look))

    def area(self, xy, colour, opacity) -> None:
        """What lies inside these corners."""
        self._clipped(*self._axes.fill(*(xy + self._shift).T, color=colour, alpha=opacity, linewidth=0))

    def dots(self, xy, colour, size, opacity=1.0, marker="o") -> None:
        """Round dots of this width, with a thin light edge."""
        look = {"color": colour, "markersize": size * self.POINT, "alpha": opacity, "linestyle": "none"}
        self._clipped(
            *self._axes.plot(*(xy + self._shift).T, marker, markeredgecolor="white", markeredgewidth=0.5, **look)
        )

    def crosses(self, xy, colour, size, opacity=1.0) -> None:
        """Crosses of this width."""
        self.dots(xy, colour, 1.2 * size, opacity, "X")

    def image(self, rgba, left, top, width, height) -> None:
        """(m, k, 4) bytes, the upper row first, smoothed over this rectangle."""
        left, top = self._shift + [left, top]
        extent = (left, left + width, top + height, top)
        self._clipped(self._axes.imshow(rgba, extent=extent, aspect="auto", interpolation="bilinear"))

    def tip(self, *_) -> None:
        """A still has no mouse."""

    def text(self, x, y, words, size=11, anchor="start", bold=False, turned=False, faint=False, colour=None) -> None:
        """Words on the base line ``y``."""
        look = {
            "fontsize": 0.93 * size * self.POINT,
            "ha": {"start": "left", "middle": "center", "end": "right"}[anchor],
        }
        look |= {"weight": "bold" if bold else "normal", "color": colour or ("#444444" if faint else "black")}
        place = self._shift + [x, y]
        self._axes.text(*place, words, va="baseline", rotation=90 * turned, rotation_mode="anchor", **look)
