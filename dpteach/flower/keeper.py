"""The one that switches off the lights: ``python -m dpteach.flower.keeper MARK FOLDER``.

It waits until its standard input closes, which happens when its parent says so *or dies in whatever way*, SIGKILL
included. Then it ends every process that carries the mark in its environment, and removes the folder.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

import psutil

VARIABLE = "DPTEACH_FEDERATION"


def marked(mark: str) -> list[psutil.Process]:
    """The processes whose :data:`VARIABLE` is ``mark``, or begins with ``mark/``; never this one.

    A mark goes from a process to its children, also to those whose parent has ended.
    """
    found = []
    for process in psutil.process_iter():
        try:
            theirs = process.environ().get(VARIABLE, "")
            if (
                process.pid != os.getpid()
                and (theirs == mark or theirs.startswith(f"{mark}/"))
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            pass  # it has ended, or is somebody else's
    return found


def end(mark: str, patience: float = 2.0) -> None:
    """End the marked processes: ask, wait up to ``patience`` seconds, then kill until none is left. 0 kills at once."""
    if patience > 0:
        alive = marked(mark)
        for process in alive:
            _quietly(process.terminate)
        psutil.wait_procs(alive, patience)
    while alive := marked(mark):  # one that was just starting shows up in the second look
        for process in alive:
            _quietly(process.kill)
        psutil.wait_procs(alive, 1)


def _quietly(action) -> None:
    with contextlib.suppress(psutil.Error):
        action()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    mark, folder = sys.argv[1:]
    sys.stdin.read()
    end(mark)
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
