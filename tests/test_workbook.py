"""Every live picture of the workbook, dragged once by mouse in a real JupyterLab: a new frame must answer.

Of each notebook only the cells run that its live pictures need; that all of it is right, ``pytest --nbval notebooks/``
tests.
"""

import re
import symtable
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from lab import new_notebook, new_page

from dpteach import Settings, epsilon, models, two_moons
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
    """On two moons: 2,000 records, 30 epochs, batches of 256."""
    cells = nbformat.read(NOTEBOOKS / "10_playground.ipynb", as_version=4).cells
    text = " ".join(" ".join(cell.source for cell in cells).split())

    def price(noise_multiplier=1.0, epochs=30, per_epoch=8, **more):
        return epsilon(noise_multiplier=noise_multiplier, sample_rate=1 / per_epoch, steps=epochs * per_epoch, **more)

    assert f"from {price():.2f} to {price(per_epoch=16):.2f}" in text and "falls by a third" in text
    assert 0.6 < price(per_epoch=16) / price() < 0.7
    assert f"far more, to {price(0.5, per_epoch=16):.2f}" in text
    double = price(4.0, 60) / price(4.0)
    assert f"Less: from {price(4.0):.2f} to {price(4.0, 60):.2f}, by {double:.2f}" in text
    assert f"first say ε ≤ {price(accountant='rdp'):.2f}, and then ε = {price():.2f}" in text
    assert f"σ = 8 with all else as it was gives more than 95 % at ε = {price(8.0):.2f}" in text
    *_, last = train(models.mlp(), two_moons(2000), Settings(8.0, epochs=30, lr=2.0), test_data=two_moons(1000, seed=1))
    assert last.accuracy > 0.955
