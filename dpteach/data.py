"""What to train on: MNIST, whole; two moons, for the pictures with a decision boundary; a table of patients."""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpteach._checks import number, whole

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "mnist"

_PATIENTS = Path(__file__).with_name("breast_cancer.csv.gz")  # as scikit-learn has it, a package of 54 MB with its own

# Where a file comes from that is in neither folder; whatever comes must have its checksum.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")

# SHA-256 of the unpacked files: the ones in data/mnist/SHA256SUMS, kept here for an install without that folder.
CHECKSUMS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True, eq=False)
class Data(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Records and their labels; also a PyTorch data set that hands out a whole batch at once.

    Args:
        X: ``(n, ...)`` float32, one record per row.
        y: ``(n,)`` int64, one label per record.
        source: the Python that makes it, with names of this room, for an exported script; "" if nobody knows.

    Raises:
        ValueError: if ``X`` and ``y`` differ in length, or there is no record at all.

    >>> data = Data(torch.zeros(5, 2), torch.arange(5))
    >>> len(data), data.take([0, 3]).y
    (5, tensor([0, 3]))
    """

    X: Tensor
    y: Tensor
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.X) != len(self.y) or len(self.X) == 0:
            raise ValueError(f"X and y must have the same length, at least 1, got {len(self.X)} and {len(self.y)}")

    def __len__(self) -> int:
        return len(self.X)

    def __repr__(self) -> str:
        return f"Data({len(self):,} records of shape {tuple(self.X.shape[1:])})"

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.X[index], self.y[index]

    # A DataLoader asks for a whole batch through this name: no item by item collation (use an identity collate_fn).
    __getitems__ = __getitem__

    def take(self, indices: int | slice | Sequence[int] | Tensor) -> "Data":
        """The records at ``indices`` (an int count takes the first ones), as a ``Data`` of their own."""
        known = self.source and isinstance(indices, (int, slice, range))
        source = f"{self.source}.take({indices})" if known else ""
        if isinstance(indices, int):
            indices = slice(whole("indices", indices, low=1))
        return Data(self.X[indices], self.y[indices], source)


def cache_folder() -> Path:
    """Where unpacked data is kept: ``$DPTEACH_CACHE``, else ``dpteach`` in the user's cache folder."""
    if os.environ.get("DPTEACH_CACHE"):
        return Path(os.environ["DPTEACH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpteach"


def load_mnist(train: bool = True) -> Data:
    """MNIST: 60,000 training or 10,000 test images of handwritten digits.

    The copy in ``data/mnist`` is unpacked once into :func:`cache_folder`. Where that copy is absent, the same
    files are downloaded. Each file's SHA-256 is checked at every load.

    Args:
        train: the training images, or else the test images.

    Returns:
        ``X`` (n, 1, 28, 28) float32 in [0, 1]; ``y`` (n,) int64 in 0…9. No statistic of the data is used for scaling.

    Raises:
        ValueError: if a file is truncated or altered; names the file, the expected and the found checksum.
        FileNotFoundError: if there is neither a copy nor a way to download one; says what to do.

    Source: LeCun, Cortes, Burges; CC BY-SA 3.0. See ``data/mnist/README.md``.
    """
    root = cache_folder()
    raw, part = root / "MNIST" / "raw", "train" if train else "t10k"
    for name in CHECKSUMS:
        packed = BUNDLED / f"{name}.gz"
        if not (raw / name).exists():
            _store(_copy(packed) if packed.exists() else _download(packed.name, root), raw / name)
    for name in CHECKSUMS:
        _verify(raw / name, (raw / name).read_bytes(), "Delete this file: the next load makes it anew.")
    images = _numbers(raw / f"{part}-images-idx3-ubyte", header=16).reshape(-1, 1, 28, 28)
    labels = _numbers(raw / f"{part}-labels-idx1-ubyte", header=8)
    return Data(images.to(torch.float32).div_(255), labels.to(torch.int64), f"load_mnist({train})")


def _numbers(path: Path, header: int) -> Tensor:
    """The bytes after the header: the files are known to the bit."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8, offset=header))


def _verify(path: Path, content: bytes, cure: str) -> bytes:
    expected, found = CHECKSUMS[path.name.removesuffix(".gz")], hashlib.sha256(content).hexdigest()
    if found == expected:
        return content
    raise ValueError(f"{path} is damaged or altered: its (unpacked) SHA-256 must be {expected}, found {found}. {cure}")


def _unpacked(content: bytes) -> bytes:
    """All that can be read: what is cut off or no gzip file has another checksum."""
    unpacked = io.BytesIO()
    with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(io.BytesIO(content)) as stream:
        while chunk := stream.read(1 << 20):
            unpacked.write(chunk)
    return unpacked.getvalue()


def _copy(packed: Path) -> bytes:
    return _verify(packed, _unpacked(packed.read_bytes()), "Fetch this file again from the project's repository.")


def _download(name: str, root: Path) -> bytes:
    failed = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=30) as answer:
                return _verify(Path(name), _unpacked(answer.read()), "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed.append(f"{mirror}: {error}")
    raise FileNotFoundError(
        f"MNIST was not found: no copy in {BUNDLED}, none in {root}, and the download failed ({'; '.join(failed)}). "
        f"Connect to the internet and try again, or copy the four files of data/mnist from the project's repository to "
        f"{BUNDLED}."
    )


def _store(content: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_bytes(content)
    try:
        os.replace(part, target)  # whole or not at all, also when two processes unpack at once
    except PermissionError:  # Windows replaces no file that is being read: another process was quicker
        part.unlink()
        if not target.exists():
            raise


def split(
    data: Data, workers: int, skew: float = 0.0, weights: Sequence[float] | None = None, *, seed: int = 0
) -> list[Data]:
    """Deal the records out to workers: each record goes to exactly one.

    Args:
        data: the records of all.
        workers: how many workers, >= 1 and at most the number of records.
        skew: how unlike their labels are, in [0, 1). At 0 every worker gets the same mix, by chance. Above, the records
            of a class are dealt out in shares drawn from a Dirichlet distribution with concentration
            ``workers · weight · (1 - skew) / skew``: 0.5 gives Dirichlet(1) for equal weights, 0.9 leaves most of a
            class with one worker. The sizes then follow the shares.
        weights: a positive number a worker, in proportion to the records that it gets (with ``skew``: in expectation).
            All the same if not given.
        seed: the same seed deals in the same way.

    Returns:
        A ``Data`` a worker; together they hold every record once. None is empty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: the label-skewed split by a Dirichlet distribution: Yurochkin et al. 2019.

    >>> [len(part) for part in split(two_moons(100), 2, weights=[3, 1])]
    [75, 25]
    """
    n = len(data)
    workers = whole("workers", workers, low=1)
    if workers > n:
        raise ValueError(f"workers must be at most the number of records ({n}), got {workers}")
    skew = number("skew", skew, low=0, high=1)
    weights = [1.0] * workers if weights is None else [number("weights", w, low=0, above=True) for w in weights]
    if len(weights) != workers:
        raise ValueError(f"weights must hold one number for each of the {workers} workers, got {len(weights)}")
    share = np.array(weights) / sum(weights)
    draw = np.random.default_rng(whole("seed", seed, low=0))
    order = draw.permutation(n)
    if skew == 0:
        parts = np.split(order, _cuts(share, n))
    else:
        labels = data.y.cpu().numpy()[order]
        by_class = [order[labels == label] for label in np.unique(labels)]
        dealt = [np.split(of, _cuts(draw.dirichlet(workers * share * (1 - skew) / skew), len(of))) for of in by_class]
        parts = [np.sort(np.concatenate(pieces)) for pieces in zip(*dealt)]
    for k in range(workers):  # a worker with nothing takes one record from the largest
        if len(parts[k]) == 0:
            largest = max(range(workers), key=lambda w: len(parts[w]))
            parts[largest], parts[k] = parts[largest][:-1], parts[largest][-1:]
    return [data.take(torch.from_numpy(part)) for part in parts]


def _cuts(shares: np.ndarray, n: int) -> np.ndarray:
    return np.round(np.cumsum(shares)[:-1] * n).astype(int)


def two_moons(n: int, seed: int = 0, *, noise: float = 0.2) -> Data:
    """Two interleaved half circles, one per class: a toy whose decision boundary can be drawn.

    Args:
        n: number of records, split over the two classes as evenly as possible.
        seed: the same seed gives the same records.
        noise: standard deviation of the Gaussian scatter, in the units of the axes.

    Returns:
        ``X`` (n, 2) float32 around the origin, ``y`` (n,) int64 in {0, 1}, in random order.

    Raises:
        ValueError: if ``n`` < 2 or ``noise`` is negative or not finite.
    """
    n = whole("n", n, low=2)
    noise = number("noise", noise, low=0)
    generator = torch.Generator().manual_seed(whole("seed", seed, low=0))
    y = torch.arange(n) % 2
    angle = math.pi * torch.rand(n, generator=generator)
    side = 1.0 - 2.0 * y
    X = torch.stack([side * angle.cos() + y - 0.5, side * angle.sin() + 0.5 * y - 0.25], dim=1)
    X = X + noise * torch.randn(n, 2, generator=generator)
    order = torch.randperm(n, generator=generator)
    return Data(X[order], y[order], f"two_moons({n}, {seed}, noise={noise:g})")


def load_breast_cancer(train: bool = True) -> Data:
    """A table of patients: 30 measures of the cells of a tumour, and whether it was malignant (0) or benign (1).

    400 patients are the private ones. The other 169 are held out and public: they give the scale of every column, so
    that no statistic of the private ones is used.

    Args:
        train: the 400 private patients, or else the 169 others.

    Returns:
        ``X`` (n, 30) float32, ``y`` (n,) int64 in {0, 1}.

    Source: Wolberg, Mangasarian, Street & Street 1993, Breast Cancer Wisconsin (Diagnostic), UCI; CC BY 4.0.
    """
    table = np.loadtxt(_PATIENTS, delimiter=",", skiprows=1)
    table = table[np.random.default_rng(0).permutation(len(table))]
    raw, y = table[:, :-1], torch.from_numpy(table[:, -1]).to(torch.int64)
    X = torch.from_numpy((raw - raw[400:].mean(0)) / raw[400:].std(0)).to(torch.float32)
    part = slice(0, 400) if train else slice(400, None)
    return Data(X[part], y[part], f"load_breast_cancer({train})")
