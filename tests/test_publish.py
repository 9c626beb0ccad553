"""Where the workbook is published: one address in every badge and set-up cell, and a package that leaves Colab's stack alone."""

import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from traitlets.config import Config

from dpteach import publish

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# .ci/colab.txt lays its versions over the workbook's environment; these two are too large to be installed twice.
COLABS_TORCH = {"torch": "2.11.0", "torchvision": "0.26.0"}


def opening_and_set_up(path):
    notebook = nbformat.read(path, as_version=4)
    return notebook.cells[0].source, next(c for c in notebook.cells if c.cell_type == "code").source


@pytest.fixture
def clone(tmp_path):
    """What ``publish`` changes, copied, with an address of its own."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    for path in PATHS[:2]:
        shutil.copy(path, tmp_path / "notebooks" / path.name)
    return tmp_path


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_has_the_one_address_in_its_badge_and_in_its_set_up_cell(path):
    opening, set_up = opening_and_set_up(path)
    assert opening.split("\n\n")[1] == publish.badge(publish.address(), path.name)
    assert set_up == publish.set_up_cell(publish.address())
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w.-]+)", opening + set_up)) == {publish.address()}


def test_a_notebook_that_colab_can_not_run_says_so_and_has_no_badge(clone):
    (path,) = (path for path in PATHS if path.name in publish.NOT_ON_COLAB)
    opening, _ = opening_and_set_up(path)
    assert path.stem == "07_flower" and "colab.research" not in opening and opening.count("Not on Colab") == 1
    shutil.copy(path, clone / "notebooks" / path.name)
    old = nbformat.read(path, as_version=4)
    old.cells[0].source = publish.with_badge(opening, publish.badge("old/badge", PATHS[0].name))  # as it was before
    assert "colab.research" in old.cells[0].source
    for before in (old, nbformat.read(path, as_version=4)):
        nbformat.write(before, clone / "notebooks" / path.name)
        publish.publish(publish.address(clone), clone)
        assert opening_and_set_up(clone / "notebooks" / path.name)[0] == opening


def test_the_readme_has_the_one_address_in_its_badge():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert readme.split("\n\n")[1] == publish.badge(publish.address(), PATHS[0].name)


def test_the_command_moves_every_copy_of_the_address_and_nothing_else(clone):
    before = {path: path.read_text(encoding="utf8") for path in clone.rglob("*") if path.is_file()}
    publish.publish("some-body/a.workbook", clone)
    assert publish.address(clone) == "some-body/a.workbook"
    for path, text in before.items():
        changed = path.read_text(encoding="utf8")
        assert publish.address() not in changed
        assert changed.replace("some-body/a.workbook", publish.address()) == text
    publish.publish(publish.address(), clone)
    assert {path: path.read_text(encoding="utf8") for path in before} == before


def test_a_notebook_without_badge_and_with_an_old_set_up_cell_gets_both(clone):
    path = clone / "notebooks" / PATHS[0].name
    notebook = nbformat.read(path, as_version=4)
    whole = notebook.cells[0].source
    notebook.cells[0].source = whole.replace(publish.badge(publish.address(), path.name) + "\n\n", "")
    assert "Colab" not in notebook.cells[0].source
    next(c for c in notebook.cells if c.cell_type == "code").source = "import torch"
    nbformat.write(notebook, path)
    publish.publish(publish.address(clone), clone)
    assert opening_and_set_up(path) == (whole, publish.set_up_cell(publish.address()))


@pytest.mark.parametrize("wrong", ["", "somebody", "a/b/c", "https://github.com/a/b", 'a/b"'])
def test_an_address_of_another_form_is_refused_and_nothing_is_written(wrong, clone, refuses):
    before = (clone / "pyproject.toml").read_text()
    with refuses("repository", wrong):
        publish.publish(wrong, clone)
    assert (clone / "pyproject.toml").read_text() == before


def test_outside_a_clone_the_command_says_where_to_run_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="in a clone of the repository"):
        publish.publish("a/b", tmp_path)


@pytest.mark.parametrize("missing", [False, True])
def test_the_set_up_cell_calls_pip_only_where_the_package_is_missing(missing, monkeypatch, capsys):
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    called = []
    shell.register_magic_function(called.append, magic_name="pip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing else name)
    shell.run_cell(publish.set_up_cell("a/b")).raise_error()
    assert called == (['install --quiet "dpteach @ git+https://github.com/a/b"'] if missing else [])
    assert capsys.readouterr() == ("", "")


def test_the_set_up_cell_is_short():
    assert len(publish.set_up_cell("a/b").splitlines()) <= 12


def colab():
    lines = (ROOT / ".ci" / "colab.txt").read_text(encoding="utf8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if not line.startswith("#"))
    return {**pins, **COLABS_TORCH}


@pytest.mark.parametrize("package", ["dpteach", "opacus", "dp-accounting"])
def test_installing_the_package_on_colab_replaces_nothing_that_colab_has(package):
    frozen = colab()
    assert {"torch", "torchvision", "numpy", "matplotlib", "ipywidgets"} <= set(frozen)
    if package == "dpteach":  # what the file says: the installed metadata may be older
        declared = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))[
            "project"
        ]["dependencies"]
    else:
        declared = requires(package)
    asked = [r for r in map(Requirement, declared) if not r.marker or r.marker.evaluate({"extra": ""})]
    assert any(r.name in frozen for r in asked)
    assert [
        f"{r} does not admit {frozen[r.name]}" for r in asked if r.name in frozen and frozen[r.name] not in r.specifier
    ] == []
