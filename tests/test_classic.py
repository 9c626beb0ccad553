"""The explorer in classic Notebook 6 with ipywidgets 7, the nearest to Colab's page that can be run elsewhere.

The workbook's own environment has neither: ``.ci/colab`` makes one that has.
"""

import importlib.metadata
import os
import re
import sys

import pytest
from lab import chromium, free_port, new_notebook, running, told_address

PATIENCE = 90  # seconds; every wait ends as soon as what it waits for is there

EXPLORER = """
import torch, threading
from dpteach import Explorer, Range, Settings, models, two_moons
torch.set_num_threads(1)
explorer = Explorer(two_moons(2000), models.mlp, Settings(0.77, 1.3, epochs=4000, lr=0.9), test_data=two_moons(500, seed=1),
                    ranges={"epochs": Range(1, 5000, whole=True)})
explorer
"""

WATCH = """() => {
  window.frames_seen = [];
  const look = () => {
    const svg = document.querySelector('#notebook svg[role=img]'), status = document.querySelector('#notebook .dpteach-status');
    const row = {alt: svg ? svg.getAttribute('aria-label') : '', status: status ? status.textContent : ''};
    const last = window.frames_seen[window.frames_seen.length - 1] || {};
    if (row.alt !== last.alt || row.status !== last.status) window.frames_seen.push({...row, ms: performance.now()});
  };
  new MutationObserver(look).observe(document.querySelector('#notebook'), {subtree: true, childList: true, attributes: true});
  look();
}"""


def notebook_version():
    try:
        return importlib.metadata.version("notebook")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if not notebook_version().startswith("6."):
        message = f"classic Notebook 6 is needed, found {notebook_version()}: .ci/colab has it"
        pytest.fail(message) if os.environ.get("DPTEACH_STACK") == "colab" else pytest.skip(message)
    folder = tmp_path_factory.mktemp("classic")
    new_notebook(folder, "explorer.ipynb", EXPLORER)
    home = folder / ".home"
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [
        sys.executable,
        "-m",
        "notebook",
        "--no-browser",
        f"--port={free_port()}",
        "--ip=127.0.0.1",
        "--allow-root",
        "--NotebookApp.token=dpteach",
        f"--notebook-dir={folder}",
    ]  # with port 0, Notebook 6 does not say which it got
    with running(
        command, env, folder / "notebook.log", lambda: told_address(home / "runtime", "nbserver-*.json")
    ) as address:
        yield address


@pytest.fixture(scope="module")
def page(address):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(1000 * PATIENCE)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}notebooks/explorer.ipynb?token=dpteach")
        page.wait_for_function(
            "() => { const n = window.Jupyter?.notebook; "
            "return n?.kernel?.is_connected() && n.kernel.widget_manager && !n.kernel_busy; }"
        )
        page.wait_for_timeout(
            2000
        )  # the page asks the kernel for widgets that are there already, and hears no new ones
        page.evaluate("() => Jupyter.notebook.execute_all_cells()")
        page.locator("#notebook svg[role=img]").first.wait_for()
        page.evaluate(WATCH)
        yield page
        assert errors == []


def until(page, condition, since=0.0):
    """Wait for a frame, newer than ``since``, that meets the JavaScript ``condition`` on ``f``; the frame."""
    found = page.wait_for_function(f"() => window.frames_seen.find(f => f.ms > {since} && {condition})", polling=20)
    return found.json_value()


def now(page):
    return page.evaluate("() => performance.now()")


def sigma(frame):
    return float(re.search(r"σ = ([\d.]+)", frame["alt"]).group(1))


def slider(page, words):
    return page.locator("#notebook .widget-hslider", has_text=words).first


def test_frames_move_in_classic_notebook(page):
    assert importlib.metadata.version("ipywidgets").startswith("7.")
    page.wait_for_function("() => new Set(window.frames_seen.map(f => f.status)).size >= 8")
    steps = [
        int(m.group(1))
        for f in page.evaluate("() => window.frames_seen")
        if (m := re.search(r"step (\d+) of", f["status"]))
    ]
    assert len(set(steps)) >= 7 and steps == sorted(steps)


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_slider_dragged_by_mouse_starts_a_training_with_its_value(page, share):
    before = sigma(page.evaluate("() => window.frames_seen[window.frames_seen.length - 1]"))
    row = slider(page, "noise multiplier")
    track, handle = row.locator(".ui-slider").bounding_box(), row.locator(".ui-slider-handle").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    for k in range(1, 11):
        page.mouse.move(handle["x"] + k / 10 * (track["x"] + share * track["width"] - handle["x"]), middle)
        page.wait_for_timeout(30)
    page.mouse.up()
    let_go = now(page)
    shown = float(row.locator(".widget-readout").inner_text())
    assert abs(shown - before) > 0.2
    frame = until(page, f"f.alt.includes('σ = {shown:.3g},') && f.status.startsWith('Training')", let_go)
    print(f"\nclassic Notebook, slider to new frame: {frame['ms'] - let_go:.0f} ms")
    page.wait_for_timeout(500)
    assert sigma(page.evaluate("() => window.frames_seen[window.frames_seen.length - 1]")) == float(f"{shown:.3g}")


def test_stop_and_start_work(page):
    clicked = now(page)
    page.locator("#notebook button", has_text="Stop").first.click()
    stopped = until(page, "f.status.startsWith('Stopped')", clicked)
    print(f"\nclassic Notebook, Stop: {stopped['ms'] - clicked:.0f} ms")
    page.wait_for_timeout(300)
    seen = page.evaluate("() => window.frames_seen.length")
    page.wait_for_timeout(700)
    assert page.evaluate("() => window.frames_seen.length") == seen
    clicked = now(page)
    page.locator("#notebook button", has_text="Start").first.click()
    until(page, "f.status.startsWith('Training')", clicked)
