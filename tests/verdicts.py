"""Check answers one after the other, and say which of them get another verdict than they should."""

from dpteach.exercises import check


def unexpected(cases) -> str:
    """A line for each of ``cases`` (id, answer, passed, words in its sentence) whose verdict is another one; else ""."""
    lines = []
    for id, answer, passed, words in cases:
        verdict = check(id, answer)
        if verdict.passed is not passed or words not in verdict.message:
            name = getattr(answer, "__name__", None) or repr(answer)[:60]
            lines.append(f"{id}, {name}: expected {passed}, {words!r}; got {verdict.passed}, {verdict.message!r}")
    return "\n".join(lines)
