"""Names for a screen reader, a visible focus, keys that move a slider, and one sentence when the kernel is gone.

The page's part stands in ``page.css`` and ``page.js``. The script runs from the ``onerror`` of an image without a
picture: the only way that an ``HTML`` widget of ipywidgets has, and one that needs no extension on the page.
"""

from html import escape
from importlib.resources import files

import ipywidgets as widgets

_GONE = "The kernel was restarted or has ended. Run this cell again, and the cells above it first."


_CSS, _JS = (files("dpteach.explorer").joinpath(f"page.{kind}").read_text("utf8") for kind in ("css", "js"))
_PAGE_PART = f"""<style>{_CSS}</style><p class="dpteach-gone">{_GONE}</p>
<img alt="" src="data:," style="display:none" onerror="{escape(_JS)}">"""


def accessible_box(rows: list[widgets.Widget]) -> widgets.VBox:
    """The rows in a box in which each control has a visible focus, and a name for a screen reader."""
    last = widgets.HTML(_PAGE_PART)
    last.add_class("dpteach-last")
    box = widgets.VBox([*rows, last])
    box.add_class("dpteach")
    return box


def live_region() -> widgets.HTML:
    """A place whose new words a screen reader says when it has finished its sentence."""
    place = widgets.HTML()
    place.add_class("dpteach-aloud")
    return place
