"""Sliders over real training.

An :class:`Explorer` trains in one background thread and draws at most ten frames a second; moving a slider starts the
training again with the new setting. A :class:`Viewer` does the same for a picture that is computed, not trained.

How a slider is wired: an explorer makes a :class:`~dpteach.explorer.controls.Slider`; ``live.LivePicture`` has it ask
the ``thread.WorkerThread``; that calls the explorer's ``_work`` with the newest values.

Why a thread: a loop inside the cell never hears the sliders, and an event loop stands still while another cell runs.
Why SVG text in an ``HTML`` widget: a frame costs about a millisecond, follows the page's theme, and needs no JavaScript
of our own, so it works wherever ipywidgets 7.7 or 8 does. (A few lines of script name the sliders for a screen reader;
where a page refuses them, all else works.)
"""

from dpteach.explorer.controls import RANGES, Range
from dpteach.explorer.explorer import Explorer
from dpteach.explorer.federated import FederatedExplorer
from dpteach.explorer.live import Viewer
from dpteach.explorer.playground import Playground
from dpteach.explorer.prediction import Prediction, predictions
from dpteach.explorer.scenes import Scene, scenes
from dpteach.explorer.surface import SurfaceExplorer
from dpteach.explorer.training import Kept, Run

__all__ = ["RANGES", "Explorer", "FederatedExplorer", "Kept", "Playground", "Range", "Run", "Scene", "SurfaceExplorer"]
__all__ += ["Prediction", "Viewer", "predictions", "scenes"]
