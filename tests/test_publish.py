"""Where the workbook is published: one address or none, and a package that leaves Colab's stack alone."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from scripts import script
from traitlets.config import Config

publish = script("publish")

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "some-body/a.workbook"

# .ci/colab.txt lays its versions over the workbook's environment; this one is too large to be installed twice.
COLABS_TORCH = {"torch": "2.11.0"}


def opening_and_set_up(path):
    notebook = nbformat.read(path, as_version=4)
    return notebook.cells[0].source, next(c for c in notebook.cells if c.cell_type == "code").source


@pytest.fixture
def clone(tmp_path):
    """What ``publish`` changes, copied, with no address yet."""
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    for path in (PATHS[0], *(path for path in PATHS if path.name in publish.NOT_ON_COLAB)):
        shutil.copy(path, tmp_path / "notebooks" / path.name)
    publish.publish(None, tmp_path)
    return tmp_path


def texts(folder):
    return {p: p.read_text(encoding="utf8") for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_has_the_one_address_or_none(path):
    opening, set_up = opening_and_set_up(path)
    address = publish.address()
    assert set_up == publish.set_up_cell(address)
    assert opening == publish.with_badges(opening, publish.badges(address, path.name))
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w.-]+)", opening + set_up)) <= {address}


def test_the_readme_has_the_one_address_or_no_badge():
    readme, address = (ROOT / "README.md").read_text(encoding="utf8"), publish.address()
    assert readme == publish.with_badges(readme, publish.readme_badges(address, PATHS[0].name))
    assert address or not re.search(r"colab-badge|badge\.svg|codespaces\.new", readme)


def test_a_notebook_that_colab_can_not_run_says_so_and_has_no_badge(clone):
    (name,) = publish.NOT_ON_COLAB
    for address in (None, ADDRESS):
        publish.publish(address, clone)
        opening, _ = opening_and_set_up(clone / "notebooks" / name)
        assert opening.split("\n\n")[1] == publish.NOT_ON_COLAB[name] and "colab.research" not in opening


def test_an_address_goes_everywhere_and_away_again(clone):
    before = texts(clone)
    publish.publish(ADDRESS, clone)
    assert publish.address(clone) == ADDRESS
    after = texts(clone)
    assert all(f"https://github.com/{ADDRESS}" in text for text in after.values())
    assert 'Repository = "https://github.com/some-body/a.workbook"\n\n[tool' in after[clone / "pyproject.toml"]
    readme = after[clone / "README.md"].split("\n\n")[1]
    assert readme.count(ADDRESS) == 4 and readme.startswith("[![Open in Colab]")
    publish.publish("other/place", clone)
    assert texts(clone) == {path: text.replace(ADDRESS, "other/place") for path, text in after.items()}
    publish.publish(None, clone)
    assert texts(clone) == before and publish.address(clone) is None


def test_an_old_set_up_cell_is_replaced(clone):
    path = clone / "notebooks" / PATHS[0].name
    before = path.read_text(encoding="utf8")
    notebook = nbformat.read(path, as_version=4)
    next(c for c in notebook.cells if c.cell_type == "code").source = "import torch"
    nbformat.write(notebook, path)
    publish.publish(None, clone)
    assert path.read_text(encoding="utf8") == before


@pytest.mark.parametrize("wrong", ["", "somebody", "a/b/c", "https://github.com/a/b", 'a/b"'])
def test_an_address_of_another_form_is_refused_and_nothing_is_written(wrong, clone, refuses):
    before = texts(clone)
    with refuses("repository", wrong):
        publish.publish(wrong, clone)
    assert texts(clone) == before


@pytest.mark.parametrize(
    "remote, address",
    [
        (None, None),
        ("/a/folder/dpteach", None),
        ("https://gitlab.com/some-body/a.workbook.git", None),
        ("https://github.com/some-body/a.workbook.git", ADDRESS),
        ("https://github.com/some-body/a.workbook", ADDRESS),
        ("git@github.com:some-body/a.workbook.git", ADDRESS),
        ("ssh://git@github.com/some-body/a.workbook", ADDRESS),
    ],
)
def test_the_address_is_that_of_the_remote_origin(clone, remote, address):
    subprocess.run(["git", "init", "-q", clone], check=True)
    if remote:
        subprocess.run(["git", "-C", clone, "remote", "add", "origin", remote], check=True)
    assert publish.origin(clone) == address


def test_the_command_takes_the_address_of_its_own_clone(clone):
    (clone / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "publish", clone / ".ci")
    for command in ("init -q", "remote add origin git@github.com:some-body/a.workbook.git"):
        subprocess.run(["git", "-C", clone, *command.split()], check=True)
    command = [sys.executable, clone / ".ci" / "publish"]
    assert "published as https://github.com/some-body" in subprocess.run(command, capture_output=True, text=True).stdout
    assert publish.address(clone) == ADDRESS
    wrong = subprocess.run([*command, "somebody"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("repository must be of the form OWNER/REPO")


def run_set_up_cell(address, monkeypatch, missing):
    """What the cell asks of pip; the error that it ends with."""
    shell, called = InteractiveShell(config=Config(HistoryManager={"enabled": False})), []
    shell.register_magic_function(called.append, magic_name="pip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing else name)
    ended = shell.run_cell(publish.set_up_cell(address))
    return called, ended.error_before_exec or ended.error_in_exec


@pytest.mark.parametrize("address", [None, "a/b"])
def test_the_set_up_cell_says_nothing_where_the_package_is(address, monkeypatch, capsys):
    assert run_set_up_cell(address, monkeypatch, missing=False) == ([], None)
    assert capsys.readouterr() == ("", "")


def test_the_set_up_cell_installs_a_missing_package_from_the_address(monkeypatch):
    called, error = run_set_up_cell("a/b", monkeypatch, missing=True)
    assert called == ['install --quiet "dpteach @ git+https://github.com/a/b"'] and error is None


def test_without_an_address_the_set_up_cell_asks_no_server_and_says_how_to_install(monkeypatch, capsys):
    called, error = run_set_up_cell(None, monkeypatch, missing=True)
    assert called == [] and isinstance(error, ModuleNotFoundError) and "://" not in str(error)
    assert re.findall("`(.*?)`", str(error)) == ["%pip install ..", "%pip install ./dpteach.zip"]  # .ci/colab runs both


def test_the_set_up_cell_is_short():
    assert max(len(publish.set_up_cell(address).splitlines()) for address in (None, "a/b")) <= 12


def colab():
    lines = (ROOT / ".ci" / "colab.txt").read_text(encoding="utf8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if not line.startswith("#"))
    return {**pins, **COLABS_TORCH}


@pytest.mark.parametrize("package", ["dpteach", "opacus", "dp-accounting"])
def test_installing_the_package_on_colab_replaces_nothing_that_colab_has(package):
    frozen = colab()
    assert {"torch", "numpy", "matplotlib", "ipywidgets"} <= set(frozen)
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
