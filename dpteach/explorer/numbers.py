"""The three big numbers over the pictures: accuracy, ε, and odds that a reader can picture."""

import functools
import math
from html import escape
from typing import Any

import numpy as np

from dpteach.accounting import epsilon
from dpteach.plots import COLOURS, short

_DELTAS = (1e-5, *np.linspace(0.02, 0.9, 12))  # at which the curve of (ε, δ) is asked
BANDS = {1.0: "strong", 10.0: "some", math.inf: "practically no guarantee"}


def band(epsilon: float) -> str:
    """What an ε is worth, in words."""
    words = next(words for end, words in BANDS.items() if epsilon <= end)
    return words if "guarantee" in words else f"{words} guarantee"


@functools.lru_cache(maxsize=256)
def most_believed(*, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """How often an attacker can be right, at most, who sees the model and knows all but whether one record took part.

    It bounds the mean of p, how often they are right about those who took part, and r, about those who did not.

    Args:
        noise_multiplier, sample_rate, steps: as for :func:`dpteach.accounting.epsilon`.

    Returns:
        In [0.5, 1]; a bound. (ε, δ)-DP says p ≤ e^ε·(1 − r) + δ and r ≤ e^ε·(1 − p) + δ: added, (p + r) / 2 is at most
        (e^ε + δ) / (e^ε + 1). A run is (ε, δ)-DP for many pairs, by RDP, and the smallest of their bounds holds.

    Source: Kairouz et al. 2015, Theorem 2.1 (the two inequalities).
    """
    if noise_multiplier == 0:
        return 1.0
    run: dict[str, Any] = {
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "accountant": "rdp",
    }
    inverse = [(math.exp(-epsilon(**run, target_delta=float(delta))), delta) for delta in _DELTAS]
    return min(float((1 + delta * e) / (1 + e)) for e, delta in inverse)


def right_of_100(most: float) -> int:
    """:func:`most_believed`, of a hundred guesses, rounded up."""
    return min(100, math.ceil(100 * most - 1e-9))


def odds_in_words(most: float) -> str:
    """The odds as a sentence. "At most" holds for every attacker: one who always says "in" is right 50 times."""
    return (
        "If a coin decided whether you take part, an attacker who sees the model guesses right "
        f"at most {right_of_100(most)} of 100 times."
    )


def dots(most: float) -> str:
    """A hundred guesses, ten a line; those that are right have the attacker's colour."""
    right = right_of_100(most)
    signs = [f'<b style="color:{COLOURS["attacker"]}">●</b>' if k < right else "○" for k in range(100)]
    lines = "<br>".join("".join(signs[k : k + 10]) for k in range(0, 100, 10))
    words = f"{right} of 100 guesses right at most (●); who only guesses is right in 50."
    return f'<div style="line-height:1.1;letter-spacing:3px" aria-hidden="true">{lines}</div>{words}'


def tile(name: str, number: str, words: str, before: str) -> str:
    """A big number with its name and what it means. ``before``: what it was, or nothing."""
    before = f" <i>Before: {escape(before)}.</i>" if before else ""
    return f"<div><span>{escape(name)}</span><b>{escape(number)}</b><p>{escape(words)}{before}</p></div>"


def tiles(*made: str) -> str:
    """Tiles side by side."""
    return f'<div class="dpteach-numbers">{"".join(made)}</div>'


def points(difference: float) -> str:
    """A difference of two accuracies in words."""
    count = round(100 * difference)
    return f"{abs(count)} point{'s' * (abs(count) != 1)} {'more' if count > 0 else 'less'}" if count else "as much"


def epsilon_number(value: float, exact: bool) -> str:
    """ε as the eye reads it: three digits at most."""
    return short(value) if exact or math.isinf(value) else f"≤ {short(value)}"
