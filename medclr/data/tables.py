"""The two tables of a slice store: a row a scan (``scans.csv``), from which a row a slice follows (``slices.arrow``).

Shape letters: N slices of the store, n of a scan, D slices of the scan's source.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.csv
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


@dataclass(frozen=True, slots=True)
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

    @property
    def loses_mask(self) -> bool:
        """Whether it has a mask that its stored slices cannot give back: they have fewer rows or columns than it."""
        return self.has_mask and (self.content_height, self.content_width) != (self.height, self.width)

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


def scans_csv(scans: Iterable[StoredScan]) -> str:
    """The text of ``scans.csv``; numbers to the last digit."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_KINDS)
    writer.writerows([_cell(getattr(scan, name)) for name in _KINDS] for scan in scans)
    return text.getvalue()


def parse_scans(text: bytes) -> list[StoredScan]:
    """The inverse of ``scans_csv``, in UTF-8: column by column, which for 100,000 scans saves several seconds.

    Raises:
        ValueError: a column or a cell is missing, is one too many, or cannot be read.
    """
    # A copy that is Arrow's own: its worker may be the last to hold what was read, and a worker that has to ask Python
    # to let go of it, as for ``bytes``, aborts a process that is ending (apache/arrow#34314).
    owned = pa.BufferOutputStream()
    owned.write(text)
    table = pyarrow.csv.read_csv(
        pa.BufferReader(owned.getvalue()),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: _ARROW.get(kind, pa.string()) for name, kind in _KINDS.items()}, null_values=[""]
        ),
    )
    if table.column_names != list(_KINDS):
        raise ValueError("its columns are not those of this version")
    columns = []
    for name, kind in _KINDS.items():
        cells = table[name].to_pylist()
        if get_origin(kind) is tuple:
            of = get_args(kind)[0]
            part = "1".__eq__ if of is bool else of
            known = {cell: tuple(map(part, cell.split())) for cell in set(cells)}  # few differ between scans
            cells = [known[cell] for cell in cells]
        elif table[name].null_count and kind != float | None:
            raise ValueError(f"column {name} has an empty cell")
        columns.append(cells)
    return list(map(StoredScan, *columns))


def read_scans(path: Path) -> list[StoredScan]:
    """Read ``scans.csv``.

    Raises:
        MedclrError: it cannot be read.
    """
    try:
        return parse_scans(path.read_bytes())
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


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_cell, value))
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


_KINDS: dict[str, Any] = {field.name: get_type_hints(StoredScan)[field.name] for field in fields(StoredScan)}
_ARROW = {int: pa.int64(), float: pa.float64(), float | None: pa.float64(), bool: pa.bool_()}
