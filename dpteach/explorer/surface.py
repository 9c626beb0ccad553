"""The surface: accuracy over σ × C, each cell trained with several seeds, all of them as one stack while you look."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from dpteach.accounting import epsilon, noise_multiplier_for
from dpteach.data import Data
from dpteach.explorer.accessibility import accessible_box
from dpteach.explorer.controls import RANGES, Range, Slider, button, in_a_row, number_text, two_columns
from dpteach.explorer.live import LivePicture
from dpteach.explorer.thread import Job
from dpteach.explorer.training import class_count
from dpteach.plots import Band, Heat, Level, Line, Panel, Points, short, svg
from dpteach.stack import train_many
from dpteach.training import Settings

_FRAME = 0.15  # seconds between two frames
_CROSS = ("noise_multiplier", "max_grad_norm")  # these two sliders move it; the others train anew
_LEVELS = (1, 3, 8)  # of ε


class SurfaceExplorer(LivePicture):
    """Test accuracy over σ × C; a moved slider of epochs, learning rate or batch size trains every cell again.

    The sliders of σ and C move a cross. ``surface.settings``, the cell below it, can go into an :class:`Explorer`.
    Showing the surface, or taking its best cell, spends more than the ε that stands there: that is the ε of one run,
    and the cells of one seed share their noise.

    Args:
        data: the private records.
        make_model: makes a run's model from its settings, as for :func:`dpteach.train_many`.
        settings: where the sliders start; its ``seed`` is the first of the seeds.
        test_data: records for the accuracy.
        noise_multipliers, max_grad_norms: the columns and the rows, ascending.
        seeds: runs a cell.
        shared_batches: as for :func:`dpteach.train_many`; for images.

    Attributes:
        controls: the slider widgets by setting name.
        accuracies: ``(rows, columns, seeds)``; NaN where none is known yet.
        epsilons: ``(columns,)``, of the whole run, by RDP.
    """

    def __init__(
        self,
        data: Data,
        make_model: Callable[[Settings], nn.Module],
        settings: Settings,
        *,
        test_data: Data,
        noise_multipliers: Sequence[float],
        max_grad_norms: Sequence[float],
        seeds: int = 3,
        shared_batches: bool = False,
    ):
        self._data, self._make_model, self._test, self._shared = data, make_model, test_data, shared_batches
        self._start_settings = settings
        self.sigmas, self.norms = np.array(noise_multipliers, float), np.array(max_grad_norms, float)
        self._seeds = [(settings.seed or 0) + k for k in range(seeds)]
        self.accuracies: np.ndarray = np.full((len(self.norms), len(self.sigmas), seeds), np.nan)
        self.epsilons, self._levels = np.full(len(self.sigmas), np.nan), dict[int, float]()
        self._trained: Any = None
        limits = {
            **RANGES,
            "noise_multiplier": Range(self.sigmas[0], self.sigmas[-1], log=True),
            "max_grad_norm": Range(self.norms[0], self.norms[-1], log=True),
            "batch_size": Range(1, len(data), log=True, whole=True),
        }
        names = (*_CROSS, "epochs", "lr", "batch_size")
        super().__init__(
            {name: Slider(name, getattr(settings, name), limits[name]) for name in names}, "dpteach-surface", alone=True
        )
        start = button("Start", "play", "Train every cell again", self.start)
        stop = button("Stop", "stop", "Stop training", lambda: self._halt("Stopped. Press Start to train again."))
        left = [*self.controls.values(), in_a_row(start, stop)]
        self.widget = accessible_box([two_columns(left, [self._status_line, self._picture]), self._spoken])
        self._picture.value = svg(self._panels())  # empty, but there: another explorer may stop the first training
        self.start()

    def start(self) -> None:
        """Train every cell from the beginning."""
        self._trained = None
        self._thread.request(force=True)

    @property
    def settings(self) -> Settings:
        """Those of the cell below the cross, with the first seed."""
        values = self.values
        row, column = self._cell()
        values |= {"noise_multiplier": float(self.sigmas[column]), "max_grad_norm": float(self.norms[row])}
        return dataclasses.replace(self._start_settings, **values)

    def expected(self, settings: Settings) -> float | None:
        """The mean accuracy of the cell nearest to these settings; None where the surface has trained no such cell."""
        given = {name: getattr(settings, name) for name in self.controls}
        if self._trained != {name: value for name, value in given.items() if name not in _CROSS}:
            return None
        (left, right), (low, high) = _ends(self.sigmas), _ends(self.norms)
        if not (left <= settings.noise_multiplier <= right and low <= settings.max_grad_norm <= high):
            return None
        return float(self.accuracies.mean(2)[self._cell(given)])

    @property
    def cloud(self) -> Points:
        """Every run of the surface, to lie behind other runs: accuracy by ε (RDP)."""
        every = np.broadcast_to(self.epsilons[None, :, None], self.accuracies.shape)
        return Points(every.ravel(), self.accuracies.ravel(), "non-private", "every run", ghost=True)

    def best(self) -> list[tuple[float, Settings, float, float]]:
        """By column: ε, the settings of its best cell, and the mean and the standard deviation of its accuracies."""
        means, sds = self.accuracies.mean(2), self._sds()
        rows = np.nan_to_num(means).argmax(0)
        found = []
        for k, row in enumerate(rows):
            sigma, C = float(self.sigmas[k]), float(self.norms[row])
            settings = dataclasses.replace(self.settings, noise_multiplier=sigma, max_grad_norm=C)
            found.append((float(self.epsilons[k]), settings, float(means[row, k]), float(sds[row, k])))
        return found

    def summary(self) -> str:
        """What the best cell of each ε reaches, and the cell below the cross."""
        return self.error and self.status or f"{self._here()} {self._front_panel().alt}"

    def _here(self) -> str:
        row, column = self._cell()
        mean, sd = self.accuracies.mean(2)[row, column], self._sds()[row, column]
        at = f"σ = {number_text(self.sigmas[column])}, C = {number_text(self.norms[row])}"
        cost = f"ε ≤ {short(float(self.epsilons[column]))} for one run"
        return f"The cell below the cross, {at}: {100 * mean:.0f} ± {100 * sd:.0f} %; {cost}."

    def _cell(self, values: dict[str, Any] | None = None) -> tuple[int, int]:
        """The row and the column below the cross, or of other values."""
        C, sigma = ((values or self.values)[name] for name in ("max_grad_norm", "noise_multiplier"))
        return int(np.abs(np.log(self.norms / C)).argmin()), int(np.abs(np.log(self.sigmas / sigma)).argmin())

    def _sds(self) -> np.ndarray:
        seeds = self.accuracies.shape[2]
        return self.accuracies.std(2, ddof=1) if seeds > 1 else np.zeros(self.accuracies.shape[:2])

    def _work(self, job: Job) -> None:
        plan = {name: value for name, value in job.values.items() if name not in _CROSS}
        if plan != self._trained:
            if not job.comes_to_rest() or not self._train(job, dataclasses.replace(self._start_settings, **plan)):
                return
            self._trained = plan
        self._show(job, svg(self._panels()), self._here())

    def _train(self, job: Job, base: Settings) -> bool:
        """Train every cell; False where the job is over before."""
        n = len(self._data)
        of: dict[str, Any] = {"sample_rate": base.sample_rate(n), "steps": base.epochs * base.steps_per_epoch(n)}
        of |= {"target_delta": base.target_delta, "accountant": "rdp"}
        epsilons = np.array([epsilon(noise_multiplier=s, **of) for s in self.sigmas])
        inside = [e for e in _LEVELS if epsilons[-1] < e < epsilons[0]]
        levels = {e: noise_multiplier_for(target_epsilon=e, **of) for e in inside}
        cells = [
            dataclasses.replace(base, noise_multiplier=float(s), max_grad_norm=float(c), seed=seed)
            for c, s, seed in itertools.product(self.norms, self.sigmas, self._seeds)
        ]
        stack = train_many(self._make_model, self._data, cells, shared_batches=self._shared, test_data=self._test)
        next_frame = 0.0
        for step in stack:
            if job.over:
                return False
            if step.accuracies is not None and (step.step == step.steps or time.perf_counter() > next_frame):
                self.accuracies = step.accuracies.reshape(self.accuracies.shape)
                self.epsilons, self._levels = epsilons, levels
                words = f"Training {len(cells)} runs: epoch {step.epoch} of {base.epochs}"
                self._show(job, svg(self._panels()), words, progress=True)
                next_frame = time.perf_counter() + _FRAME
        return True

    def _panels(self) -> list[Panel]:
        return [self._surface_panel(), self._front_panel()]

    def _surface_panel(self) -> Panel:
        means = self.accuracies.mean(2)
        values, best = self.values, self.best()
        items: list[Any] = [Heat(self.sigmas, self.norms, means, 1 / class_count(self._data), 1)]
        items += [Level("budget", x=sigma, name=f"ε {e}") for e, sigma in self._levels.items()]
        known = [settings for _, settings, mean, _ in best if np.isfinite(mean)]
        below = (self.norms[1] / self.norms[0]) ** 0.33  # the number of the cell stays readable
        xs, ys = [s.noise_multiplier for s in known], [s.max_grad_norm / below for s in known]
        items.append(Points(xs, ys, "budget", "best C of each ε"))
        items.append(Points([values["noise_multiplier"]], [values["max_grad_norm"]], "attacker", "sliders", cross=True))
        rows = (
            f"C = {number_text(norm)}: {', '.join('–' if np.isnan(v) else f'{100 * v:.0f}' for v in row)}"
            for norm, row in zip(self.norms, means)
        )
        alt = f"Mean test accuracy of {len(self._seeds)} seeds in percent, by σ = "
        alt += f"{', '.join(map(number_text, self.sigmas))}. {'; '.join(rows)}."
        (left, right), (low, high) = _ends(self.sigmas), _ends(self.norms)
        words = "Test accuracy in %, mean over seeds", "noise multiplier σ", "clipping norm C"
        return Panel(*words, items, alt, (left, right), (low, high * 1.25), x_log=True, y_log=True)

    def _front_panel(self) -> Panel:
        """What each ε can buy: the best cell of each column, and every run behind it."""
        best = [(e, mean, sd) for e, _, mean, sd in self.best() if np.isfinite(mean)]
        es, means, sds = np.array(best).reshape(-1, 3).T
        every = np.broadcast_to(self.epsilons[None, :, None], self.accuracies.shape)
        row, column = self._cell()
        here = Points(every[row, column], self.accuracies[row, column], "attacker", "sliders", cross=True)
        items = [
            self.cloud,
            Band(es, means - sds, means + sds, "budget"),
            Line(es, means, "budget", "best C, ± one sd"),
            here,
        ]
        told = "; ".join(f"ε {short(e)}: {100 * m:.0f} ± {100 * s:.0f}" for e, m, s in best)
        alt = f"Test accuracy in percent of the best C by ε of one run, ± one sd over seeds: {told or 'none yet'}."
        words = "What an ε buys", "ε of one run (RDP bound)", "test accuracy"
        return Panel(*words, items, alt, None, (1 / class_count(self._data), 1), x_log=True)


def _ends(middles: np.ndarray) -> tuple[float, float]:
    """The outer borders of cells on a logarithmic axis."""
    half = (middles[1] / middles[0]) ** 0.5
    return float(middles[0] / half), float(middles[-1] * half)
