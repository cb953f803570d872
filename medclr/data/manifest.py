"""The manifest: one CSV row a scan, and beside it the table that says where the files lie.

    NAME.csv           what there is: pseudonyms, modality, geometry, label, split; the only one that may leave the ward
    NAME.files.csv     which files make each scan; stays where the scans are
    NAME.rejected.csv  what could not be used, and why
    NAME.index.json    the options of ``medclr index`` that all its scans share

Files are called by opaque ids (``medclr.data.places``) unless ``--keep-paths`` was given.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

from medclr import files
from medclr.data.places import File, find_places
from medclr.errors import MedclrError
from medclr.scans.modality import MODALITIES
from medclr.scans.policy import Plane, Policy
from medclr.scans.privacy import default_key_file


@dataclass(frozen=True)
class ScanRow:
    """One scan: a DICOM series, a NIfTI volume or an image. Its fields are the columns of ``NAME.csv``, in order."""

    scan_id: str
    """Keyed pseudonym of the path, the bytes and the volume; unique."""
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
    """Opaque id of the file, or of the folder of a DICOM series; or its path under its root, '/' between the parts."""
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
    """Keyed digest (``Pseudonyms.content``) of the file's SHA-256; of a series: of that of its files' SHA-256, joined
    in the order of the slices. Equal bytes are found by it, but not by somebody who lacks the key."""
    volume: int = 0
    """Which volume of its file, counted from 0, where a file holds several."""
    irregular: str = ""
    """In what the scan is not plain, such as missing slices (``medclr.scans.policy``); '' if it is plain."""
    label: str = ""
    """The class, '' if unlabelled."""
    mask_path: str = ""
    """Opaque id of the segmentation, or its path relative to the masks' folder; '' if there is none."""
    split: str = ""
    """The name of the patient's split; '' if none was asked for."""


class FileRow(NamedTuple):
    """One file of a scan. Its fields are the columns of ``NAME.files.csv``; slices stand in geometric order."""

    scan_id: str
    kind: Literal["image", "mask"]
    root: str
    """The absolute folder that was indexed (or that held the masks); '' if ``path`` is an opaque id."""
    path: str
    """Opaque id, or the path relative to ``root``; '/' between its parts."""
    size: int
    """As in ``File``, when it was read, and below."""
    mtime_ns: int
    series: str
    """Keyed pseudonym of the DICOM series, by which later slices find their scan; '' for NIfTI and images."""
    patient: str
    """Keyed pseudonym of what the header itself says of the patient, before any table overrules it; '' if nothing."""
    sha256: str = ""
    """Of the file's bytes."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"{self.root}/{self.path}" if self.root else self.path


@dataclass(frozen=True)
class Rejected:
    """A file that could not be used. Its fields are the columns of ``NAME.rejected.csv``."""

    path: str
    """Opaque id, or the absolute path."""
    reason: str


@dataclass(frozen=True)
class Settings:
    """Options that all scans of a manifest share: what ``NAME.index.json`` holds."""

    key: str
    """Which key made the pseudonyms (``Pseudonyms.name``)."""
    keep_paths: bool
    plane: Plane | None
    policy: Policy
    split: str = ""
    """Shares of the splits, such as train=0.7,test=0.3; who has a split keeps it, so these may not change."""


@dataclass(frozen=True)
class SourceFiles:
    """The files behind one scan."""

    image: list[Path]
    """Absolute; the slices of a DICOM series in geometric order."""
    mask: Path | None
    """A NIfTI of labels on the scan's grid."""
    names: Mapping[Path, str] = field(default_factory=dict)
    """What to call each in a message."""

    def renamed(self, text: str) -> str:
        """A message in which each file is called by its name of the manifest, without its path."""
        for path in sorted(map(str, self.names), key=len, reverse=True):  # one may begin like another
            text = text.replace(path, self.names[Path(path)])
        return text


@dataclass(frozen=True)
class Manifest:
    """A manifest as it stands on disk, checked."""

    path: Path
    rows: list[ScanRow]
    file_rows: list[FileRow]
    sha256: str
    """Of the bytes of ``NAME.csv``: a slice store records which manifest it was made from."""

    key_file: Path | None = None
    """Beside it stands where the files lie, if the tables hold opaque ids; None: ``default_key_file``."""

    @cached_property
    def located(self) -> list[tuple[FileRow, File]]:
        """Each row of ``file_rows``, and that file; MedclrError if the key's table does not know where it lies."""
        ids = {row.path for row in self.file_rows if not row.root}
        places = find_places(self.key_file or default_key_file(), ids)
        found = ((row, places[row.path] if not row.root else (row.root, row.path)) for row in self.file_rows)
        return [(row, File(root, path, row.size, row.mtime_ns)) for row, (root, path) in found]

    @cached_property
    def files(self) -> dict[str, SourceFiles]:
        """The files of each ``scan_id``; MedclrError if the key's table does not know one."""
        images: dict[str, list[Path]] = {row.scan_id: [] for row in self.rows}
        masks: dict[str, Path] = {}
        names: dict[str, dict[Path, str]] = {row.scan_id: {} for row in self.rows}
        for row, file in self.located:
            path = file.absolute()
            names[row.scan_id][path] = row.path
            if row.kind == "mask":
                masks[row.scan_id] = path
            else:
                images[row.scan_id].append(path)
        return {scan_id: SourceFiles(paths, masks.get(scan_id), names[scan_id]) for scan_id, paths in images.items()}


def files_path(manifest: Path) -> Path:
    """``NAME.files.csv`` beside ``NAME.csv``."""
    return manifest.with_suffix(".files.csv")


def rejected_path(manifest: Path) -> Path:
    """``NAME.rejected.csv`` beside ``NAME.csv``."""
    return manifest.with_suffix(".rejected.csv")


def settings_path(manifest: Path) -> Path:
    """``NAME.index.json`` beside ``NAME.csv``."""
    return manifest.with_suffix(".index.json")


def table_paths(manifest: Path) -> list[Path]:
    """All files of a manifest in the order in which they are written; ``NAME.csv`` comes last."""
    return [settings_path(manifest), rejected_path(manifest), files_path(manifest), manifest]


def read_manifest(path: Path, key_file: Path | None = None) -> Manifest:
    """Read and check a manifest and its table of files.

    Args:
        path: ``NAME.csv``.
        key_file: the key with which it was made; needed when ``Manifest.files`` is asked for.

    Raises:
        MedclrError: a table is missing, was not written by medclr, or contradicts itself.
    """
    if files.is_pending(path):
        raise MedclrError(f"{path}: medclr index was interrupted while it wrote; run the same command again")
    rows = _read_table(path, ScanRow)
    file_rows = _read_table(files_path(path), FileRow)
    _check(path, rows, file_rows)
    return Manifest(path, rows, file_rows, files.sha256(path), key_file)


def write_manifest(
    path: Path,
    rows: Iterable[ScanRow],
    file_rows: Iterable[FileRow],
    rejected: Iterable[Rejected],
    settings: Settings | None = None,
) -> Manifest:
    """Check and write the tables, sorted, all of them or none; the order of files within a scan is kept.

    Args:
        path: ``NAME.csv``.
        rows: of the scans.
        file_rows: of their files.
        rejected: what could not be used.
        settings: without them nothing can be added later.

    Raises:
        MedclrError: the rows contradict each other, or the folder cannot be written to.
    """
    rows = sorted(rows, key=lambda row: (row.patient_id, row.scan_id))
    order = {row.scan_id: i for i, row in enumerate(rows)}
    # A stable sort: within a scan the slices stay in the order given.
    file_rows = sorted(file_rows, key=lambda row: (order.get(row.scan_id, -1), row.kind))
    _check(path, rows, file_rows)
    texts = {settings_path(path): json.dumps(asdict(settings), indent=2) + "\n"} if settings else {}
    texts |= {
        rejected_path(path): _table(Rejected, sorted(rejected, key=attrgetter("path", "reason"))),
        files_path(path): _table(FileRow, file_rows),
        path: _table(ScanRow, rows),
    }
    files.write_together(texts)
    return Manifest(path, rows, file_rows, files.sha256(path))


def read_settings(path: Path) -> Settings:
    """The options that all scans of the manifest at ``path`` share; raises as ``read_manifest``."""
    table = settings_path(path)
    try:
        values = json.loads(table.read_text(encoding="utf-8"))
        return Settings(**values | {"policy": Policy(**values["policy"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedclrError(f"{table}: cannot be read as what medclr index writes ({type(error).__name__})") from error


def read_rejected(path: Path) -> list[Rejected]:
    """What the last run could not use, for the manifest at ``path``; raises as ``read_manifest``."""
    return _read_table(rejected_path(path), Rejected)


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


def _columns(row_type: type[Row]) -> list[str]:
    return list(row_type.__annotations__)


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
    names = _columns(row_type)
    hints = get_type_hints(row_type)
    parsers = [(i, _PARSERS[hints[name]]) for i, name in enumerate(names) if hints[name] in _PARSERS]
    table = csv.reader(io.StringIO(text, newline=""))
    header = next(table, [])
    if absent := [name for name in names if name not in header]:
        raise MedclrError(f"{path}: column {', '.join(absent)} is missing; is this a table that medclr index wrote?")
    if unknown := [name for name in header if name not in names]:
        raise MedclrError(f"{path}: column {', '.join(map(repr, unknown))} is unknown; take it out")
    order = [header.index(name) for name in names]
    is_sorted = header == names
    rows = []
    for line in table:
        try:
            if len(line) != len(header):
                raise ValueError(f"{len(line)} cells where {len(header)} columns are named")
            cells: list[Any] = line if is_sorted else [line[i] for i in order]
            for i, parse in parsers:
                cells[i] = parse(cells[i])
            rows.append(row_type(*cells))
        except ValueError as error:
            raise MedclrError(f"{path}: line {table.line_num}: {error}") from None
    return rows


def _table(row_type: type[Row], rows: Sequence[Row]) -> str:
    """A CSV that ``_read_table`` reads back equal; None becomes an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = _columns(row_type)
    writer.writerow(names)
    cells: Iterable[Any] = rows if issubclass(row_type, tuple) else map(attrgetter(*names), rows)
    writer.writerows(cells)
    return text.getvalue()
