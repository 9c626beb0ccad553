"""An explorer with a choice of data, method and optimizer, and runs kept for comparison."""

import ipywidgets as widgets

from dpteach.explorer.accessibility import accessible_box
from dpteach.explorer.controls import close_tree, in_a_row, menu
from dpteach.explorer.explorer import Explorer
from dpteach.explorer.live import show_widget
from dpteach.explorer.scenes import Scene
from dpteach.training import OPTIMIZERS

_METHODS = [("DP-SGD from the four moves", "dpsgd"), ("DP-SGD by Opacus", "opacus")]


class Playground:
    """An :class:`Explorer` with every slider, and a choice of data, method and optimizer.

    The runs on the same data stay as dots, whatever the method; a slider that was moved stays where it is.

    Args:
        scenes: what to choose from, by the name that the menu shows.

    Attributes:
        explorer: the :class:`Explorer` that is open now.

    Raises:
        ValueError: if there is no scene.
    """

    def __init__(self, scenes: dict[str, Scene]):
        if not scenes:
            raise ValueError("scenes must hold at least one scene, got none")
        self._scenes = scenes
        self.menus = {
            "scene": menu("data and model", list(scenes)),
            "method": menu("method", _METHODS),
            "optimizer": menu("optimizer", list(OPTIMIZERS)),
        }
        self._place, menus = widgets.VBox(), in_a_row(*self.menus.values())
        menus.add_class("dpteach-menus")
        self.widget = accessible_box([menus, self._place])
        self.explorer: Explorer
        for choice in self.menus.values():
            choice.observe(lambda _: self._open(), "value")
        self._scene: Scene | None = None
        self._memories: dict[int, tuple] = {}  # by scene: what was kept, and what was tried
        self._open()

    def _open(self) -> None:
        scene, moved = self._scenes[self.menus["scene"].value], {}
        if self._scene is not None:  # what was moved stays where it is, the others begin as the scene says
            start = self._scene.settings
            moved = {name: value for name, value in self.explorer.values.items() if value != getattr(start, name)}
            self._memories[id(self._scene)] = self.explorer.memory
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
        if id(scene) in self._memories:
            self.explorer.go_on_from(self._memories[id(scene)])
        for name, value in moved.items():
            self.explorer.controls[name].value = min(value, len(scene.data)) if name == "batch_size" else value
        shown, self._place.children = self._place.children, [self.explorer.widget]
        for widget in shown:
            close_tree(widget)

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`Explorer.wait`."""
        self.explorer.wait(timeout)

    def _ipython_display_(self) -> None:
        show_widget(
            self.widget, "Playground with a choice of data, method and optimizer, and a slider for every setting"
        )
