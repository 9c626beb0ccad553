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
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is somebody else's
            ours = f"{process.environ().get(VARIABLE, '')}/".startswith(f"{mark}/")
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end(mark: str, patience: float = 0.5) -> None:
    """End the marked processes: ask, wait up to ``patience`` seconds, then kill until none is left. 0 kills at once."""
    sent, wait = (signal.SIGTERM, patience) if patience > 0 else (signal.SIGKILL, 1)
    while alive := marked(mark):  # again, as one that was just starting shows up in the second look
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sent)
        psutil.wait_procs(alive, wait)
        sent, wait = signal.SIGKILL, 1


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
