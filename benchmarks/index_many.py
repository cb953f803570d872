"""How `medclr index` takes a large archive: time and memory for 100,000 small slices, and again after ten new ones.

    python benchmarks/index_many.py                   # 1,000 series of 100 slices in a temporary folder
    python benchmarks/index_many.py --series 100      # a tenth of it

Each run is a process of its own, as from the command line; its time on a processor, which other programs disturb less,
and its peak memory are what the system counted.
Aims: below 1 GB, and the second time below 5 % of the first.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SLICES = 100
AIM_GB, AIM_RATIO = 1.0, 0.05

SERIES, SLICE, HEIGHT = b"771177", b"882288", b"9933.9"
"""What stands in the template for the numbers of a series and of a slice, and for the slice's height in mm."""


def template() -> bytes:
    """A CT slice of 4 KB with SERIES, SLICE and HEIGHT in it."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.826.0.1.1771177.1882288"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.2771177", "1.2.826.0.1.3771177"
    dataset.PatientID, dataset.Modality, dataset.BodyPartExamined = "patient 771177", "CT", "CHEST"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows = dataset.Columns = 42
    dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.8], 2.5
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-100, -100, "9933.9"]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = bytes(2 * 42 * 42)
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def write_slices(folder: Path, plain: bytes, series: int, slices: range) -> None:
    """Slices of one series, each the template with its own ids and position."""
    here = folder / f"{series:06d}"
    here.mkdir(parents=True, exist_ok=True)
    of_series = plain.replace(SERIES, b"%06d" % series)
    for i in slices:
        data = of_series.replace(SLICE, b"%06d" % i).replace(HEIGHT, b"%06.1f" % (2.5 * i))
        (here / f"{i:06d}").write_bytes(data)


def measure(folder: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, seconds of a processor, and peak GB of one `medclr index`."""
    command = [sys.executable, "-m", "medclr", "index", str(folder), "--out", str(out), "--key-file", f"{out}.key"]
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, command, dict(os.environ))
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit("medclr index failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def main() -> None:
    """Index, add ten slices, index again, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="how often ten slices are added")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, out, plain = Path(temporary, "scans"), Path(temporary, "many.csv"), template()
        for series in range(arguments.series):
            write_slices(folder, plain, series, range(SLICES))
        n_files = arguments.series * SLICES
        print(f"{n_files:,} files of {len(plain):,} bytes in {arguments.series:,} series")
        first, busy, peak = measure(folder, out)
        print(f"first time: {first:.1f} s, of a processor {busy:.1f} s; peak memory {peak:.2f} GB")
        ratios = []
        for i in range(arguments.repeats):
            write_slices(folder, plain, i, range(SLICES, SLICES + 10))
            seconds, processor, more = measure(folder, out)
            print(f"after ten new files: {seconds:.2f} s, of a processor {processor:.2f} s; peak memory {more:.2f} GB")
            ratios.append((seconds / first, processor / busy))
            peak = max(peak, more)
    elapsed, worked = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"ratio of the times {elapsed:.3f}, of the processor's {worked:.3f} (aim: below {AIM_RATIO})")
    print(f"peak memory {peak:.2f} GB (aim: below {AIM_GB})")


if __name__ == "__main__":
    main()
