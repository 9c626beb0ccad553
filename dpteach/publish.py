"""Where the workbook is published: the badges "Open in Colab", and the cell that sets a notebook up.

``python -m dpteach.publish OWNER/REPO`` writes the GitHub repository's address into ``pyproject.toml``, and from there
into each notebook's opening and set-up cell and into the README. Without an argument it applies the address that is
there, as for a new notebook. Run it in a clone; then run ``.ci/execute``.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/"
_ADDRESS = re.compile(rf'(?m)^(Repository = "{GITHUB})([^"]+)(")')
# Colab has no Flower, and nobody has run it there: a sentence in the place of the badge.
NOT_ON_COLAB = {"07_flower.ipynb": "*Not on Colab, which has no Flower: run this notebook on a machine of your own.*"}
_BADGE = re.compile(rf"\n(\[!\[Open in Colab\]\([^\n]*|{'|'.join(map(re.escape, NOT_ON_COLAB.values()))})\n")


def address(root: Path = ROOT) -> str:
    """``OWNER/REPO``, as ``pyproject.toml`` names it: the one place."""
    return _ADDRESS.findall((root / "pyproject.toml").read_text(encoding="utf8"))[0][1]


def badge(repository: str, notebook: str) -> str:
    """Markdown: a picture that opens ``notebooks/{notebook}`` on Colab, or the sentence that says why there is none."""
    if notebook in NOT_ON_COLAB:
        return NOT_ON_COLAB[notebook]
    site = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({site}/assets/colab-badge.svg)]({site}/github/{repository}/blob/main/notebooks/{notebook})"
    )


def set_up_cell(repository: str) -> str:
    """The first code cell of every notebook. It installs the package where it is missing, and nothing where it is not."""
    return f"""\
import importlib.util

if importlib.util.find_spec("dpteach") is None:  # on Colab: add what is missing, keep the versions that are there
    %pip install --quiet "dpteach @ git+{GITHUB}{repository}"

import torch
import dpteach

torch.set_num_threads(1)  # small models train faster on one core"""


def with_badge(text: str, line: str) -> str:
    """``text`` with the badge as its second paragraph, after the title; one that was there before is replaced."""
    title, rest = _BADGE.sub("", text, count=1).split("\n", 1)
    return f"{title}\n\n{line}\n{rest}"


def publish(repository: str, root: Path = ROOT) -> None:
    """Write the address into ``pyproject.toml``, the README and every notebook.

    Raises:
        ValueError: if ``repository`` is not of the form OWNER/REPO.
        FileNotFoundError: if ``root`` is not a clone of the workbook.
    """
    import nbformat  # for authors: the installed package does without

    if not re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+", repository):
        raise ValueError(f"repository must be of the form OWNER/REPO, as on GitHub, got {repository!r}")
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    if not paths or not (root / "pyproject.toml").exists():
        raise FileNotFoundError(
            f"no workbook in {root}: run this command in a clone of the repository, installed with pip -e"
        )
    _rewrite(root / "pyproject.toml", lambda text: _ADDRESS.sub(rf"\g<1>{repository}\g<3>", text))
    _rewrite(root / "README.md", lambda text: with_badge(text, badge(repository, paths[0].name)))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        opening, set_up = notebook.cells[0], next(c for c in notebook.cells if c.cell_type == "code")
        opening.source = with_badge(opening.source, badge(repository, path.name))
        set_up.source = set_up_cell(repository)
        nbformat.write(notebook, path)


def _rewrite(path: Path, change) -> None:
    path.write_text(change(path.read_text(encoding="utf8")), encoding="utf8")


if __name__ == "__main__":
    try:
        chosen = sys.argv[1] if len(sys.argv) > 1 else address()
        publish(chosen)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"published as {GITHUB}{chosen}: now run .ci/execute, look at the difference, and commit it")
