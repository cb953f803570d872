"""The slice store: every scan decoded once, as square uint16 slices that are read at random, without decoding.

    store.json         what this is: format version, slice size, the manifest's hash, every file's size and SHA-256
    slices-NNNNN.npy   uint16 [n,S,S], whole scans one after another; physical value = offset + scale * stored
    masks-NNNNN.npy    uint16 [n,S,S], labels on the same grid; only where a scan of the shard has a mask
    truth-NNNNN.npz    uint16 [n,H,W], by scan_id, the masks that were shrunk, at the resolution of their source: what
                       is judged against. None of a scan that was not shrunk: the stored mask is that of its file
    slices.arrow       one row a slice: where it lies and what it means; mapped, so it opens at once
    scans.csv          one row a scan, with the way back to the voxels of its source file
    rejected.csv       the scans that could not be decoded, and why

The columns of the tables stand in ``tables.py``. ``prepare.py`` writes a store, ``store.json`` last; from then on
nothing in it changes.

Shape letters: N slices of the store, n of a shard, B asked for, D of a scan; H rows and W columns of the source;
S = size_px.
"""

import hashlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclr import files
from medclr.data import blobs
from medclr.data.blobs import Blobs, Folder, read_whole
from medclr.data.encode import nearest
from medclr.data.tables import REMAKE, StoredScan, read_scans, read_table, slice_table
from medclr.errors import MedclrError, one_line
from medclr.progress import progress

FORMAT_VERSION = 2

PIECE_BYTES = 4 * 2**20
"""A whole shard is read so much at a time."""

UNFINISHED = "unfinished.jsonl"
"""Stands in a store until it is complete: what it will be, and then a line for each shard that is written."""


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
    keep_blank: bool
    """Whether slices that show nothing are among the stored."""
    n_slices: int
    n_blank: int
    """Slices that show nothing and are not stored."""
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
        here = Folder(self.path)
        self._shards = blobs.SHARDS(self.path)
        for name, written in self.info.files.items():
            _check_size(self.path / name, self._shards if is_shard(name) else here, written.size)
        self._columns = read_table(self.path / "slices.arrow", self.info.n_slices)
        self._begins: dict[str, int] = {}  # file of a shard -> where its slices begin, once it was looked at

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
        return self._gather(indices, "slices")

    def physical(self, indices: ArrayLike) -> NDArray[np.float32]:
        """[B,S,S], in the modality's units (Hounsfield units for CT)."""
        indices = np.asarray(indices, dtype=np.int64)  # [B]
        values = self.read(indices).astype(np.float32)  # [B,S,S]
        values *= self.column("scale")[indices, None, None]
        values += self.column("offset")[indices, None, None]
        return values

    def masks(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """[B,S,S], labels; 0 throughout for a scan without a mask (see ``StoredScan.has_mask``)."""
        return self._gather(indices, "masks")

    def source_mask(self, scan: int) -> NDArray[np.uint16]:
        """The labels in a scan's mask file, on the voxels of its source; 0 throughout for a scan without a mask.

        Args:
            scan: row of ``scans``.

        Returns:
            ``StoredScan.source_shape``, in the source file's own index order.

        Raises:
            MedclrError: an earlier medclr made the store and did not keep them, or they are not what was written.
        """
        stored = self.scans[scan]
        if not stored.loses_mask:
            first = int(self.column("scan").searchsorted(np.int32(scan)))  # of its own type: else the column is copied
            return to_source_grid(self.masks(np.arange(first, first + stored.n_slices)), stored)
        self.check_source_masks([scan])
        shape = stored.n_slices, stored.height, stored.width
        labels = np.empty(shape, dtype=np.uint16)  # [n,H,W]
        with self._truth(stored.shard) as archive, archive.open(f"{stored.scan_id}.npy") as file:
            _check_array(file, self.path / truth_name(stored.shard), shape)
            for image in labels:
                image[:] = np.frombuffer(file.read(image.nbytes), dtype="<u2").reshape(image.shape)
        return _in_source_order(labels, stored)

    def check_source_masks(self, scans: Iterable[int]) -> None:
        """Raise MedclrError if ``source_mask`` cannot answer for some of ``scans``: an earlier medclr made them."""
        for stored in map(self.scans.__getitem__, scans):
            if stored.loses_mask and truth_name(stored.shard) not in self.info.files:
                raise MedclrError(
                    f"{self.path}: its masks are coarser than those of the files, which the medclr that made it did not"
                    f" keep, so no segmentation can be judged; {REMAKE}"
                )

    @contextmanager
    def _truth(self, shard: int) -> Iterator[zipfile.ZipFile]:
        """The masks that are kept beside a shard.

        Raises:
            MedclrError: they are not what was written.
        """
        path = self.path / truth_name(shard)
        try:
            with (
                blobs.stream(self._shards, path, self.info.files[path.name].size, REMAKE) as file,
                zipfile.ZipFile(file) as archive,
            ):
                yield archive
        except MedclrError:
            raise
        except Exception as error:  # zipfile raises anything on a damaged file
            raise MedclrError(f"{path}: cannot be read ({one_line(error)}); {REMAKE}") from error

    def _gather(self, indices: ArrayLike, kind: str) -> NDArray[np.uint16]:
        indices = np.asarray(indices, dtype=np.int64)  # [B]
        size_px = self.info.size_px
        found = np.empty((len(indices), size_px, size_px), dtype=np.uint16)  # [B,S,S]
        shards, rows = self._columns["shard"][indices], self._columns["row"][indices]  # [B] each
        # Slices that stand one after another in a file, as those of a scan do, are read at once.
        ends = np.flatnonzero((np.diff(shards) != 0) | (np.diff(rows) != 1)) + 1
        bounds = [0, *ends.tolist(), len(indices)] if len(indices) else []
        for first, end in itertools.pairwise(bounds):
            name = f"{kind}-{shards[first]:05d}.npy"
            if name in self.info.files:
                offset = self.begin(name, int(shards[first])) + int(rows[first]) * 2 * size_px**2
                into = found[first:end].data.cast("B")
                read_whole(self._shards, self.path / name, offset, into, REMAKE)
            else:
                found[first:end] = 0
        return found

    def begin(self, name: str, shard: int) -> int:
        """The byte at which the slices in a file of a shard begin.

        Raises:
            MedclrError: the file is not what was written.
        """
        if name not in self._begins:
            shape = (self.info.shard_slices[shard], self.info.size_px, self.info.size_px)
            self._begins[name] = _check_header(self._shards, self.path / name, self.info.files[name].size, shape)
        return self._begins[name]

    def read_through(self, shard: int) -> Iterator[None]:
        """Read the slices of a shard from end to end, as fast as the disk can, for the system to keep them at hand.

        Yields after each piece, so that one can stop.
        """
        if (name := slices_name(shard)) in self.info.files:
            for _ in self._pieces(name):
                yield

    def sha256(self, name: str) -> str:
        """Of the bytes that a file has now."""
        digest = hashlib.sha256()
        for piece in self._pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a file, each piece in the place of the one before."""
        place, size = self._shards if is_shard(name) else Folder(self.path), self.info.files[name].size
        buffer = memoryview(bytearray(min(PIECE_BYTES, size)))
        for offset in range(0, size, PIECE_BYTES):
            piece = buffer[: size - offset]
            read_whole(place, self.path / name, offset, piece, REMAKE)
            yield piece

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """[shards], what the slices of each take."""
        return np.array(self.info.shard_slices, dtype=np.int64) * 2 * self.info.size_px**2


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
        digests = pool.map(opened.sha256, info.files)
        for (name, written), digest in zip(info.files.items(), digests, strict=True):
            if digest != written.sha256:
                raise MedclrError(f"{opened.path / name}: its bytes changed since it was written; {REMAKE}")
            advance(1)
    for shard in range(len(info.shard_slices)):
        for name in (slices_name(shard), masks_name(shard)):
            if name in info.files:
                opened.begin(name, shard)
    _check_scans(opened)
    _check_truth(opened)
    for name, column in slice_table(opened.scans, info.modalities, info.labels).items():
        if not np.array_equal(column, opened.column(name)):
            raise MedclrError(f"{opened.path / 'slices.arrow'}: column {name} contradicts scans.csv; {REMAKE}")
    return f"{store} is whole: {info.n_slices:,} slices of {info.n_scans:,} scans in {len(info.files):,} files"


def _check_scans(store: Store) -> None:
    """Raise unless every row of ``scans.csv`` is possible, and together they are what ``store.json`` says."""
    info, size_px = store.info, store.info.size_px
    rows = [0] * len(info.shard_slices)  # next row of each shard
    for scan in store.scans:
        box = scan.content_top, scan.content_left, scan.content_height, scan.content_width
        is_possible = (
            list(scan.blank) == sorted(set(scan.blank) & set(range(scan.depth)))
            and scan.n_slices > 0
            and min(box[:2]) >= 0 < min(box[2:])
            and max(box[0] + box[2], box[1] + box[3]) <= size_px
            and sorted(scan.source_axes) == [0, 1, 2]
            and math.prod(scan.source_shape) == scan.depth * scan.height * scan.width
            and len(scan.affine) == 16
            and (scan.window_center is None) == (scan.window_width is None)
            and 0 <= scan.shard < len(rows)
            and scan.first_row == rows[scan.shard]
        )
        if not is_possible:
            raise MedclrError(f"{store.path / 'scans.csv'}: the row of {scan.scan_id} contradicts itself; {REMAKE}")
        rows[scan.shard] += scan.n_slices
    for name, found in {
        "n_scans": len(store.scans),
        "n_patients": len(store.patients),
        "n_blank": sum(len(scan.blank) for scan in store.scans),
        "masks": any(scan.has_mask for scan in store.scans),
        "shard_slices": tuple(rows),
    }.items():
        if getattr(info, name) != found:
            raise MedclrError(f"{store.path / 'store.json'}: {name} contradicts scans.csv; {REMAKE}")


def _check_truth(store: Store) -> None:
    """Raise unless the masks that are kept beside a shard are those of its scans that need it."""
    needed: dict[int, dict[str, tuple[int, int, int]]] = {}  # shard -> member -> [n,H,W]
    for scan in store.scans:
        if scan.loses_mask:
            shape = scan.n_slices, scan.height, scan.width
            needed.setdefault(scan.shard, {})[f"{scan.scan_id}.npy"] = shape
    for shard in range(len(store.info.shard_slices)):
        if (name := truth_name(shard)) in store.info.files:
            with store._truth(shard) as archive:
                members = needed.get(shard, {})
                if {*archive.namelist()} != {*members}:
                    raise MedclrError(f"{store.path / name}: holds the masks of other scans than scans.csv; {REMAKE}")
                for member, shape in members.items():
                    with archive.open(member) as file:
                        _check_array(file, store.path / name, shape)


def to_source_grid(labels: NDArray[Any], scan: StoredScan) -> NDArray[Any]:
    """Bring labels on a scan's stored slices back to the voxels of its source file, by nearest neighbour.

    Args:
        labels: [n,S,S], on the stored slices of the scan, in order.
        scan: the scan's row of ``scans.csv``.

    Returns:
        ``scan.source_shape``, in the source file's own index order, of the same type as ``labels``; 0 on the slices
        that are not stored because they show nothing.
    """
    rows = scan.content_top + nearest(scan.content_height, scan.height)  # [H]
    columns = scan.content_left + nearest(scan.content_width, scan.width)  # [W]
    return _in_source_order(labels[:, rows[:, None], columns], scan)


def _in_source_order(slices: NDArray[Any], scan: StoredScan) -> NDArray[Any]:
    """The stored slices [n,H,W] of a scan at its own resolution -> as ``to_source_grid``."""
    volume = np.zeros((scan.depth, scan.height, scan.width), dtype=slices.dtype)  # [D,H,W]
    volume[scan.slice_indices()] = slices
    volume = np.flip(volume, tuple(axis for axis, flipped in enumerate(scan.source_flips) if flipped))
    return volume.transpose(np.argsort(scan.source_axes).tolist()).reshape(scan.source_shape)


def slices_name(shard: int) -> str:
    """File name of a shard's slices."""
    return f"slices-{shard:05d}.npy"


def masks_name(shard: int) -> str:
    """File name of a shard's masks."""
    return f"masks-{shard:05d}.npy"


def truth_name(shard: int) -> str:
    """File name of the masks of a shard that are kept at the resolution of their source."""
    return f"truth-{shard:05d}.npz"


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
        raise MedclrError(f"{path}: cannot be read ({error}); {REMAKE}") from error


def is_shard(name: str) -> bool:
    """Whether a file of a store holds slices or masks: it may lie elsewhere, see ``blobs.py``."""
    return name.endswith((".npy", ".npz"))


def _check_header(shards: Blobs, path: Path, size: int, shape: tuple[int, ...]) -> int:
    """Where the data begin in a .npy file of uint16 of that shape."""
    head = bytearray(min(size, 4096))
    read_whole(shards, path, 0, memoryview(head), REMAKE)
    stream = io.BytesIO(head)
    _check_array(stream, path, shape)
    return stream.tell()


def _check_array(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> None:
    """Read the header of a .npy file that is, or lies in, ``path``; raise unless it is of uint16 of that shape."""
    try:
        np.lib.format.read_magic(file)
        found, in_columns, dtype = np.lib.format.read_array_header_1_0(file)  # the version that is written
    except MedclrError:
        raise
    except Exception as error:  # numpy reads the header as Python: a damaged one raises anything
        raise MedclrError(f"{path}: cannot be read ({one_line(error)}); {REMAKE}") from error
    if found != shape or dtype != np.uint16 or in_columns:
        raise MedclrError(f"{path}: holds {dtype} {found}, expected uint16 {shape}; {REMAKE}")


def _check_size(path: Path, place: Blobs, size: int) -> None:
    try:
        found = place.size(path.name)
    except FileNotFoundError:
        raise MedclrError(f"{path}: is missing from the store; {REMAKE}") from None
    if found != size:
        raise MedclrError(f"{path}: holds {found:,} bytes where {size:,} were written; {REMAKE}")
