"""What ``medclr prepare`` costs with one worker, against a bare loop that decodes, shrinks and saves the same scans.

    python benchmarks/prepare.py MANIFEST... [--size-px 224] [--rounds 5]

The bare loop calls the same libraries and checks nothing: pydicom's pixel_array and rescale, nibabel's dataobj, or
Pillow; Pillow's antialiased resize of each slice; one np.save of uint16 squares a scan. It neither hashes nor waits for
the disk. The two sides take turns in one process, and the medians over the rounds are compared.
Exits with status 1 if prepare takes more than 1.5 times as long.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from medclr.data.manifest import Manifest, SourceFiles, read_manifest
from medclr.data.prepare import prepare

LIMIT = 1.5


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path, help="NAME.csv that medclr index wrote")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side, after one of each to warm up")
    options = parser.parse_args()
    missed = False
    for path in options.manifests:
        manifest = read_manifest(path)
        times: dict[str, list[float]] = {"prepare": [], "bare": []}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            for _ in range(options.rounds + 1):
                for side, taken in times.items():
                    started = time.perf_counter()
                    if side == "prepare":
                        prepare(path, out, size_px=options.size_px)
                    else:
                        bare_prepare(manifest, out, options.size_px)
                    taken.append(time.perf_counter() - started)
                    shutil.rmtree(out)
        ours, bare = (statistics.median(taken[1:]) for taken in times.values())
        missed |= ours > LIMIT * bare
        n_slices = sum(row.n_slices for row in manifest.rows)
        print(
            f"{path.name}: {n_slices:,} slices to {options.size_px} px, {options.rounds} rounds: prepare {ours:.2f} s"
            f" ({n_slices / ours:,.0f} slices/s), bare {bare:.2f} s, ratio {ours / bare:.2f} (goal {LIMIT})"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
