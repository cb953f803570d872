"""Whether cost grows with the store: time of a step over more and more slices, and memory over more and more bytes.

    python benchmarks/growth.py [--slices 1000 10000 100000 1000000] [--gb 1 20] [--steps 40]

Stores of zeros are made as sparse files in a temporary folder, and ``medclr pretrain`` is run on each for some steps in
a process of its own: a small network, so that what feeds it shows. Time is processor time of the whole process, readers
included, so that others on the machine disturb little; a step's is the median. The stores take turns, three times.
Memory is the peak of the process, tables included; the large store is read shard by shard (``data.order shards``), the
small one at random, as ``auto`` would choose where the large one does not fit.

Exits with status 1 if a step or the memory grows by more than the goals of 10 % and 20 %.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medclr import files
from medclr.data import store as stores
from medclr.data.shard import _write_header
from medclr.data.store import FileInfo, StoreInfo, slices_name
from medclr.data.tables import StoredScan, scans_csv, slice_table, write_table

DEPTH, SCANS_PER_SHARD = 100, 26
STEP_LIMIT, MEMORY_LIMIT = 1.10, 1.20


def make_store(folder: Path, n_slices: int, size_px: int) -> Path:
    """A store of that many slices, in scans of 100: its tables are whole, its pixels the zeros of sparse files."""
    folder.mkdir()
    n_scans = n_slices // DEPTH
    scans = [
        StoredScan(
            scan_id=f"{i:032x}", patient_id=f"{i // 2:032x}", study_id="", modality="CT", body_part="", plane="axial",
            label="", split="", sha256=f"{i:064x}", volume=0, irregular="", depth=DEPTH, height=512, width=512,
            blank=(), content_top=0, content_left=0, content_height=size_px, content_width=size_px,
            spacing_mm=(2.5, 0.7, 0.7), affine=tuple(np.eye(4).ravel().tolist()), source_shape=(DEPTH, 512, 512),
            source_axes=(0, 1, 2), source_flips=(False, False, False), scale=1.0, offset=-1024.0, low=-1000.0,
            high=900.0, air=-1024.0, window_center=40.0, window_width=400.0, has_mask=False,
            shard=i // SCANS_PER_SHARD, first_row=i % SCANS_PER_SHARD * DEPTH,
        )
        for i in range(n_scans)
    ]  # fmt: skip
    shards = [DEPTH * min(SCANS_PER_SHARD, n_scans - first) for first in range(0, n_scans, SCANS_PER_SHARD)]
    for number, n in enumerate(shards):
        with (folder / slices_name(number)).open("wb") as file:
            _write_header(file, (n, size_px, size_px))
            file.truncate(file.tell() + n * 2 * size_px**2)
    write_table(folder / "slices.arrow", slice_table(scans, ("CT",), ()))
    files.write_text(folder / "scans.csv", scans_csv(scans))
    info = StoreInfo(
        format_version=stores.FORMAT_VERSION, medclr_version="", size_px=size_px, keep_blank=False, n_slices=n_slices,
        n_blank=0, n_scans=n_scans, n_patients=-(-n_scans // 2), n_rejected=0, manifest_name="", manifest_sha256="",
        modalities=("CT",), labels=(), masks=False, shard_slices=tuple(shards),
        files={path.name: FileInfo(path.stat().st_size, "") for path in folder.iterdir()},
    )  # fmt: skip
    files.write_json(folder / "store.json", asdict(info))
    return folder


def child(words: list[str], steps: int) -> dict[str, float]:
    """Run so many steps of a pretraining: seconds of processor time of one, and the peak of the memory."""
    from medclr.memory import peak_bytes
    from medclr.pretrain import train
    from medclr.request import read_settings

    marks: list[float] = []

    def enough(step: int, clock: object) -> bool:
        marks.append(time.process_time())
        return step == steps

    train(read_settings(words), time.perf_counter(), enough)
    peak = peak_bytes()
    return {"step_s": statistics.median(np.diff(marks[2:]).tolist()), "peak": peak}


def run(store: Path, order: str, size_px: int, steps: int, window_mb: int = 2048) -> dict[str, float]:
    """``child`` in a new process."""
    settings = {
        "batch": 32, "views.size_px": size_px, "epochs": 100, "data.order": order, "data.window_mb": window_mb,
        "device": "cpu", "monitor.every_epochs": 100, "monitor.sample": 64, "encoder.stem": "imagenet",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        words = ["--store", str(store), "--out", f"{out}/run", *(f"--{k}={v}" for k, v in settings.items())]
        command = [sys.executable, __file__, "--child", json.dumps([words, steps])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--gb", type=float, nargs="*", default=[1, 20])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the sparse files are made; None: with temporary files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(*json.loads(given.child))))
        return 0
    is_flat = True
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        made = {n: make_store(folder / f"slices-{n}", n, 32) for n in given.slices}
        found = [{n: run(path, "shuffle", 16, given.steps) for n, path in made.items()} for _ in range(given.rounds)]
        print("slices in the store    processor time a step    of the smallest    peak memory")
        for n in given.slices:
            times = [each[n]["step_s"] for each in found]
            ratio = statistics.median(each[n]["step_s"] / each[given.slices[0]]["step_s"] for each in found)
            peak = max(each[n]["peak"] for each in found)
            print(f"{n:>19,}    {1000 * statistics.median(times):>18.1f} ms    {ratio:>15.2f}    {peak / 1e6:>8.0f} MB")
            is_flat &= ratio <= STEP_LIMIT
        peaks = []
        for gb in given.gb:
            n = int(gb * 1e9 / (2 * 224**2)) // DEPTH * DEPTH
            store = make_store(folder / f"gb-{gb}", n, 224)
            order = "shuffle" if gb == given.gb[0] else "shards"
            peaks.append(run(store, order, 16, given.steps)["peak"])
            print(
                f"{gb:g} GB of slices, order {order}: peak memory {peaks[-1] / 1e6:.0f} MB, {peaks[-1] / peaks[0]:.2f}"
            )
            is_flat &= peaks[-1] <= MEMORY_LIMIT * peaks[0]
    return int(not is_flat)


if __name__ == "__main__":
    sys.exit(main())
