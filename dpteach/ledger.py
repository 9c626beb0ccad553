"""What training on one set of records has cost so far: an account that is written before each training.

A ledger's file is always whole: each charge writes a new one beside it, forces it to the disk and puts it in the old
one's place. Whatever can't be read, or is not what it was, is an error and never an empty account.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import operator
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock

from dpteach.accounting import MAX_STEPS, _of_history, _question, _setting

_FORMAT, _VERSION = "dpteach-ledger", 2
_HEAD = (
    f'{{"format": "{_FORMAT}", "version": {_VERSION}, '
    '"columns": ["noise_multiplier", "sample_rate", "steps", "times"], "charges": [\n'
).encode()
_WINDOWS = os.name == "nt"
_NO_LINKS, _BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)
_IN_MEMORY = threading.Lock()
_T = TypeVar("_T")


@dataclass(frozen=True)
class Charge:
    """One entry of a :class:`Ledger`: so many steps with this noise multiplier σ and this sample rate q."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class _Account(NamedTuple):
    id: str = ""
    rows: tuple[tuple[float, float, int, int], ...] = ()  # σ, q, steps, and how many such charges came in a row
    charges: int = 0
    steps: int = 0
    data: bytes = b""  # the file that says so

    def extends(self, other: "_Account") -> bool:
        last = len(other.rows) - 1
        if last < 0:
            return True
        same = len(self.rows) > last and self.rows[:last] == other.rows[:last]
        return same and self.rows[last][:3] == other.rows[last][:3] and self.rows[last][3] >= other.rows[last][3]

    def charged(self, sigma: float, q: float, steps: int) -> "_Account":
        rows, lines = self.rows, self.data[: self.data.rfind(b'\n], "id": "')] if self.data else _HEAD
        again = bool(rows) and rows[-1][:3] == (sigma, q, steps)
        row = (sigma, q, steps, rows[-1][3] + 1 if again else 1)
        if again:
            rows, lines = rows[:-1], lines[: lines.rfind(b"\n") + 1]
        elif rows:
            lines += b",\n"
        data = _sealed(lines + _line(row), self.id) if self.id else b""
        return _Account(self.id, (*rows, row), self.charges + 1, self.steps + steps, data)


class Ledger:
    """What training on one data set has cost so far, over all its runs: write the charge first, then train.

    A charge that is written *before* the training it pays for also counts a training that was killed half-way. With a
    ``path`` the ledger lives in a file: it outlasts the process, and several processes can charge it at the same time.
    A ledger belongs to one set of records. Two sets without a common record have two ledgers, and their ε are never
    added (parallel composition).

    The file is found once, when the ledger is opened: links are followed then, and a later ``chdir`` changes nothing.
    From then on this object refuses to go on if the file is gone, is another ledger, or has lost a charge that it has
    seen. What no program can see is a file that was replaced by an older copy while none was running, or by one that
    was then charged alike: back up, but restore with care.

    Args:
        path: a ledger's file; None keeps the ledger in memory. As an attribute, absolute.
        new: make the file, which must not exist yet, in a folder that exists. Only its owner can read and write it; on
            Windows, whoever may do so in the folder.

    Raises:
        ValueError: if there is no such file (with ``new``: if there is one, or no folder), or it has several hard
            links, as a charge would part them; if it is damaged, of another version, or not a ledger. It is left as it
            is: an account that can't be read must not start again at zero.

    >>> ledger = Ledger()
    >>> for _ in range(5):  # the two-worker blog post of 2020: five rounds of 235 steps
    ...     serial_number = ledger.charge(noise_multiplier=1.2, sample_rate=128 / 30_000, steps=235)
    >>> round(ledger.epsilon(target_delta=1e-5, accountant="rdp-classic"), 2)
    1.01
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, new: bool = False):
        self.path: Path | None = None
        self._seen = _Account()
        if path is not None and new:
            self._make(Path(path))
        elif path is not None:
            self._open(Path(path))

    @property
    def id(self) -> str:
        """The file's own random identity; empty in memory, and in a file of the first edition until its next charge."""
        return self._account().id

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Every charge, in the order in which they were made."""
        return tuple(Charge(sigma, q, steps) for sigma, q, steps, times in self._account().rows for _ in range(times))

    @property
    def count(self) -> int:
        """How many charges were made."""
        return self._account().charges

    @property
    def steps(self) -> int:
        """How many steps were paid for, at whatever setting."""
        return self._account().steps

    def charge(self, *, noise_multiplier: float, sample_rate: float, steps: int) -> int:
        """Write down ``steps`` steps that are about to run. When this returns, a file is on the disk.

        Args:
            noise_multiplier: σ, 0 or from 1e-100 to 1e100; 0 makes ε infinite from here on.
            sample_rate: q in (0, 1].
            steps: number of steps, >= 0; all charges together at most 10¹⁵.

        Returns:
            The charge's serial number: how many charges the ledger had before. No two charges get the same one, also if
            two processes charge at the same time.

        Raises:
            ValueError: if an argument is out of its range, or the file can't be read or is not what it was. Then
                nothing is written: don't train.
            OSError: if the file can't be written. Don't train.
        """
        sigma, q, steps = _setting(noise_multiplier, sample_rate, steps)
        with self._lock():  # read, add and write as one
            account = self._account(write=True)
            if account.steps + steps > MAX_STEPS:
                left = MAX_STEPS - account.steps
                raise ValueError(f"steps must be <= {left:,} in a ledger that has {account.steps:,}, got {steps!r}")
            if self.path is not None and not account.id:  # in a file of the first edition
                lines = b",\n".join(map(_line, account.rows))
                account = account._replace(id=secrets.token_hex(16), data=_sealed(_HEAD + lines, ""))
            charged = account.charged(sigma, q, steps)
            if self.path is not None:
                _write(self.path, charged.data, self.path.stat())
            self._seen = charged
        return account.charges

    def epsilon(self, *, target_delta: float = 1e-5, accountant: str = "prv") -> float:
        """ε of everything that was charged, at ``target_delta``.

        Args and errors as for :func:`dpteach.accounting.epsilon`. Charges with different σ or q are composed as they
        are. Only if there are more different ones than the accountant can price in seconds (16; 128 by RDP), each is
        first rounded to a little less noise and a little higher rate: ε is then a bound that is less tight.
        """
        delta, _ = _question(target_delta, accountant)
        stretches: dict[tuple[float, float], int] = collections.Counter()
        for sigma, q, steps, times in self._account().rows:
            stretches[sigma, q] += steps * times
        return _of_history(tuple((*key, steps) for key, steps in stretches.items()), delta, accountant)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"Ledger({where}, {self.count} charges, {self.steps} steps)"

    def _open(self, path: Path) -> None:
        try:
            self.path = path.resolve(strict=True)
        except (OSError, RuntimeError):  # nothing there, or links in a circle
            raise ValueError(
                f"path must be a ledger that exists, got {str(path)!r}. If these records have one, restore it: what "
                "they have cost stands in it. If nothing was ever trained on them, make one: Ledger(path, new=True)"
            ) from None
        self._account()  # a damaged file is an error now, not after the first training

    def _make(self, path: Path) -> None:
        if os.path.lexists(path):
            raise ValueError(f"path must be a new file with new=True, got {str(path)!r}: leave out new to open it")
        if not path.parent.is_dir():
            raise ValueError(f"path must be in a folder that exists, got {str(path)!r}")
        self.path, name = path.parent.resolve() / path.name, secrets.token_hex(16)
        self._seen = _Account(name, data=_sealed(_HEAD, name))
        with self._lock(new=True):
            if os.path.lexists(self.path):  # another process was quicker
                raise ValueError(f"path must be a new file with new=True, got {str(path)!r}")
            _write(self.path, self._seen.data)

    def _lock(self, new: bool = False) -> contextlib.AbstractContextManager[Any]:
        if self.path is None:
            return _IN_MEMORY
        if not new and not os.path.lexists(self.path):  # a lock file would need, and make, the folder
            raise self._damaged("it is gone")
        if not os.access(self.path.parent, os.W_OK):  # filelock would wait for the right to write
            raise PermissionError(errno.EACCES, "The folder of a ledger must allow to write", str(self.path.parent))
        lock = f"{self.path}.lock"
        if os.path.islink(lock):  # older versions of filelock follow it
            raise OSError(errno.ELOOP, "The lock of a ledger must not be a link", lock)
        return FileLock(lock, timeout=30)

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a readable ledger ({why}). It says what has been spent, so nothing may train without "
            "it: restore it from a backup, or move it away only if no model trained on this data is ever released."
        )

    def _account(self, write: bool = False) -> _Account:
        """What the file says now; an error if that is not what this object has seen, or more."""
        seen = self._seen  # looked at before the file is: another thread may charge in between
        if self.path is None:
            return seen
        data = self._read(self.path, write)
        if seen.data and data == seen.data:
            return seen
        try:
            account = _parsed(data)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            name = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise self._damaged(f"{name}{error}") from error
        if seen.data and seen.id not in ("", account.id):
            raise self._damaged("it is another ledger than the one that was opened")
        if not account.extends(seen):
            raise self._damaged("it lacks charges that it had before")
        self._seen = account
        return account

    def _read(self, path: Path, write: bool) -> bytes:
        flags = (os.O_RDWR if write else os.O_RDONLY) | getattr(os, "O_NONBLOCK", 0) | _NO_LINKS | _BINARY
        try:
            if not _NO_LINKS and os.path.islink(path):
                raise OSError(errno.ELOOP, "it is a link")
            with open(_patiently(os.open, path, flags), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise self._damaged("it is not a file")
                if found.st_nlink > 1:
                    raise ValueError(
                        f"{path} must have one name, got {found.st_nlink} hard links: the next charge would make "
                        "two ledgers of them. Remove the other names"
                    )
                return file.read()
        except FileNotFoundError:
            raise self._damaged("it is gone") from None
        except OSError as error:
            # Windows has no right to open a folder
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR) or os.path.isdir(path):
                raise self._damaged("it is not a file any more") from None
            raise


def _write(path: Path, data: bytes, old: os.stat_result | None = None) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS | _BINARY, 0o600)
    try:
        with open(descriptor, "wb") as file:
            if old is not None and not _WINDOWS:
                with contextlib.suppress(PermissionError):  # only root can give a file away
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        _patiently(os.replace, part, path)  # whole or not at all
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    if not _WINDOWS:  # the new name must be on the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _patiently(action: Callable[..., _T], *args: Any) -> _T:
    """``action(*args)``; on Windows again for a second, which refuses while another process has the file open."""
    deadline = time.monotonic() + 1
    while True:
        try:
            return action(*args)
        except PermissionError:
            if not _WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _line(row: tuple[float, float, int, int]) -> bytes:
    return json.dumps(row)[1:-1].encode()


def _sealed(lines: bytes, name: str) -> bytes:
    body = lines + f'\n], "id": "{name}"'.encode()
    return body + f', "sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def _parsed(data: bytes) -> _Account:
    def refused(constant: str) -> Any:
        raise ValueError(f"it holds {constant}")

    content = json.loads(data, parse_constant=refused)
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']!r}")
    if content["version"] == 1:
        return _parsed_first_edition(content, data)
    if content["version"] != _VERSION:
        raise ValueError(f"its version is {content['version']!r}, this program reads 1 and {_VERSION}")
    if data != _sealed(data[: data.rindex(b'\n], "id": "')], content["id"]) or not data.startswith(_HEAD):
        raise ValueError("its checksum does not fit its charges")
    return _account_of(content["charges"], content["id"], data)


def _parsed_first_edition(content: dict[str, Any], data: bytes) -> _Account:
    entries = content["charges"]
    if content["sha256"] != hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest():
        raise ValueError("its checksum does not fit its charges")
    charges = [(entry["noise_multiplier"], entry["sample_rate"], entry["steps"]) for entry in entries]
    rows = [(*charge, len(list(group))) for charge, group in itertools.groupby(charges)]
    return _account_of(list(itertools.chain.from_iterable(rows)), "", data)


def _account_of(cells: list[Any], name: str, data: bytes) -> _Account:
    """``cells``: the rows one after the other; 100,000 lists would take longer to read."""
    if not cells:
        return _Account(name, data=data)
    sigmas, rates, steps, times = (cells[column::4] for column in range(4))
    types = [set(map(type, column)) for column in (sigmas, rates, steps, times)]
    if len(cells) % 4 or types != [{float}, {float}, {int}, {int}]:
        raise ValueError("its charges are not two floats and two ints each")
    total = sum(map(operator.mul, steps, times))
    for sigma in (max(sigmas), min((sigma for sigma in sigmas if sigma), default=0.0)):
        for q in (min(rates), max(rates)):
            _setting(sigma, q, min(steps))
    if min(times) < 1 or total > MAX_STEPS:
        raise ValueError(f"its charges have {total} steps")
    return _Account(name, tuple(zip(sigmas, rates, steps, times)), sum(times), total, data)
