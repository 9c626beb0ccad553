"""What an exercise is, and how an answer is examined.

A coding exercise knows its reference answer and the wrong answers that learners give, each with the misconception behind
it. The learner's function is run on the same inputs as all of these: where it behaves like a known wrong answer, the
verdict says which misconception that is.
"""

import copy
import inspect
import math
import numbers
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

_UNATTEMPTED = (None, ..., NotImplemented)


@dataclass(frozen=True)
class Verdict:
    """What :func:`check` found. ``passed`` is True, False, or None where nothing was answered yet."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        sign = {True: "Right", False: "Not yet", None: "Not attempted"}[self.passed]
        return textwrap.fill(f"{sign}: {self.message}", 110)


@dataclass(frozen=True)
class Wrong:
    """A plausible wrong answer: ``answer`` (a function, a number, a letter) and the sentence about what it gets wrong."""

    answer: Any
    message: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: "2.1": notebook and number.
        hint: a sentence or two; shown folded in the notebook.
        reference: the right answer; a function's source is the solution.
        examine: ``examine(answer) -> Verdict``.
        wrong: the wrong answers that the verdicts know.
        solution: Markdown to show as the solution; the reference's source if not given.
    """

    id: str
    hint: str
    reference: Any
    examine: Callable[[Any], Verdict]
    wrong: tuple[Wrong, ...] = ()
    solution: str = ""

    def solution_text(self) -> str:
        """The solution as Markdown."""
        return self.solution or f"```python\n{textwrap.dedent(inspect.getsource(self.reference)).strip()}\n```"


class Complaint(Exception):
    """The answer can't be compared; the message is a sentence for the learner."""


def coding(
    id: str,
    *,
    hint: str,
    reference: Callable,
    inputs: Sequence[Callable[[], tuple]],
    wrong: Sequence[Wrong],
    praise: str,
    observe: Callable[[Callable, tuple], Any] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    solution: str = "",
) -> Exercise:
    """An exercise whose answer is a function.

    Args:
        inputs: functions without arguments, each making the arguments of one call, anew each time.
        wrong: wrong answers to recognise; ``Wrong.answer`` is a function with the same arguments.
        praise: the sentence for a right answer: why it is right.
        observe: ``observe(fn, args)`` -> number or tensor to compare, for answers that draw random numbers (a standard
            deviation over many draws, say). If not given, what ``fn(*args)`` returns is compared.
        rtol, atol: how close is equal.
    """
    observe = observe or _result

    def on_each_input(observe: Callable, fn: Callable) -> list:
        with _known_random_numbers():
            return [observe(fn, make()) for make in inputs]

    known = cache(partial(on_each_input, observe))  # the answers that come with the exercise, each run once

    def examine(fn: Any) -> Verdict:
        if not callable(fn):
            return Verdict(False, f"the answer must be a function, got {type(fn).__name__}.")
        try:
            mine = on_each_input(partial(_observed, observe), fn)
        except Complaint as complaint:
            return Verdict(False, str(complaint))
        if any(any(value is nothing for nothing in _UNATTEMPTED) for value in mine):
            return _unattempted()
        right = known(reference)
        problem = _difference(mine, right, rtol, atol)
        if problem is None:
            return Verdict(True, praise)
        for other in wrong:
            try:
                theirs = known(other.answer)
            except Exception:  # a wrong answer may fail on an input: then the learner's would have failed as well
                continue
            if _difference(mine, theirs, rtol, atol) is None:
                return Verdict(False, other.message)
        return Verdict(False, problem)

    return Exercise(id, hint, reference, examine, tuple(wrong), solution)


def value(
    id: str, *, hint: str, answer: float, wrong: Sequence[Wrong], praise: str, solution: str,
    rtol: float = 0.01, atol: float = 0.0,
) -> Exercise:
    """An exercise whose answer is a number. ``Wrong.answer`` is a number too."""

    def close(a: float, b: float) -> bool:
        return a == b or math.isclose(a, b, rel_tol=rtol, abs_tol=atol)

    def examine(given: Any) -> Verdict:
        if isinstance(given, torch.Tensor) and given.numel() == 1:
            given = given.item()
        try:
            given = float(given)
        except (TypeError, ValueError):
            return Verdict(False, f"the answer must be a number, got {type(given).__name__}.")
        if close(given, answer):
            return Verdict(True, praise)
        for other in wrong:
            if close(given, other.answer):
                return Verdict(False, other.message)
        return Verdict(False, f"{given:g} is too {'high' if given > answer else 'low'}." if math.isfinite(given)
                       else f"{given} is not a finite number.")

    return Exercise(id, hint, answer, examine, tuple(wrong), solution)


def choose(id: str, *, hint: str, answer: str, wrong: Sequence[Wrong], praise: str, solution: str) -> Exercise:
    """An exercise whose answer is a letter. ``Wrong.answer`` is a letter too: every letter that is offered."""
    letters = sorted([answer, *(other.answer for other in wrong)])

    def examine(given: Any) -> Verdict:
        letter = given.strip().lower() if isinstance(given, str) else given
        if letter == answer:
            return Verdict(True, praise)
        for other in wrong:
            if letter == other.answer:
                return Verdict(False, other.message)
        return Verdict(False, f"the answer must be one of {', '.join(repr(x) for x in letters)}, got {given!r}.")

    return Exercise(id, hint, answer, examine, tuple(wrong), solution)


def examine(exercise: Exercise, answer: Any) -> Verdict:
    """The verdict on ``answer``; never an exception that a learner's answer caused."""
    if any(answer is nothing for nothing in _UNATTEMPTED):
        return _unattempted()
    try:
        return exercise.examine(answer)
    except Complaint as complaint:
        return Verdict(False, str(complaint))


def _unattempted() -> Verdict:
    return Verdict(None, "write your answer above, run its cell, then run this one again.")


def _result(fn: Callable, args: tuple) -> Any:
    return fn(*args)


@contextmanager
def _known_random_numbers() -> Iterator[None]:
    """The same random numbers for every answer that draws from a global generator; afterwards they go on as before.

    Without it, the verdict on such an answer is itself a matter of chance.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _observed(observe: Callable, fn: Callable, args: tuple) -> Any:
    kept = copy.deepcopy(args)
    try:
        result = observe(fn, args)
    except Complaint:
        raise
    except Exception as error:
        raise Complaint(f"your function raised {type(error).__name__}: {error}") from error
    for before, after in zip(kept, args):
        if isinstance(before, torch.Tensor) and not torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0)):
            raise Complaint("your function changes its input in place. Make a new tensor instead (a * b, not a *= b).")
    return result


def _difference(mine: list, right: list, rtol: float, atol: float) -> str | None:
    """None where all are equal; else a sentence about the first that is not."""
    for number, (a, b) in enumerate(zip(mine, right), start=1):
        if type(a) is not type(b) and not (_is_number(a) and _is_number(b)):
            return f"your function must return {_kind(b)}, got {_kind(a)}."
        if isinstance(b, torch.Tensor):
            if a.shape != b.shape:
                return f"your function must return a tensor of shape {tuple(b.shape)}, got {tuple(a.shape)} (input {number})."
            if not torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True):
                gap = (a.double() - b.double()).abs().max().item()
                return f"the values are not right: on input {number} the largest difference is {gap:.3g}."
        elif isinstance(b, (tuple, list)):
            inner = _difference(list(a), list(b), rtol, atol) if len(a) == len(b) else f"expected {len(b)} values, got {len(a)}."
            if inner:
                return inner
        elif _is_number(b):
            if not (a == b or math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))):
                return f"on input {number} the answer should be {b:.4g}, yours is {a:.4g}."
        elif a != b:
            return f"on input {number} the answer should be {b!r}, yours is {a!r}."
    return None


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)  # NumPy's numbers too


def _kind(x: Any) -> str:
    return "a number" if _is_number(x) else f"a {type(x).__name__}"
