"""What every notebook must have. That its outputs are true, ``pytest --nbval notebooks/`` tests."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from scripts import script

from dpteach.exercises import check, every, folded, solution

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
publish = script("publish")
SETUP = publish.set_up_cell(publish.address())
MAKES_LIVE = r"(\w+) = (?:dpteach\.)?(?:\w*Explorer|Viewer|Playground)\("


@pytest.fixture(params=PATHS, ids=[p.stem for p in PATHS])
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def prose(notebook) -> str:
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_it_is_valid_and_its_cell_ids_are_unique(notebook):
    nbformat.validate(notebook)
    ids = [c.id for c in notebook.cells]
    assert len(set(ids)) == len(ids)


def test_its_first_code_cell_is_the_same_set_up_everywhere(notebook):
    assert code(notebook)[0].source == SETUP


def test_its_code_cells_are_short(notebook):
    assert {c.id: len(c.source.splitlines()) for c in code(notebook) if len(c.source.splitlines()) > 12} == {}


def test_it_was_run_from_top_to_bottom_and_nothing_failed(notebook):
    assert [c.execution_count for c in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [o for c in code(notebook) for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_hides_no_output_from_nbval(notebook):
    assert not [c.id for c in code(notebook) if "NBVAL" in c.source or c.metadata.get("tags")]


def test_it_stores_no_widget_state_and_no_path_of_a_machine(path, notebook):
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    text = path.read_text(encoding="utf8")
    assert "widget-view" not in text
    assert not re.search(r"/(root|home|work|tmp|Users)/|C:\\\\", text)
    assert len(text) < 1_500_000


def test_every_explorer_leaves_a_still_and_its_sentence(notebook):
    cells = code(notebook)
    live = [i for i, c in enumerate(cells) if re.search(MAKES_LIVE, c.source)]
    for i in live:
        name = re.search(MAKES_LIVE, cells[i].source).group(1)
        after = cells[i + 1]
        assert f"{name}.wait(" in after.source and "print(" in after.source, after.source
        assert [o for o in after.outputs if "image/png" in o.get("data", {})], after.source
    assert live


def test_every_picture_has_its_sentence_in_text_beside_it(notebook):
    for cell in code(notebook):
        pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        printed = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        assert not pictures or printed.strip(), cell.source
        assert all(len(p.data["text/plain"]) > 30 for p in pictures), cell.source


def test_it_has_the_parts_of_a_lesson(path, notebook):
    text = prose(notebook)
    assert text.startswith(f"# {path.stem[:2]} · ")
    for part in (
        "You will be able to",
        "minutes",
        "## Sharp edges",
        "## Test yourself",
        "You can now",
        "**Next:**",
        "redict",
    ):
        assert part in text, part
    assert text.split("## Test yourself")[1].count("<details>") >= 3


def test_its_exercises_have_a_box_a_check_and_a_folded_solution(path, notebook):
    ids = [e.id for e in every() if e.id.split(".")[0] == str(int(path.stem[:2]))]
    sources = [c.source for c in code(notebook)]
    for id in ids:
        assert re.search(rf"> \*\*Exercise {re.escape(id)} · .+ · \d+ minutes · \w+\*\*", prose(notebook)), id
        assert any(f'check("{id}"' in s for s in sources), id
        assert [c.source for c in notebook.cells if c.metadata.get("fold") == id] == [folded(id)], id
    if path.stem[:2] in ("01", "02", "03", "04"):
        assert len(ids) >= 3


def test_it_sends_nobody_to_a_notebook_that_is_not_there(notebook):
    text = "\n".join(c.source for c in notebook.cells)
    named = set(re.findall(r"[Nn]otebooks? `?(\d\d)", text)) | set(
        re.findall(r"[Nn]otebooks \d\d(?: to |–| and )(\d\d)", text)
    )
    assert named | set(re.findall(r"\b(\d\d)_[a-z]", text)) <= {p.stem[:2] for p in PATHS}


def prints(cell) -> list[ast.Call]:
    source = re.sub(r"^( *)%.*", r"\1pass", cell.source, flags=re.MULTILINE)  # %pip is not Python
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "id", "") == "print" and call.args]


def test_no_number_is_printed_that_nothing_computed(notebook):
    literal = [
        call for c in code(notebook) for call in prints(c) if all(isinstance(a, ast.Constant) for a in call.args)
    ]
    assert [ast.unparse(call) for call in literal if re.search(r"\d", ast.unparse(call))] == []


@pytest.mark.parametrize("path", PATHS[:4], ids=[p.stem for p in PATHS[:4]])
def test_with_you_and_without_you_have_one_colour_each(path, notebook):
    source = "\n".join(c.source for c in code(notebook))
    drawn = set(
        re.findall(
            r'"([a-z-]+)", "(with you|with the record|members|without you|somebody else(?:\'s)?|non-members)"', source
        )
    )
    assert all(role == ("private" if name.startswith(("with ", "members")) else "data") for role, name in drawn), drawn
    assert drawn or path.stem[:2] == "02"


def test_it_calls_a_false_positive_by_one_name_and_sends_nobody_to_what_does_not_install(path, notebook):
    text = "\n".join(c.source for c in notebook.cells)
    assert re.findall(r"named by mistake|[Aa]ccus\w+|false accusation", text) == []
    # 05 shows what secure_mode does; nobody is sent to it.
    assert path.stem[:2] == "05" or re.findall(r"torchcsprng|secure_mode", text) == []


def test_the_readme_says_how_long_each_notebook_takes():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    rows = dict(re.findall(r"^\| \[.+\]\(notebooks/(\w+)\.ipynb\) \|.*\| (\d+) \|$", readme, re.MULTILINE))
    says = {p.stem: re.search(r"about (\d+) minutes", prose(nbformat.read(p, as_version=4))).group(1) for p in PATHS}
    assert rows == says


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert [p.stem for p in PATHS if p.stem not in readme] == []


@pytest.mark.parametrize("id", [e.id for e in every() if callable(e.reference)])
def test_a_solution_that_is_pasted_into_its_notebook_is_right(id):
    """With the names that the notebook has imported by then, and no others."""
    path = next(p for p in PATHS if int(p.stem[:2]) == int(id.split(".")[0]))
    cells = code(nbformat.read(path, as_version=4))
    names: dict = {}
    for cell in cells[: next(i for i, c in enumerate(cells) if f'check("{id}"' in c.source)]:
        for node in ast.parse(re.sub(r"^( *)%.*", r"\1pass", cell.source, flags=re.MULTILINE)).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names)
    source = re.search(r"```python\n(.*?)```", solution(id), re.DOTALL).group(1)
    exec(source, names)
    verdict = check(id, names[re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE)[-1]])
    assert verdict.passed is True, verdict
