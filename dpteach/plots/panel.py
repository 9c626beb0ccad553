"""One pair of axes: what is drawn on it, where it begins and ends, and its ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpteach.plots.items import Item, array


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn on it.

    Args:
        title, x_label, y_label: in words, with the unit.
        items: :class:`Line`, :class:`Points`, :class:`Field` and so on, drawn in this order.
        alt: a sentence that says what the picture shows, with its figures.
        x_range, y_range: (low, high); from the items if not given.
        x_log, y_log: draw on a logarithmic axis; values that are not positive are left out.
        bare: without axes, for :class:`Pictures`.

    Raises:
        ValueError: if two items with a label look the same: the same sign in the same colour.
    """

    title: str
    x_label: str
    y_label: str
    items: Sequence[Item]
    alt: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_log: bool = False
    y_log: bool = False
    bare: bool = False

    def __post_init__(self):
        seen: dict[tuple, str] = {}
        for item in self.items:
            if item.label and seen.setdefault(item.look, item.label) != item.label:
                raise ValueError(
                    f"items must look different, got {seen[item.look]!r} and {item.label!r} as the same sign in the "
                    f"same colour in {self.title!r}; give one another role, or dashed=True, or cross=True"
                )

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of both axes: as given, or around every finite value of the items."""
        extents = [item.extent() for item in self.items]
        return (
            self.x_range or _span([xs for xs, _ in extents], self.x_log, 0.0),
            self.y_range or _span([ys for _, ys in extents], self.y_log, 0.05),
        )


def alt_text(panels: Sequence[Panel]) -> str:
    """The panels' sentences, one after the other."""
    return " ".join(panel.alt for panel in panels)


def _span(parts: list, log: bool, margin: float) -> tuple[float, float]:
    values = np.concatenate([np.zeros(0), *map(array, parts)])
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if len(values) == 0:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        return (low / 1.15, high * 1.15)
    if low == high:
        return (low - 0.5, high + 0.5)
    pad = (high - low) * margin
    return (low - (pad if low != 0 else 0.0), high + pad)


def ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``: about ``most``, and on a logarithmic axis at least two."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, (last - first) // most)
        values = [10.0**e for e in range(first, last + 1, stride)]
        if sum(low <= t <= high for t in values) < 2:
            values = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        if sum(low <= t <= high for t in values) < 2:
            return ticks(low, high, False, most)
        return [t for t in values if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short: "0.3", "1.5e5"."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def short(value: float) -> str:
    """Three digits at most: "0.716", "14.1", "7,900", "∞"."""
    if math.isinf(value):
        return "∞"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        return tick_text(float(f"{value:.2g}"))
    value = float(f"{value:.3g}")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"
