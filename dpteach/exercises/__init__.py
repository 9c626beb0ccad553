"""The exercises of the workbook: ``check`` an answer, ``cmp`` two, read a ``hint``, see the ``solution``."""

import importlib
from typing import Any

import torch

from dpteach.exercises.core import Exercise, Verdict, examine, unattempted

_NOTEBOOKS = {
    "1": "loop",
    "2": "clipping",
    "3": "noise",
    "4": "budget",
    "5": "opacus",
    "6": "federated",
    "7": "flower",
    "8": "attacks",
    "9": "accuracy",
    "11": "language",
}


class Text(str):
    """A string that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


def find(id: str) -> Exercise:
    """The exercise ``"2.1"``: notebook 2, exercise 1.

    Raises:
        ValueError: if there is no such exercise; lists the ones there are in that notebook.
    """
    module = _NOTEBOOKS.get(str(id).partition(".")[0])
    if module is None:
        raise ValueError(f"id must start with a notebook's number ({', '.join(_NOTEBOOKS)}), got {id!r}")
    exercises = {e.id: e for e in importlib.import_module(f"dpteach.exercises.{module}").EXERCISES}
    if id not in exercises:
        raise ValueError(f"id must be one of {', '.join(map(repr, exercises))}, got {id!r}")
    return exercises[id]


def every() -> list[Exercise]:
    """All exercises, in order."""
    modules = (importlib.import_module(f"dpteach.exercises.{name}") for name in _NOTEBOOKS.values())
    return [exercise for module in modules for exercise in module.EXERCISES]


def check(id: str, answer: Any) -> Verdict:
    """Examine an answer.

    Args:
        id: "2.1": notebook and number.
        answer: the learner's function, number or letter.

    Returns:
        A :class:`Verdict`; as the last line of a cell it shows as a sentence. A wrong answer that is known gets the
        misconception behind it; an answer that raises, does not end within 2 seconds, changes its input, or returns
        the wrong type or shape gets a sentence too. What the learner's function prints is kept from the cell: the
        verdict shows the last lines of it, once.

    Raises:
        ValueError: if there is no exercise of that id.
    """
    return examine(find(id), answer)


def cmp(name: str, mine: Any, theirs: torch.Tensor) -> None:
    """Print how close two results are: exact, close, or how far apart they are at most.

    Args:
        name: what is compared, in words.
        mine: a tensor or array; what a stub returns is not compared.
        theirs: close is: nowhere further from it than a millionth of its largest value.
    """
    if unattempted(mine):
        print(f"{name}: nothing to compare yet")
        return
    mine, theirs = torch.as_tensor(mine).detach().double(), theirs.detach().double()
    if mine.shape != theirs.shape:
        print(f"{name}: shapes differ, {tuple(mine.shape)} and {tuple(theirs.shape)}")
        return
    gap, largest = ((mine - theirs).abs().max().item(), theirs.abs().max().item()) if len(mine) else (0.0, 0.0)
    close = "exact" if gap == 0 else "close, to a millionth" if gap <= 1e-6 * largest else ""
    print(f"{name}: {close or f'they differ, by up to {gap:.2g}; the largest value is {largest:.2g}'}")


def hint(id: str) -> Text:
    """The hint of exercise ``id``. ValueError if there is none of that id."""
    return Text(find(id).hint)


def solution(id: str) -> Text:
    """The solution of exercise ``id``. ValueError if there is none of that id."""
    return Text(find(id).solution_text())


def folded(id: str) -> str:
    """Hint and solution as the notebooks show them: folded, in Markdown."""
    parts = (("Hint", hint(id)), ("Solution", solution(id)))
    return "\n\n".join(f"<details><summary>{title} {id}</summary>\n\n{text}\n\n</details>" for title, text in parts)
