"""Every live picture of the workbook, dragged once by mouse in a real JupyterLab: a new frame must answer.

Of each notebook only the cells run that its live pictures need; that all of it is right, ``pytest --nbval notebooks/`` tests.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from lab import new_notebook, new_page

from dpteach.flower import MISSING, installed

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MAKES_LIVE = r"\b(?:\w*Explorer|Viewer|Playground)\("


def names(source: str) -> tuple[set[str], set[str]]:
    """What a cell defines, and what it uses."""
    defines, uses = set(), set()
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):  # a cell may hold %pip
        if isinstance(node, ast.Name):
            (uses if isinstance(node.ctx, ast.Load) else defines).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defines.add(node.name)
        elif isinstance(node, ast.alias):
            defines.add(node.asname or node.name.split(".")[0])
    return defines, uses


def live_part(path: Path) -> list[str]:
    """The set-up cell, the cells with a live picture, and the cells that define what these use; in their order."""
    sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    kept: list[str] = []
    wanted: set[str] = set()
    for source in reversed(sources):
        defines, uses = names(source)
        if re.search(MAKES_LIVE, source) or source == sources[0] or defines & wanted:
            kept.insert(0, source)
            wanted |= uses
    return kept


LIVE = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if re.search(MAKES_LIVE, path.read_text(encoding="utf8"))]


@pytest.fixture(scope="module")
def lab(lab_folder, address, browser):
    lab = new_page(browser).open(address, new_notebook(lab_folder, "first.ipynb", ""))
    yield lab
    lab.close()


@pytest.mark.parametrize("path", LIVE, ids=[path.stem for path in LIVE])
def test_a_drag_is_answered_by_a_new_frame(path, lab_folder, lab):
    if path.stem == "07_flower" and not installed():
        pytest.skip(MISSING)
    cells = live_part(path)
    lab.open_beside(new_notebook(lab_folder, path.name, *cells)).run_all(timeout=300)
    for index in (i for i, source in enumerate(cells) if re.search(MAKES_LIVE, source)):
        lab.look_at(index).watch()
        if lab.cell.locator("button", has_text="Stop").count():
            lab.stop()
        assert lab.still_for(0.3), "nothing may move before the drag"
        pressed = lab.now()
        lab.drag("", [0.35 if lab.place() > 0.5 else 0.65])
        came = lab.until(f"f.ms > {pressed} && f.picture !== all[0].picture && !/^(Stopped|Can't)/.test(f.status)")
        print(f"\n{path.stem}, {' '.join(lab.slider().inner_text().split())}: {came - pressed:.0f} ms from the press to the frame")
    assert lab.errors == [] and lab.failures() == []
    lab.end_kernel()
