import gzip
import hashlib
import math
import multiprocessing
import os
import re
import shutil
import time

import pytest
import torch
from loops import in_one_test
from torch.utils.data import DataLoader

from dpteach import data
from dpteach.data import BUNDLED, CHECKSUMS, Data, load_mnist, split, two_moons

LABELS = "t10k-labels-idx1-ubyte"  # the smallest of the four files


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A cache folder that ``load_mnist`` has filled."""
    folder = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPTEACH_CACHE", str(folder))
        load_mnist(train=False)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, unpacked):
    """A cache of its own that holds three of the four files, and a bundled folder that holds only the fourth."""
    monkeypatch.setenv("DPTEACH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "BUNDLED", tmp_path / "bundled")
    (tmp_path / "bundled").mkdir()
    shutil.copy(BUNDLED / f"{LABELS}.gz", tmp_path / "bundled")
    raw = tmp_path / "cache" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in CHECKSUMS:
        if name != LABELS:
            os.link(unpacked / "MNIST" / "raw" / name, raw / name)
    return tmp_path


# --- MNIST ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, n", [(True, 60_000), (False, 10_000)])
def test_mnist_is_whole_scaled_and_in_order(unpacked, monkeypatch, train, n):
    monkeypatch.setenv("DPTEACH_CACHE", str(unpacked))
    mnist = load_mnist(train)
    assert mnist.X.shape == (n, 1, 28, 28) and mnist.X.dtype == torch.float32
    assert float(mnist.X.min()) == 0.0 and float(mnist.X.max()) == 1.0
    assert mnist.y.shape == (n,) and mnist.y.dtype == torch.int64
    assert mnist.y.unique().tolist() == list(range(10))
    assert mnist.y[:5].tolist() == ([5, 0, 4, 1, 9] if train else [7, 2, 1, 0, 4])


def test_the_bundled_files_are_those_whose_checksums_are_written_down():
    written = dict(reversed(line.split()) for line in (BUNDLED / "SHA256SUMS").read_text().splitlines())
    assert written == CHECKSUMS
    for name, expected in written.items():
        assert hashlib.sha256(gzip.decompress((BUNDLED / f"{name}.gz").read_bytes())).hexdigest() == expected


def flip_a_bit(packed):
    return packed[:2000] + bytes([packed[2000] ^ 1]) + packed[2001:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: b"",
        lambda packed: b"<html>not found</html>",
        flip_a_bit,
        lambda packed: gzip.compress(gzip.decompress(packed)[:-1] + b"\x07"),
    ],
    ids=["truncated", "empty", "no gzip file", "a bit flipped", "one label altered"],
)
def test_a_damaged_copy_is_refused_by_name_and_checksums_and_never_reaches_the_cache(place, damage):
    packed = place / "bundled" / f"{LABELS}.gz"
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(ValueError) as caught:
        load_mnist(train=False)
    message = str(caught.value)
    assert message.startswith(f"{packed} is damaged or altered") and f"must be {CHECKSUMS[LABELS]}" in message
    assert re.search(r"found [0-9a-f]{64}\. Fetch", message)
    assert not list((place / "cache").rglob(f"{LABELS}*"))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"\x07"], ids=["truncated", "altered"])
def test_a_damaged_cache_is_refused_and_made_anew_once_deleted(place, damage):
    load_mnist(train=False)
    cached = place / "cache" / "MNIST" / "raw" / LABELS
    damaged = damage(cached.read_bytes())
    cached.write_bytes(damaged)
    with pytest.raises(ValueError) as caught:
        load_mnist(train=True)  # also where the damaged file is not the one asked for
    message = str(caught.value)
    assert message.startswith(f"{cached} is damaged or altered") and "Delete this file" in message
    assert f"must be {CHECKSUMS[LABELS]}, found {hashlib.sha256(damaged).hexdigest()}" in message
    cached.unlink()
    assert len(load_mnist(train=False)) == 10_000


@pytest.fixture
def mirrors(place, monkeypatch):
    """Nothing is bundled; two mirrors, the second one with the file."""
    folders = [place / "first", place / "second"]
    for folder in folders:
        folder.mkdir()
    (place / "bundled" / f"{LABELS}.gz").rename(folders[1] / f"{LABELS}.gz")
    monkeypatch.setattr(data, "MIRRORS", tuple(f"{folder.as_uri()}/" for folder in folders))
    return [folder / f"{LABELS}.gz" for folder in folders]


def test_without_a_copy_and_without_internet_one_error_says_what_to_do(place, mirrors):
    mirrors[1].unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_mnist(train=False)
    message = str(caught.value)
    for part in (
        "MNIST was not found",
        str(place / "bundled"),
        str(place / "cache"),
        *data.MIRRORS,
        "No such file",
        "Connect to the internet",
        "copy the four files",
    ):
        assert part in message


def test_without_a_copy_the_file_comes_from_the_first_mirror_that_has_the_right_one(place, mirrors):
    content = mirrors[1].read_bytes()
    mirrors[0].write_bytes(flip_a_bit(content))
    assert len(load_mnist(train=False)) == 10_000
    cached = place / "cache" / "MNIST" / "raw" / LABELS
    cached.unlink()
    mirrors[1].write_bytes(content[:2000])
    with pytest.raises(FileNotFoundError, match=r"first/: .* is damaged or altered.*second/: .* is damaged or altered"):
        load_mnist(train=False)
    assert not cached.exists()


def test_windows_which_replaces_no_file_that_is_being_read_is_no_error_if_the_file_is_there(place, monkeypatch):
    cached = place / "cache" / "MNIST" / "raw" / LABELS
    replace = os.replace

    def quicker(part, target):
        replace(part, target)
        part.write_bytes(b"ours")
        raise PermissionError("the other process reads it")

    def refused(part, target):
        raise PermissionError("no right to write here")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        load_mnist(train=False)
    monkeypatch.setattr(os, "replace", quicker)
    assert len(load_mnist(train=False)) == 10_000
    assert [file.name for file in cached.parent.glob(f"{LABELS}*")] == [LABELS]


def load_when_all_are_ready(ready, delay, folder):
    os.environ["DPTEACH_CACHE"] = str(folder)
    ready.wait(timeout=60)
    time.sleep(delay)
    assert len(load_mnist(train=False)) == 10_000


def test_processes_that_unpack_at_once_all_succeed(tmp_path):
    start = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    ready = start.Barrier(3)
    delays = (0, 0, 0.2)  # two write the same file, the third finds it half written
    processes = [start.Process(target=load_when_all_are_ready, args=(ready, delay, tmp_path)) for delay in delays]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(file.name for file in tmp_path.rglob("*-ubyte*")) == sorted(CHECKSUMS)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("DPTEACH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "dpteach"
    monkeypatch.setenv("DPTEACH_CACHE", str(tmp_path / "elsewhere"))
    assert data.cache_folder() == tmp_path / "elsewhere"


# --- records --------------------------------------------------------------------------------------------------------


def test_a_loader_gets_a_whole_batch_in_one_call():
    records = Data(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    loader = DataLoader(records, batch_size=4, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(X.squeeze(1).long(), y) for X, y in batches)


def test_records_are_taken_by_index_and_by_count_and_an_empty_batch_keeps_its_shape():
    records = Data(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    assert records.take([3, 1]).y.tolist() == [3, 1] and records.take([3, 1]).X.tolist() == [[6, 7], [2, 3]]
    assert records.take(4).y.tolist() == [0, 1, 2, 3]
    assert len(records) == 10 and records[2][1] == 2
    for nobody in ([], torch.tensor([], dtype=torch.int64)):
        X, y = records[nobody]
        assert X.shape == (0, 2) and y.shape == (0,) and y.dtype == torch.int64


def test_records_without_a_label_each_are_refused(refuses):
    for X, y in ((torch.zeros(3, 2), torch.zeros(2)), (torch.zeros(0, 2), torch.zeros(0))):
        with pytest.raises(ValueError, match=f"the same length, at least 1, got {len(X)} and {len(y)}"):
            Data(X, y)
    for count in (0, -1, True):
        with refuses("indices", count):
            Data(torch.zeros(3, 2), torch.zeros(3)).take(count)


# --- two moons ------------------------------------------------------------------------------------------------------


def test_two_moons_repeat_with_their_seed_only_and_draw_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    one, same, other = two_moons(50, seed=3), two_moons(50, seed=3), two_moons(50, seed=4)
    assert torch.equal(one.X, same.X) and torch.equal(one.y, same.y)
    assert not torch.equal(one.X, other.X)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("n", [2, 101, 400])
def test_two_moons_are_balanced_and_in_no_order(n):
    moons = two_moons(n)
    assert moons.X.shape == (n, 2) and moons.X.dtype == torch.float32 and moons.y.dtype == torch.int64
    assert int((moons.y == 0).sum()) == math.ceil(n / 2) and int((moons.y == 1).sum()) == n // 2
    assert n < 100 or 0.3 < float((moons.y[1:] == moons.y[:-1]).double().mean()) < 0.7


def test_two_moons_can_be_told_apart_but_not_by_a_line():
    clean, noisy = two_moons(600, noise=0.0), two_moons(600)
    distances = torch.cdist(clean.X[clean.y == 0], clean.X[clean.y == 1])
    assert float(distances.min()) > 0.3
    nearest = torch.cdist(noisy.X, noisy.X).fill_diagonal_(math.inf).argmin(1)
    assert float((noisy.y[nearest] == noisy.y).double().mean()) > 0.93
    design = torch.cat([noisy.X, torch.ones(600, 1)], dim=1)
    line = torch.linalg.lstsq(design, 2.0 * noisy.y.unsqueeze(1) - 1).solution
    assert float(((design @ line > 0).squeeze(1).long() == noisy.y).double().mean()) < 0.9
    assert float(noisy.X.mean(0).abs().max()) < 0.1


@in_one_test(
    "name, value",
    [
        *(("n", v) for v in (1, 2.5, math.nan, True)),
        *(("seed", v) for v in (-1, "0")),
        *(("noise", v) for v in (-0.1, math.inf, None)),
    ],
)
def test_two_moons_refuse_bad_arguments(refuses, name, value):
    with refuses(name, value):
        two_moons(**{"n": 10, name: value})


def ids(part):
    return part.X[:, 0].int().tolist()


NUMBERED = Data(torch.arange(600.0).reshape(-1, 1), torch.arange(600) % 3)


@in_one_test(
    "more", [{}, {"skew": 0.9}, {"weights": [5, 1, 1, 1]}, {"skew": 0.5, "weights": [5, 1, 1, 1]}, {"skew": 0.999}]
)
@in_one_test("seed", [0, 1, 2])
def test_a_split_gives_every_record_to_exactly_one_worker(more, seed):
    parts = split(NUMBERED, 4, **more, seed=seed)
    assert sorted(sum(map(ids, parts), [])) == list(range(600))
    assert min(map(len, parts)) >= 1
    assert [ids(part) for part in parts] == [ids(part) for part in split(NUMBERED, 4, **more, seed=seed)]


def test_a_split_has_the_sizes_of_its_weights():
    assert [len(part) for part in split(NUMBERED, 3)] == [200, 200, 200]
    assert [len(part) for part in split(NUMBERED, 3, weights=[3, 2, 1])] == [300, 200, 100]


def test_a_skewed_split_makes_the_workers_labels_unlike():
    def unlike(skew):
        gaps = []
        for seed in range(10):
            shares = [torch.bincount(p.y, minlength=3) / len(p) for p in split(NUMBERED, 2, skew=skew, seed=seed)]
            gaps.append((shares[0] - shares[1]).abs().sum().item())
        return sum(gaps) / len(gaps)

    assert unlike(0.0) < 0.3 < unlike(0.5) < unlike(0.95)


@in_one_test(
    "name, value, more",
    [
        ("workers", 0, {"workers": 0}),
        ("workers", 601, {"workers": 601}),
        ("skew", 1.0, {"skew": 1.0}),
        ("skew", -0.1, {"skew": -0.1}),
        ("weights", 0, {"weights": [1, 0]}),
    ],
)
def test_a_split_refuses_what_makes_no_sense(refuses, name, value, more):
    with refuses(name, value):
        split(NUMBERED, **{"workers": 2, **more})
    with pytest.raises(ValueError, match="weights must hold one number for each of the 3 workers, got 2"):
        split(NUMBERED, 3, weights=[1, 1])
