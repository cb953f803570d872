"""The manifest: one CSV row a scan, and beside it the table that says where the files lie.

    NAME.csv           what there is: pseudonyms, modality, geometry, label, split; the only one that may leave the ward
    NAME.files.csv     which files make each scan, with their absolute folder; stays where the scans are
    NAME.rejected.csv  what could not be used, and why

The patient is the unit of everything here: splits, label budgets and the overlap guard all go by ``patient_id``.
"""

import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from medclr import files
from medclr.errors import MedclrError
from medclr.scans.modality import MODALITIES


@dataclass(frozen=True)
class ScanRow:
    """One scan: a DICOM series, a NIfTI volume or an image. Its fields are the columns of ``NAME.csv``, in order."""

    scan_id: str
    """Keyed pseudonym of ``path`` and ``sha256``; unique."""
    patient_id: str
    """Keyed pseudonym of the patient."""
    study_id: str
    """Keyed pseudonym of the DICOM study; '' for NIfTI and images."""
    modality: str
    """A key of ``medclr.scans.modality.MODALITIES``."""
    body_part: str
    """A controlled word of DICOM Body Part Examined (0018,0015), PS3.16 annex L; '' if unknown."""
    plane: str
    """axial, coronal, sagittal or oblique; '' if unknown."""
    path: str
    """The file, or the folder of a DICOM series, relative to its scan root; '/' between its parts."""
    n_slices: int
    """D, the number of slices."""
    rows: int
    """H of the slices."""
    columns: int
    """W of the slices."""
    spacing_z_mm: float | None
    """Millimetres between the centres of neighbouring slices; None if the file records none."""
    spacing_y_mm: float | None
    """Millimetres between rows."""
    spacing_x_mm: float | None
    """Millimetres between columns."""
    sha256: str
    """Of the file's bytes; of a series: of its files' digests, joined in the order of the slices."""
    volume: int = 0
    """Which volume of its file, counted from 0, where a file holds several."""
    irregular: str = ""
    """In what the scan is not plain, such as missing slices (``medclr.scans.policy``); '' if it is plain."""
    label: str = ""
    """The class, '' if unlabelled."""
    mask_path: str = ""
    """The segmentation, relative to the masks' folder; '' if there is none."""
    split: str = ""
    """The name of the patient's split; '' if none was asked for."""


@dataclass(frozen=True)
class FileRow:
    """One file of a scan. Its fields are the columns of ``NAME.files.csv``; slices stand in geometric order."""

    scan_id: str
    kind: Literal["image", "mask"]
    root: str
    """The absolute folder that was indexed (or that held the masks)."""
    path: str
    """Relative to ``root``; '/' between its parts."""
    size: int
    """Bytes, and below nanoseconds since 1970, when the file was read: if both still hold it is not read again."""
    mtime_ns: int
    series: str
    """Keyed pseudonym of the DICOM series, by which later slices find their scan; '' for NIfTI and images."""
    patient: str
    """Keyed pseudonym of what the header itself says of the patient, before any table overrules it; '' if nothing."""

    def absolute(self) -> Path:
        """Where the file lies."""
        return Path(self.root, self.path)


@dataclass(frozen=True)
class Rejected:
    """A file that could not be used. Its fields are the columns of ``NAME.rejected.csv``."""

    path: str
    reason: str


@dataclass(frozen=True)
class SourceFiles:
    """The files behind one scan."""

    image: list[Path]
    """Absolute; the slices of a DICOM series in geometric order."""
    mask: Path | None
    """A NIfTI of labels on the scan's grid."""


@dataclass(frozen=True)
class Manifest:
    """A manifest as it stands on disk, checked."""

    path: Path
    rows: list[ScanRow]
    file_rows: list[FileRow]
    sha256: str
    """Of the bytes of ``NAME.csv``: a slice store records which manifest it was made from."""

    @cached_property
    def files(self) -> dict[str, SourceFiles]:
        """The files of each ``scan_id``."""
        images: dict[str, list[Path]] = {row.scan_id: [] for row in self.rows}
        masks: dict[str, Path] = {}
        for row in self.file_rows:
            if row.kind == "mask":
                masks[row.scan_id] = row.absolute()
            else:
                images[row.scan_id].append(row.absolute())
        return {scan_id: SourceFiles(paths, masks.get(scan_id)) for scan_id, paths in images.items()}


def files_path(manifest: Path) -> Path:
    """``NAME.files.csv`` beside ``NAME.csv``."""
    return manifest.with_suffix(".files.csv")


def rejected_path(manifest: Path) -> Path:
    """``NAME.rejected.csv`` beside ``NAME.csv``."""
    return manifest.with_suffix(".rejected.csv")


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest and its table of files.

    Raises:
        MedclrError: a table is missing, was not written by medclr, or contradicts itself.
    """
    rows = _read_table(path, ScanRow)
    file_rows = _read_table(files_path(path), FileRow)
    _check(path, rows, file_rows)
    return Manifest(path, rows, file_rows, files.sha256(path))


def write_manifest(
    path: Path, rows: Iterable[ScanRow], file_rows: Iterable[FileRow], rejected: Iterable[Rejected]
) -> Manifest:
    """Check and write the three tables, sorted, ``NAME.csv`` last; the order of files within a scan is kept.

    Raises:
        MedclrError: the rows contradict each other, or the folder cannot be written to.
    """
    rows = sorted(rows, key=lambda row: (row.patient_id, row.scan_id))
    order = {row.scan_id: i for i, row in enumerate(rows)}
    # A stable sort: within a scan the slices stay in the order given.
    file_rows = sorted(file_rows, key=lambda row: (order.get(row.scan_id, -1), row.kind))
    _check(path, rows, file_rows)
    _write_table(rejected_path(path), Rejected, sorted(rejected, key=attrgetter("path", "reason")))
    _write_table(files_path(path), FileRow, file_rows)
    _write_table(path, ScanRow, rows)
    return Manifest(path, rows, file_rows, files.sha256(path))


def read_rejected(path: Path) -> list[Rejected]:
    """What the last run could not use, for the manifest at ``path``; raises as ``read_manifest``."""
    return _read_table(rejected_path(path), Rejected)


def parse_split(text: str) -> dict[str, float]:
    """``"train=0.7,test=0.3"`` -> ``{"train": 0.7, "test": 0.3}``.

    Raises:
        MedclrError: it does not read like that, or the fractions do not add up to 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            fractions[name] = float(value)
        except ValueError:
            raise MedclrError(f"split {text!r} is not understood; write it as train=0.7,test=0.3") from None
    if "" in fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise MedclrError(f"split {text!r}: each part needs a name, and the fractions must add up to 1")
    return fractions


def split_of(patient_id: str, fractions: Mapping[str, float], salt: str = "") -> str:
    """The split of one patient, a function of the id alone: new patients never move those who are already there.

    Args:
        patient_id: as in the manifest.
        fractions: name -> fraction, adding up to 1.
        salt: another word gives another, independent split.
    """
    digest = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0,1)
    upper = 0.0
    for name, fraction in fractions.items():
        upper += fraction
        if position < upper:
            return name
    return name  # the fractions add up to a hair less than 1


def patient_labels(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(patient, label) of each scan -> one label a patient: the commonest, of equals the first in the alphabet."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for patient, label in pairs:
        if label:
            counts[patient][label] += 1
    return {patient: min(c, key=lambda label: (-c[label], label)) for patient, c in counts.items()}


def label_budgets(
    patients: Mapping[str, str], budgets: Sequence[int | float], seed: int
) -> dict[int | float, list[str]]:
    """Nested, stratified subsets of patients: whoever is among the 5 is also among the 10.

    One order of all patients is drawn, of which every budget is a prefix: first one patient of each class, then
    always the class that lags furthest behind its share. Within a class the order is a hash of (seed, patient).

    Args:
        patients: patient -> label, of the training patients alone.
        budgets: a whole number counts patients; a fraction (a float, at most 1.0) is a part of them, rounded, and at
            least one patient a class.
        seed: another seed gives other subsets.

    Raises:
        MedclrError: a budget is larger than the patients there are, or smaller than the number of classes.
    """
    queues: dict[str, list[str]] = {label: [] for label in sorted(set(patients.values()))}
    for patient in sorted(patients, key=lambda p: hashlib.sha256(f"{seed}\0{p}".encode()).digest()):
        queues[patients[patient]].append(patient)
    total, n_classes = len(patients), len(queues)
    taken = dict.fromkeys(queues, 0)
    order: list[str] = []
    while len(order) < total:
        waiting = [label for label in queues if taken[label] < len(queues[label])]
        label = min(
            waiting,
            key=lambda label: (taken[label] > 0, taken[label] - (len(order) + 1) * len(queues[label]) / total, label),
        )
        order.append(queues[label][taken[label]])
        taken[label] += 1

    subsets: dict[int | float, list[str]] = {}
    for budget in budgets:
        is_fraction = isinstance(budget, float)
        if is_fraction and not 0 < budget <= 1:
            raise MedclrError(f"label budget {budget}: fractions lie in (0, 1]; a whole number counts patients")
        n = max(n_classes, round(budget * total)) if is_fraction else int(budget)
        if n > total:
            raise MedclrError(f"label budget {budget}: there are only {total} labelled patients to train on")
        if n < n_classes:
            raise MedclrError(f"label budget {budget}: fewer patients than the {n_classes} classes")
        subsets[budget] = order[:n]
    return subsets


def refuse_overlap(first: Iterable[str], second: Iterable[str], what: str) -> None:
    """Raise if any patient stands on both sides.

    Args:
        first: patient ids.
        second: patient ids.
        what: names the two sides in the message, such as "the training and the test set".

    Raises:
        MedclrError: some patient is in both.
    """
    shared = sorted(set(first) & set(second))
    if shared:
        raise MedclrError(f"{len(shared)} patients are in both {what}, the first is {shared[0]}; split by patient")


def _check(path: Path, rows: Sequence[ScanRow], file_rows: Sequence[FileRow]) -> None:
    """Raise unless the tables agree with themselves and each other."""
    seen: set[str] = set()
    split: dict[str, str] = {}
    for row in rows:
        if not row.scan_id or not row.patient_id:
            raise MedclrError(f"{path}: the row of {row.path!r} has no scan_id or patient_id; run medclr index again")
        if row.scan_id in seen:
            raise MedclrError(f"{path}: scan_id {row.scan_id} stands twice; remove one of the two rows")
        if row.modality not in MODALITIES:
            known = ", ".join(MODALITIES)
            raise MedclrError(f"{path}: modality {row.modality!r} of {row.scan_id} is not one of {known}")
        if min(row.n_slices, row.rows, row.columns) < 1:
            raise MedclrError(f"{path}: {row.scan_id} has no slices, rows or columns; run medclr index again")
        if split.setdefault(row.patient_id, row.split) != row.split:
            raise MedclrError(
                f"{path}: patient {row.patient_id} stands in two splits, {split[row.patient_id]!r} and {row.split!r};"
                " give all scans of a patient the same split"
            )
        seen.add(row.scan_id)
    again = "delete both and run medclr index again"
    with_files = {row.scan_id for row in file_rows if row.kind == "image"}
    if missing := seen - with_files:
        raise MedclrError(f"{files_path(path)}: lists no file for scan {min(missing)}; {again}")
    if strange := {row.scan_id for row in file_rows} - seen:
        raise MedclrError(f"{files_path(path)}: scan {min(strange)} is not in {path.name}; {again}")


Row = TypeVar("Row", ScanRow, FileRow, Rejected)


def _optional_float(text: str) -> float | None:
    return float(text) if text else None


_PARSERS: dict[Any, Callable[[str], Any]] = {int: int, float | None: _optional_float}


def _read_table(path: Path, row_type: type[Row]) -> list[Row]:
    """Rows of a CSV whose columns are the fields of ``row_type``.

    Raises:
        MedclrError: the file is missing, a column is missing or unknown, or a value has the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # a spreadsheet may have put a byte order mark before it
    except FileNotFoundError:
        raise MedclrError(f"{path}: no such file; medclr index writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MedclrError(f"{path}: cannot be read as a table ({error})") from error
    names = [field.name for field in fields(row_type)]
    hints = get_type_hints(row_type)
    parsers = [_PARSERS.get(hints[name], str) for name in names]
    table = csv.reader(io.StringIO(text, newline=""))
    header = next(table, [])
    if absent := [name for name in names if name not in header]:
        raise MedclrError(f"{path}: column {', '.join(absent)} is missing; is this a table that medclr index wrote?")
    if unknown := [name for name in header if name not in names]:
        raise MedclrError(f"{path}: column {', '.join(map(repr, unknown))} is unknown; take it out")
    order = [header.index(name) for name in names]
    rows = []
    for cells in table:
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells where {len(header)} columns are named")
            rows.append(row_type(*(parse(cells[i]) for parse, i in zip(parsers, order, strict=True))))
        except ValueError as error:
            raise MedclrError(f"{path}: line {table.line_num}: {error}") from None
    return rows


def _write_table(path: Path, row_type: type[Row], rows: Sequence[Row]) -> None:
    """Write a CSV that ``_read_table`` reads back equal; None becomes an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(row_type)]
    writer.writerow(names)
    writer.writerows(map(attrgetter(*names), rows))
    files.write_text(path, text.getvalue())
