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
minutes = script("minutes")
NUMBER = r"\d\db?"  # 04, and its appendix 04b
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


def number(path) -> str:
    return path.stem.partition("_")[0]


def test_it_opens_as_every_notebook_does(path, notebook):
    first = notebook.cells[0].source
    title, *_ = first.splitlines()
    assert re.fullmatch(rf"# {number(path)} · \S.*", title)
    assert "\n\n**You will be able to**\n\n- " in first
    assert 3 <= len(re.findall(r"^- ", first, re.MULTILINE)) <= 5
    assert re.search(r"\n\n\*\*Takes about \d+ minutes", first)


def test_its_sections_are_numbered_alike_and_it_closes_as_every_notebook_does(path, notebook):
    headings = re.findall(r"^## (.+)$", re.sub("(?s)```.*?```", "", prose(notebook)), re.MULTILINE)
    numbered = [h for h in headings if re.match(r"\d", h)]
    assert [h.partition(" · ")[0] for h in numbered] == [str(k + 1) for k in range(len(numbered))] != []
    end = ["Sharp edges", "Your predictions", "Test yourself", "What you can do now"]
    if number(path) == "10":  # the playground
        end.remove("Your predictions")
    assert headings == [*numbered, *end]
    last = notebook.cells[-1].source
    places = [last.find(words) for words in ("**You can now", "**Next:**", "**Read on**", "**Look up**")]
    assert places == sorted(places) and places[0] >= 0, places
    test = prose(notebook).split("## Test yourself")[1]
    assert [s[:2] for s in re.findall(r"<details><summary>(.+)", test)] == ["1.", "2.", "3."]


def test_it_takes_an_hour_at_most_and_asks_for_a_few_guesses(path, notebook):
    """By the counter of ``.ci/minutes``. A guess has a place to be written, and is shown beside the measurement."""
    source = "\n".join(c.source for c in code(notebook))
    asked = re.findall(r"^(\w+) = Prediction\(", source, re.MULTILINE)
    if number(path) != "10":  # the playground
        assert 45 <= minutes.minutes(path) <= 60, minutes.parts(path)
        assert 3 <= len(asked) <= 5 and "predictions()" in source
    assert [name for name in asked if f"{name}.show(" not in source] == []
    assert "**Predict" not in prose(notebook)


def test_its_exercises_have_a_box_a_check_and_a_folded_solution(path, notebook):
    boxes = re.findall(r"^> \*\*Exercise ([\d.]+) · (.+?) · \d+ minutes · \w+\*\*$", prose(notebook), re.MULTILINE)
    sources = [c.source for c in code(notebook)]
    for id, _ in boxes:
        assert id.split(".")[0] == str(int(number(path)[:2]))
        assert any(f'check("{id}"' in s for s in sources), id
        assert [c.source for c in notebook.cells if c.metadata.get("fold") == id] == [folded(id)], id
    assert len(set(boxes)) == len(boxes)
    if number(path) != "10":
        assert {"break it", "write code"} <= {kind for _, kinds in boxes for kind in kinds.split(" · ")}


def test_each_exercise_stands_in_one_notebook():
    boxes = [id for p in PATHS for id in re.findall(r"\*\*Exercise ([\d.]+) ·", prose(nbformat.read(p, as_version=4)))]
    assert sorted(boxes) == sorted(e.id for e in every())


def test_it_sends_nobody_to_a_notebook_that_is_not_there(notebook):
    text = "\n".join(c.source for c in notebook.cells)
    named = set(re.findall(rf"[Nn]otebooks? `?({NUMBER})", text)) | set(
        re.findall(rf"[Nn]otebooks {NUMBER}(?: to |–| and )({NUMBER})", text)
    )
    assert named | set(re.findall(rf"\b({NUMBER})_[a-z]", text)) <= {number(p) for p in PATHS}


def prints(cell) -> list[ast.Call]:
    source = re.sub(r"^( *)%.*", r"\1pass", cell.source, flags=re.MULTILINE)  # %pip is not Python
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "id", "") == "print" and call.args]


def test_no_sentence_is_printed_where_a_measurement_was_promised(notebook):
    """A ``print`` of nothing but words: with a number in it, or in a cell that asserts."""
    cells = [(c, [p for p in prints(c) if all(isinstance(a, ast.Constant) for a in p.args)]) for c in code(notebook)]
    canned = [
        ast.unparse(p) for c, ps in cells for p in ps if "assert " in c.source or re.search(r"\d", ast.unparse(p))
    ]
    assert canned == []


@pytest.mark.parametrize("path", PATHS[:4], ids=[p.stem for p in PATHS[:4]])
def test_with_you_and_without_you_have_one_colour_each(path, notebook):
    source = "\n".join(c.source for c in code(notebook))
    drawn = set(
        re.findall(
            r'"([a-z-]+)", "(with you|with the record|members|without you|somebody else(?:\'s)?|non-members)"', source
        )
    )
    assert all(role == ("private" if name.startswith(("with ", "members")) else "data") for role, name in drawn), drawn
    assert drawn or number(path) == "02"


def test_it_calls_a_false_positive_by_one_name_and_sends_nobody_to_what_does_not_install(path, notebook):
    text = "\n".join(c.source for c in notebook.cells)
    assert re.findall(r"named by mistake|[Aa]ccus\w+|false accusation", text) == []
    # 05 shows what secure_mode does; nobody is sent to it.
    assert number(path) in ("05", "05b") or re.findall(r"torchcsprng|secure_mode", text) == []


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert [p.stem for p in PATHS if p.stem not in readme] == []


@pytest.mark.parametrize("id", [e.id for e in every() if callable(e.reference)])
def test_a_solution_that_is_pasted_into_its_notebook_is_right(id):
    """With the names that the notebook has imported by then, and no others."""
    cells = next(
        c for c in (code(nbformat.read(p, as_version=4)) for p in PATHS) if any(f'check("{id}"' in x.source for x in c)
    )
    names: dict = {}
    for cell in cells[: next(i for i, c in enumerate(cells) if f'check("{id}"' in c.source)]:
        for node in ast.parse(re.sub(r"^( *)%.*", r"\1pass", cell.source, flags=re.MULTILINE)).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names)
    source = re.search(r"```python\n(.*?)```", solution(id), re.DOTALL).group(1)
    exec(source, names)
    verdict = check(id, names[re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE)[-1]])
    assert verdict.passed is True, verdict
