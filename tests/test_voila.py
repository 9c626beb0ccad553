"""The playground as a web page of its own, served by Voilà: ``pip install voila``, ``voila notebooks/10_playground.ipynb``."""

import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from lab import chromium, free_port, running

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds; every wait ends as soon as what it waits for is there

# The sentence of the first live picture that tells its σ: the explorer's loss.
ALT = "() => [...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label')).find(a => a.includes('σ = ')) || ''"


@pytest.fixture
def address(tmp_path):
    if importlib.util.find_spec("voila") is None:
        pytest.skip("Voilà is not installed: pip install voila")
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "voila",
        str(ROOT / "notebooks" / "10_playground.ipynb"),
        "--no-browser",
        f"--port={port}",
        f"--VoilaExecutor.timeout={PATIENCE}",
    ]

    def answers():
        with socket.socket() as probe:
            return f"http://127.0.0.1:{port}/" if probe.connect_ex(("127.0.0.1", port)) == 0 else None

    with running(command, env, tmp_path / "voila.log", answers, sent=signal.SIGINT) as url:
        yield url


def test_the_playground_is_a_page_of_its_own_whose_sliders_train(address):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 1400})
        page.set_default_timeout(1000 * PATIENCE)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        began = time.monotonic()
        page.goto(address)
        page.wait_for_function(f"() => ({ALT})() !== ''", polling=50)
        print(f"\nVoilà: first live picture after {time.monotonic() - began:.1f} s")
        before = page.evaluate(ALT)
        assert page.locator("text=import torch").count() == 0  # an app shows no code

        row = page.locator(".widget-hslider", has_text="noise multiplier").first
        row.scroll_into_view_if_needed()
        track, handle = row.locator(".noUi-base").bounding_box(), row.locator(".noUi-handle").bounding_box()
        y = handle["y"] + handle["height"] / 2
        page.mouse.move(handle["x"] + handle["width"] / 2, y)
        page.mouse.down()
        for share in (0.5, 0.6, 0.7, 0.8, 0.9):
            page.mouse.move(track["x"] + share * track["width"], y)
            page.wait_for_timeout(30)
        page.mouse.up()
        let_go = time.monotonic()
        shown = row.locator(".widget-readout").inner_text()
        assert f"σ = {shown}," not in before
        page.wait_for_function(f"() => ({ALT})().includes('σ = {shown},')", polling=20)
        print(f"Voilà, slider to new frame: {1000 * (time.monotonic() - let_go):.0f} ms")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.dpteach-status')].some(s => s.textContent.startsWith('Finished'))"
        )
        assert errors == []
