"""The order of the samples, the share of each process, and reading ahead."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import mixed_cohort, save_manifest, save_nifti
from PIL import Image

import medclr.data.blobs as blobs
import medclr.data.loader as loading
import medclr.data.prepare as preparing
from medclr.data.blobs import Folder
from medclr.data.loader import Batch, Facts, Loader, load_batch, load_facts
from medclr.data.manifest import read_manifest, write_manifest
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.errors import MedclrError


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder: Path = tmp_path_factory.mktemp("store")
    prepare(mixed_cohort(folder), folder / "store", size_px=24)
    return Store(folder / "store")  # 55 slices


def tensors(batch: Facts) -> dict[str, torch.Tensor]:
    return {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "modalities"}


def assert_same(a: Facts, b: Facts) -> None:
    assert a.modalities == b.modalities
    for name, tensor in tensors(a).items():
        assert tensor.dtype == tensors(b)[name].dtype
        assert torch.equal(tensor, tensors(b)[name]), name


def test_a_batch_holds_what_the_store_says(store):
    indices = np.array([52, 2, 2, 40])
    batch = load_batch(store, indices)
    assert len(batch) == 4
    assert batch.images.shape == (4, 1, 24, 24)
    np.testing.assert_array_equal(batch.images[:, 0], store.physical(indices))
    np.testing.assert_array_equal(batch.index, indices)
    for name in ("low", "high", "air", "modality", "scan", "patient", "slice_index", "position", "label"):
        column = getattr(batch, name)
        assert column.dtype == (torch.float32 if name in ("low", "high", "air", "position") else torch.int64)
        np.testing.assert_array_equal(column, store.column(name)[indices])
    assert batch.content.dtype == torch.float32
    ct = store.scans[store.column("scan")[2]]
    box = [ct.content_top, ct.content_left, ct.content_height, ct.content_width]
    assert batch.content[1:3].tolist() == [box, box]
    assert batch.content[0].tolist() == [0, 2, 24, 20], "40 x 33 pixels at 24"
    assert [batch.modalities[m] for m in batch.modality] == ["XR", "CT", "CT", "MR"]


def test_select_and_to(store):
    batch = load_batch(store, range(10))
    assert_same(batch.select(torch.arange(10) % 2 == 0), load_batch(store, range(0, 10, 2)))
    assert_same(batch.select(slice(3, 7)), load_batch(store, range(3, 7)))
    assert_same(batch.to("cpu"), batch)
    assert all(tensor.device.type == "meta" for tensor in tensors(batch.to("meta")).values())


def test_an_epoch_takes_each_slice_once_and_drops_the_rest(store):
    indices = store.indices()[5:]
    loader = Loader(store, indices, batch_size=8, seed=0)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 6
    taken = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(taken)) == 48
    assert set(taken) <= set(indices.tolist())
    assert taken != sorted(taken)


def test_order_is_a_function_of_seed_and_epoch(store):
    def order(seed: int, epoch: int) -> list[int]:
        return Loader(store, store.indices(), 4, seed).order(epoch).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("slices_per_scan", [None, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_take_the_batch_of_one(store, world_size, slices_per_scan):
    def epoch(rank: int, world_size: int) -> list[Batch]:
        rows = np.arange(8).reshape(world_size, -1)[rank]
        return list(Loader(store, store.indices(), 8, 5, rows, slices_per_scan=slices_per_scan).epoch(3))

    shares = zip(*(epoch(rank, world_size) for rank in range(world_size)), strict=True)
    for whole, parts in zip(epoch(0, 1), shares, strict=True):
        b = 8 // world_size
        for rank, part in enumerate(parts):
            assert_same(part, whole.select(slice(rank * b, (rank + 1) * b)))


def test_batches_hold_the_neighbours_that_load_batch_reads(store):
    for batch in Loader(store, store.indices(), 8, 0, slices=3).epoch(0):
        assert batch.images.shape[1] == 3
        assert_same(batch, load_batch(store, batch.index, 3))


def test_resuming_equals_going_on(store):
    loader = Loader(store, store.indices(), 8, 0, slices_per_scan=5)
    batches = list(loader.epoch(1))
    for step in range(len(batches) + 1):
        resumed = list(Loader(store, store.indices(), 8, 0, slices_per_scan=5).epoch(1, start_step=step))
        assert len(resumed) == len(batches) - step
        for a, b in zip(resumed, batches[step:], strict=True):
            assert_same(a, b)


def test_some_slices_of_each_scan_drawn_anew(store):
    loader = Loader(store, store.indices(), 5, 0, slices_per_scan=3)
    seen: list[set[int]] = []
    for epoch in range(60):
        order = loader.order(epoch)
        _, counts = np.unique(store.column("scan")[order], return_counts=True)
        assert sorted(counts) == [1] * 4 + [3] * 6, "images have a single slice"
        assert loader.steps_per_epoch == 22 // 5
        seen.append(set(order.tolist()))
    assert set.union(*seen) == set(range(55)), "over the epochs all have their turn"
    assert len(set(map(frozenset, seen))) == 60
    times = np.bincount(np.concatenate([list(s) for s in seen]), minlength=55)
    times = times[store.column("scan") == 0]  # 9 slices, each drawn with probability 1/3 in 60 epochs: 20 +- 3.7
    assert 8 <= times.min() <= times.max() <= 32


def test_larger_than_the_data(store):
    with pytest.raises(MedclrError, match="batch 64 is larger than the data: an epoch holds 55 slices"):
        Loader(store, store.indices(), 64, 0)
    with pytest.raises(MedclrError, match="batch 16 is larger than the data: an epoch holds 10 slices"):
        Loader(store, store.indices(), 16, 0, slices_per_scan=1)


def test_no_slices_of_a_scan_cannot_be(store):
    with pytest.raises(MedclrError, match="must be at least 1"):
        Loader(store, store.indices(), 4, 0, slices_per_scan=0)


def test_a_batch_in_pieces_is_the_same_batch(store):
    rows, pieces = np.array([6, 2, 4]), [np.array([2, 0]), np.array([1]), np.array([2, 0])]
    whole = Loader(store, store.indices(), 8, 5)
    parts = Loader(store, store.indices(), 8, 5, rows, pieces).epochs(whole.steps_per_epoch + 2, epochs=3)
    for batch in [*list(whole.epoch(1))[2:], *whole.epoch(2)]:
        for piece in pieces:
            assert_same(next(parts), batch.select(torch.from_numpy(rows[piece])))
    assert next(parts, None) is None


def test_facts_are_a_batch_without_its_pixels(store):
    batch = load_batch(store, [3, 50, 7])
    facts = load_facts(store, [3, 50, 7])
    assert_same(facts, batch.facts())
    assert_same(Facts.cat([facts.select(slice(0, 2)), facts.select(slice(2, 3))]), facts)
    assert not hasattr(facts, "images")


# Which slices may show the same anatomy

KINDS = [
    ("MR", "axial", "brain"),  # two scans of each kind
    ("MR", "axial", "brain"),
    ("MR", "sagittal", "brain"),
    ("MR", "sagittal", "brain"),
    ("MR", "axial", "knee"),
    ("CT", "axial", "brain"),
    ("MR", "axial", ""),
    ("MR", "", ""),
    ("MR", "", ""),
]


def store_of_kinds(folder: Path, order: list[int]) -> Store:
    """A volume of 2 to 4 slices a kind, in that order, then an MR and two X-rays of a single slice."""
    rng, scans = np.random.default_rng(0), []
    for i in order:
        voxels = rng.gamma(2, 100, (3 + i % 2, 4, 2 + i % 3)).astype(np.int16)
        scans.append({"path": save_nifti(folder / f"volume{i}.nii.gz", voxels), "modality": KINDS[i][0]})
    flat = rng.gamma(2, 100, (4, 4, 1)).astype(np.int16)
    scans.append({"path": save_nifti(folder / "flat.nii.gz", flat), "modality": "MR"})
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / f"xr{i}.png")
        scans.append({"path": folder / f"xr{i}.png", "modality": "XR"})
    known = read_manifest(save_manifest(folder / "scans.csv", scans))
    kinds = [*(KINDS[i] for i in order), KINDS[0], ("XR", "", "chest"), ("XR", "", "chest")]
    rows = [replace(row, plane=plane, body_part=part) for row, (_, plane, part) in zip(known.rows, kinds, strict=True)]
    manifest = write_manifest(folder / "kinds.csv", rows, known.file_rows, []).path
    prepare(manifest, folder / "store", size_px=8)
    return Store(folder / "store")


def test_slices_of_a_group_are_volumes_of_one_modality_plane_and_body_part(tmp_path):
    store = store_of_kinds(tmp_path / "a", [*range(9)])
    facts = load_facts(store, store.indices())
    group, scan = facts.group.tolist(), facts.scan.tolist()
    assert {store.scans[row].plane for row in scan} == {"axial", "sagittal", ""}
    for i, one in enumerate(scan):
        for j, other in enumerate(scan):
            is_alike = max(one, other) < 9 and KINDS[one] == KINDS[other]
            assert (group[i] == group[j]) == (is_alike or one == other)
    assert [number < 0 for number in group] == [row >= 9 for row in scan], "single images"
    batch = load_batch(store, store.indices()[::-1].copy())
    assert batch.group.dtype == torch.int64
    assert batch.group.tolist() == group[::-1]
    assert Facts.cat([facts.select(slice(4, None)), facts.select(slice(0, 4))]).group.tolist() == group[4:] + group[:4]

    code = "import sys; from medclr.data.loader import *; store = Store(sys.argv[1]);"
    code += "print(load_facts(store, store.indices()).group.tolist())"
    done = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{group}\n", ""), "another process calls them the same"

    # of the words alone: another store of some of these scans calls their groups the same
    order = [8, 3, 0]
    some = load_facts(other := store_of_kinds(tmp_path / "b", order), other.indices())
    named = dict(zip(scan, group, strict=True))
    assert [named[order[row]] for row in some.scan.tolist() if row < 3] == [g for g in some.group.tolist() if g >= 0]


# Shards that are read one after another


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Store:
    """The same slices, each scan in a shard of its own."""
    folder: Path = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "SHARD_SLICES", 4)
        prepare(mixed_cohort(folder), folder / "store", size_px=24)
    return Store(folder / "store")


SLICE_BYTES = 2 * 24**2


@pytest.mark.parametrize("slices_per_scan", [None, 3])
@pytest.mark.parametrize("window", [1, 20, 10_000])
def test_a_window_of_shards_is_done_before_the_next_begins(shards, window, slices_per_scan):
    indices = shards.indices()[::2] if slices_per_scan is None else shards.indices()
    loader = Loader(shards, indices, 4, 3, None, None, slices_per_scan, window * SLICE_BYTES)
    orders = [loader.order(epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert len(set(order.tolist())) == len(order)
        if slices_per_scan is None:
            assert sorted(order) == sorted(indices)
        visited = shards.column("shard")[order]
        runs = [int(shard) for i, shard in enumerate(visited) if i == 0 or visited[i - 1] != shard]
        if window == 1:
            assert len(runs) == len(set(runs)) == len(shards.info.shard_slices), "one shard at a time"
            assert runs != sorted(runs)
        first = {shard: np.flatnonzero(visited == shard)[0] for shard in set(runs)}
        last = {shard: np.flatnonzero(visited == shard)[-1] for shard in set(runs)}
        reading = [sum(first[s] <= i <= last[s] for s in first) for i in range(len(order))]
        at_once = {1: 1, 20: 5, 10_000: len(shards.info.shard_slices)}[window]
        assert max(reading) <= at_once, "so many shards of 5 slices begin before 20 slices are full"
    if window == 10_000:
        assert [len(set(shards.column("shard")[order[:8]])) > 2 for order in orders] == [True] * 3, "well mixed"


def test_shards_are_read_through_before_their_window_and_resuming_changes_nothing(shards, monkeypatch):
    read: list[int] = []
    through = Store.read_through
    monkeypatch.setattr(Store, "read_through", lambda self, shard: (read.append(shard), through(self, shard))[1])

    def loader() -> Loader:
        return Loader(shards, shards.indices(), 5, 3, window_bytes=20 * SLICE_BYTES)

    batches = list(loader().epochs(0, 2))
    visited = shards.column("shard")[np.concatenate([loader().order(0)[:55], loader().order(1)[:55]])]
    n = len(shards.info.shard_slices)
    assert len(read) == 2 * n, "each once an epoch"
    assert set(read[:n]) == set(read[n:]) == set(visited.tolist())
    per_epoch = loader().steps_per_epoch
    for step in (3, per_epoch - 1, per_epoch, per_epoch + 2):
        read.clear()
        for a, b in zip(loader().epochs(step, 2), batches[step:], strict=True):
            assert_same(a, b)
        assert set(read) == set(visited[step * 5 :].tolist())
    assert not readers()


def test_leaving_while_shards_are_read_through(shards, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(self, shard):
        begun.set()
        while not go.is_set():
            yield
            go.wait(0.001)

    monkeypatch.setattr(Store, "read_through", slow)
    epoch = Loader(shards, shards.indices(), 5, 3, window_bytes=20 * SLICE_BYTES).epoch(0)
    consumer = threading.Thread(target=lambda: next(epoch, None))
    consumer.start()
    begun.wait()
    assert consumer.is_alive(), "it waits for its window"
    go.set()
    consumer.join()
    go.clear()  # the next window never ends by itself
    epoch.close()
    assert not readers()


def test_errors_of_reading_through_reach_the_consumer(shards, monkeypatch):
    def broken(self, shard):
        raise MedclrError("slices-00003.npy: cannot be read")

    monkeypatch.setattr(Store, "read_through", broken)
    with pytest.raises(MedclrError, match="cannot be read"):
        next(Loader(shards, shards.indices(), 5, 3, window_bytes=20 * SLICE_BYTES).epoch(0))
    assert not readers()


@pytest.mark.parametrize("copies", [1, 4])
def test_a_step_reads_its_own_slices_and_nothing_else_however_large_the_store(store, monkeypatch, copies):
    """The cost of a step does not grow with the store: bytes are counted, not seconds."""
    read: list[int] = []

    class Counted(Folder):
        def read(self, name: str, offset: int, into: memoryview) -> int:
            read.append(len(into))
            return super().read(name, offset, into)

    monkeypatch.setattr(blobs, "SHARDS", Counted)
    opened = Store(store.path)
    indices = np.tile(opened.indices(), copies)
    opened.read(opened.indices())  # looks at each header once
    read.clear()
    batches = list(Loader(opened, indices, 5, 0).epochs(0, 2))
    assert sum(read) == 5 * len(batches) * SLICE_BYTES
    assert len(read) <= 5 * len(batches)


# Threads, and what they leave behind


def test_never_more_than_so_many_batches_in_flight(store, monkeypatch):
    taken, most, lock = 0, 0, threading.Lock()
    load, begun = loading.load_batch, [0]

    def counted(*args):
        nonlocal most
        with lock:
            begun[0] += 1
            most = max(most, begun[0] - taken)
        return load(*args)

    monkeypatch.setattr(loading, "load_batch", counted)
    for _ in Loader(store, store.indices(), 2, 0).epochs(0, 20):
        time.sleep(0.0002)
        taken += 1
    assert begun[0] == taken == 20 * 27
    assert most == loading.READ_AHEAD + 1


def held() -> tuple[int, int]:
    """Bytes of memory, and open files, of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("window_bytes", [None, 20 * SLICE_BYTES])
def test_ten_thousand_steps_leave_nothing_behind(shards, window_bytes):
    loader = Loader(shards, shards.indices(), 5, 0, window_bytes=window_bytes)
    step, threads = 0, threading.active_count()
    for _ in loader.epochs(0, 10_000 // loader.steps_per_epoch + 1):
        step += 1
        if step == 2000:
            gc.collect()
            before = held()
    gc.collect()
    assert step > 10_000
    memory, files = held()
    assert memory - before[0] < 2**21, "a leak of the pixels of a batch alone would be 90 MB"
    assert files == before[1]
    assert threading.active_count() == threads


def test_a_process_that_leaves_in_the_middle_leaves_no_thread(shards):
    code = f"""
import os, sys, threading
from pathlib import Path
from medclr.data.loader import Loader
from medclr.data.store import Store
store = Store(Path({str(shards.path)!r}))
for number in (None, {int(signal.SIGINT)}):
    try:
        for step, batch in enumerate(Loader(store, store.indices(), 5, 0).epochs(0, 10**6)):
            if step == 20 and number is None:
                raise ValueError
            if step == 20:
                os.kill(os.getpid(), number)
    except (ValueError, KeyboardInterrupt) as error:
        print(type(error).__name__)
    print([thread.name for thread in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ValueError\n['MainThread']\nKeyboardInterrupt\n['MainThread']\n"


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_reads_ahead_but_not_without_bound(store, monkeypatch):
    reads: list[int] = []
    load = loading.load_batch
    monkeypatch.setattr(loading, "load_batch", lambda *args: (reads.append(1), load(*args))[1])
    epoch = Loader(store, store.indices(), 2, 0).epoch(0)
    next(epoch)
    while len(reads) < 1 + loading.READ_AHEAD:
        pass
    assert len(reads) == 1 + loading.READ_AHEAD
    assert len(list(epoch)) == 26
    assert not readers()


def test_stopping_early_leaves_no_thread(store):
    epoch = Loader(store, store.indices(), 2, 0).epoch(0)
    next(epoch)
    assert readers()
    epoch.close()
    assert not readers()


def test_errors_of_the_reader_reach_the_consumer(store, monkeypatch):
    load = loading.load_batch
    loader = Loader(store, store.indices(), 2, 0)
    bad = loader.order(0)[8]  # the first of batch 4

    def broken(store, indices, slices):
        if bad in indices:
            raise MedclrError("slices-00003.npy: cannot be read")
        return load(store, indices, slices)

    monkeypatch.setattr(loading, "load_batch", broken)
    epoch = loader.epoch(0)
    for _ in range(4):  # what was read before is delivered
        next(epoch)
    with pytest.raises(MedclrError, match=r"slices-00003\.npy: cannot be read"):
        next(epoch)
    assert not readers()
