"""The explorers through a real kernel, by the messages that a page exchanges with it: storms of input and faults.

No browser, and no assumption about the page: it runs alike with ipywidgets 7 and 8, with ipykernel 6 and 7.
"""

import html
import itertools
import math
import queue
import re
import time
from contextlib import contextmanager

import pytest
from jupyter_client.manager import start_new_kernel

PATIENCE = 90  # seconds; every wait ends as soon as what it waits for is there

IMPORTS = """
import threading, time
import psutil, torch
from dpteach import Explorer, FederatedExplorer, Playground, Range, Scene, Settings, models, two_moons
torch.set_num_threads(1)
"""
# Long enough to be at work through any test, on any machine.
LONG = """
explorer = Explorer(two_moons(2000), models.mlp, Settings(0.77, 1.3, epochs=4000, lr=0.9), test_data=two_moons(500, seed=1),
                    ranges={"epochs": Range(1, 5000, whole=True)})
explorer
"""
FEDERATION = """
explorer = FederatedExplorer(two_moons(2000), models.mlp, Settings(0.77, 1.3, epochs=400, lr=0.9), rounds=20,
                             test_data=two_moons(500, seed=1))
explorer
"""
PLAYGROUND = """
scenes = {str(n): Scene(two_moons(n), models.mlp, Settings(0.77, 1.3, epochs=100, batch_size=20, lr=0.9), two_moons(500, seed=1))
          for n in (2000, 3000, 4000)}
explorer = Playground(scenes)
explorer
"""
KINDS = {"Explorer": LONG, "FederatedExplorer": FEDERATION, "Playground": PLAYGROUND}
TRAINING = "print(sum(t.name == 'dpteach-train' for t in threading.enumerate()))"


class Cell:
    """What the widgets of one executed cell have said since: a page's view of them."""

    def __init__(self, kernel, message_id):
        self.kernel, self.message_id = kernel, message_id
        self.text, self.error, self.done = "", None, False
        self.widgets: dict[str, dict] = {}  # comm id: state
        self.frames: list[tuple[float, str]] = []  # kernel's time, the picture's sentence
        self.said: list[tuple[float, str]] = []  # kernel's time, the status line
        self.pictures: list[str] = []

    def hear(self, comm, state, at):
        self.widgets.setdefault(comm, {}).update(state)
        value = state.get("value")
        if isinstance(value, str) and (alts := re.findall(r'<svg[^>]*aria-label="([^"]*)"', value)):
            self.frames.append((at, html.unescape(" ".join(alts))))
            self.pictures.append(value)
        elif isinstance(value, str) and '"dpteach-status"' in value:
            self.said.append((at, html.unescape(re.sub("<[^>]*>", "", value))))

    @property
    def status(self):
        return self.said[-1][1] if self.said else ""

    def find(self, words):
        """The comm of the control whose description begins with ``words``; the newest one."""
        return [comm for comm, state in self.widgets.items() if str(state.get("description", "")).startswith(words)][-1]

    def move(self, words, value, trait="value"):
        self.kernel.send(self.find(words), {"method": "update", "state": {trait: value}, "buffer_paths": []})

    def click(self, label):
        self.kernel.send(self.find(label), {"method": "custom", "content": {"event": "click"}})

    def ends(self, words):
        """The smallest and the largest value of a slider."""
        state = self.widgets[self.find(words)]
        is_log = state["_model_name"] == "FloatLogSliderModel"
        return [state["base"] ** state[end] if is_log else state[end] for end in ("min", "max")]

    def until_status(self, beginning, since=0.0):
        self.kernel.until(
            lambda: any(at > since and text.startswith(beginning) for at, text in self.said),
            f"a status {beginning!r}, last was {self.status!r}",
        )

    def stop(self):
        self.click("Stop")
        self.until_status("Stopped", since=self.said[-1][0])
        self.kernel.until(lambda: self.kernel.ask(TRAINING) == "0", "the end of the thread's last step")


class Kernel:
    """A kernel, and the page's end of its messages."""

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.cells: dict[str, Cell] = {}
        self.owners: dict[str, Cell] = {}  # comm id: the cell that opened it

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def restart(self):
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=PATIENCE)

    def send(self, comm, data):
        message = self.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
        self.cells[message["header"]["msg_id"]] = self.owners[comm]  # what a control opens belongs to its cell
        self.client.shell_channel.send(message)

    def begin(self, code) -> Cell:
        """Start a cell; its messages are heard in :meth:`hear`."""
        message_id = self.client.execute(code)
        cell = self.cells[message_id] = Cell(self, message_id)
        return cell

    def run(self, code, *, fails=False) -> Cell:
        cell = self.begin(code)
        self.until(lambda: cell.done, f"the end of the cell {code!r}")
        assert fails or cell.error is None, cell.error
        return cell

    def ask(self, code) -> str:
        return self.run(code).text.strip()

    def hear(self, seconds=0.05):
        """Take in what the kernel says, for some seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                message = self.client.get_iopub_msg(timeout=left)
            except queue.Empty:
                return
            self._take(message)

    def _take(self, message):
        kind, content = message["msg_type"], message["content"]
        cell = self.cells.get(message["parent_header"].get("msg_id"))
        if kind == "comm_open" and cell:
            self.owners[content["comm_id"]] = cell
            cell.hear(content["comm_id"], content["data"]["state"], message["header"]["date"].timestamp())
        elif kind == "comm_msg" and content["data"].get("method") == "update" and content["comm_id"] in self.owners:
            self.owners[content["comm_id"]].hear(
                content["comm_id"], content["data"]["state"], message["header"]["date"].timestamp()
            )
        elif cell and kind == "stream":
            cell.text += content["text"]
        elif cell and kind == "error":
            cell.error = content["ename"]
        elif cell and kind == "status" and content["execution_state"] == "idle":
            cell.done = True

    def until(self, condition, what, patience=PATIENCE):
        end = time.monotonic() + patience
        while not condition():
            assert self.manager.is_alive(), f"the kernel's process ended before {what}"
            assert time.monotonic() < end, f"not within {patience} s: {what}"
            self.hear(0.02)


@contextmanager
def new_kernel():
    kernel = Kernel()
    try:
        kernel.run(IMPORTS)
        yield kernel
    finally:
        kernel.close()


@pytest.fixture(scope="module")
def kernel():
    with new_kernel() as kernel:
        yield kernel


@pytest.fixture
def cell(kernel):
    """An explorer that has just begun a long training."""
    cell = kernel.run(LONG)
    cell.until_status("Training")
    yield cell
    kernel.run("explorer.stop(); explorer.wait()")


@pytest.fixture(params=KINDS)
def storm(kernel, request):
    """A slider of each kind of explorer, which has just begun a long training: the cell, how it moves, what it has become."""
    cell = kernel.run(KINDS[request.param])
    cell.until_status("Training")
    if request.param == "FederatedExplorer":  # its pictures do not say σ
        trained = "print(explorer.workers[0].settings.noise_multiplier)"
        yield cell, lambda value: cell.move("σ of alice", value), lambda: float(kernel.ask(trained))
    else:
        yield cell, lambda value: cell.move("noise multiplier", value), lambda: sigma(cell.frames[-1][1])
    kernel.run("getattr(explorer, 'explorer', explorer).stop(); explorer.wait()")


def sigma(alt):
    return float(re.search(r"σ = ([\d.e+-]+)", alt).group(1))


def steps(cell, since=0.0):
    return [int(m.group(1)) for at, text in cell.said if at > since and (m := re.search(r"step (\d+) of", text))]


def goes_on(cell, since=None):
    """Training makes frames now."""
    since = cell.said[-1][0] if since is None else since
    cell.kernel.until(lambda: len(set(steps(cell, since))) >= 3, f"three frames, last status {cell.status!r}")


def is_silent(cell, seconds=0.6):
    cell.kernel.hear(0.3)
    heard = len(cell.frames)
    cell.kernel.hear(seconds)
    assert len(cell.frames) == heard


def test_frames_follow_each_other(kernel, cell):
    kernel.until(lambda: len(set(steps(cell))) >= 10, "ten frames")
    assert steps(cell) == sorted(steps(cell))


def test_a_moved_slider_shows_in_a_new_frame(kernel, cell):
    waits = []
    for k in range(5):
        value = 1.5 + k
        moved = time.time()
        cell.move("noise multiplier", value)
        kernel.until(lambda value=value: abs(sigma(cell.frames[-1][1]) - value) < 0.02, f"σ = {value}")
        waits.append(cell.frames[-1][0] - moved)
        goes_on(cell)
    print(f"\nslider to new frame: median {1000 * sorted(waits)[2]:.0f} ms of {len(waits)}")
    assert sorted(waits)[2] < 2, waits


def test_stop_stops_and_a_slider_starts_again(kernel, cell):
    clicked = time.time()
    cell.stop()
    print(f"\nStop: {1000 * (cell.said[-1][0] - clicked):.0f} ms")
    is_silent(cell)
    assert kernel.ask(TRAINING) == "0"
    cell.move("clipping norm", 3.0)
    goes_on(cell)
    assert "C = 3," in cell.frames[-1][1]


def test_sixty_changes_in_three_seconds_end_on_the_last_with_one_thread(kernel, storm):
    cell, move, becomes = storm
    for k in range(60):
        move(1 + (7 * k % 60) / 20 if k < 59 else 5.5)
        kernel.hear(0.05)
    last = time.time()
    kernel.until(lambda: abs(becomes() - 5.5) < 0.02, "the last σ")
    goes_on(cell, last)
    assert abs(becomes() - 5.5) < 0.02
    assert kernel.ask(TRAINING) == "1"


def test_a_thousand_messages_at_once_end_on_the_last_with_one_thread(kernel, storm):
    cell, move, becomes = storm
    began = time.time()
    for k in range(1000):
        move(1 + (7 * k % 60) / 20 if k < 999 else 6.5)
        if k % 10 == 0:
            kernel.hear(0.001)  # a page listens too; the kernel drops what nobody takes from it
    kernel.until(lambda: abs(becomes() - 6.5) < 0.02, "the last σ")
    print(f"\n1,000 messages: the last setting was at work {time.time() - began:.1f} s after the first")
    goes_on(cell, time.time())
    assert abs(becomes() - 6.5) < 0.02
    assert kernel.ask(TRAINING) == "1"
    cell.stop()
    assert kernel.ask(TRAINING) == "0"


def test_stop_and_start_fifty_times(kernel, storm):
    cell = storm[0]
    before = int(kernel.ask("print(threading.active_count())"))
    for k in range(50):
        cell.click("Stop")
        cell.click("Start")
        kernel.hear(0.03 * (k % 3))
    goes_on(cell, time.time())
    assert kernel.ask(TRAINING) == "1"
    cell.stop()
    is_silent(cell)
    assert kernel.ask(TRAINING) == "0"
    assert int(kernel.ask("print(threading.active_count())")) <= before


def test_sixty_changes_of_a_menu_leave_one_explorer(kernel):
    """Each choice opens an explorer of its own: the one before it ends, and leaves nothing behind."""
    cell = kernel.run(PLAYGROUND)
    cell.until_status("Training")

    def alive():  # explorers and widgets
        return [
            int(v)
            for v in kernel.ask("""import gc, ipywidgets; gc.collect(); alive = gc.get_objects()
print(sum(type(thing) is Explorer for thing in alive), sum(issubclass(type(thing), ipywidgets.Widget) for thing in alive))
del alive""").split()
        ]

    def choose(scene):
        cell.move("data and model", scene, trait="index")

    choose(1)
    goes_on(cell, time.time())
    cell.stop()
    before = alive()
    for k in range(60):
        choose(k % 3 if k < 59 else 1)
        kernel.hear(0.05)
    last = time.time()
    goes_on(cell, last)
    kernel.until(lambda: kernel.ask(TRAINING) == "1", "the end of the thread before the last")
    assert kernel.ask("print(explorer.menus['scene'].value, len(explorer.explorer._data))") == "3000 3000"
    cell.stop()
    assert alive() == before


def test_of_a_cell_that_is_run_ten_times_only_the_last_explorer_trains(kernel):
    cells = [kernel.run(LONG) for _ in range(10)]
    cells[-1].until_status("Training")
    goes_on(cells[-1])
    kernel.hear(0.3)
    heard = [len(cell.frames) for cell in cells]
    goes_on(cells[-1])
    assert [len(cell.frames) for cell in cells[:-1]] == heard[:-1]
    assert kernel.ask(TRAINING) == "1"
    assert all("another explorer started" in cell.status for cell in cells[:-1] if cell.status), [
        c.status for c in cells
    ]
    cells[0].click("Start")  # the first one is still on the page, and takes over
    goes_on(cells[0], time.time())
    assert "another explorer started" in cells[-1].status
    assert kernel.ask(TRAINING) == "1"
    cells[0].stop()


def test_run_all_while_an_explorer_is_still_training(kernel):
    notebook = [
        LONG,
        "print('between')",
        LONG.replace("explorer", "second").replace("epochs=4000", "epochs=20"),
        "second.wait(); print(second.summary())",
        LONG.replace("explorer", "third"),
    ]
    for _ in range(3):  # the third explorer still trains when everything is run again
        cells = [kernel.begin(code) for code in notebook]
        kernel.until(lambda cells=cells: all(cell.done for cell in cells), "all cells")
        assert [cell.error for cell in cells] == [None] * 5
        assert "training accuracy" in cells[3].text or "test accuracy" in cells[3].text
        assert cells[2].status.startswith("Finished")
        goes_on(cells[4], time.time() - 5)
        assert kernel.ask(TRAINING) == "1"
    cells[4].stop()


@pytest.mark.alone
def test_frames_go_on_while_another_cell_is_busy(kernel, cell):
    def frames_of_4_s(code):
        """Frames while ``code`` runs for 4 s, by the kernel's clock."""
        heard = len(cell.frames)
        other = kernel.run(code + "\nprint(end)")
        return sum(at < float(other.text) for at, _ in cell.frames[heard:])

    alone = frames_of_4_s("end = time.time() + 4; time.sleep(4)")
    beside = frames_of_4_s("end = time.time() + 4\nwhile time.time() < end: sum(range(1000))")
    print(f"\nframes in 4 s: {alone}; beside a busy cell: {beside}")
    assert beside >= alone / 5 and beside >= 2


def test_an_interrupt_ends_the_running_cell_and_not_the_training(kernel, cell):
    kernel.manager.interrupt_kernel()  # nothing runs: nothing ends
    goes_on(cell, time.time())
    waiting = kernel.begin("explorer.wait()")
    kernel.hear(1)
    assert not waiting.done
    kernel.manager.interrupt_kernel()
    kernel.until(lambda: waiting.done, "the end of the waiting cell")
    assert waiting.error == "KeyboardInterrupt"
    goes_on(cell, time.time())
    assert kernel.ask(TRAINING) == "1"
    cell.stop()
    is_silent(cell)
    cell.click("Start")
    goes_on(cell, time.time())


def test_a_restarted_kernel_trains_again_when_the_cells_are_run():
    with new_kernel() as kernel:
        kernel.run(LONG).until_status("Training")
        process = int(kernel.ask("print(psutil.Process().pid)"))
        kernel.restart()
        assert int(kernel.ask("import psutil; print(psutil.Process().pid)")) != process
        assert kernel.run("explorer", fails=True).error == "NameError"
        kernel.run(IMPORTS)
        cell = kernel.run(LONG)
        goes_on(cell, 0)
        cell.stop()
        assert kernel.ask(TRAINING) == "0"


SMALL = """
explorer = Explorer(two_moons(120), models.mlp, Settings(1.0, 1.0, epochs=3, batch_size=30, lr=0.5), sliders=SLIDERS)
explorer
""".replace("SLIDERS", "('noise_multiplier', 'max_grad_norm', 'epochs', 'lr', 'batch_size', 'target_delta')")
NAMES = ("noise multiplier", "clipping norm", "epochs", "learning rate", "batch size", "δ")
CORNERS = [
    *({name: end} for name in NAMES for end in (0, 1)),
    {"noise multiplier": 0, "clipping norm": 1},
    {"noise multiplier": 1, "clipping norm": 1, "learning rate": 1},
    {"epochs": 0, "batch size": 1},
    dict.fromkeys(NAMES, 0),
    dict.fromkeys(NAMES, 1),
]


FEDERATED = """
explorer = FederatedExplorer(two_moons(160), models.mlp, Settings(1.0, 1.0, epochs=1, batch_size=40, lr=0.5), rounds=2, skew=0.3,
                             test_data=two_moons(100, seed=1))
explorer
"""
SHARED = ("σ of alice", "σ of bob", "rounds", "alice's share", "label skew")
FEDERATED_CORNERS = [
    *({name: end} for name in SHARED for end in (0, 1)),
    {"alice's share": 0, "label skew": 1},
    {"alice's share": 1, "label skew": 1},
    dict.fromkeys(SHARED, 0),
    dict.fromkeys(SHARED, 1),
]


def in_words(corner):
    return ", ".join(f"{name} {('min', 'max')[end]}" for name, end in corner.items())


def assert_sound(
    cell,
    ending=r"Finished: training accuracy \d+%, without privacy \d+%( at learning rate [\d.]+)?\.|Diverged at step \d+: .* Try a lower",
):
    """The last picture draws finite numbers only, with sentences that say them; the status says how the run ended."""
    drawn = " ".join(re.findall(r'(?:points|d|cx|cy|x|y|x1|x2|y1|y2|width|height)="([^"]*)"', cell.pictures[-1]))
    assert drawn and not re.search("nan|inf", drawn, re.IGNORECASE)
    assert all(math.isfinite(float(n)) for n in re.findall(r"-?\d[\d.]*(?:e[+-]?\d+)?", drawn))
    assert re.match(ending, cell.status)
    assert "nan" not in cell.frames[-1][1].lower(), cell.frames[-1][1]


def at_the_corner(kernel, code, corner):
    """Run the cell, move its sliders to the corner, wait for the end of that run."""
    cell = kernel.run(code)
    cell.until_status("Finished")
    kernel.run("explorer.wait()")
    asked = time.time()
    for name, end in corner.items():
        cell.move(name, cell.ends(name)[end])
    kernel.until(
        lambda: any(at > asked and text.startswith(("Finished", "Diverged")) for at, text in cell.said),
        f"the end of the run, last was {cell.status!r}",
    )
    kernel.run("explorer.wait()")
    kernel.hear(0.2)
    assert kernel.ask("print(explorer.error)") == "None"
    summary = kernel.ask("print(explorer.summary())")
    assert "ε" in summary and "nan" not in summary, summary
    return cell


@pytest.mark.parametrize("corner", FEDERATED_CORNERS, ids=in_words)
def test_every_slider_of_a_federation_at_its_ends_gives_a_finite_explained_picture(corner, kernel):
    cell = at_the_corner(kernel, FEDERATED, corner)
    assert_sound(cell, r"Finished: test accuracy of the average \d+%\.|Diverged in round \d+: .* Try a lower")
    price = [html.unescape(s["value"]) for s in cell.widgets.values() if "Price of" in str(s.get("value"))][-1]
    assert re.search(r"alice ε [=≤] [\d.]+.*; bob ε [=≤] [\d.]+", price), price


@pytest.mark.parametrize("corner", CORNERS, ids=in_words)
def test_every_slider_at_its_ends_gives_a_finite_explained_picture(corner, kernel):
    cell = at_the_corner(kernel, SMALL, corner)
    assert_sound(cell)
    price = [html.unescape(s["value"]) for s in cell.widgets.values() if "Price of" in str(s.get("value"))][-1]
    assert re.search(r"ε [=≤] [\d.]+ at δ = ", price), price


def test_a_loss_that_is_not_a_number_ends_the_run_and_says_so(kernel):
    cell = kernel.run(SMALL.replace("sliders=", "ranges={'lr': Range(0.01, 1e38, log=True)}, sliders="))
    cell.until_status("Finished")
    cell.move("learning rate", 1e38)
    cell.until_status("Diverged")
    kernel.run("explorer.wait()")
    assert_sound(cell)
    assert int(kernel.ask("print(len(explorer.steps))")) < int(kernel.ask("print(explorer.steps[-1].steps)"))
    assert "Diverged at step" in kernel.ask("print(explorer.summary())")
    moved = time.time()
    cell.move("learning rate", 0.5)
    cell.until_status("Finished", since=moved)


def test_a_hundred_runs_leave_memory_and_threads_as_they_were(kernel):
    cell = kernel.run(SMALL)
    figures = """import gc; gc.collect(); alive = gc.get_objects()
own = [thing for thing in alive if str(type(thing)).startswith(("<class 'dpteach", "<class 'ipywidgets", "<class 'torch"))]
print(psutil.Process().memory_info().rss / 2**20, threading.active_count(), len(alive), len(own)); del alive, own"""

    sigmas = itertools.cycle([1.2, 1.4, 1.6, 1.8, 2.0])

    def runs(count):
        for _ in range(count):
            asked = time.time()
            cell.move("noise multiplier", next(sigmas))
            cell.until_status("Finished", since=asked)
        kernel.run("explorer.wait()")
        return [float(v) for v in kernel.ask(figures).split()]

    runs(20)
    memory, threads, objects, own = runs(1)
    memory_after, threads_after, objects_after, own_after = runs(100)
    print(
        f"\n100 runs: {memory:.0f} to {memory_after:.0f} MB, {threads:.0f} to {threads_after:.0f} threads, "
        f"{objects:.0f} to {objects_after:.0f} objects, {own:.0f} to {own_after:.0f} of them our own"
    )
    assert memory_after - memory < 20
    assert threads_after <= threads
    assert own_after - own < 50
    assert objects_after - objects < 10_000  # the kernel's own sockets and threads come and go: 2,000 up or down
