"""The source of a function, with its colours, on a notebook's page."""

import inspect
import textwrap


class Source(str):
    """Python code that a notebook shows with its colours."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def source(function) -> Source:
    """The source code of a function of the package, for a notebook to show: nothing is copied that could drift."""
    return Source(textwrap.dedent(inspect.getsource(function)).strip())
