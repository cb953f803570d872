"""How much `medclr index` costs beyond reading the same headers and hashing the same bytes in a bare pydicom loop.

    python benchmarks/index.py                  # 1,500 synthetic CT slices in a temporary folder
    python benchmarks/index.py --folder SCANS   # your own DICOM folder

Both sides run in one process, in turns, on files that the page cache holds; the medians are compared.
Aim: at most 1.5 times.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medclr.data.index import index

AIM = 1.5


def write_cohort(folder: Path, n_series: int, n_slices: int, size_px: int) -> None:
    """CT series of plain slices, one folder each, with short headers: there the bare loop is at its best."""
    pixels = np.random.RandomState(0).randint(0, 4096, (size_px, size_px)).astype(np.uint16)
    for s in range(n_series):
        series, study = generate_uid(), generate_uid()
        (folder / f"series{s:03d}").mkdir(parents=True)
        for i in range(n_slices):
            dataset = Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
            dataset.Modality, dataset.PatientID, dataset.BodyPartExamined = "CT", f"patient {s // 2}", "CHEST"
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            dataset.Rows = dataset.Columns = size_px
            dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.8], 2.5
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            dataset.ImagePositionPatient = [-100, -100, 2.5 * i]
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
            dataset.PixelData = (pixels + i).tobytes()
            dataset.save_as(folder / f"series{s:03d}" / f"{i:04d}.dcm", enforce_file_format=True)


def bare_loop(folder: Path) -> float:
    """Seconds to read and hash every file and parse its header, and nothing else."""
    started = time.perf_counter()
    series = set()
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            hashlib.sha256(data).hexdigest()
            dataset = dcmread(BytesIO(data), stop_before_pixels=True)
            series.add((dataset.SeriesInstanceUID, *dataset.ImagePositionPatient))
    return time.perf_counter() - started


def medclr_index(folder: Path, out: Path) -> float:
    """Seconds for `medclr index` from nothing to the tables on disk."""
    for table in out.parent.glob(f"{out.stem}.*"):
        table.unlink()
    started = time.perf_counter()
    index([folder], out, key_file=out.parent / "key")
    return time.perf_counter() - started


def main() -> None:
    """Run both sides in turns and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="DICOM files to index instead of synthetic ones")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary, "cohort")
        if arguments.folder is None:
            write_cohort(folder, n_series=30, n_slices=50, size_px=256)
        out = Path(temporary, "tables", "cohort.csv")
        n_files = sum(path.is_file() for path in folder.rglob("*"))
        bare_loop(folder), medclr_index(folder, out)  # warm the page cache and the imports
        bare, ours = [], []
        for _ in range(arguments.repeats):
            bare.append(bare_loop(folder))
            ours.append(medclr_index(folder, out))
    ratio = statistics.median(ours) / statistics.median(bare)
    for name, seconds in (("bare pydicom loop", bare), ("medclr index", ours)):
        middle, a_file = statistics.median(seconds), statistics.median(seconds) / n_files * 1e3
        print(f"{name:18} {middle:6.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), {a_file:.3f} ms a file")
    print(f"{n_files:,} files, {arguments.repeats} runs each: ratio {ratio:.2f} (aim: at most {AIM})")


if __name__ == "__main__":
    main()
