"""Odd files of every kind, and what becomes of each; what is read is laid beside readers that nobody here wrote.

    python -m tests.zoo [--data DIR] [--out docs/zoo.md]

Files are those of pydicom's installed tests and, where ``--data`` is present, of the shared data. Fails if a reader
raises anything but ScanError, if a scan agrees with no independent reader, or if one differs and nobody knows why.
"""

import argparse
import importlib
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from medclr import files, scans
from medclr.errors import ScanError
from medclr.scans.nifti import read_mask
from medclr.scans.policy import ACCEPTED
from medclr.scans.scan import Found, Scan
from tests.oracles import CannotReadError, Reference, dcm2niix, itk, nifti, pydicom_pipeline

ROOT = Path(__file__).resolve().parents[1]
PYDICOM = Path(pydicom.__file__).parent / "data"

Voxels = NDArray[np.float64]


@dataclass(frozen=True)
class Explained:
    """Why an independent reader differs, and, if that can be said, how what it reads from the file becomes ours."""

    why: str
    as_ours: Callable[[Reference, Path], Reference] | None = None


def _high_bytes(reference: Reference, _: Path) -> Reference:
    return replace(reference, voxels=reference.voxels * 256)


def _ultrasound(reference: Reference, file: Path) -> Reference:
    """With the pixel spacing of the first region, which is in centimetres (PS3.3 C.8.5.5.1.15)."""
    region = pydicom.dcmread(file, stop_before_pixels=True).SequenceOfUltrasoundRegions[0]
    assert (region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection) == (3, 3)
    return replace(reference, spacing_mm=(1, 10 * region.PhysicalDeltaY, 10 * region.PhysicalDeltaX))


_PALETTE = Explained("equal but for the palette, of whose 16 bits ITK keeps the high byte", _high_bytes)
_REGIONS = Explained("equal but for the spacing, which ITK does not look for in ultrasound regions", _ultrasound)
_RLE = Explained("GDCM puts the bytes of colours of more than 8 bits together wrongly")
EXPLAINED = {
    ("mlut_18.dcm", "SimpleITK"): Explained("ITK applies a rescale, but no Modality LUT Sequence"),
    ("OBXXXX1A.dcm", "SimpleITK"): _PALETTE,
    ("OBXXXX1A_2frame.dcm", "SimpleITK"): _PALETTE,
    ("OBXXXX1A_rle.dcm", "SimpleITK"): _PALETTE,
    ("OBXXXX1A_rle_2frame.dcm", "SimpleITK"): _PALETTE,
    ("OT-PAL-8-face.dcm", "SimpleITK"): _PALETTE,
    ("examples_palette.dcm", "SimpleITK"): _PALETTE,
    ("examples_ybr_color.dcm", "SimpleITK"): _REGIONS,
    ("JPGLosslessP14SV1_1s_1f_8b.dcm", "SimpleITK"): _REGIONS,
    ("SC_rgb_rle_16bit.dcm", "SimpleITK"): _RLE,
    ("SC_rgb_rle_16bit_2frame.dcm", "SimpleITK"): _RLE,
    ("SC_rgb_rle_32bit.dcm", "SimpleITK"): _RLE,
    ("SC_rgb_rle_32bit_2frame.dcm", "SimpleITK"): _RLE,
}
"""File and independent reader -> why they differ. One that is not needed any more is an error too."""


@dataclass(frozen=True)
class Look:
    """A scan laid beside what an independent reader makes of the same files."""

    oracle: str
    differences: tuple[str, ...]
    why: str = ""
    """The explanation, if there is one."""

    def __str__(self) -> str:
        if self.why:
            return f"{self.oracle}: {'differs: ' if self.differences else ''}{self.why}"
        return f"{self.oracle}: {'differs: ' + '; '.join(self.differences) if self.differences else 'equal'}"


@dataclass(frozen=True)
class Row:
    """What became of a scan, or of a file that is none."""

    collection: str
    files: tuple[Path, ...]
    scan: Scan | None = None
    reason: str = ""
    """Why it was refused, alone or among the other files of its folder."""
    looks: tuple[Look, ...] = ()

    @property
    def name(self) -> str:
        """The file's name; of a series that of its folder."""
        first, *others = self.files
        return f"{first.parent.name}/ ({len(self.files)} files)" if others else first.name

    @property
    def trouble(self) -> list[str]:
        """What must not be."""
        if self.scan is None:
            return []
        wrong = [str(look) for look in self.looks if look.differences and not look.why]
        wrong += [f"{look.oracle} is equal, and is explained to differ" for look in self.looks
                  if look.why and not look.differences and not EXPLAINED[self.name, look.oracle].as_ours]  # fmt: skip
        if all(look.differences for look in self.looks):
            wrong.append("agrees with no independent reader")
        return [f"{self.collection}, {self.name}: {words}" for words in wrong]


def collections(data: Path) -> Iterator[tuple[str, list[Path]]]:
    """Name and files of each; of the shared data what is there."""
    yield "pydicom", [path for path in _files(PYDICOM) if path.suffix not in (".py", ".pyc")]
    for name in ("dicom_zoo", "mr_brain_dicom", "ct_abdomen_dicom", "ct_body"):
        if (data / name).exists():
            yield name, _files(data / name)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def visit(collection: str, files: Sequence[Path]) -> list[Row]:
    """Every file of a collection to a row; those of one scan share it."""
    headers: dict[str, dict[Path, Any]] = defaultdict(dict)
    rows = []
    for path in files:
        with path.open("rb") as file:
            known = scans.reader_of(file.read(scans.HEAD_BYTES))
        if known is None:
            rows.append(Row(collection, (path,), reason=scans.NO_SCAN))
            continue
        name, reader = known
        try:
            headers[name][path] = reader.read_header(path)
        except ScanError as error:
            rows.append(Row(collection, (path,), reason=str(error)))
    for name, some in headers.items():
        reader = importlib.import_module(f"medclr.scans.{name}")
        found, rejected = reader.find(list(some.values()))
        rows += [_read(Row(collection, scan.files), scan) for scan in found]
        for path, reason in rejected:  # alone it may be a scan
            alone, _ = reader.find([some[path]])
            row = Row(collection, (path,), reason=reason)
            rows += [_read(row, scan) for scan in alone] or [row]
    return sorted(rows, key=lambda row: row.files)


def _read(row: Row, found: Found) -> Row:
    """Read, and laid beside the independent readers."""
    try:
        scan = scans.read(found.files, found.modality or "OT", volume=found.volume, policy=ACCEPTED)
    except ScanError as error:
        return replace(row, reason=str(error).removeprefix(f"{found.files[0]}: "))
    looks: list[Look] = []
    for oracle in _independent(row):
        if oracle is pydicom_pipeline and any(not look.differences for look in looks):
            break  # the weaker one, for what the others cannot read
        try:
            with warnings.catch_warnings():  # theirs, not ours
                warnings.simplefilter("ignore")
                reference = oracle(row.files)
        except CannotReadError:
            continue
        known = EXPLAINED.get((row.name, reference.oracle))
        if known and known.as_ours:
            reference = known.as_ours(reference, row.files[0])
        differences = tuple(compare(scan, reference, is_placed=bool(found.plane)))
        looks.append(Look(reference.oracle, differences, known.why if known else ""))
    return replace(row, scan=scan, looks=tuple(looks))


def _independent(row: Row) -> list[Callable[[Sequence[Path]], Reference]]:
    """Who can be asked about these files, the most independent first."""
    first = row.files[0]
    if first.name.endswith((".nii", ".nii.gz")):
        return [lambda files: nifti(files[0]), itk]
    asked: list[Callable[[Sequence[Path]], Reference]] = []
    if first.parent.name == "one_series_seven_transfer_syntaxes":
        converted = first.parents[1] / "one_series_reference_nifti" / f"{first.stem}.nii"
        asked.append(lambda files: nifti(converted, "reference NIfTI"))
    if len(row.files) > 1 and row.collection.endswith("_dicom") and shutil.which("dcm2niix"):
        asked.append(lambda files: dcm2niix(files[0].parent))
    if not asked or len(row.files) > 1:  # ITK shows a mosaic as one flat picture
        asked.append(itk)
    return [*asked, pydicom_pipeline]


def compare(scan: Scan, reference: Reference, *, is_placed: bool) -> Iterator[str]:
    """What differs. With a place in space, voxels are compared where they lie, whatever their order in the arrays.

    A single slice has no distance to a neighbour: Scan gives its Slice Thickness, ITK 1 mm or Spacing Between Slices.
    """
    theirs, affine = reference.voxels, reference.affine
    if affine is None or not is_placed:
        if reference.spacing_mm and not np.allclose(reference.spacing_mm[1:], scan.spacing_mm[1:], rtol=1e-5):
            yield f"spacing {reference.spacing_mm} mm"
    else:
        affine = affine.copy()
        if len(scan.voxels) == 1 and 1 in theirs.shape:
            across = theirs.shape.index(1)
            affine[:3, across] *= scan.spacing_mm[0] / np.linalg.norm(affine[:3, across])
        turn = np.linalg.inv(affine) @ scan.affine  # our index -> theirs
        axes = np.abs(turn[:3, :3]).argmax(axis=0)  # of theirs, along ours
        if sorted(axes) != [0, 1, 2]:
            yield "lies across our voxels"
            return
        placed = np.eye(4)[[*axes, 3]].T  # [4,4], our index -> theirs, if theirs is ours turned and mirrored
        theirs = theirs.transpose(axes)
        for ours, axis in enumerate(axes):
            if turn[axis, ours] < 0:
                theirs = np.flip(theirs, ours)
                placed[axis, ours], placed[axis, 3] = -1, theirs.shape[ours] - 1
        corners = np.array([(*at, 1) for at in np.ndindex(2, 2, 2)]) * (*np.subtract(theirs.shape, 1), 1)  # [8,4]
        apart_mm = np.abs(corners @ (scan.affine - affine @ placed).T).max()
        if apart_mm > 0.01:
            yield f"voxels lie up to {apart_mm:.3g} mm elsewhere"
            return
    if theirs.shape != scan.voxels.shape:
        yield f"shape {reference.voxels.shape}"
        return
    wrong = ~np.isclose(theirs, scan.voxels, rtol=1e-6, atol=1e-6)  # float32, as Scan holds them
    if wrong.any():
        worst = np.abs(theirs - scan.voxels).max()
        yield f"{int(wrong.sum()):,} of {wrong.size:,} values, by up to {worst:.4g}"


ORGANS_HU = {
    "spleen": ((1,), 40, 200),
    "kidneys": ((2, 3), 40, 300),
    "liver": ((5,), 40, 200),
    "stomach": ((6,), -200, 150),
    "lungs": (tuple(range(10, 15)), -950, -400),
    "vertebrae": (tuple(range(26, 51)), 100, 600),
    "aorta": ((52,), 30, 500),
    "autochthonous muscles": ((86, 87), 0, 100),
}
"""Organ -> TotalSegmentator's classes, and where a mean in HU is plausible, with contrast medium or without."""


def anatomy(scan: Scan, mask: NDArray[np.uint16]) -> list[tuple[str, str, bool]]:
    """Whether labels [D,H,W] fall on the anatomy of a CT: (what, value, is it so).

    Means within organs are plausible, the liver lies right of the spleen and the spine behind the aorta, and the labels
    explain more of the variance of HU than they do turned round or moved by 2 voxels along any axis.
    """
    rows = []
    for organ, (classes, low, high) in ORGANS_HU.items():
        inside = np.isin(mask, classes)
        if inside.sum() >= 500:
            mean = float(scan.voxels[inside].mean())
            rows.append((f"mean of the {organ}, {int(inside.sum()):,} voxels", f"{mean:.0f} HU", low <= mean <= high))

    def centre(*classes: int) -> Voxels:
        middle: Voxels = scan.affine @ [*np.argwhere(np.isin(mask, classes)).mean(axis=0), 1]
        return middle[:3]  # RAS mm

    apart = centre(5) - centre(1), centre(52) - centre(*range(26, 51))
    rows.append(("the liver lies right of the spleen", f"by {apart[0][0]:.0f} mm", bool(apart[0][0] > 0)))
    rows.append(("the aorta lies in front of the spine", f"by {apart[1][1]:.0f} mm", bool(apart[1][1] > 0)))
    kept = _explained(scan.voxels, mask)
    for axis, name in enumerate(("slices", "rows", "columns")):
        for words, other in (
            (f"{name} turned round", np.flip(mask, axis)),
            (f"{name} moved by 2", np.roll(mask, 2, axis)),
        ):
            worse = _explained(scan.voxels, other)
            rows.append((f"variance explained with {words}", f"{worse:.3f} instead of {kept:.3f}", worse < kept))
    return rows


def _explained(values: NDArray[np.float32], mask: NDArray[np.uint16]) -> float:
    """Part of the variance of the labelled values that lies between labels (eta squared)."""
    inside = mask > 0
    of, labels = values[inside].astype(float), mask[inside]
    counts = np.bincount(labels)
    means = np.bincount(labels, of) / np.maximum(counts, 1)
    return float((counts * (means - of.mean()) ** 2).sum() / ((of - of.mean()) ** 2).sum())


def labelled_ct(data: Path) -> list[tuple[str, str, bool]]:
    """``anatomy`` of the abdominal CT, whose labels an independent converter has put on its own grid."""
    scan = scans.read(_files(data / "ct_abdomen_dicom"))
    return anatomy(scan, read_mask(data / "ct_abdomen_labels_117.nii.gz", like=scan))


def page(rows: Sequence[Row], labels: Sequence[tuple[str, str, bool]]) -> str:
    """docs/zoo.md."""
    read = [row for row in rows if row.scan is not None]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.scan is None:
            reasons[row.collection, row.reason].append(row.name)
    refused = sum(map(len, reasons.values()))
    lines = [INTRODUCTION.format(files=sum(len(row.files) for row in rows), read=len(read), refused=refused)]
    lines += [
        "| collection | file | modality | shape | spacing mm | values | agrees with |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read:
        scan = row.scan
        assert scan is not None
        notes = [*([f"irregular: {scan.irregular}"] if scan.irregular else []), *map(str, row.looks)]
        if row.reason:
            notes.append(f"alone; beside the others of its folder it {row.reason}")
        cells = (
            row.collection,
            row.name,
            scan.modality,
            " × ".join(map(str, scan.voxels.shape)),
            " × ".join(f"{mm:.4g}" for mm in scan.spacing_mm),
            f"{scan.voxels.min():.6g} to {scan.voxels.max():.6g}",
            "<br>".join(notes),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Refused", "", "| collection | reason | files |", "|---|---|---|"]
    lines += [f"| {c} | {reason} | {', '.join(sorted(names))} |" for (c, reason), names in sorted(reasons.items())]
    if labels:
        lines += [LABELS, "| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value, _ in labels)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Odd files, and what becomes of each

Written by `make zoo`, which fails if a reader crashes, if a scan agrees with no reader that nobody here wrote, or if
one of them differs and nobody knows why. {files} files: {read} scans are read, {refused} files are refused.

- **dicom_zoo, pydicom**: the odd files of pydicom's tests, and one Siemens series saved nine ways. **mr_brain_dicom,
  ct_abdomen_dicom**: whole series. **ct_body**: NIfTI.
- **SimpleITK** sorts and decodes with GDCM, applies the rescale and turns MONOCHROME1 round; its world is LPS.
  **dcm2niix** sorts and decodes by itself. **nibabel** reads NIfTI, also what an independent converter made of the
  Siemens series (**reference NIfTI**). **pydicom**, the weaker witness because medclr decodes with it too, is asked
  where no other can read the file.
- *equal*: every voxel, at the same place in the patient to 0.01 mm, with the same value to float32's last digit; for
  pictures without a place, the same pixels and pixel spacing. A single slice has no distance to a neighbour: medclr
  gives its thickness and ITK what it finds, and this is not compared.
- To compare, an independent reader's colour is weighted to luminance (BT.601) and CT's padding becomes air.

## Read
"""

LABELS = """
## Labels on the same anatomy

The abdominal CT, read from DICOM, and the labels of 117 structures that lie on the grid of an independent converter,
brought over by `read_mask`. Turned round or moved, they must explain less of the variance of Hounsfield units.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if something is not as it must be."""
    from rich.console import Console
    from rich.markdown import Markdown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("MEDCLR_SHARED_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(shared))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "zoo.md")
    given = parser.parse_args(arguments)
    console = Console(width=200)
    if shutil.which("dcm2niix") is None:
        console.print("dcm2niix is not installed, so nothing is compared with it: apt-get install dcm2niix")
    rows = [row for name, files in collections(given.data) for row in visit(name, files)]
    has_labels = (given.data / "ct_abdomen_labels_117.nii.gz").exists()
    labels = labelled_ct(given.data) if has_labels else []
    text = page(rows, labels)
    files.write_text(given.out, text)
    console.print(Markdown(text))
    trouble = [words for row in rows for words in row.trouble]
    trouble += [f"labels: {what}: {value}" for what, value, is_so in labels if not is_so]
    for words in trouble:
        console.print(words, style="red", highlight=False)
    return int(bool(trouble))


if __name__ == "__main__":
    raise SystemExit(main())
