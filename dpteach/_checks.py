"""One sentence for each bad argument: its name, its value, what it may be."""

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any


def number(
    name: str, value: Any, *, low: float, above: bool = False, high: float = math.inf, below: bool = True
) -> float:
    """``value`` as a float, if it lies in the range; else ``ValueError`` naming the argument.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.
        low, high: the range's ends.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.
    """
    allowed = f"{'>' if above else '>='} {low:g}"
    if high < math.inf:
        allowed += f" and {'<' if below else '<='} {high:g}"
    elif below:
        allowed += " and finite"
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if real and (value in (math.inf, -math.inf) or abs(value) <= sys.float_info.max):  # not NaN, nor a huge int
        number = float(value)
        if (number > low if above else number >= low) and (number < high if below else number <= high):
            return number
    raise ValueError(f"{name} must be a number {allowed}, got {_shown(value)}")


def whole(name: str, value: Any, *, low: int, high: float = math.inf) -> int:
    """``value`` as an int, if it is a whole number in the range; else ``ValueError`` naming the argument."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if real and low <= value <= high and value != math.inf and value == int(value):
        return int(value)
    allowed = f">= {low}" + (f" and <= {high:,}" if high < math.inf else "")
    raise ValueError(f"{name} must be a whole number {allowed}, got {_shown(value)}")


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """``value``, if it is one of ``allowed``; else ``ValueError`` that lists them."""
    if value in tuple(allowed):
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def clipping_norm(value: Any) -> float:
    """``value`` as C: a number > 0, or infinity; not so small that float32 loses the gradients that it bounds."""
    C = number("max_grad_norm", value, low=0, above=True, below=False)
    if C < 1e-20:
        raise ValueError(
            f"max_grad_norm must be at least 1e-20, got {value!r}: float32 can't hold gradients that small"
        )
    return C


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python prints no int of more than 4,300 digits
        return "an int of thousands of digits"
