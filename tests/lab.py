"""JupyterLab in a headless Chromium, for the browser tests: start both, run a notebook, drag a slider, watch the frames."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
CHROMIUM_ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]

# Every change of a picture or a status, with the time at which the page had it.
WATCH = """() => {
  window.frames_seen = [];
  const look = () => {
    const svg = document.querySelector('.jp-Notebook svg[role=img]'), status = document.querySelector('.jp-Notebook [role=status]');
    const row = {alt: svg ? svg.getAttribute('aria-label') : '', status: status ? status.textContent : ''};
    const last = window.frames_seen[window.frames_seen.length - 1] || {};
    if (row.alt !== last.alt || row.status !== last.status) window.frames_seen.push({...row, ms: performance.now()});
  };
  new MutationObserver(look).observe(document.querySelector('.jp-Notebook'), {subtree: true, childList: true, attributes: true});
  look();
}"""

EXECUTE = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({code, store_history: false});
  let text = '';
  future.onIOPub = m => { if (m.header.msg_type === 'stream') text += m.content.text;
                          if (m.header.msg_type === 'error') text += 'ERROR ' + m.content.evalue; };
  await future.done;
  return text;
}"""


@contextmanager
def lab_server(folder: Path):
    """JupyterLab over ``folder`` on a free loopback port, with settings of its own; yields the address, ends the server."""
    home = folder / ".home"
    env = {
        **os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    log = (folder / "lab.log").open("w")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--ip=127.0.0.1", "--IdentityProvider.token=dpteach",
        f"--ServerApp.root_dir={folder}", "--expose-app-in-browser", "--allow-root", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _address(home / "runtime", server, folder / "lab.log")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


def _address(runtime: Path, server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())["url"]
            except (ValueError, KeyError):
                pass  # still being written
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


class LabPage:
    """One notebook, open in the browser."""

    def __init__(self, page):
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, address: str, name: str) -> "LabPage":
        self.page.goto(f"{address}lab/tree/{name}?token=dpteach&reset")
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=90_000
        )
        return self

    def run_all(self, *, timeout: float = 120) -> "LabPage":
        """Run every cell and wait until the last one has run."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')", None)
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'",
            timeout=timeout * 1000,
        )
        return self

    def execute(self, code: str) -> str:
        """Run ``code`` in the notebook's kernel, beside its cells; what it prints."""
        return self.page.evaluate(EXECUTE, code)

    def watch(self) -> None:
        """Begin to record frames: see :meth:`frames`."""
        self.page.locator(".jp-Notebook svg[role=img]").first.wait_for(timeout=30_000)
        self.page.evaluate(WATCH)

    def frames(self) -> list[dict]:
        """What the page has shown since :meth:`watch`: alt sentence, status, and when (in ms)."""
        return self.page.evaluate("() => window.frames_seen")

    def now(self) -> float:
        return self.page.evaluate("() => performance.now()")

    def until(self, condition: str, *, timeout: float = 10) -> float:
        """Wait for a frame that meets the JavaScript ``condition`` on ``f``; when it came, in ms."""
        handle = self.page.wait_for_function(
            f"() => window.frames_seen.find((f, i) => {condition})", timeout=timeout * 1000, polling=10
        )
        return handle.json_value()["ms"]

    def slider(self, words: str):
        """The slider whose description is ``words``."""
        row = self.page.locator(".jp-Notebook .widget-slider, .jp-Notebook .jupyter-widgets.widget-hslider").filter(has_text=words)
        return row.first

    def drag(self, words: str, shares: list[float], *, seconds: float = 0.0) -> None:
        """Press the slider's handle and move it to each of ``shares`` (0 left, 1 right) in turn, then let go."""
        track = self.slider(words).locator(".noUi-base").bounding_box()
        handle = self.slider(words).locator(".noUi-handle").bounding_box()
        mouse, y = self.page.mouse, handle["y"] + handle["height"] / 2
        mouse.move(handle["x"] + handle["width"] / 2, y)
        mouse.down()
        for share in shares:
            mouse.move(track["x"] + share * track["width"], y)
            if seconds:
                self.page.wait_for_timeout(1000 * seconds / len(shares))
        mouse.up()

    def click(self, label: str) -> None:
        self.page.locator(".jp-Notebook button", has_text=label).first.click()


@contextmanager
def chromium():
    """A headless Chromium. Where there is none: skip, or fail where CI is set."""
    if CHROMIUM is None:
        message = "no Chromium on this machine: install the package 'chromium' to run the browser tests"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser) -> LabPage:
    """A page of its own: its own cookies, its own workspace."""
    return LabPage(browser.new_page(viewport={"width": 1300, "height": 1000}))
