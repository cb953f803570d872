"""The two tables of a slice store: a row a scan (``scans.csv``), from which a row a slice follows (``slices.arrow``).

Shape letters: N slices of the store, n of a scan, D slices of the scan's source.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medclr import files
from medclr.errors import MedclrError

REMAKE = "delete the store and run medclr prepare again"

TABLE: dict[str, type[np.number[Any]]] = {
    "scan": np.int32,  # row of scans.csv
    "patient": np.int32,  # index into Store.patients
    "modality": np.int8,  # index into StoreInfo.modalities
    "slice_index": np.int32,  # d
    "position": np.float32,  # d / (D - 1); 0.5 where D = 1
    "shard": np.int32,
    "row": np.int32,  # within the shard
    "content_top": np.int16,  # where the slice lies in the square, in pixels; around it is padding
    "content_left": np.int16,
    "content_height": np.int16,
    "content_width": np.int16,
    "scale": np.float32,  # physical = offset + scale * stored
    "offset": np.float32,
    "low": np.float32,  # 0.5 and 99.5 percentiles of the scan, physical units
    "high": np.float32,
    "air": np.float32,  # physical value of the padding
    "label": np.int32,  # index into StoreInfo.labels; -1 = none
}
"""Columns of ``slices.arrow``."""


@dataclass(frozen=True)
class StoredScan:
    """One scan of a store. Its fields are the columns of ``scans.csv``; the values of a tuple are parted by blanks."""

    scan_id: str
    """This and the next ten are the manifest's."""
    patient_id: str
    study_id: str
    modality: str
    body_part: str
    plane: str
    label: str
    split: str
    sha256: str
    volume: int
    irregular: str
    depth: int
    """D, with the blank slices."""
    height: int
    """H."""
    width: int
    """W."""
    blank: tuple[int, ...]
    """The slices, counted from 0, that show nothing and are not stored (``medclr.data.encode.blank_slices``)."""
    content_top: int
    """This and the next three: where the slice lies in the square, in pixels; around it is padding."""
    content_left: int
    content_height: int
    content_width: int
    spacing_mm: tuple[float, float, float]
    """Of the source, along (d,h,w)."""
    affine: tuple[float, ...]
    """The 16 numbers of ``Scan.affine``, row by row: source (d,h,w,1) -> RAS+ millimetres."""
    source_shape: tuple[int, ...]
    """This and the next two as in ``Scan``: with ``spacing_mm`` and ``affine`` the whole way back to the source. For a
    DICOM series the source is the stack of its files in geometric order, as the manifest's table of files has them."""
    source_axes: tuple[int, int, int]
    source_flips: tuple[bool, bool, bool]
    scale: float
    """physical = offset + scale * stored."""
    offset: float
    low: float
    """0.5 and 99.5 percentiles of the scan, physical units."""
    high: float
    air: float
    """Physical value of the padding."""
    window_center: float | None
    """The window in which the file asks to be shown, in physical units (``Scan.window``); None: it names none."""
    window_width: float | None
    has_mask: bool
    shard: int
    first_row: int
    """The scan's slices are the rows from ``first_row`` to ``first_row + n_slices`` of its shard."""

    @property
    def n_slices(self) -> int:
        """n, how many of its slices are stored."""
        return self.depth - len(self.blank)

    def slice_indices(self) -> NDArray[np.int64]:
        """[n], which of the source's D slices are stored."""
        return np.delete(np.arange(self.depth), self.blank)


def slice_table(
    scans: Sequence[StoredScan], modalities: Sequence[str], labels: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """The columns of ``TABLE``, [N] each: everything in them follows from the scans."""
    depth = np.array([scan.depth for scan in scans])  # [m]
    first = np.cumsum(depth) - depth  # [m], of the slices of all sources
    kept = np.ones(int(depth.sum()), dtype=bool)
    for start, scan in zip(first.tolist(), scans, strict=True):
        if scan.blank:
            kept[np.add(start, scan.blank)] = False
    scan_of = np.repeat(np.arange(len(scans), dtype=np.int32), depth)[kept]  # [N]
    slice_index = np.flatnonzero(kept) - first[scan_of]  # [N]
    n_slices = np.array([scan.n_slices for scan in scans])  # [m]
    patient_index = {patient: i for i, patient in enumerate(sorted({scan.patient_id for scan in scans}))}
    per_scan: dict[str, list[Any]] = {
        "patient": [patient_index[scan.patient_id] for scan in scans],
        "modality": [modalities.index(scan.modality) for scan in scans],
        "label": [labels.index(scan.label) if scan.label else -1 for scan in scans],
    }
    columns: dict[str, NDArray[Any]] = {"scan": scan_of, "slice_index": slice_index}
    columns["position"] = np.where((depth == 1)[scan_of], 0.5, slice_index / np.maximum(depth - 1, 1)[scan_of])
    first_row = np.array([scan.first_row for scan in scans]) - (np.cumsum(n_slices) - n_slices)  # [m]
    columns["row"] = first_row[scan_of] + np.arange(len(scan_of))
    for name, kind in TABLE.items():
        if name not in columns:
            values = per_scan.get(name) or [getattr(scan, name) for scan in scans]
            columns[name] = np.array(values, dtype=kind)[scan_of]
    return {name: columns[name].astype(kind, copy=False) for name, kind in TABLE.items()}


def write_table(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Write ``slices.arrow``: one uncompressed record batch, so that each column is one piece of the mapped file."""
    batch = pa.record_batch(columns)
    with files.writing(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as out:
        out.write_batch(batch)


def scan_cells(scan: StoredScan) -> list[str]:
    """The cells of one row of ``scans.csv``; numbers to the last digit."""
    values = (getattr(scan, name) for name in _NAMES)
    return [" ".join(map(_text, value)) if isinstance(value, tuple) else _text(value) for value in values]


def parse_scans(rows: Sequence[Sequence[str]]) -> list[StoredScan]:
    """The inverse of ``scan_cells``, of many rows: column by column, which takes a third of the time.

    Raises:
        ValueError: there are too many or too few cells, or one cannot be read.
    """
    columns = zip(*rows, strict=True)
    parsed = [map(parse, cells) for parse, cells in zip(_PARSERS, columns, strict=True)] if rows else []
    return list(map(StoredScan, *parsed)) if rows else []


def scans_csv(scans: Iterable[StoredScan]) -> str:
    """The text of ``scans.csv``."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_NAMES)
    writer.writerows(map(scan_cells, scans))
    return text.getvalue()


def read_scans(path: Path) -> list[StoredScan]:
    """Read ``scans.csv``.

    Raises:
        MedclrError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if next(rows, None) != _NAMES:
                raise ValueError("its columns are not those of this version")
            return parse_scans(list(rows))
    except (OSError, ValueError) as error:
        raise MedclrError(f"{path}: cannot be read ({error}); {REMAKE}") from error


def read_table(path: Path, n_slices: int) -> dict[str, NDArray[Any]]:
    """The columns of ``slices.arrow``, [N] each, mapped.

    Raises:
        MedclrError: it is no slice table, or not one of so many slices.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        columns = {name: table[name].chunk(0).to_numpy() for name in TABLE}
    except (OSError, KeyError, IndexError, pa.ArrowInvalid) as error:
        raise MedclrError(f"{path}: is not a slice table ({error}); {REMAKE}") from error
    if any(column.shape != (n_slices,) or column.dtype != TABLE[name] for name, column in columns.items()):
        raise MedclrError(f"{path}: is not the table of this store; {REMAKE}")
    return columns


def _text(value: Any) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def _parser(kind: Any) -> Callable[[str], Any]:
    """What reads the cells of a column of this type."""
    if get_origin(kind) is tuple:
        part = _parser(get_args(kind)[0])
        return lambda cell: tuple(map(part, cell.split()))
    if kind == float | None:
        return lambda cell: float(cell) if cell else None
    return (lambda cell: bool(int(cell))) if kind is bool else kind


_NAMES = [field.name for field in fields(StoredScan)]
_PARSERS = [_parser(get_type_hints(StoredScan)[name]) for name in _NAMES]
