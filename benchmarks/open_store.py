"""Opening a store of ten million slices in 100,000 scans: seconds and memory, of its tables alone (no pixels).

    python benchmarks/open_store.py

The tables are made in a temporary folder, and read by a new process: it opens the store, reads a random batch of its
columns, parses all its scans and finds those of a split. Exits with status 1 if that takes more than five seconds, or
1 GB of memory of its own.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medclr import files
from medclr.data import store as stores
from medclr.data.store import FileInfo, Store, StoreInfo
from medclr.data.tables import TABLE, StoredScan, scans_csv, slice_table, write_table

SCANS, DEPTH, SCANS_PER_SHARD = 100_000, 100, 26
LIMIT_S, LIMIT_GB = 5, 1


def make_tables(folder: Path) -> None:
    """A store of CT scans with affines of their own; a shard has no file, which is as good as one of zeros."""
    affines = np.random.default_rng(0).normal(0, 1, (SCANS, 16)).tolist()
    scans = [
        StoredScan(
            scan_id=f"{i:032x}",
            patient_id=f"{i // 2:032x}",
            study_id=f"{i // 2:032x}",
            modality="CT",
            body_part="chest",
            plane="axial",
            label="",
            split="train",
            sha256=f"{i:064x}",
            volume=0,
            irregular="",
            depth=DEPTH,
            height=512,
            width=512,
            blank=(),
            content_top=0,
            content_left=0,
            content_height=224,
            content_width=224,
            spacing_mm=(2.5, 0.7, 0.7),
            affine=tuple(affines[i]),
            source_shape=(DEPTH, 512, 512),
            source_axes=(0, 1, 2),
            source_flips=(False, False, False),
            scale=1.0,
            offset=-1024.0,
            low=-1000.0,
            high=900.0,
            air=-1024.0,
            window_center=40.0,
            window_width=400.0,
            has_mask=False,
            shard=i // SCANS_PER_SHARD,
            first_row=i % SCANS_PER_SHARD * DEPTH,
        )
        for i in range(SCANS)
    ]
    write_table(folder / "slices.arrow", slice_table(scans, ("CT",), ()))
    files.write_text(folder / "scans.csv", scans_csv(scans))
    info = StoreInfo(
        format_version=stores.FORMAT_VERSION, medclr_version="", size_px=224, keep_blank=False, n_slices=SCANS * DEPTH,
        n_blank=0, n_scans=SCANS, n_patients=SCANS // 2, n_rejected=0, manifest_name="", manifest_sha256="",
        modalities=("CT",), labels=(), masks=False,
        shard_slices=tuple(
            DEPTH * min(SCANS_PER_SHARD, SCANS - first) for first in range(0, SCANS, SCANS_PER_SHARD)
        ),
        files={name: FileInfo((folder / name).stat().st_size, "") for name in ("slices.arrow", "scans.csv")},
    )  # fmt: skip
    files.write_json(folder / "store.json", asdict(info))


def measure(folder: Path) -> int:
    """Open, read, print; the exit status."""
    started, before = time.perf_counter(), time.process_time()
    store = Store(folder)
    rows = np.random.default_rng(0).integers(0, len(store), 256)
    assert all(len(store.column(name)[rows]) == len(rows) for name in TABLE)
    opened = time.perf_counter() - started
    assert len(store.indices("train")) == len(store)
    taken, cpu = time.perf_counter() - started, time.process_time() - before
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile"))  # from kB
    print(
        f"{len(store):,} slices of {len(store.scans):,} scans: opened and 256 rows read in {opened:.2f} s; with all"
        f" scans and a split {taken:.2f} s (CPU {cpu:.2f} s; at most {LIMIT_S}), {own:.2f} GB (at most {LIMIT_GB})"
        f" and {mapped:.2f} GB of files, mapped, which the system takes back when it needs them"
    )
    return int(taken > LIMIT_S or own > LIMIT_GB)


def main() -> int:
    if len(sys.argv) > 1:
        return measure(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        make_tables(Path(folder))
        return subprocess.run([sys.executable, __file__, folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
