"""An explorer with a choice of data, method and optimizer, and runs kept for comparison."""

import math
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets

from dpteach.explorer.accessibility import accessible_box, live_region
from dpteach.explorer.controls import button, close_tree, in_a_row, menu, number_text
from dpteach.explorer.explorer import Explorer
from dpteach.explorer.live import show_widget
from dpteach.explorer.scenes import Scene
from dpteach.plots import Item, Mark, Panel, Points, alt_text, still, svg
from dpteach.training import OPTIMIZERS, Settings

_METHODS = [("DP-SGD from the four moves", "dpsgd"), ("DP-SGD by Opacus", "opacus")]
_COLUMNS = {
    "data and model": lambda pin: escape(pin.scene),
    "method": lambda pin: f"{pin.method}, {pin.optimizer}",
    "σ": lambda pin: number_text(pin.settings.noise_multiplier),
    "C": lambda pin: number_text(pin.settings.max_grad_norm),
    "epochs": lambda pin: pin.settings.epochs,
    "learning rate": lambda pin: number_text(pin.settings.lr),
    "batch": lambda pin: pin.settings.batch_size,
    "ε (PRV)": lambda pin: f"{pin.epsilon:.2f}",
    "accuracy": lambda pin: f"{pin.accuracy:.1%}",
    "without privacy": lambda pin: f"{pin.accuracy_without_privacy:.1%}",
}


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
        self.menus = {
            "scene": menu("data and model", list(scenes)),
            "method": menu("method", _METHODS),
            "optimizer": menu("optimizer", list(OPTIMIZERS)),
        }
        pin = button("Pin this run", "thumb-tack", "Keep the run's ε and accuracy", self.pin)
        clear = button("Unpin all", "trash", "Forget the runs that were kept", self._unpin)
        self._note, self._kept, self._place = live_region(), widgets.HTML(), widgets.VBox()
        menus = in_a_row(*self.menus.values())
        menus.add_class("dpteach-menus")
        rows = [menus, self._place, in_a_row(pin, clear, self._note), self._kept]
        self.widget = accessible_box(rows)
        for choice in self.menus.values():
            choice.observe(lambda _: self._open(), "value")
        self._scene: Scene | None = None
        self._open()

    def _open(self) -> None:
        scene, moved = self._scenes[self.menus["scene"].value], {}
        if self._scene is not None:  # what was moved stays where it is, the others begin as the scene says
            start = self._scene.settings
            moved = {name: value for name, value in self.explorer.values.items() if value != getattr(start, name)}
        self._scene = scene
        self.explorer = Explorer(
            scene.data,
            scene.make_model,
            scene.settings,
            test_data=scene.test_data,
            method=self.menus["method"].value,
            optimizer=self.menus["optimizer"].value,
            baseline_lr=scene.baseline_lr or scene.settings.lr,
            challenge=scene.challenge,
            sliders=("noise_multiplier", "max_grad_norm", "epochs", "lr", "batch_size", "target_delta"),
        )
        for name, value in moved.items():
            self.explorer.controls[name].value = min(value, len(scene.data)) if name == "batch_size" else value
        before, self._place.children = self._place.children, [self.explorer.widget]
        for widget in before:
            close_tree(widget)

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`Explorer.wait`."""
        self.explorer.wait(timeout)

    def pin(self) -> None:
        """Keep the run that has just finished; where there is none, a sentence beside the button says why."""
        self._note.value = self._try_to_pin()
        self._draw()

    def _try_to_pin(self) -> str:
        run = self.explorer.run
        accuracy, without = run.accuracy, run.baseline.accuracy if run.baseline else None
        if self.explorer.busy:
            return "Nothing to pin yet: wait until the run has finished."
        if not run.complete or run.exact is None or accuracy is None or without is None:
            return "Nothing to pin: this run did not finish. Press Start to train again."
        scene, method, optimizer = (choice.value for choice in self.menus.values())
        pin = Pin(scene, method, optimizer, run.settings, max(run.exact.values()), accuracy, without)
        if pin in self.pinned:
            return f"This run is pinned already: it is run {self.pinned.index(pin) + 1}."
        self.pinned.append(pin)
        return f"Run {len(self.pinned)} is pinned."

    def _unpin(self) -> None:
        self.pinned.clear()
        self._note.value = "No run is pinned."
        self._draw()

    def _draw(self) -> None:
        rows = [[i, *(cell(pin) for cell in _COLUMNS.values())] for i, pin in enumerate(self.pinned, start=1)]
        heads = "".join(f"<th>{head}</th>" for head in ("run", *_COLUMNS))
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        table = f'<table style="line-height:1.3;border-spacing:8px 2px"><tr>{heads}</tr>{body}</table>'
        self._kept.value = f'{svg(self._panels())}<div style="overflow-x:auto">{table}</div>' if self.pinned else ""

    def _panels(self) -> list[Panel]:
        # Accuracies on different data cannot be compared: the picture shows the data of the last pin, the table all.
        scene = self.pinned[-1].scene if self.pinned else ""
        pins = [pin for pin in self.pinned if pin.scene == scene and math.isfinite(pin.epsilon)]
        epsilons, reached = [pin.epsilon for pin in pins], [pin.accuracy for pin in pins]
        references = [pin.accuracy_without_privacy for pin in pins]  # runs of other epochs or batches have other ones
        items: list[Item] = [Points(epsilons, reached, "private", "with privacy")]
        results = "; ".join(f"ε {epsilon:.2f}: {accuracy:.0%}" for epsilon, accuracy in zip(epsilons, reached))
        if len(set(references)) == 1:
            items.append(Mark("non-private", "without privacy", y=references[0]))
            results += f"; without privacy {references[0]:.0%}"
        elif pins:
            items.append(Points(epsilons, references, "non-private", "without privacy", cross=True))
            results += f"; without privacy {', '.join(f'{r:.0%}' for r in references)}"
        # Always up to 100 %, and not less than a tenth high: a difference of chance must not look like a result.
        y_range = (math.floor(10 * (min([*reached, *references], default=0.9) - 0.02)) / 10, 1.01)
        alt = f"Test accuracy of the pinned runs on {scene}, by ε. {results}." if results else "No run is pinned."
        title, x_label = f"Pinned runs: {scene}", "ε of the whole run"
        return [Panel(title, x_label, "test accuracy", items, alt, x_log=True, y_range=y_range)]

    def still(self):
        """The pinned runs as a matplotlib figure, ε across and accuracy upward."""
        return still(self._panels(), self.summary())

    def summary(self) -> str:
        """The pinned runs in words."""
        return alt_text(self._panels())

    def _ipython_display_(self) -> None:
        show_widget(
            self.widget, "Playground with a choice of data, method and optimizer, and a slider for every setting"
        )
