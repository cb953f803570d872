"""Random reads from a warm slice store, against bare numpy memory maps of the same shards.

    python benchmarks/store.py [STORE]

Without a store, one of 2,000 CT-like slices of 224 px is made in a temporary folder. All reads of a round visit the
same slices in the same random order; the ways of reading take turns, and the medians over the rounds are printed.
Exits with status 1 if a random read takes more than 40 microseconds.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medclr.data.manifest import FileRow, ScanRow, write_manifest
from medclr.data.prepare import prepare
from medclr.data.store import Store, slices_name

ROUNDS = 9
READS = 2048
BATCH = 64
LIMIT_US = 40


def make_store(folder: Path, n_scans: int = 20, depth: int = 100, size_px: int = 224) -> Path:
    """Volumes of random Hounsfield units, prepared."""
    rng = np.random.default_rng(0)
    rows, file_rows = [], []
    for number in range(n_scans):
        hu = rng.integers(-1000, 2000, (size_px, size_px, depth), dtype=np.int16)
        path = folder / f"{number}.nii"
        nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 3, 1])), path)
        name = f"scan{number:02d}"
        rows.append(
            ScanRow(
                name, name, "", "CT", "", "axial", path.name, depth, size_px, size_px, 3, 1, 1, sha256=f"{number:064x}"
            )
        )
        file_rows.append(FileRow(name, "image", str(folder), path.name, path.stat().st_size, 0, "", ""))
    manifest = write_manifest(folder / "bench.csv", rows, file_rows, [])
    prepare(manifest.path, folder / "store", size_px=size_px)
    return folder / "store"


def main() -> int:
    """Measure and print; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(sys.argv[1]) if len(sys.argv) > 1 else make_store(Path(folder)))
        return measure(store)


def measure(store: Store) -> int:
    """Measure and print; the exit status."""
    bare = [np.load(store.path / slices_name(shard), mmap_mode="r") for shard in range(len(store.info.shard_slices))]
    shard, row = store.column("shard"), store.column("row")
    store.read(store.indices()[: 2**15])  # warm

    def store_single(order: NDArray[np.int64]) -> None:
        for index in order:
            store.read([index])

    def store_batch(order: NDArray[np.int64]) -> None:
        for start in range(0, len(order), BATCH):
            store.read(order[start : start + BATCH])

    def store_physical(order: NDArray[np.int64]) -> None:
        for start in range(0, len(order), BATCH):
            store.physical(order[start : start + BATCH])

    def numpy_single(order: NDArray[np.int64]) -> None:
        for index in order:
            np.array(bare[shard[index]][row[index]])

    def numpy_fancy(order: NDArray[np.int64]) -> None:
        """One fancy read a batch, of as many slices, all from the shard where the batch begins: no order is easier."""
        for start in range(0, len(order), BATCH):
            rows = row[order[start : start + BATCH]]
            here = bare[shard[order[start]]]
            here[rows % len(here)]

    ways: dict[str, Callable[[NDArray[np.int64]], None]] = {
        "store.read, one slice a call": store_single,
        f"store.read, {BATCH} slices a call": store_batch,
        f"store.physical, {BATCH} slices a call": store_physical,
        "numpy memmap, one slice a call": numpy_single,
        f"numpy memmap, {BATCH} slices of one shard a call": numpy_fancy,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(ROUNDS):
        order = np.random.default_rng(seed).integers(0, len(store), READS)
        for name, way in ways.items():
            started = time.perf_counter()
            way(order)
            times[name].append((time.perf_counter() - started) / READS * 1e6)
    median = {name: float(np.median(values)) for name, values in times.items()}
    print(f"{len(store):,} slices of {store.info.size_px} px; microseconds a slice, median of {ROUNDS} rounds")
    for name, value in median.items():
        print(f"  {name:<45} {value:6.1f}")
    single, batch, _, bare_single, bare_fancy = median.values()
    print(f"  store / numpy: {single / bare_single:.2f} one by one, {batch / bare_fancy:.2f} in batches")
    slow = single > LIMIT_US
    print(f"a random read takes {single:.1f} microseconds; {'MORE THAN' if slow else 'at most'} {LIMIT_US} are allowed")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
