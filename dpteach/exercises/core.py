"""What an exercise is, and how an answer is examined.

A coding exercise knows its reference answer and the wrong answers that learners give, each with the misconception
behind it. The learner's function is run on the same inputs as all of these: where it behaves like a known wrong answer,
the verdict says which misconception that is. No verdict shows the reference answer, or what it returns.
"""

import copy
import ctypes
import functools
import inspect
import io
import math
import numbers
import random
import re
import reprlib
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TIME_LIMIT = 2.0  # seconds for one call of the learner's function
EXAMINATION_LIMIT = 60.0  # seconds for all calls together

_TICK = 0.05  # seconds; short, since on Windows an interrupt waits for the end of one


@dataclass(frozen=True)
class Verdict:
    """What :func:`check` found. ``passed`` is True, False, or None where nothing was answered yet.

    ``printed`` is the end of what the learner's function printed, in the first call that printed something.
    """

    passed: bool | None
    message: str
    printed: str = ""

    def __repr__(self) -> str:
        sign = {True: "Right", False: "Not yet", None: "Not attempted"}[self.passed]
        text = textwrap.fill(f"{sign}: {self.message}", 110)
        return f"{text}\n\nYour function printed:\n{textwrap.indent(self.printed, '    ')}" if self.printed else text


@dataclass(frozen=True)
class Wrong:
    """A plausible wrong answer, a function, a number or a letter, and the sentence about what it gets wrong."""

    answer: Any
    message: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: "2.1": notebook and number.
        hint: a sentence or two; shown folded in the notebook.
        reference: the right answer; a function's source is the solution.
        examine: ``examine(answer) -> Verdict``; may raise :class:`Complaint`.
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


def changed(reference: Callable, **arguments: Any) -> Callable:
    """A wrong answer: the right one for other arguments, given as values, or as functions of all arguments by name."""
    names = inspect.signature(reference).parameters

    def answer(*args: Any) -> Any:
        given = SimpleNamespace(**dict(zip(names, args)))
        others = {name: value(given) if callable(value) else value for name, value in arguments.items()}
        return reference(**{**vars(given), **others})

    return answer


class Complaint(Exception):
    """The answer can't be compared; the message is a sentence for the learner."""


class NotAttempted(Exception):
    """The learner's function returns what a stub returns."""


def coding(
    id: str,
    *,
    hint: str,
    reference: Callable,
    inputs: Sequence[Callable[[], tuple]],
    wrong: Sequence[Wrong],
    praise: str,
    observe: Callable[[Callable, tuple], Any] | None = None,
    traits: Mapping[str, str] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    dtype: tuple[torch.dtype, str] | None = None,
    solution: str = "",
) -> Exercise:
    """An exercise whose answer is a function.

    Args:
        inputs: functions without arguments, each making the arguments of one call, anew each time.
        wrong: wrong answers to recognise; ``Wrong.answer`` is a function with the same arguments.
        praise: the sentence for a right answer: why it is right.
        observe: ``observe(fn, args)`` -> what to compare, for answers that draw random numbers (a standard deviation
            over many draws, say). If not given, what ``fn(*args)`` returns is compared.
        traits: for an ``observe`` that returns a dict: the sentence for each key, for an answer that no known wrong
            answer explains. It may use ``{mine}`` and ``{times}``: the learner's number, alone and over the right one.
        rtol, atol: how close is equal. Wrong answers may be less close, up to 1e-4 and 1e-5.
        dtype: the dtype that the exercise asks for, and a sentence why. If not given, any is right that is fine enough.
    """
    observe = observe or _result

    def on_input(observe: Callable, fn: Callable, k: int) -> Any:
        with _known_random_numbers():
            return observe(fn, inputs[k]())

    known = cache(partial(on_input, observe))  # the answers that come with the exercise, each run once on each input

    def is_like(other: Callable, mine: list, *how: Any) -> bool:
        try:
            return all(_difference(value, known(other, k), *how) is None for k, value in enumerate(mine))
        except Exception:  # a wrong answer may fail on an input: then the learner's would have failed as well
            return False

    def examine(fn: Callable) -> Verdict:
        mine, complaint = [], None
        try:
            for k in range(len(inputs)):
                mine.append(on_input(partial(observed, observe), fn, k))
        except Complaint as error:  # on a later input, perhaps, and what came before tells more
            complaint = str(error)
        problems = (
            _difference(value, known(reference, k), rtol, atol, dtype, traits, f"input {k + 1}")
            for k, value in enumerate(mine)
        )
        problem = next(filter(None, problems), None)
        if complaint and not problem:
            return Verdict(False, complaint)
        if problem is None:
            return Verdict(True, praise)
        how = max(rtol, 1e-4), max(atol, 1e-5)
        if is_like(reference, mine, *how):  # only its precision is wrong: a wrong answer must be met exactly
            how = rtol, atol, dtype
        return Verdict(False, next((other.message for other in wrong if is_like(other.answer, mine, *how)), problem))

    return Exercise(id, hint, reference, examine, tuple(wrong), solution)


def value(
    id: str,
    *,
    hint: str,
    answer: float,
    wrong: Sequence[Wrong],
    praise: str,
    solution: str,
    rtol: float = 0.01,
    atol: float = 0.0,
    share: bool = False,
) -> Exercise:
    """An exercise whose answer is a number. ``Wrong.answer`` is a number too.

    ``share``: the answer lies between 0 and 1. Then "8.3 %" is right, 8.3 is called percent, and two
    decimals are enough.
    """

    def close(given: float, other: float) -> bool:
        return given == other or math.isclose(given, other, rel_tol=rtol, abs_tol=atol)

    def right(given: float) -> bool:
        return close(given, answer) or (share and math.isclose(given, round(answer, 2)))

    def examine(given: Any) -> Verdict:
        number = as_number(given)
        if number is None:
            return Verdict(False, f"the answer must be a number, got {_kind(given)}.")
        if right(number):
            return Verdict(True, praise)
        for other in wrong:
            if close(number, other.answer):
                return Verdict(False, other.message)
        if share and number > 1:
            if right(number / 100):
                return Verdict(False, "this is the answer in percent. Give it as a share, between 0 and 1.")
            for other in wrong:
                if close(number / 100, other.answer):
                    return Verdict(False, f"taken as percent: {other.message}")
        if math.isnan(number):
            return Verdict(False, "nan is not a number that can be compared.")
        return Verdict(False, f"{number:g} is too {'high' if number > answer else 'low'}.")

    return Exercise(id, hint, answer, examine, tuple(wrong), solution)


def choose(id: str, *, hint: str, answer: str, wrong: Sequence[Wrong], praise: str, solution: str) -> Exercise:
    """An exercise whose answer is a letter. ``Wrong.answer`` is a letter too: every letter that is offered.

    "(b)", " B.", and "b: because ..." are read as "b".
    """
    letters = sorted([answer, *(other.answer for other in wrong)])

    def examine(given: Any) -> Verdict:
        read = (
            re.fullmatch(r"[\W_]*([^\W\d_])(?:\s*[^\w\s,/&|+].*|\s*)", given, re.DOTALL)
            if isinstance(given, str)
            else None
        )
        letter = read.group(1).lower() if read else None
        if letter == answer:
            return Verdict(True, praise)
        for other in wrong:
            if letter == other.answer:
                return Verdict(False, other.message)
        return Verdict(False, f"the answer must be one of {', '.join(repr(x) for x in letters)}, got {_short(given)}.")

    return Exercise(id, hint, answer, examine, tuple(wrong), solution)


def open_ended(
    id: str,
    *,
    hint: str,
    reference: Any,
    describe: Callable[[Any], str | tuple[str, dict[str, float]]],
    wrong: Mapping[str, Wrong],
    praise: str,
    solution: str,
) -> Exercise:
    """An exercise that has many right answers.

    Args:
        describe: ``describe(answer)`` -> "right", or a key of ``wrong``; with it, perhaps, the numbers for the
            sentence's ``{fields}``. May raise :class:`Complaint`.
        wrong: for each kind of wrong answer an example, and the sentence for all of this kind.
    """

    def sentence(given: Any) -> tuple[bool, str]:
        found = describe(given)
        kind, fields = found if isinstance(found, tuple) else (found, {})
        return kind == "right", (praise if kind == "right" else wrong[kind].message).format(**fields)

    return Exercise(
        id,
        hint,
        reference,
        lambda given: Verdict(*sentence(given)),
        tuple(replace(w, message=sentence(w.answer)[1]) if "{" in w.message else w for w in wrong.values()),
        solution,
    )


def examine(exercise: Exercise, answer: Any) -> Verdict:
    """The verdict on ``answer``, whatever it does: raise, exit, print, never end."""
    if unattempted(answer):
        return _NOT_ATTEMPTED
    if threading.current_thread().name == _Examination.THREAD:
        return Verdict(False, "call `check` in a cell of its own, not in your function.")
    with _ONE_AT_A_TIME:
        examination = _Examination()
        verdict = examination.run(exercise, answer)
    if verdict.passed is None and examination.printed:
        verdict = Verdict(False, "your function prints, and returns nothing. End it with `return`, and what it found.")
    return replace(verdict, printed=examination.last_lines())


def unattempted(answer: Any) -> bool:
    """Whether ``answer`` is what a stub holds or returns."""
    return any(answer is nothing for nothing in (None, ..., NotImplemented))


def attempted(result: Any) -> Any:
    """``result``, what the learner's function returned.

    Raises:
        NotAttempted: if it is what a stub returns.
    """
    if unattempted(result):
        raise NotAttempted
    return result


def observed(observe: Callable, fn: Callable, args: tuple) -> Any:
    """``observe(fn, args)``.

    Raises:
        NotAttempted: where ``fn`` returns what a stub returns.
        Complaint: where the learner's ``fn`` raises anything, or changes a tensor of ``args``.
    """
    kept = copy.deepcopy(args)
    try:
        result = observe(fn, args)
    except (Complaint, NotAttempted):
        raise
    except BaseException as error:
        raise Complaint(_raised(error) + (_called_with(kept) if isinstance(error, Exception) else "")) from error
    for before, after in zip(kept, args):
        if isinstance(before, torch.Tensor) and not (
            before.shape == after.shape and torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))
        ):
            raise Complaint("your function changes its input in place. Make a new tensor instead (a * b, not a *= b).")
    return attempted(result)


def with_model(fn: Callable, args: tuple) -> Any:
    """``fn(model, ...)``, for an exercise whose function is to look at a model, and to leave it as it is.

    Raises:
        Complaint: where the model's weights are others afterwards.
    """
    before = copy.deepcopy(args[0].state_dict())
    result = fn(*args)
    if any(not torch.equal(before[name], now) for name, now in args[0].state_dict().items()):
        raise Complaint("your function changes the model's weights. Look at the model, and leave it as it is.")
    return result


def as_number(given: Any) -> float | None:
    """A number of any kind as a float; None if it is none.

    A number is one of Python's, of NumPy's, a tensor or array of one element, "0.5", "50 %".
    """
    if isinstance(given, (torch.Tensor, np.ndarray)):
        if math.prod(given.shape) != 1:
            return None
        given = given.reshape(()).tolist()
    if isinstance(given, str):
        text = given.strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
    if not _is_number(given):
        return None
    try:
        return float(given)
    except OverflowError:  # 10**400
        return math.inf if given > 0 else -math.inf


def as_numbers(given: Any, count: int | None = None) -> list[float] | None:
    """Numbers of any kind as floats; None if they are something else, or not ``count``."""
    try:
        found = [as_number(x) for x in given]
    except TypeError:
        return None
    return None if None in found or count not in (None, len(found)) else found


_ONE_AT_A_TIME = threading.Lock()  # two that redirect the prints of one process would not restore them
_WARM: dict[int, Exercise] = {}  # the exercises whose reference answer has run


class _Examination:
    """The examination of one answer, in a thread of its own.

    A thread can be left behind. So the caller waits no longer than the limit, whatever the learner's function does, and
    can be interrupted; and this is one way for all systems and for all threads of a kernel, where a signal would reach
    the main thread only, and not on Windows. A function that is late is ended by an exception that is thrown into its
    thread; one that catches that too, or sleeps, is left. (Nothing but another process could end a single call of C
    that keeps the interpreter's lock, as ``10**10**9`` does.)
    """

    THREAD = "dpteach-check"

    def __init__(self) -> None:
        self.printed = ""
        self._calls = 0  # of the learner's function
        self._inside = False  # one of them is running
        self._waited = self._waited_for_call = self._watched_call = 0
        self._has_printed = False  # in a call that is over
        self._verdict = Verdict(False, "")
        self._done = threading.Event()

    def run(self, exercise: Exercise, answer: Any) -> Verdict:
        thread = threading.Thread(target=self._examine, args=(exercise, answer), name=self.THREAD, daemon=True)
        late = ""
        with redirect_stdout(_Prints(self, thread, sys.stdout)), redirect_stderr(_Prints(self, thread, sys.stderr)):
            try:
                thread.start()
                while not late and not self._done.wait(_TICK):
                    late = self._late()
            except KeyboardInterrupt:
                late = "you stopped the check before it was over."
            if late:
                with suppress(KeyboardInterrupt):  # a second one, from an impatient learner
                    self._end(thread)
        return Verdict(False, late) if late else self._verdict

    def last_lines(self, lines: int = 5) -> str:
        """The end of what was printed."""
        all_lines = self.printed.rstrip().splitlines()
        shown = [line if len(line) <= 105 else f"{line[:102]}..." for line in all_lines[-lines:]]
        return "\n".join((["..."] if len(all_lines) > lines else []) + shown)

    def _examine(self, exercise: Exercise, answer: Any) -> None:
        try:
            if callable(exercise.reference) and not callable(answer):
                raise Complaint(f"the answer must be a function, got {_kind(answer)}.")
            if callable(answer) and id(exercise) not in _WARM:
                exercise.examine(exercise.reference)  # what is slow once (an import) is not charged to the learner
                _WARM[id(exercise)] = exercise
            self._verdict = exercise.examine(self._timed(answer) if callable(answer) else answer)
        except NotAttempted:
            self._verdict = _NOT_ATTEMPTED
        except Complaint as complaint:
            self._verdict = Verdict(False, str(complaint))
        except BaseException as error:  # an object that can't even be compared
            self._verdict = Verdict(False, f"your answer can't be examined: {_raised(error, 'looking at it')}")
        finally:
            self._done.set()

    def _timed(self, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            self._inside = True
            try:
                return fn(*args, **kwargs)
            finally:
                self._inside = False
                self._has_printed = bool(self.printed)

        return timed

    def _late(self) -> str:
        # Counted in ticks: where the machine is too busy for this loop, the learner's function does not get on either.
        self._waited += 1
        if self._calls != self._watched_call or not self._inside:
            self._watched_call, self._waited_for_call = self._calls, 0
        self._waited_for_call += 1
        if self._waited_for_call * _TICK > TIME_LIMIT:
            return f"your function did not finish within {TIME_LIMIT:g} seconds: does its loop end?"
        if self._waited * _TICK > EXAMINATION_LIMIT:
            return (
                f"the check was not over after {EXAMINATION_LIMIT:g} seconds. "
                "It calls your function many times: each must be quick."
            )
        return ""

    def _end(self, thread: threading.Thread) -> None:
        for _ in range(20):  # again and again: `except:` in a loop takes the first ones
            # SystemExit is the one exception that a thread may die of without a traceback.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(_TICK)
            if not thread.is_alive():
                return

    def print(self, text: str) -> None:
        if self._inside and not self._has_printed:
            self.printed = (self.printed + text)[-4000:]


class _Prints(io.TextIOBase):
    """Stands in for stdout or stderr during a check; what other threads print goes where it always went."""

    def __init__(self, examination: _Examination, thread: threading.Thread, elsewhere: Any) -> None:
        self._examination, self._thread, self._elsewhere = examination, thread, elsewhere

    def write(self, text: str) -> int:
        if threading.current_thread() is not self._thread:
            return self._elsewhere.write(text)
        self._examination.print(text)
        return len(text)


def _raised(error: BaseException, who: str = "your function") -> str:
    """One sentence about an exception that the learner's answer raised."""
    if isinstance(error, SystemExit):
        return f"{who} ends Python (`sys.exit`). Use `return`."
    if isinstance(error, RecursionError):
        return f"{who} calls itself without end (RecursionError)."
    if isinstance(error, MemoryError):
        return f"{who} needs more memory than there is (MemoryError)."
    try:
        text = str(error).strip()
    except BaseException:  # an exception that can't be printed
        text = ""
    text = textwrap.shorten(text.partition("\n")[0], 300).rstrip(".")
    return f"{who} raised {type(error).__name__}: {text}." if text else f"{who} raised {type(error).__name__}."


def _called_with(args: tuple) -> str:
    """A sentence about the arguments, where they are such as a few words can name."""

    def short(x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return f"a tensor of shape {tuple(x.shape)}" if x.ndim else f"tensor({x.item()})"
        return f"a {type(x).__name__}" if isinstance(x, torch.Generator) else reprlib.repr(x)

    def plain(x: Any) -> bool:
        return isinstance(x, (torch.Tensor, torch.Generator, numbers.Real, str))

    if not args or not all(plain(x) or isinstance(x, (list, tuple)) and all(map(plain, x)) for x in args):
        return ""
    return f" It was called with {', '.join(map(short, args))}."


def _result(fn: Callable, args: tuple) -> Any:
    return fn(*args)


@contextmanager
def _known_random_numbers() -> Iterator[None]:
    """The same random numbers for every answer that draws from a global generator; afterwards they go on as before.

    Without it, the verdict on such an answer is itself a matter of chance.
    """
    # NumPy's legacy functions: what a learner's np.random.rand() draws from.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        # torch.manual_seed keeps a stack trace of each call for each kind of device
        torch.default_generator.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _difference(
    mine: Any,
    right: Any,
    rtol: float,
    atol: float,
    dtype: tuple[torch.dtype, str] | None = None,
    traits: Mapping[str, str] | None = None,
    where: str = "",
) -> str | None:
    """None where they are equal; else a sentence about what is not, without what is right."""

    def unlike(a: Any, b: Any, where: str) -> str | None:
        if isinstance(b, torch.Tensor):
            if isinstance(a, np.ndarray) and a.dtype.kind in "biuf":
                a = torch.as_tensor(a.copy())
            if not isinstance(a, torch.Tensor):
                return f"your function must return a Tensor, got {_kind(a)}."
            if a.shape != b.shape:
                return f"your function must return a tensor of shape {tuple(b.shape)}, got {tuple(a.shape)} ({where})."
            if dtype and a.dtype != dtype[0]:
                return f"your function must return {dtype[0]}, got {a.dtype}. {dtype[1]}"
            if a.is_complex() or (a.dtype == torch.bool) != (b.dtype == torch.bool):
                return f"your function must return {b.dtype}, got {a.dtype}."
            a_, b_ = a.detach().cpu().double(), b.detach().cpu().double()
            if torch.allclose(a_, b_, rtol=rtol, atol=atol, equal_nan=True):
                return None
            if a_.isnan().any() and not b_.isnan().any():
                return f"the values are not right: on {where} there is a NaN."
            largest = f"on {where} the largest difference is {(a_ - b_).abs().max().item():.3g}."
            coarse = a.dtype in (torch.float16, torch.bfloat16)
            advice = f" {a.dtype} may be too coarse: stay in {b.dtype}." if coarse else ""
            return f"the values are not right: {largest}{advice}"
        if _is_number(b):
            number = None if isinstance(a, str) or getattr(a, "shape", ()) != () else as_number(a)
            if number is None:
                return f"your function must return a number, got {_kind(a)}."
            equal = number == b or math.isclose(number, b, rel_tol=rtol, abs_tol=atol)
            if equal or math.isnan(number) and math.isnan(b):
                return None
            reason = "not a number" if math.isnan(number) else f"too {'high' if number > b else 'low'}"
            return f"on {where} your answer is {number:.4g}: {reason}."
        if isinstance(b, dict):
            if not isinstance(a, dict):
                return f"your function must return a dict, got {_kind(a)}."
            if set(a) != set(b):
                return f"on {where} the keys of your dict are not right."
            for key in b:
                if sentence := unlike(a[key], b[key], f"{where}, key {key!r},"):
                    return _filled(traits[key], a[key], b[key]) if traits and key in traits else sentence
            return None
        if isinstance(b, (tuple, list)):
            if not isinstance(a, (tuple, list)):
                return f"your function must return {_kind(b)}, got {_kind(a)}."
            if len(a) != len(b):
                return f"on {where} your function must return {len(b)} values, got {len(a)}."
            sentences = (unlike(x, y, f"{where}, value {k},") for k, (x, y) in enumerate(zip(a, b), 1))
            return next(filter(None, sentences), None)
        if isinstance(a, (np.generic, np.ndarray, torch.Tensor)) and a.shape == ():
            a = a.item()
        if type(a) is not type(b):
            return f"your function must return {_kind(b)}, got {_kind(a)}."
        return None if a == b else f"on {where} your answer is not right."

    return unlike(mine, right, where)


def _filled(sentence: str, mine: Any, right: Any) -> str:
    mine, right = as_number(mine), as_number(right)
    if mine is None or right is None:
        return sentence
    return sentence.format(mine=mine, times=mine / right if right else math.inf)


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)  # NumPy's numbers too


def _kind(x: Any) -> str:
    return "a number" if _is_number(x) else f"a {type(x).__name__}"


def _short(x: Any) -> str:
    try:
        return reprlib.repr(x)
    except BaseException:  # an object that can't be printed
        return _kind(x)


_NOT_ATTEMPTED = Verdict(None, "write your answer above, run its cell, then run this one again.")
