"""One thread that always works on the newest setting."""

import sys
import threading
from collections.abc import Callable
from typing import Any

_AT_REST = 0.08  # seconds without another change: the slider has come to rest

# A training step leaves the interpreter many times. Beside a busy cell it waits one switch interval for each return:
# with this one instead of Python's own 0.005 s it makes 1.5 to 1.9 times as many steps (on two busy cores), and
# the cell about a fifth fewer. Where no other thread wants the interpreter, it costs nothing: so it stays.
_SWITCH_INTERVAL = 0.0005


class Job:
    """A setting to work on. It is over as soon as a newer one is asked for, or a Stop."""

    def __init__(self, thread: "WorkerThread", generation: int, values: dict[str, Any]):
        self.generation, self.values = generation, values
        self._thread = thread

    @property
    def over(self) -> bool:
        """Whether nobody wants its result any more."""
        return self.generation != self._thread.generation

    def wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait for ``condition()``, at most until the job is over. Whoever makes it true notifies the thread's lock."""
        with self._thread.lock:
            self._thread.lock.wait_for(lambda: self.over or condition(), timeout)

    def comes_to_rest(self) -> bool:
        """Whether no newer setting follows within a moment. The very first job need not wait: nobody drags yet."""
        if self.generation > 1:
            self.wait_until(lambda: False, _AT_REST)
        return not self.over


class WorkerThread:
    """Works on what the controls say, always the newest; the thread ends when nothing is wanted any more.

    Each request raises a generation number under a lock; whatever belongs to an older generation is dropped.

    Args:
        name: the thread's name.
        read: ``read()``, the controls' values by name.
        work: ``work(job)``; it returns early, without a word, when ``job.over``.
        fail: ``fail(job, error)``, where ``work`` has raised.
        yield_to: ``yield_to()`` for a thread of which one works at a time: called on the one that works when another
            one begins. It must cancel.
    """

    _one_at_a_time = threading.Lock()
    _latest: "WorkerThread | None" = None

    def __init__(
        self,
        name: str,
        read: Callable[[], dict[str, Any]],
        work: Callable[[Job], None],
        fail: Callable[[Job, Exception], None],
        yield_to: Callable[[], None] | None = None,
    ):
        self._name, self._read, self._work, self._fail, self._yield_to = name, read, work, fail, yield_to
        self.lock = threading.Condition(threading.RLock())
        self.generation = 0
        self.error: Exception | None = None  # that ended the last job
        self._asked: dict[str, Any] | None = None  # what the controls said last; it outlives a Stop
        self._wanted: dict[str, Any] | None = None  # what is to be worked on; None after a Stop
        self._thread: threading.Thread | None = None

    @property
    def stopped(self) -> bool:
        """Whether nothing is wanted: after a Stop."""
        return self._wanted is None

    @property
    def busy(self) -> bool:
        """Whether it is at work."""
        return self._thread is not None

    def request(self, force: bool = False) -> None:
        """Work on what the controls say, if it is not what they said before or ``force``.

        Called on the main thread, or on the thread of a JupyterLab subshell.
        """
        with self.lock:
            values = self._read()
            # A page answers a value with its own rounding of it, at any time, also while another explorer is at work.
            if values == self._asked and not force:
                return
            self._asked = values
        if self._yield_to is not None:
            self._end_the_one_before()
        with self.lock:
            self._wanted = self._asked
            self.generation += 1
            self.lock.notify_all()
            if self._thread is None:
                sys.setswitchinterval(min(_SWITCH_INTERVAL, sys.getswitchinterval()))
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()

    def cancel(self) -> bool:
        """Stop as soon as ``work`` looks; whether there was something to stop."""
        with self.lock:
            self.generation += 1
            self._wanted = None
            self.lock.notify_all()
            return self.busy

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has nothing to do; False if that took longer than ``timeout`` seconds."""
        with self.lock:
            return self.lock.wait_for(lambda: not self.busy, timeout)

    def _end_the_one_before(self) -> None:
        with WorkerThread._one_at_a_time:
            before, WorkerThread._latest = WorkerThread._latest, self
        if before is not None and before is not self and before._yield_to is not None:
            before._yield_to()
            before.wait()

    def _loop(self) -> None:
        done = 0
        while True:
            with self.lock:
                if self._wanted is None or self.generation == done:
                    self._thread = None
                    self.lock.notify_all()
                    return
                job = Job(self, self.generation, self._wanted)
            self.error = None
            try:
                self._work(job)
            except Exception as error:  # a learner never meets a traceback from inside a widget
                self._fail(job, error)
            done = job.generation
