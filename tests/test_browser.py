"""The explorer in a real JupyterLab: drags by mouse, frames as the page shows them, and what goes wrong around it."""

import ast
import re
import statistics
import time

import pytest
from lab import NOTEBOOK, new_notebook, new_page, slowness

# On a quiet machine the medians are below 300 ms and 200 ms; the tests print them. Multiplied by the machine's
# slowness.
SLOWEST_FRAME, SLOWEST_STOP = 600, 400

EXPLORER = """
import torch, threading
from dpteach import Explorer, Range, Settings, models, two_moons
torch.set_num_threads(1)
explorer = Explorer(two_moons(2000), models.mlp, Settings(0.77, 1.3, epochs=600, lr=0.9), test_data=two_moons(500, seed=1),
                    ranges={"epochs": Range(1, 1000, whole=True), "batch_size": Range(1, 5000, log=True, whole=True)})
explorer
"""
STEP = r"+(/step (\d+) of 4800/.exec(f.status)?.[1] ?? 0)"


@pytest.fixture(scope="module")
def opened(lab_folder, address, browser):
    lab = new_page(browser).open(address, new_notebook(lab_folder, "explorer.ipynb", EXPLORER)).run_all()
    yield lab
    assert lab.errors == []
    lab.close()


@pytest.fixture
def lab(opened):
    """The explorer, training from its start with its first settings."""
    opened.execute(
        "explorer.stop(); explorer.wait()\n"
        "for name in explorer.controls: explorer.controls[name].value = getattr(explorer._start_settings, name)\n"
        "explorer.stop(); explorer.wait(); explorer.start()"
    )
    opened.watch()
    opened.until(
        r"/^Training: step \d\d?\d? of 4800/.test(f.status) && f.alt.startsWith('σ = 0.77, C = 1.3, 600 epochs')"
    )
    opened.watch()
    return opened


def sigma(frame: dict) -> float:
    return float(re.search(r"σ = ([\d.]+)", frame["alt"]).group(1))


def show_sigma_of_readout(lab) -> None:
    """Wait for a frame of a training with the σ that the slider shows."""
    shown = float(lab.readout("noise multiplier"))
    lab.until(f"i === all.length - 1 && f.alt.startsWith('σ = {shown:.3g},') && f.status.startsWith('Training')")


def ended(lab) -> None:
    """The page shows "Stopped" while the thread is still in its last step."""
    lab.execute("explorer.wait(10)")
    assert lab.trainers() == 0


def answers_a_drag(lab) -> None:
    pressed = lab.now()
    lab.drag("noise multiplier", [0.3 if lab.place("noise multiplier") > 0.5 else 0.7])
    lab.until(
        f"f.ms > {pressed} && f.alt.startsWith('σ = {float(lab.readout('noise multiplier')):.3g},') && "
        "f.status.startsWith('Training')"
    )


def test_frames_follow_each_other_while_training_runs(lab):
    began = lab.now()
    eighth = lab.until(f"new Set(all.slice(0, i + 1).map(f => {STEP})).size >= 8")
    assert eighth - began < 2000 * slowness()
    steps = [int(m.group(1)) for f in lab.frames() if (m := re.search(r"step (\d+) of 4800", f["status"]))]
    assert steps == sorted(steps)


def test_a_dragged_slider_shows_in_a_new_frame_within_a_moment(lab):
    waits, slow = [], []
    for k in range(10):
        before = lab.frames()[-1]
        lab.drag("noise multiplier", [0.2 + 0.06 * k])
        let_go = lab.now()
        shown = lab.until(
            f"f.ms > {let_go} && !f.alt.startsWith('σ = {sigma(before):.3g},') && f.status.startsWith('Training')"
        )
        waits.append(shown - let_go)
        slow.append(slowness())
    print(
        f"\nslider to new frame: median {statistics.median(waits):.0f} ms, {min(waits):.0f} to {max(waits):.0f}, "
        f"on a machine {statistics.median(slow):.1f} times slower than a quiet one"
    )
    assert statistics.median(waits) <= SLOWEST_FRAME * statistics.median(slow), waits
    show_sigma_of_readout(lab)


@pytest.mark.alone
def test_a_drag_of_sigma_is_answered_at_once_and_moves_the_dot_by_four_orders_of_magnitude(
    lab_folder, address, browser
):
    """Two moons, σ from 0.1 to 10 in 4 s: ε of the plan follows the mouse, and the new dot lies elsewhere, by eye."""
    code = """
import torch
from dpteach import Explorer, scenes
torch.set_num_threads(1)
scene = scenes()["two moons"]
explorer = Explorer(scene.data, scene.make_model, scene.settings, test_data=scene.test_data, baseline_lr=scene.baseline_lr)
explorer
"""
    lab = new_page(browser).open(address, new_notebook(lab_folder, "moons.ipynb", code)).run_all()
    lab.watch()
    lab.drag("noise multiplier", [-0.05])
    lab.until("f.alt.startsWith('σ = 0.1,') && f.status.startsWith('Finished')", timeout=60)
    lab.execute("explorer.wait()")
    lab.watch()
    lab.slider("noise multiplier").locator(".widget-readout").evaluate("""readout => { window.moved = [];
        new MutationObserver(() => window.moved.push(performance.now())).observe(readout, {childList: true, subtree: true}); }""")
    lab.drag("noise multiplier", [k / 100 for k in range(1, 104)], seconds=4)
    let_go, moved = lab.now(), lab.page.evaluate("() => window.moved")
    # Only a picture that shows another plan is an answer: a training that goes on draws frames too.
    frames = [f for f in lab.frames() if f["ms"] <= let_go]
    plans = [re.search(r"This run: at most ε ([\d.,]*\d)", f["alt"])[1] for f in frames]
    answers = [f["ms"] for f, plan, before in zip(frames[1:], plans[1:], plans) if plan != before]
    rate, first = len(answers) / ((let_go - moved[0]) / 1000), answers[0] - moved[0]
    print(
        f"\nwhile dragging: {rate:.1f} answers a second, the first after {first:.0f} ms; "
        f"machine {slowness():.1f} times slower than a quiet one"
    )
    assert rate >= 6 / slowness() and first <= 300 * slowness()  # the goal: 8 and 100, where nothing else runs
    lab.until("i === all.length - 1 && f.alt.startsWith('σ = 10,') && f.status.startsWith('Finished')", timeout=60)
    dots = lab.cell.evaluate("""cell => [...cell.querySelectorAll('[data-run]')].map(
        dot => [+dot.getAttribute('cx'), +dot.getAttribute('cy'), dot.textContent])""")
    (left, low, last), (right, high, first_of_drag) = dots[-1], dots[-2]
    told = [re.search(r"Run \d+: ([\d.]+)% at ε = ([\d.,]+);", words).groups() for words in (first_of_drag, last)]
    (accuracy, epsilon), (accuracy_after, epsilon_after) = [[float(x.replace(",", "")) for x in pair] for pair in told]
    assert epsilon / epsilon_after > 10_000 and accuracy - accuracy_after > 10
    assert right - left > 0.6 * 300 and low - high > 0.2 * 200  # of a frame of some 300 by 200 pixels
    # A click on the dot brings σ = 0.1 back.
    lab.cell.locator("[data-run]").nth(len(dots) - 2).click()
    lab.until("i === all.length - 1 && f.alt.startsWith('σ = 0.1,') && f.status.startsWith('Finished')", timeout=60)
    assert lab.readout("noise multiplier") == "0.100" and lab.errors == []
    lab.close()


def test_the_script_is_copied_by_a_click(lab):
    lab.execute("explorer.controls['epochs'].value = 1; explorer.wait()")
    lab.click("Copy as Opacus script")
    lab.page.evaluate(
        "() => document.addEventListener('copy', () => { window.copied = getSelection().toString() || document.activeElement.value; })"
    )
    lab.cell.locator(".dpteach-copy").click()
    copied = lab.page.evaluate("() => window.copied")
    assert copied == lab.execute("print(explorer.script())") + "\n" and "make_private" in copied
    lab.click("Copy as Opacus script")


def test_stop_stops_at_once_and_no_frame_follows(lab):
    waits, slow = [], []
    for _ in range(5):
        clicked = lab.now()
        lab.click("Stop")
        waits.append(lab.until(f"f.ms > {clicked} && f.status.startsWith('Stopped')") - clicked)
        slow.append(slowness())
        ended(lab)
        assert lab.still_for(0.7)
        again = lab.now()
        lab.click("Start")
        lab.until(f"f.ms > {again} && f.status.startsWith('Training')")
    print(
        f"\nStop: median {statistics.median(waits):.0f} ms, {min(waits):.0f} to {max(waits):.0f}, "
        f"on a machine {statistics.median(slow):.1f} times slower than a quiet one"
    )
    assert statistics.median(waits) <= SLOWEST_STOP * statistics.median(slow), waits


def test_sixty_quick_changes_end_on_the_last_setting_with_one_thread(lab):
    shares = [0.5 + 0.4 * (-1) ** k * (k / 60) for k in range(59)] + [0.75]
    lab.drag("noise multiplier", shares, seconds=3)
    show_sigma_of_readout(lab)
    assert lab.trainers() == 1
    shown = float(lab.readout("noise multiplier"))
    assert float(f"{float(lab.execute('print(explorer.run.settings.noise_multiplier)')):.3g}") == shown
    lab.stop()
    ended(lab)
    assert lab.still_for(0.5)


def test_training_goes_on_while_another_cell_runs(lab):
    lab.page.evaluate(f"""() => {{ window.cell_over = false;
        {NOTEBOOK}.sessionContext.session.kernel.requestExecute({{code: 'import time; time.sleep(4)'}})
            .done.then(() => {{ window.cell_over = true; }}); }}""")
    began = lab.now()
    lab.until(f"all.filter(f => f.ms > {began}).length >= 5 && !window.cell_over", timeout=4)
    assert not lab.page.evaluate("() => window.cell_over")
    lab.page.wait_for_function("() => window.cell_over")
    lab.stop()


def settings_of_the_run(lab) -> dict:
    return ast.literal_eval(lab.execute("explorer.stop(); explorer.wait(); print(vars(explorer.run.settings))"))


def show_all_sliders(lab) -> None:
    if not lab.slider("batch size").is_visible():
        lab.click("More:")
        lab.slider("batch size").wait_for()


@pytest.mark.parametrize(
    "typed, shown", [("4", "4.00"), ("3.14159", "3.14159"), ("0.123456789", "0.123"), ("100", "10.0")]
)
def test_a_typed_value_runs_as_typed_and_the_readout_says_it(lab, typed, shown):
    lab.type("noise multiplier", typed)
    lab.until(f"i === all.length - 1 && f.alt.startsWith('σ = {float(shown):g},')")
    assert lab.still_to_be("noise multiplier", shown)
    assert settings_of_the_run(lab)["noise_multiplier"] == float(shown)


def test_a_value_set_by_code_is_what_runs_and_what_the_page_shows(lab):
    show_all_sliders(lab)
    lab.execute(
        "for name, value in (('noise_multiplier', 8.0), ('batch_size', 1000), ('lr', 0.3)): "
        "explorer.controls[name].value = value"
    )
    lab.until("f.alt.startsWith('σ = 8,')")
    for words, shown in (("noise multiplier", "8.00"), ("batch size", "1000"), ("learning rate", "0.300")):
        assert lab.still_to_be(words, shown)
    run = settings_of_the_run(lab)
    assert (run["noise_multiplier"], run["batch_size"], run["lr"]) == (8.0, 1000, 0.3)


def test_a_dragged_value_runs_as_its_readout_says(lab):
    show_all_sliders(lab)
    for words in ("noise multiplier", "clipping norm", "learning rate", "batch size"):
        lab.drag(words, [0.35, 0.617])
    shown = [
        float(lab.readout(words)) for words in ("noise multiplier", "clipping norm", "learning rate", "batch size")
    ]
    lab.until(f"i === all.length - 1 && f.alt.startsWith('σ = {shown[0]:g}, C = {shown[1]:g},')")
    names = ("noise_multiplier", "max_grad_norm", "lr", "batch_size")
    deadline = (
        time.monotonic() + 15
    )  # the picture's words say σ and C; the last slider's change may still be on its way
    while time.monotonic() < deadline:
        running = ast.literal_eval(lab.execute("print(vars(explorer.run.settings))"))
        if [running[name] for name in names] == shown:
            break
        time.sleep(0.2)
    run = settings_of_the_run(lab)
    assert [run[name] for name in names] == shown


def test_run_all_with_two_explorers_trains_each_once(lab_folder, address, browser):
    """The page's own rounding of the first one's values comes late, while the second one is at work."""
    cells = ["import torch\nfrom dpteach import Explorer, Range, Settings, models, two_moons\ntorch.set_num_threads(1)"]
    for name, epochs in (("first", 2), ("second", 300)):
        cells += [
            f"{name} = Explorer(two_moons(2000), models.mlp, Settings(0.77, 1.3, epochs={epochs}, lr=2.0, "
            "batch_size=250), "
            f"ranges={{'epochs': Range(1, 1000, whole=True)}})\n{name}",
            f"{name}.wait()\nprint({name}.summary())",
        ]
    lab = new_page(browser).open(address, new_notebook(lab_folder, "two.ipynb", *cells)).run_all()
    lab.look_at(1).watch()
    lab.click("More:")
    lab.slider("batch size").wait_for()
    lab.page.wait_for_timeout(1500)
    assert lab.execute("print(first._thread.generation, second._thread.generation)").split() == [
        "2",
        "1",
    ]  # the second's start was a halt
    assert lab.frames()[-1]["status"].startswith("Finished") and "(PRV" in lab.cell.inner_text()
    lab.close()


def test_the_picture_speaks_its_figures(lab):
    lab.until(
        r"/σ = 0.77, C = 1.3, 600 epochs. .*Loss by step: \d\.\d at the end/.test(f.alt)"
        r" && /ε by step: at most [\d.]+ after step \d+ of 4800/.test(f.alt)"
    )


def test_a_wrong_setting_is_one_sentence_in_the_status_line(lab):
    if not lab.slider("batch size").is_visible():
        lab.click("More:")
    lab.drag("batch size", [1.0])
    lab.until("/^Can't go on: batch_size must be at most the number of records .2000., got [0-9]+$/.test(f.status)")
    assert "Traceback" not in lab.cell.inner_text()


def test_an_untouched_explorer_trains_once(lab_folder, address, browser):
    lab = new_page(browser).open(address, new_notebook(lab_folder, "untouched.ipynb", EXPLORER)).run_all()
    lab.watch()
    lab.until(f"{STEP} > 100", timeout=60)
    assert lab.execute("print(explorer._thread.generation)") == "1"
    lab.close()


def test_an_interrupt_of_the_kernel_does_not_stop_the_training_and_stop_still_does(lab):
    lab.command("notebook:interrupt-kernel")
    began = lab.now()
    lab.until(f"f.ms > {began} && new Set(all.filter(f => f.ms > {began}).map(f => {STEP})).size >= 4")
    lab.stop()
    ended(lab)
    assert lab.still_for(0.5)


def test_run_all_with_an_explorer_still_training_leaves_one_training(lab):
    for _ in range(4):
        lab.run_all()
        assert lab.trainers() == 1
    lab.watch()
    answers_a_drag(lab)
    assert lab.cell.locator(".dpteach").count() == 1


def test_two_tabs_on_one_kernel_show_the_same_explorer(lab, address, browser):
    lab.command("docmanager:save")
    other = new_page(browser).open(address, "explorer.ipynb")
    other.watch()
    began = [tab.now() for tab in (lab, other)]
    other.click("Start")  # the training of before may be over: a page can take longer to open
    for tab, start in zip((lab, other), began):
        tab.until(f"new Set(all.filter(f => f.ms > {start}).map(f => {STEP})).size >= 3")
    other.drag("noise multiplier", [0.8])
    for tab in (lab, other):
        tab.until(f"i === all.length - 1 && f.alt.startsWith('σ = {float(other.readout('noise multiplier')):.3g},')")
    assert lab.readout("noise multiplier") == other.readout("noise multiplier")
    assert abs(lab.place("noise multiplier") - other.place("noise multiplier")) < 0.02
    assert lab.trainers() == 1 and other.errors == []
    other.page.close()


def test_after_a_reload_of_the_page_the_explorer_that_trains_is_still_there(lab):
    lab.reload()
    lab.watch()
    assert lab.trainers() == 1
    answers_a_drag(lab)
    lab.run_cell().watch()
    answers_a_drag(lab)
    assert lab.trainers() == 1
    lab.stop()
    ended(lab)


def test_after_a_restart_of_the_kernel_the_cell_runs_again(lab):
    lab.page.evaluate(f"() => {NOTEBOOK}.sessionContext.session.kernel.restart()")
    assert lab.trainers() == 0
    assert "Traceback" not in lab.cell.inner_text() and lab.failures() == []
    left = lab.cell.locator(".dpteach").first
    lab.page.wait_for_function("() => !document.querySelector('.dpteach button')?.checkVisibility()")
    assert (
        left.inner_text().strip()
        == "The kernel was restarted or has ended. Run this cell again, and the cells above it first."
    )
    icons = "box => [box, ...box.querySelectorAll('*')].filter(e => e.checkVisibility() && getComputedStyle(e, '::before').content !== 'none')"
    assert left.evaluate(f"box => ({icons})(box).length") == 0
    lab.run_cell().watch()
    assert lab.trainers() == 1
    answers_a_drag(lab)
    lab.stop()
