"""JupyterLab in a headless Chromium, for the browser tests: start both, run a notebook, drag a slider, watch the frames.

A wait ends as soon as its condition holds, and gives up after a time that grows with how slow the machine is just then:
see :func:`slowness`. What the tests know about JupyterLab stands here:

- Right after a page has loaded, Lab swallows Shift+Enter: cells are run by Lab's own commands, from inside the page.
- A promise of Lab's stayed open for ever (once, with Lab 4.2.0 on a busy machine; which one is not known): none is
  waited for without a limit.
- Lab answers a slider's value with its own rounding of it: 1.0000000000000002.
- An explorer trains in a thread named ``dpteach-train``; ``dpteach-price``, for the tight ε, may outlive it by seconds.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Two tabs at once: Chromium slows down one that it takes to be hidden.
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
]
TRAINERS = "print(sum(t.name == 'dpteach-train' for t in __import__('threading').enumerate()))"

# Every change of the picture or of the status in one cell's output, with the time at which the page had it.
WATCH = """(cell) => {
  window.frames_seen = [];
  window.frames_observer?.disconnect();
  const look = () => {
    const panels = [...cell.querySelectorAll('svg[role=img]')], text = what => cell.querySelector(what)?.textContent ?? '';
    const row = {alt: panels.map(p => p.getAttribute('aria-label')).join(' '), picture: panels.map(p => p.outerHTML).join(''),
                 status: text('.dpteach-status'), spoken: text('.dpteach-spoken')};
    const last = window.frames_seen.at(-1);
    if (row.picture !== last?.picture || row.status !== last?.status || row.spoken !== last?.spoken)
      window.frames_seen.push({...row, ms: performance.now()});
  };
  window.frames_observer = new MutationObserver(look);
  window.frames_observer.observe(cell, {subtree: true, childList: true, attributes: true});
  look();
}"""

NOTEBOOK = "window.jupyterapp.shell.currentWidget"

EXECUTE = f"""async ([code, ms]) => {{
  const future = {NOTEBOOK}.sessionContext.session.kernel.requestExecute({{code, store_history: false}});
  let text = '';
  future.onIOPub = m => {{ if (m.header.msg_type === 'stream') text += m.content.text;
                           if (m.header.msg_type === 'error') text += 'ERROR ' + m.content.evalue; }};
  await Promise.race([future.done, new Promise((_, no) => setTimeout(() => no(new Error(code + ': not done in time')), ms))]);
  return text;
}}"""


def slowness() -> float:
    """How many times slower than a quiet machine this one is now: 1 or more. Limits of time are multiplied by it."""
    began = time.perf_counter()
    for _ in range(1_000_000):
        pass
    return max(1.0, (time.perf_counter() - began) / 0.04, psutil.getloadavg()[0] / (os.cpu_count() or 1))


def new_notebook(folder: Path, name: str, *cells: str) -> str:
    """Write a notebook with these code cells; its name."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source.strip()) for source in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(notebook, folder / name)
    return name


@contextmanager
def lab_server(folder: Path):
    """JupyterLab over ``folder`` on a free loopback port, with settings of its own; yields the address, ends the server."""
    home = folder / ".home"
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--port=0",
        "--ip=127.0.0.1",
        "--IdentityProvider.token=dpteach",
        f"--ServerApp.root_dir={folder}",
        "--expose-app-in-browser",
        "--allow-root",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with running(
        command, env, folder / "lab.log", lambda: told_address(home / "runtime", "jpserver-*.json")
    ) as address:
        yield address


@contextmanager
def running(command: list[str], env: dict, log: Path, address, *, sent=signal.SIGTERM):
    """A server in a session of its own, with its words in ``log``; yields what ``address()`` says once it says something."""
    with log.open("w", encoding="utf8") as words:
        server = subprocess.Popen(command, env=env, stdout=words, stderr=words, start_new_session=True)
    try:
        deadline = time.monotonic() + 90 * slowness()
        while not (found := address()):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{' '.join(command[1:3])} did not start:\n{log.read_text(encoding='utf8', errors='replace')[-2000:]}"
                )
            time.sleep(0.2)
        yield found
    finally:
        server.send_signal(sent)
        try:
            server.wait(20 * slowness())
        except subprocess.TimeoutExpired:
            for child in psutil.Process(server.pid).children(recursive=True):
                child.kill()
            server.kill()
            server.wait()


def told_address(runtime: Path, pattern: str) -> str | None:
    """The address that a Jupyter server has written into its runtime folder; None before."""
    for path in runtime.glob(pattern):
        try:
            return json.loads(path.read_text(encoding="utf8"))["url"]
        except (ValueError, KeyError):
            pass  # still being written
    return None


def free_port() -> int:
    """A loopback port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LabPage:
    """One notebook, open in the browser."""

    def __init__(self, page):
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(30_000 * slowness())
        self.cell = page.locator(".jp-Notebook .jp-Cell").first

    def open(self, address: str, name: str) -> "LabPage":
        self.page.goto(f"{address}lab/tree/{name}?token=dpteach&reset", timeout=60_000 * slowness())
        self._wait_for_kernel(name)
        return self

    def open_beside(self, name: str) -> "LabPage":
        """Open another notebook in the same JupyterLab page: quicker than another page."""
        self.command("docmanager:open", path=name)
        self._wait_for_kernel(name)
        return self

    def _wait_for_kernel(self, name: str) -> None:
        self.page.wait_for_function(
            f"""name => window.jupyterapp && {NOTEBOOK}?.context?.path === name
            && {NOTEBOOK}.sessionContext?.session?.kernel?.status === 'idle'""",
            arg=name,
            timeout=90_000 * slowness(),
        )

    def reload(self) -> "LabPage":
        """What the browser's reload button does, after a save."""
        self.command("docmanager:save")
        name = self.page.evaluate(f"() => {NOTEBOOK}.context.path")
        self.page.reload(timeout=60_000 * slowness())
        self._wait_for_kernel(name)
        return self

    def command(self, name: str, *, cell: int | None = None, timeout: float = 30, **arguments) -> None:
        """Run one of Lab's commands, on a cell if given, and wait until it is done."""
        self.page.evaluate(
            f"""([name, args, cell, ms]) => {{
                 if (cell !== null) {NOTEBOOK}.content.activeCellIndex = cell;
                 return Promise.race([
                   window.jupyterapp.commands.execute(name, args),
                   new Promise((_, no) => setTimeout(() => no(new Error(name + ': not done in time')), ms))]).then(() => null); }}""",
            [name, arguments, cell, 1000 * timeout * slowness()],
        )

    def run_all(self, *, timeout: float = 120) -> "LabPage":
        """Run every cell, and wait until the last one has run and none has failed."""
        self.command("notebook:run-all-cells", timeout=timeout)
        assert self.failures() == []
        return self

    def run_cell(self, index: int = 0, *, timeout: float = 120) -> "LabPage":
        self.command("notebook:run-cell", cell=index, timeout=timeout)
        return self

    def end_kernel(self) -> None:
        """A training that goes on would slow down the next test."""
        self.page.evaluate(
            f"() => Promise.race([{NOTEBOOK}.sessionContext.shutdown(), new Promise(go => setTimeout(go, 30_000))])"
        )

    def close(self) -> None:
        self.end_kernel()
        self.page.close()

    def failures(self) -> list[str]:
        """The errors that the notebook's cells show."""
        return self.page.evaluate(f"""() => {NOTEBOOK}.content.widgets.flatMap(c => c.model.type === 'code' ?
            c.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue) : [])""")

    def execute(self, code: str, *, timeout: float = 60) -> str:
        """Run ``code`` in the notebook's kernel, beside its cells; what it prints."""
        return self.page.evaluate(EXECUTE, [code, 1000 * timeout * slowness()]).strip()

    def trainers(self) -> int:
        """How many threads train in the kernel."""
        return int(self.execute(TRAINERS))

    def look_at(self, index: int) -> "LabPage":
        """From here on, this cell's explorer is meant."""
        name = self.page.evaluate(
            f"""async i => {{
            const book = {NOTEBOOK}.content, name = `${{{NOTEBOOK}.context.path}} ${{i}}`;
            await Promise.race([book.scrollToItem(i, 'start'), new Promise(go => setTimeout(go, 3000))]);
            book.widgets[i].node.setAttribute('data-cell', name);
            return name; }}""",
            index,
        )
        self.cell = self.page.locator(f".jp-Notebook .jp-Cell[data-cell='{name}']")
        return self

    def watch(self) -> None:
        """Begin to record frames: see :meth:`frames`."""
        self.cell.locator("svg[role=img]").first.wait_for()
        self.cell.evaluate(WATCH)

    def frames(self) -> list[dict]:
        """What the cell has shown since :meth:`watch`: alt sentences, picture, status, what is read out, and when (in ms)."""
        return self.page.evaluate("() => window.frames_seen")

    def now(self) -> float:
        return self.page.evaluate("() => performance.now()")

    def until(self, condition: str, *, timeout: float = 20) -> float:
        """Wait for a frame ``f`` (number ``i`` of ``all``) that meets the JavaScript ``condition``; when it came, in ms."""
        try:
            handle = self.page.wait_for_function(
                f"() => window.frames_seen.find((f, i, all) => {condition})",
                timeout=1000 * timeout * slowness(),
                polling=10,
            )
        except Exception as error:
            last = {k: v for k, v in self.frames()[-1].items() if k != "picture"}
            raise AssertionError(f"no frame with {condition}; the last of {len(self.frames())}: {last}") from error
        return handle.json_value()["ms"]

    def still_for(self, seconds: float) -> bool:
        """Whether the cell shows nothing new for this long: that nothing happens can only be waited for."""
        seen = len(self.frames())
        self.page.wait_for_timeout(1000 * seconds)
        return len(self.frames()) == seen

    def slider(self, words: str = ""):
        """The slider whose description has ``words``; without: the first."""
        return self.cell.locator(".widget-hslider").filter(has_text=words).first

    def readout(self, words: str = "") -> str:
        return self.slider(words).locator(".widget-readout").inner_text()

    def drag(self, words: str, shares: list[float], *, seconds: float = 0.0) -> None:
        """Press the slider's handle and move it to each of ``shares`` (0 left, 1 right) in turn, then let go."""
        slider = self.slider(words)
        slider.scroll_into_view_if_needed()
        track, handle = (slider.locator(name).bounding_box() for name in (".noUi-base", ".noUi-handle"))
        mouse, y = self.page.mouse, handle["y"] + handle["height"] / 2
        mouse.move(handle["x"] + handle["width"] / 2, y)
        mouse.down()
        for share in shares:
            mouse.move(track["x"] + share * track["width"], y)
            if seconds:
                self.page.wait_for_timeout(1000 * seconds / len(shares))
        mouse.up()

    def type(self, words: str, text: str) -> None:
        """Type a number into the slider's readout."""
        number = self.slider(words).locator(".widget-readout")
        number.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def still_to_be(self, words: str, shown: str) -> bool:
        """Whether the readout shows this, and does so half a second later."""
        self.page.wait_for_timeout(500)
        return self.readout(words) == shown

    def place(self, words: str = "") -> float:
        """Where the slider's handle stands: 0 left, 1 right."""
        track, handle = (self.slider(words).locator(name).bounding_box() for name in (".noUi-base", ".noUi-handle"))
        return (handle["x"] + handle["width"] / 2 - track["x"]) / track["width"]

    def click(self, label: str) -> None:
        self.cell.locator("button", has_text=label).first.click()

    def stop(self) -> None:
        """Press Stop, and wait until no more frame comes."""
        self.click("Stop")
        self.until("i === all.length - 1 && /^(Stopped|Finished|Diverged)/.test(f.status)")


@contextmanager
def chromium():
    """A headless Chromium. Where there is none: skip, or fail where CI is set."""
    if CHROMIUM is None:
        message = "no Chromium on this machine: install the package 'chromium' to run the browser tests"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS, timeout=60_000 * slowness())
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser, **more) -> LabPage:
    """A page of its own: its own cookies, its own workspace."""
    return LabPage(browser.new_page(viewport={"width": 1300, "height": 1000}, **more))
