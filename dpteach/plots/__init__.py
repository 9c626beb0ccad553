"""Pictures, described once and drawn twice: as a live SVG string and as a matplotlib still.

A :class:`Panel` says what a picture shows, with a sentence for those who can't see it. :func:`svg` draws it in about a
millisecond, for ten frames a second; :func:`still` draws the same for the saved notebook. A colour means the same
everywhere: see :data:`COLOURS`.

A new kind of item is one class in ``items``, which draws itself on either canvas.
"""

import inspect
import textwrap

from dpteach.plots.items import (
    COLOURS,
    Arrows,
    Band,
    Bars,
    Field,
    Heat,
    Item,
    Level,
    Line,
    Mark,
    Pictures,
    Points,
    Words,
    Zones,
    contour,
)
from dpteach.plots.painters import still, svg
from dpteach.plots.panel import Panel, alt_text, short

__all__ = ["COLOURS", "Arrows", "Band", "Bars", "Field", "Heat", "Item", "Level", "Line", "Mark", "Panel"]
__all__ += ["Pictures", "Points", "Words", "Zones"]
__all__ += ["alt_text", "contour", "short", "source", "still", "svg"]


class Source(str):
    """Python code that a notebook shows with its colours."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def source(function) -> Source:
    """The source code of a function of the package, for a notebook to show: nothing is copied that could drift."""
    return Source(textwrap.dedent(inspect.getsource(function)).strip())
