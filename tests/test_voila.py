"""The playground as a web page of its own, served by Voilà: ``pip install voila``, ``voila notebooks/10_playground.ipynb``."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import chromium

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds; every wait ends as soon as what it waits for is there

# The sentence of the first live picture that tells its σ: the explorer's loss.
ALT = "() => [...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label')).find(a => a.includes('σ = ')) || ''"


@pytest.fixture
def address(tmp_path):
    if importlib.util.find_spec("voila") is None:
        pytest.skip("Voilà is not installed: pip install voila")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
           "IPYTHONDIR": str(tmp_path / "ipython")}
    with (tmp_path / "voila.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "voila", str(ROOT / "notebooks" / "10_playground.ipynb"), "--no-browser", f"--port={port}",
             f"--VoilaExecutor.timeout={PATIENCE}"],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"Voilà did not start:\n{(tmp_path / 'voila.log').read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


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
        page.wait_for_function("() => [...document.querySelectorAll('[role=status]')].some(s => s.textContent.startsWith('Finished'))")
        assert errors == []
