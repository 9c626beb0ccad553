"""What every test file shares."""

import os
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch
from lab import chromium, lab_server

try:
    import fcntl
except ImportError:  # Windows: what measures time has company there
    fcntl = None

torch.set_num_threads(1)  # toy models: more threads are slower, and a second core may belong to someone else


class Turnstile:
    """Of the processes that run the tests, one that has a test marked ``alone`` waits until the others stand still.

    Each test holds the floor: shared, or, if it is marked, for itself. Whoever waits for the floor holds the gate, so
    that nobody gets in before.
    """

    def __init__(self, run: int):
        self.gate, self.floor = (Path(tempfile.gettempdir(), f"dpteach-{run}.{name}") for name in ("gate", "floor"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        with ExitStack() as held:
            floor = held.enter_context(self.floor.open("w"))
            with self.gate.open("w") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(floor, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
            return (yield)


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: measures time; no other test runs beside it")
    if fcntl and hasattr(config, "workerinput"):
        config.pluginmanager.register(Turnstile(os.getppid()))


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        for path in vars(Turnstile(os.getpid())).values():
            path.unlink(missing_ok=True)


# The same examples in every run: a red test is red for everybody.
hypothesis.settings.register_profile("dpteach", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dpteach")


@pytest.fixture(scope="session")
def lab_folder(tmp_path_factory):
    """The folder that the one JupyterLab of all browser tests serves."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def address(lab_folder):
    with lab_server(lab_folder) as url:
        yield url


@pytest.fixture(scope="module")  # not longer: while it is open, its event loop is in the way of other tests
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def refuses():
    """Expect, in a ``with`` statement, one ValueError in one line: the argument, its value, what it may be."""

    @contextmanager
    def check(name, value):
        with pytest.raises(ValueError) as caught:
            yield
        message = str(caught.value)
        assert message.startswith(f"{name} must be ") and f"got {value!r}" in message and "\n" not in message, message

    return check
