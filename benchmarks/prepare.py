"""What ``medclr prepare`` costs with one worker, and what more workers gain.

    python benchmarks/prepare.py MANIFEST... [--size-px 224] [--rounds 5]
    python benchmarks/prepare.py MANIFEST... --workers 2 [--copies 20]

Without ``--workers``: against a bare loop that decodes, shrinks and saves the same scans. It calls the same libraries
and checks nothing: pydicom's pixel_array and rescale, nibabel's dataobj, or Pillow; Pillow's antialiased resize of each
slice; one np.save of uint16 squares a scan. It neither hashes nor waits for the disk. The two sides take turns in one
process. Exits with status 1 if prepare takes more than 1.5 times as long.

With ``--workers N``: the command itself with N workers against one, whole processes from start to end, in turns; each
scan of the manifest several times over, so that there is work for tens of seconds. Exits with status 1 if two workers
are less than 1.7 times as fast. What the machine has to give at that time, where others work on it as well, is what N
commands of one worker gain that run side by side.

Medians over the rounds, and the range of the ratios of neighbouring runs. A busy machine changes CPU time the least.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from medclr.data.manifest import Manifest, SourceFiles, read_manifest, write_manifest
from medclr.data.prepare import prepare

LIMIT = 1.5
GAIN = 0.85  # of each worker: 1.7 times as fast with two


def bare_prepare(manifest: Manifest, out: Path, size_px: int) -> None:
    """Decode, shrink, save."""
    out.mkdir()
    for scan_id, source in manifest.files.items():
        volume = bare_decode(source)
        np.save(out / f"{scan_id}.npy", bare_squares(volume - volume.min(), size_px, Image.Resampling.BILINEAR))
        if source.mask is not None:
            mask = bare_decode(SourceFiles([source.mask], None))
            np.save(out / f"{scan_id}-mask.npy", bare_squares(mask, size_px, Image.Resampling.NEAREST))


def bare_decode(source: SourceFiles) -> NDArray[Any]:
    """[D,H,W], the slices of a volume in whatever order they come."""
    first = source.image[0]
    if first.name.endswith((".nii", ".nii.gz")):
        return np.ascontiguousarray(np.asarray(nib.load(first).dataobj, dtype=np.float32).T)
    if first.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff"):
        with Image.open(first) as image:
            return np.asarray(image.convert("F"))[None]
    slices = []
    for path in source.image:
        dataset = dcmread(path)
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        slices.append(dataset.pixel_array.astype(np.float32) * slope + intercept)
    return np.stack(slices)


def bare_squares(volume: NDArray[Any], size_px: int, how: Image.Resampling) -> NDArray[np.uint16]:
    """[D,S,S], each slice as large as fits, in a corner."""
    _, height, width = volume.shape
    ratio = min(size_px / height, size_px / width, 1)
    h, w = round(height * ratio), round(width * ratio)
    squares = np.zeros((len(volume), size_px, size_px), dtype=np.uint16)
    for square, image in zip(squares, volume, strict=True):
        square[:h, :w] = image if ratio == 1 else Image.fromarray(image).resize((w, h), how)
    return squares


def compare_with_bare(path: Path, options: argparse.Namespace) -> bool:
    """Measure and print; whether the goal is missed."""
    manifest = read_manifest(path, options.key_file)
    times: dict[str, list[float]] = {"prepare": [], "bare": []}
    cpu: dict[str, list[float]] = {"prepare": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for _ in range(options.rounds + 1):
            for side, taken in times.items():
                started, before = time.perf_counter(), time.process_time()
                if side == "prepare":
                    prepare(path, out, size_px=options.size_px, key_file=options.key_file)
                else:
                    bare_prepare(manifest, out, options.size_px)
                taken.append(time.perf_counter() - started)
                cpu[side].append(time.process_time() - before)
                shutil.rmtree(out)
    ours, bare = (statistics.median(taken[1:]) for taken in times.values())
    ours_cpu, bare_cpu = (statistics.median(taken[1:]) for taken in cpu.values())
    n_slices = sum(row.n_slices for row in manifest.rows)
    print(
        f"{path.name}: {n_slices:,} slices to {options.size_px} px, {options.rounds} rounds: prepare {ours:.2f} s"
        f" ({n_slices / ours:,.0f} slices/s), bare {bare:.2f} s, ratio {ours / bare:.2f}"
        f" ({_range([a / b for a, b in zip(*times.values(), strict=True)][1:])}; goal {LIMIT}),"
        f" ratio of CPU time {ours_cpu / bare_cpu:.2f}"
    )
    return ours > LIMIT * bare


def compare_workers(path: Path, options: argparse.Namespace) -> bool:
    """Measure and print; whether the goal is missed."""
    n = options.workers
    one: list[float] = []
    many: list[float] = []
    side_by_side: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = replicate(read_manifest(path, options.key_file), options.copies, Path(folder) / "copies.csv")

        def seconds(workers: int, commands: int = 1) -> float:
            command = [sys.executable, "-m", "medclr", "prepare", str(manifest.path), "--size-px", str(options.size_px)]
            command += ["--workers", str(workers), "--out"]
            outs = [Path(folder) / f"out{number}" for number in range(commands)]
            started = time.perf_counter()
            running = [subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL) for out in outs]
            assert not any(process.wait() for process in running)
            taken = time.perf_counter() - started
            for out in outs:
                shutil.rmtree(out)
            return taken

        for _ in range(options.rounds):
            one.append(seconds(1))
            many.append(seconds(n))
            side_by_side.append(seconds(1, commands=n))
    gains = [a / b for a, b in zip(one, many, strict=True)]
    possible = [n * a / b for a, b in zip(one, side_by_side, strict=True)]
    gain = statistics.median(one) / statistics.median(many)
    n_slices = sum(row.n_slices for row in manifest.rows)
    print(
        f"{path.name} x {options.copies}: {n_slices:,} slices to {options.size_px} px, {options.rounds} rounds: one"
        f" worker {statistics.median(one):.1f} s, {n} workers {statistics.median(many):.1f} s, gain {gain:.2f}"
        f" ({_range(gains)}; goal {GAIN * n:.2f}); {n} commands side by side gain {statistics.median(possible):.2f}"
        f" ({_range(possible)})"
    )
    return gain < GAIN * n


def replicate(manifest: Manifest, copies: int, path: Path) -> Manifest:
    """A manifest of the same scans, each several times."""
    rows = [replace(row, scan_id=f"{row.scan_id}-{copy}") for copy in range(copies) for row in manifest.rows]
    file_rows = [
        row._replace(scan_id=f"{row.scan_id}-{copy}", root=place.root, path=place.path)
        for copy in range(copies)
        for row, place in manifest.located
    ]
    return write_manifest(path, rows, file_rows, [])


def _range(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path, help="NAME.csv that medclr index wrote")
    parser.add_argument("--key-file", type=Path, help="the key of the manifests")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--workers", type=int, help="compare so many with one")
    parser.add_argument("--copies", type=int, default=20, help="how often each scan is decoded, with --workers")
    options = parser.parse_args()
    compare = compare_workers if options.workers else compare_with_bare
    missed = [compare(path, options) for path in options.manifests]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
