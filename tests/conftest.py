"""What every test file shares."""

from contextlib import contextmanager

import hypothesis
import pytest
import torch
from lab import chromium, lab_server

torch.set_num_threads(1)  # toy models: more threads are slower, and a second core may belong to someone else

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
