"""The house itself: what it costs to enter, which room may lean on which, and what it declares."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loops import in_one_test

import dpteach
from dpteach.flower import installed

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpteach"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "_checks": 0,
    "bookkeeping": 0,
    "randomness": 0,
    "optim": 0,
    "guards": 0.5,
    "perceptrons": 0.5,
    "settings": 0.5,
    "data": 1,
    "models": 1,
    "features": 1,
    "mechanism": 1,
    "accounting": 1,
    "ledger": 1.5,
    "with_opacus": 1.5,
    "training": 2,
    "stack": 3,
    "attacks": 3,
    "audit": 3,
    "federated": 3,
    "language": 3,
    "flower": 4,
    "plots": 4,
    "speed": 4,
    "experiments": 5,
    "explorer": 5,
    "exercises": 5,
}

every_file = in_one_test("path", FILES)


def room_of(path):
    """The room that a file belongs to; the front door, ``dpteach/__init__.py``, is none."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imports(path):
    """Full names of all that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["dpteach", *path.relative_to(PACKAGE).parts[:-1]][: -node.level + 1 or None] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def rooms_used(path):
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "dpteach" and rest:
            yield dpteach._HOME.get(rest[0], rest[0])


@every_file
def test_a_room_imports_only_from_floors_below_it(path):
    room = room_of(path)
    if room is None:
        assert list(rooms_used(path)) == []
        return
    assert room in FLOORS, f"say in FLOORS which floor {room} is on"
    for other in set(rooms_used(path)) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


@every_file
def test_nothing_but_the_rooms_of_pictures_and_sliders_imports_what_they_need(path):
    used = {name.split(".")[0] for name in imports(path)}
    if room_of(path) not in ("plots", "explorer"):
        assert not used & {"matplotlib", "ipywidgets", "contourpy"}
    if room_of(path) not in ("accounting", "with_opacus", "speed") and path != PACKAGE / "exercises" / "opacus.py":
        assert "opacus" not in used


def test_importing_the_package_imports_no_library_and_no_room():
    code = "import sys; before = set(sys.modules); import dpteach; print(*sorted(set(sys.modules) - before), sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "dpteach" in loaded
    assert [name for name in loaded if name.startswith("dpteach.")] == []
    assert not {name.split(".")[0] for name in loaded} & {"torch", "opacus", "matplotlib", "ipywidgets", "numpy"}


def test_every_name_that_the_package_offers_is_there():
    for name in dpteach.__all__:
        home = dpteach._HOME.get(name, name)
        if home == "__version__" or importlib.util.find_spec(f"dpteach.{home}"):
            assert getattr(dpteach, name) is not None
    assert set(dpteach.__all__) <= set(dir(dpteach))
    with pytest.raises(ImportError, match="no_such_room"):
        from dpteach import no_such_room  # noqa: F401


NEEDS_FLOWER = ("dpteach.flower.client_app", "dpteach.flower.server_app")
MODULES = [
    m.name for m in pkgutil.walk_packages([str(PACKAGE)], "dpteach.") if installed() or m.name not in NEEDS_FLOWER
]


@in_one_test("name", MODULES)
def test_the_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_rooms_that_the_lessons_show_have_examples():
    for name in ("accounting", "data", "ledger", "mechanism", "settings"):
        assert doctest.testmod(importlib.import_module(f"dpteach.{name}")).attempted > 0


def requirement_lines():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-e"))]


def pyproject():
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_requirement_has_a_lower_bound_and_a_reason():
    for line in requirement_lines():
        assert re.fullmatch(r'[a-z-]+>=[0-9.]+(; python_version >= "3\.\d+")? +# \S.*\S', line), line


def test_requirements_and_pyproject_name_the_same_lower_bounds():
    required = [line.split("#")[0].strip() for line in requirement_lines()]
    project = pyproject()["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["flower"]
    assert {"ipywidgets>=7.7"} == set(declared) - set(
        required
    )  # the package runs on Colab's 7.7; the workbook's JupyterLab needs 8.1
    assert len(declared) > 5 and "ipywidgets>=8.1" in required
    assert len({re.split(">=", line)[0] for line in required}) == len(required)


def test_every_test_in_the_table_of_the_audit_exists():
    audit, _ = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").split("\n## Where it runs\n")
    rows = [line for line in audit.splitlines() if line.startswith("| ") and not line.endswith("held by |")]
    unheld, missing = [], []
    for row in rows:
        named = re.findall(r"`((?:tests|notebooks)/[^`]*?)::([^`]+)`", row)
        if not named:
            unheld.append(row)
        for file, name in named:
            here = rf"^def {name}\(" if file.startswith("tests/") else rf'^ *"id": "{name}"'
            path = ROOT / file
            if not path.exists() or not re.search(here, path.read_text(encoding="utf-8"), re.MULTILINE):
                missing.append(f"{file}::{name}")
    assert len(rows) > 60 and (unheld, missing) == ([], [])


def test_a_loop_over_cases_names_each_one_that_fails():
    @in_one_test("n, what", [(1, "one"), (2, "two"), (3, "three")])
    def is_even(n, what):
        if n == 3:
            with pytest.raises(ValueError):
                pass
        assert n % 2 == 0, "odd"

    with pytest.raises(
        AssertionError, match=r"(?s)^2 of 3 cases:\n\(1, 'one'\): AssertionError: odd.*\n\(3, 'three'\): Failed"
    ):
        is_even()
