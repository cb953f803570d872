"""The slice store: every scan decoded once, as square uint16 slices that are read through memory maps.

    store.json         what this is: format version, slice size, the manifest's hash, every file's size and SHA-256
    slices-NNNNN.npy   uint16 [n,S,S], whole scans one after another; physical value = offset + scale * stored
    masks-NNNNN.npy    uint16 [n,S,S], labels on the same grid; only where a scan of the shard has a mask
    slices.arrow       one row a slice: where it lies and what it means (``TABLE``); mapped, so it opens at once
    scans.csv          one row a scan (``StoredScan``), with the way back to the voxels of its source file
    rejected.csv       the scans that could not be decoded, and why

``medclr/data/prepare.py`` writes a store, ``store.json`` last; from then on nothing in it changes.

Shape letters: N slices of the store, n of a shard, B asked for, D of a scan; H rows and W columns of the source;
S = size_px.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from medclr import files
from medclr.errors import MedclrError
from medclr.progress import progress

FORMAT_VERSION = 1

TABLE: dict[str, type[np.number[Any]]] = {
    "scan": np.int32,  # row of scans.csv
    "patient": np.int32,  # index into Store.patients
    "modality": np.int8,  # index into StoreInfo.modalities
    "slice_index": np.int32,  # d
    "position": np.float32,  # d / (D - 1); 0.5 where D = 1
    "shard": np.int32,
    "row": np.int32,  # within the shard
    "scale": np.float32,  # physical = offset + scale * stored
    "offset": np.float32,
    "low": np.float32,  # 0.5 and 99.5 percentiles of the scan, physical units
    "high": np.float32,
    "air": np.float32,  # physical value of the padding
    "label": np.int32,  # index into StoreInfo.labels; -1 = none
}
"""Columns of ``slices.arrow``."""

UNFINISHED = "unfinished.jsonl"
"""Stands in a store until it is complete: what it will be, and then a line for each shard that is written."""

_REMAKE = "delete the store and run medclr prepare again"


@dataclass(frozen=True)
class StoredScan:
    """One scan of a store. Its fields are the columns of ``scans.csv``; the values of a tuple are parted by blanks."""

    scan_id: str
    """This and the next eight are the manifest's."""
    patient_id: str
    study_id: str
    modality: str
    body_part: str
    plane: str
    label: str
    split: str
    sha256: str
    depth: int
    """D."""
    height: int
    """H."""
    width: int
    """W."""
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
    """This and the next two as in ``Scan``."""
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
    has_mask: bool
    shard: int
    first_row: int
    """The scan's slices are the rows from ``first_row`` to ``first_row + depth`` of its shard."""


@dataclass(frozen=True)
class FileInfo:
    """What a file of the store was when it was written."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class StoreInfo:
    """The content of ``store.json``."""

    format_version: int
    medclr_version: str
    size_px: int
    """S."""
    n_slices: int
    n_scans: int
    n_patients: int
    n_rejected: int
    manifest_name: str
    manifest_sha256: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    """Class names, sorted; empty if no scan is labelled."""
    masks: bool
    """Whether any scan has a mask."""
    shard_slices: tuple[int, ...]
    """Slices of each shard. A shard whose every scan was rejected holds none and has no file."""
    files: dict[str, FileInfo]
    """Every other file of the store."""


class Store:
    """Random access to the slices of a store; read-only, and safe to use from several threads.

    Args:
        path: the store's folder.
        manifest: if given, the store must have been made from exactly this manifest.

    Raises:
        MedclrError: there is no store, it was made by another version or from another manifest, or a file of it is
            missing, truncated or not what it should be.
    """

    def __init__(self, path: Path, manifest: Path | None = None) -> None:
        self.path = Path(path)
        self.info = read_info(self.path)
        if manifest is not None and (digest := files.sha256(Path(manifest))) != self.info.manifest_sha256:
            raise MedclrError(
                f"{self.path}: was made from another manifest ({self.info.manifest_name}, SHA-256"
                f" {self.info.manifest_sha256[:12]}) than {manifest} ({digest[:12]}); prepare that into another folder"
            )
        for name, written in self.info.files.items():
            _check_size(self.path / name, written.size)
        self._columns = _read_table(self.path / "slices.arrow", self.info.n_slices)
        self._slices: dict[int, NDArray[np.uint16]] = {}  # shard -> [n,S,S], mapped when first read
        self._masks: dict[int, NDArray[np.uint16]] = {}

    def __len__(self) -> int:
        return self.info.n_slices

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.info.n_slices:,} slices of {self.info.n_scans:,} scans)"

    def column(self, name: str) -> NDArray[Any]:
        """[N], a column of ``TABLE``, mapped from the disk and read-only."""
        return self._columns[name]

    @cached_property
    def scans(self) -> list[StoredScan]:
        """Row i is what the column ``scan`` calls i."""
        return read_scans(self.path / "scans.csv")

    @cached_property
    def patients(self) -> list[str]:
        """Patient ids, sorted; item i is what the column ``patient`` calls i."""
        return sorted({scan.patient_id for scan in self.scans})

    def indices(self, split: str = "") -> NDArray[np.int64]:
        """The slices of one split of the manifest; all, if ``split`` is empty.

        Raises:
            MedclrError: no scan of the store is in that split.
        """
        if not split:
            return np.arange(len(self), dtype=np.int64)
        splits = np.array([scan.split for scan in self.scans])
        if split not in splits:
            known = ", ".join(sorted({*splits} - {""})) or "none (medclr index --split makes some)"
            raise MedclrError(f"{self.path}: no scan is in split {split!r}; its splits: {known}")
        return np.flatnonzero((splits == split)[self.column("scan")])

    def read(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """[B,S,S], as stored, in the order asked for."""
        return self._gather(indices, self._slices, slices_name)

    def physical(self, indices: ArrayLike) -> NDArray[np.float32]:
        """[B,S,S], in the modality's units (Hounsfield units for CT)."""
        indices = np.asarray(indices, dtype=np.int64)  # [B]
        values = self.read(indices).astype(np.float32)  # [B,S,S]
        values *= self.column("scale")[indices, None, None]
        values += self.column("offset")[indices, None, None]
        return values

    def masks(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """[B,S,S], labels; 0 throughout for a scan without a mask (see ``StoredScan.has_mask``)."""
        return self._gather(indices, self._masks, masks_name)

    def _gather(
        self, indices: ArrayLike, mapped: dict[int, NDArray[np.uint16]], name_of: Callable[[int], str]
    ) -> NDArray[np.uint16]:
        indices = np.asarray(indices, dtype=np.int64)  # [B]
        found = np.empty((len(indices), self.info.size_px, self.info.size_px), dtype=np.uint16)  # [B,S,S]
        shards, rows = self._columns["shard"][indices].tolist(), self._columns["row"][indices].tolist()
        for i, (shard, row) in enumerate(zip(shards, rows, strict=True)):
            if shard not in mapped:
                mapped[shard] = _map_shard(self.path, self.info, shard, name_of(shard))
            found[i] = mapped[shard][row]
        return found


def verify(store: Path) -> str:
    """Check a slice store against what was written.

    Hashes every file, looks at the shape of every shard, and derives the slice table anew from the scans.

    Args:
        store: folder that medclr prepare wrote.

    Returns:
        One sentence: the store is whole.

    Raises:
        MedclrError: it is not; names the first file that is wrong.
    """
    opened = Store(store)
    info = opened.info
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashing lets other threads run
        progress("verifying", len(info.files), "files") as advance,
    ):
        digests = pool.map(lambda name: files.sha256(opened.path / name), info.files)
        for (name, written), digest in zip(info.files.items(), digests, strict=True):
            if digest != written.sha256:
                raise MedclrError(f"{opened.path / name}: its bytes changed since it was written; {_REMAKE}")
            advance(1)
    for shard in range(len(info.shard_slices)):
        for name in (slices_name(shard), masks_name(shard)):
            _map_shard(opened.path, info, shard, name)
    for name, column in slice_table(opened.scans, info.modalities, info.labels).items():
        if not np.array_equal(column, opened.column(name)):
            raise MedclrError(f"{opened.path / 'slices.arrow'}: column {name} contradicts scans.csv; {_REMAKE}")
    return f"{store} is whole: {info.n_slices:,} slices of {info.n_scans:,} scans in {len(info.files):,} files"


def to_source_grid(labels: NDArray[Any], scan: StoredScan) -> NDArray[Any]:
    """Bring labels on a scan's stored slices back to the voxels of its source file, by nearest neighbour.

    Args:
        labels: [D,S,S].
        scan: the scan's row of ``scans.csv``.

    Returns:
        ``scan.source_shape``, in the source file's own index order, of the same type as ``labels``.
    """
    rows = scan.content_top + nearest(scan.content_height, scan.height)  # [H]
    columns = scan.content_left + nearest(scan.content_width, scan.width)  # [W]
    volume = labels[:, rows[:, None], columns]  # [D,H,W]
    volume = np.flip(volume, tuple(axis for axis, flipped in enumerate(scan.source_flips) if flipped))
    return volume.transpose(np.argsort(scan.source_axes).tolist()).reshape(scan.source_shape)


def nearest(n_from: int, n_to: int) -> NDArray[np.int64]:
    """[n_to], for each pixel of a resized line the pixel of the original line in which its centre lies.

    Both lines cover the same millimetres: pixel i has its centre at (i + 1/2) n_from / n_to, in pixels of the original.
    """
    return (2 * np.arange(n_to, dtype=np.int64) + 1) * n_from // (2 * n_to)


def slices_name(shard: int) -> str:
    """File name of a shard's slices."""
    return f"slices-{shard:05d}.npy"


def masks_name(shard: int) -> str:
    """File name of a shard's masks."""
    return f"masks-{shard:05d}.npy"


def slice_table(
    scans: Sequence[StoredScan], modalities: Sequence[str], labels: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """The columns of ``TABLE``, [N] each: everything in them follows from the scans."""
    depths = np.array([scan.depth for scan in scans])  # one a scan
    scan_of = np.repeat(np.arange(len(scans)), depths)  # [N]
    slice_index = np.arange(len(scan_of)) - (np.cumsum(depths) - depths)[scan_of]  # [N]
    depth = depths[scan_of]  # [N]
    patient_index = {patient: i for i, patient in enumerate(sorted({scan.patient_id for scan in scans}))}
    per_scan: dict[str, list[Any]] = {
        "patient": [patient_index[scan.patient_id] for scan in scans],
        "modality": [modalities.index(scan.modality) for scan in scans],
        "label": [labels.index(scan.label) if scan.label else -1 for scan in scans],
        "first_row": [scan.first_row for scan in scans],
    }
    for name in ("shard", "scale", "offset", "low", "high", "air"):
        per_scan[name] = [getattr(scan, name) for scan in scans]
    columns = {name: np.array(values)[scan_of] for name, values in per_scan.items()}
    columns["scan"] = scan_of
    columns["slice_index"] = slice_index
    columns["position"] = np.where(depth == 1, 0.5, slice_index / np.maximum(depth - 1, 1))
    columns["row"] = columns["first_row"] + slice_index
    return {name: columns[name].astype(kind) for name, kind in TABLE.items()}


def write_table(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Write ``slices.arrow``: one uncompressed record batch, so that each column is one piece of the mapped file."""
    batch = pa.record_batch(columns)
    with files.writing(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as out:
        out.write_batch(batch)


def scan_cells(scan: StoredScan) -> list[str]:
    """The cells of one row of ``scans.csv``; numbers to the last digit."""
    values = (getattr(scan, name) for name in _NAMES)
    return [" ".join(map(_text, value)) if isinstance(value, tuple) else _text(value) for value in values]


def parse_scan(cells: Sequence[str]) -> StoredScan:
    """The inverse of ``scan_cells``.

    Raises:
        ValueError: there are too many or too few cells, or one cannot be read.
    """
    return StoredScan(*(_parse(kind, cell) for kind, cell in zip(_KINDS, cells, strict=True)))


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
            return [parse_scan(cells) for cells in rows]
    except (OSError, ValueError) as error:
        raise MedclrError(f"{path}: cannot be read ({error}); {_REMAKE}") from error


def read_info(folder: Path) -> StoreInfo:
    """Read ``store.json``.

    Raises:
        MedclrError: there is none, it is damaged, or another version of the format wrote it.
    """
    path = folder / "store.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise MedclrError(
                f"{folder}: is of store format {values['format_version']} (medclr {values.get('medclr_version')}), this"
                f" medclr reads format {FORMAT_VERSION}; prepare the manifest again into another folder"
            )
        for name in ("modalities", "labels", "shard_slices"):
            values[name] = tuple(values[name])
        values["files"] = {name: FileInfo(**written) for name, written in values["files"].items()}
        return StoreInfo(**values)
    except (FileNotFoundError, NotADirectoryError):
        if (folder / UNFINISHED).exists():
            raise MedclrError(f"{folder}: the store is unfinished; run the same medclr prepare to go on") from None
        raise MedclrError(f"{folder}: is not a slice store (it has no store.json); medclr prepare makes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedclrError(f"{path}: cannot be read ({error}); {_REMAKE}") from error


def _read_table(path: Path, n_slices: int) -> dict[str, NDArray[Any]]:
    """The columns of ``slices.arrow``, mapped."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        columns = {name: table[name].chunk(0).to_numpy() for name in TABLE}
    except (OSError, KeyError, IndexError, pa.ArrowInvalid) as error:
        raise MedclrError(f"{path}: is not a slice table ({error}); {_REMAKE}") from error
    if any(column.shape != (n_slices,) or column.dtype != TABLE[name] for name, column in columns.items()):
        raise MedclrError(f"{path}: is not the table of this store; {_REMAKE}")
    return columns


def _map_shard(folder: Path, info: StoreInfo, shard: int, name: str) -> NDArray[np.uint16]:
    """[n,S,S], mapped; zeros if the shard has no such file."""
    shape = (info.shard_slices[shard], info.size_px, info.size_px)
    if name not in info.files:
        return np.broadcast_to(np.uint16(0), shape)
    try:
        mapped = np.load(folder / name, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise MedclrError(f"{folder / name}: cannot be read ({error}); {_REMAKE}") from error
    if mapped.shape != shape or mapped.dtype != np.uint16:
        raise MedclrError(f"{folder / name}: holds {mapped.dtype} {mapped.shape}, expected uint16 {shape}; {_REMAKE}")
    return np.asarray(mapped)  # a plain array: numpy's memmap class would make each slicing several times slower


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise MedclrError(f"{path}: is missing from the store; {_REMAKE}") from None
    if found != size:
        raise MedclrError(f"{path}: holds {found:,} bytes where {size:,} were written; {_REMAKE}")


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _parse(kind: Any, cell: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_parse(get_args(kind)[0], part) for part in cell.split())
    return bool(int(cell)) if kind is bool else kind(cell)


_NAMES = [field.name for field in fields(StoredScan)]
_KINDS = [get_type_hints(StoredScan)[name] for name in _NAMES]
