"""Sliders over real training.

An :class:`Explorer` trains in one background thread and draws at most ten frames a second; moving a slider starts the
training again with the new setting. A :class:`Viewer` does the same for a picture that is computed, not trained.

Why a thread: a loop inside the cell never hears the sliders, and an event loop stands still while another cell runs.
Why SVG text in an ``HTML`` widget: a frame costs about a millisecond, follows the page's theme, and needs no JavaScript
of our own, so it works wherever ipywidgets 7.7 or 8 does. (A few lines of script name the sliders for a screen reader;
where a page refuses them, all else works.)
"""

from dpteach.explorer.federated import FederatedExplorer
from dpteach.explorer.live import RANGES, Range, Viewer
from dpteach.explorer.playground import Pin, Playground, Scene
from dpteach.explorer.training import Explorer

__all__ = ["RANGES", "Explorer", "FederatedExplorer", "Pin", "Playground", "Range", "Scene", "Viewer"]
