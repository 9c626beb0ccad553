"""An explorer with a choice of data, method and optimizer, and runs kept for comparison."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets as widgets
from torch import nn

from dpteach.data import Data
from dpteach.explorer.live import control_style, figure, for_everybody, in_a_row, put_away, read_aloud, show_widget
from dpteach.explorer.training import Explorer, last_accuracy
from dpteach.plots import Mark, Panel, Points, alt_text, still, svg
from dpteach.training import OPTIMIZERS, Settings


@dataclass(frozen=True)
class Scene:
    """Something to train on: the arguments of an :class:`Explorer`. ``baseline_lr``: a good one without privacy."""

    data: Data
    make_model: Callable[[], nn.Module]
    settings: Settings
    test_data: Data
    baseline_lr: float | None = None


@dataclass(frozen=True)
class Pin:
    """A run that was kept for comparison: what it was, what it cost and what it reached."""

    scene: str
    method: str
    optimizer: str
    settings: Settings
    epsilon: float
    accuracy: float
    accuracy_without_privacy: float


class Playground:
    """An :class:`Explorer` with every slider, a choice of data, method and optimizer, and runs kept for comparison.

    Args:
        scenes: what to choose from, by the name that the menu shows.

    Attributes:
        explorer: the explorer that is open now.
        pinned: the runs that were kept, as :class:`Pin`.

    Raises:
        ValueError: if there is no scene.
    """

    def __init__(self, scenes: dict[str, Scene]):
        if not scenes:
            raise ValueError("scenes must hold at least one scene, got none")
        self._scenes = scenes
        self.pinned: list[Pin] = []

        def menu(words, options):
            return widgets.Dropdown(options=options, description=words, **control_style())

        self.menus = {
            "scene": menu("data and model", list(scenes)),
            "method": menu("method", [("DP-SGD from the four moves", "dpsgd"), ("DP-SGD by Opacus", "opacus")]),
            "optimizer": menu("optimizer", list(OPTIMIZERS)),
        }
        pin = widgets.Button(description="Pin this run", icon="thumb-tack", tooltip="Keep the run's ε and accuracy")
        clear = widgets.Button(description="Unpin all", icon="trash", tooltip="Forget the runs that were kept")
        pin.on_click(lambda _: self.pin())
        clear.on_click(lambda _: self._unpin())
        self._note, self._kept, self._place = read_aloud(widgets.HTML()), widgets.HTML(), widgets.VBox()
        self._box = for_everybody([*self.menus.values(), self._place, in_a_row(pin, clear, self._note), self._kept])
        for choice_ in self.menus.values():
            choice_.observe(lambda _: self._open(), "value")
        self._scene: Scene | None = None
        self._open()

    def _kept_settings(self) -> Settings:
        """Where the sliders start: those that were moved stay where they are, the others begin as the scene says."""
        scene = self._scenes[self.menus["scene"].value]
        if self._scene is None:
            return scene.settings
        start = self._scene.settings
        moved = {name: value for name, value in self.explorer.values.items() if value != getattr(start, name)}
        if "batch_size" in moved:
            moved["batch_size"] = min(moved["batch_size"], len(scene.data))
        return dataclasses.replace(scene.settings, **moved)

    def _open(self) -> None:
        scene, settings = self._scenes[self.menus["scene"].value], self._kept_settings()
        self._scene = scene
        self.explorer = Explorer(
            scene.data,
            scene.make_model,
            settings,
            test_data=scene.test_data,
            method=self.menus["method"].value,
            optimizer=self.menus["optimizer"].value,
            baseline_lr=scene.baseline_lr or scene.settings.lr,
            sliders=("noise_multiplier", "max_grad_norm", "epochs", "lr", "batch_size", "target_delta"),
        )
        before, self._place.children = self._place.children, [self.explorer._box]
        for box in before:
            put_away(box)

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`Explorer.wait`."""
        self.explorer.wait(timeout)

    def pin(self) -> None:
        """Keep the run that has just finished; where there is none, a sentence beside the button says why."""
        self._note.value = self._try_to_pin()
        self._draw()

    def _try_to_pin(self) -> str:
        run = self.explorer._run
        accuracy, without = last_accuracy(run.steps), last_accuracy(run.baseline)
        if self.explorer._thread is not None:
            return "Nothing to pin yet: wait until the run has finished."
        if not run.complete or run.exact is None or accuracy is None or without is None:
            return "Nothing to pin: this run did not finish. Press Start to train again."
        scene, method, optimizer = (menu.value for menu in self.menus.values())
        pin = Pin(scene, method, optimizer, run.settings, run.exact, accuracy, without)
        if pin in self.pinned:
            return f"This run is pinned already: it is run {self.pinned.index(pin) + 1}."
        self.pinned.append(pin)
        return f"Run {len(self.pinned)} is pinned."

    def _unpin(self) -> None:
        self.pinned.clear()
        self._note.value = "No run is pinned."
        self._draw()

    def _draw(self) -> None:
        rows = "".join(
            f"<tr><td>{i}</td><td>{escape(p.scene)}</td><td>{p.method}, {p.optimizer}</td>"
            f"<td>{figure(p.settings.noise_multiplier)}</td>"
            f"<td>{figure(p.settings.max_grad_norm)}</td><td>{p.settings.epochs}</td><td>{figure(p.settings.lr)}</td>"
            f"<td>{p.settings.batch_size}</td><td>{p.epsilon:.2f}</td><td>{p.accuracy:.1%}</td>"
            f"<td>{p.accuracy_without_privacy:.1%}</td></tr>"
            for i, p in enumerate(self.pinned, start=1)
        )
        heads = "".join(
            f"<th>{h}</th>"
            for h in (
                "run",
                "data and model",
                "method",
                "σ",
                "C",
                "epochs",
                "learning rate",
                "batch",
                "ε (PRV)",
                "accuracy",
                "without privacy",
            )
        )
        table = f'<table style="line-height:1.3;border-spacing:8px 2px"><tr>{heads}</tr>{rows}</table>'
        self._kept.value = f'{svg(self._panels())}<div style="overflow-x:auto">{table}</div>' if self.pinned else ""

    def _panels(self) -> list[Panel]:
        # Accuracies on different data cannot be compared: the picture shows the data of the last pin, the table all.
        scene = self.pinned[-1].scene if self.pinned else ""
        pins = [p for p in self.pinned if p.scene == scene and math.isfinite(p.epsilon)]
        items: list[Any] = [Points([p.epsilon for p in pins], [p.accuracy for p in pins], "private", "with privacy")]
        references = [p.accuracy_without_privacy for p in pins]  # runs of other epochs or batches have other ones
        told = "; ".join(f"ε {p.epsilon:.2f}: {p.accuracy:.0%}" for p in pins)
        if len(set(references)) == 1:
            items.append(Mark("non-private", "without privacy", y=references[0]))
            told += f"; without privacy {references[0]:.0%}"
        elif pins:
            items.append(Points([p.epsilon for p in pins], references, "non-private", "without privacy", cross=True))
            told += f"; without privacy {', '.join(f'{r:.0%}' for r in references)}"
        # Always up to 100 %, and not less than a tenth high: a difference of chance must not look like a result.
        lowest = min((min(p.accuracy, p.accuracy_without_privacy) for p in pins), default=0.9)
        return [
            Panel(
                f"Pinned runs: {scene}",
                "ε of the whole run",
                "test accuracy",
                items,
                f"Test accuracy of the pinned runs on {scene}, by ε. {told}." if told else "No run is pinned.",
                x_log=True,
                y_range=(math.floor(10 * (lowest - 0.02)) / 10, 1.01),
            )
        ]

    def still(self):
        """The pinned runs as a matplotlib figure, ε across and accuracy upward."""
        return still(self._panels())

    def summary(self) -> str:
        """The pinned runs in words."""
        return alt_text(self._panels())

    def _ipython_display_(self) -> None:
        show_widget(self._box, "Playground with a choice of data, method and optimizer, and a slider for every setting")
