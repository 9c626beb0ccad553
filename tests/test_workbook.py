"""Every live picture of the workbook, dragged once by mouse in a real JupyterLab: a new frame must answer.

Of each notebook only the cells run that its live pictures need; that all of it is right, ``pytest --nbval notebooks/``
tests.
"""

import dataclasses
import re
import symtable
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from lab import new_notebook, new_page

from dpteach import epsilon, scenes
from dpteach.flower import MISSING, installed
from dpteach.training import train

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# In place of cells that take long.
BEFORE = {
    "07_flower": """
for name in ("alice", "bob"):
    ledger = Ledger(f"{folder.name}/{name}.json", new=True)
    for _ in range(3):
        ledger.charge(noise_multiplier=1.5, sample_rate=1 / 16, steps=16)
viewer._thread.request(force=True)
viewer.wait()
"""
}
# A live picture that the cell shows: its name stands alone in the last line. One that only code moves is not shown.
SHOWS_LIVE = r"(?s)\b(?P<name>\w+) = (?:dpteach\.)?(?:\w*Explorer|Viewer|Playground)\(.*\n(?P=name)$"


def names(source: str) -> tuple[set[str], set[str]]:
    """What a cell defines for other cells, and what it uses, also inside its functions."""
    cell = symtable.symtable(TransformerManager().transform_cell(source), "cell", "exec")  # a cell may hold %pip
    defines = {s.get_name() for s in cell.get_symbols() if s.is_assigned() or s.is_imported()}
    uses, scopes = {s.get_name() for s in cell.get_symbols() if s.is_referenced()}, cell.get_children()
    while scopes:
        scope = scopes.pop()
        uses |= {s.get_name() for s in scope.get_symbols() if s.is_global()}
        scopes += scope.get_children()
    return defines, uses


def live_part(path: Path) -> list[str]:
    """The set-up cell, the cells with a live picture, and the cells that define what these use; in their order."""
    sources = code(path)
    kept: list[str] = []
    wanted: set[str] = set()
    for source in reversed(sources):
        defines, uses = names(source)
        if re.search(SHOWS_LIVE, source) or source == sources[0] or defines & wanted:
            kept.insert(0, source)
            wanted |= uses
    return kept


def code(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


LIVE = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if any(re.search(SHOWS_LIVE, cell) for cell in code(path))]


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
    lab.execute(BEFORE.get(path.stem, ""))
    for index in (i for i, source in enumerate(cells) if re.search(SHOWS_LIVE, source)):
        lab.look_at(index).watch()
        if lab.cell.locator("button", has_text="Stop").count():
            lab.stop()
        assert lab.still_for(0.3), "nothing may move before the drag"
        pressed = lab.now()
        lab.drag("", [0.35 if lab.place() > 0.5 else 0.65])
        came = lab.until(f"f.ms > {pressed} && f.picture !== all[0].picture && !/^(Stopped|Can't)/.test(f.status)")
        print(
            f"\n{path.stem}, {' '.join(lab.slider().inner_text().split())}: {came - pressed:.0f} ms from the press to "
            "the frame"
        )
    assert lab.errors == [] and lab.failures() == []
    lab.end_kernel()


COUNT_TRAININGS = """
from dpteach.explorer.training import LiveTraining
def drain(self, run, job, drain=LiveTraining._drain):
    self.begun = getattr(self, "begun", 0) + 1
    drain(self, run, job)
LiveTraining._drain = drain
"""
# Of each live picture: its status, how often it trained, and what is not as it was when it opened.
AS_IT_OPENED = """
for live in (NAMES):
    explorer = getattr(live, "explorer", live)
    values = explorer.values
    moved = [name for name, control in explorer._controls.items() if values[name] != getattr(control, "start", values[name])]
    moved += [name for name, menu in getattr(live, "menus", {}).items() if menu.index != 0]
    print(explorer.status.split(":")[0], "PRV" in explorer._price_line.value, explorer.begun, moved)
"""


@pytest.mark.parametrize("stem", ["03_noise", "06_federated_averaging", "10_playground"])
def test_after_run_all_each_live_training_is_the_one_that_opened(stem, lab_folder, lab):
    """The text above it says what the learner sees: no later cell moves its sliders, no other explorer leaves it stopped."""
    cells = code(NOTEBOOKS / f"{stem}.ipynb")
    found = {i: re.search(SHOWS_LIVE, cell) for i, cell in enumerate(cells) if "Viewer(" not in cell}
    shown = {i: match["name"] for i, match in found.items() if match}
    lab.open_beside(new_notebook(lab_folder, f"all_{stem}.ipynb", COUNT_TRAININGS, *cells)).run_all(timeout=300)
    for index in shown:
        lab.look_at(1 + index)
        if lab.cell.locator("button", has_text="More:").count():
            lab.click("More:")
    lab.page.wait_for_timeout(1500)  # the page's own rounding of what it draws only now comes late
    found = lab.execute(AS_IT_OPENED.replace("NAMES", "".join(f"{name}, " for name in shown.values())))
    assert found.splitlines() == ["Finished True 1 []"] * len(shown)
    assert lab.errors == []
    lab.end_kernel()


def test_the_folded_answers_of_the_playground_are_its_figures():
    cells = nbformat.read(NOTEBOOKS / "10_playground.ipynb", as_version=4).cells
    text = " ".join(" ".join(cell.source for cell in cells).split())
    scene = scenes()["two moons"]

    def run(**changes):
        s = dataclasses.replace(scene.settings, **changes)
        n, steps = len(scene.data), s.epochs * s.steps_per_epoch(len(scene.data))
        return {"noise_multiplier": s.noise_multiplier, "sample_rate": s.sample_rate(n), "steps": steps}

    half = epsilon(**run(batch_size=7))
    assert f"falls by a third, from {epsilon(**run()):.2f} to {half:.2f}" in text and 0.6 < half / 12.41 < 0.7
    assert f"far more, to {epsilon(**run(batch_size=7, noise_multiplier=0.5)):.2f}" in text
    four, double = (epsilon(**run(noise_multiplier=4.0, epochs=epochs)) for epochs in (30, 60))
    assert f"Less: from {four:.2f} to {double:.2f}, by {double / four:.2f}" in text
    assert f"first say ε ≤ {epsilon(**run(), accountant='rdp'):.2f}, and then ε = {epsilon(**run()):.2f}" in text
    won = {"noise_multiplier": 5.5, "batch_size": 30}
    assert f"σ = 5.5 with a batch of 30, all else as it was, gives 91 % at ε = {epsilon(**run(**won)):.2f}" in text
    settings = dataclasses.replace(scene.settings, **won)
    *_, last = train(scene.make_model(), scene.data, settings, test_data=scene.test_data)
    assert last.accuracy > scene.challenge[1] and last.epsilon < scene.challenge[0]
