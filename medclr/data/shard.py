"""One shard of a slice store: its scans decoded, its files written, and what is to be said of them."""

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
from numpy.typing import NDArray

from medclr import files
from medclr.data import store as stores
from medclr.data.encode import Encoding, blank_slices, encode, encode_mask, encoding_of
from medclr.data.manifest import ScanRow, SourceFiles
from medclr.data.store import FileInfo
from medclr.data.tables import StoredScan
from medclr.errors import MedclrError, ScanError
from medclr.scans.scan import Scan

NOTE = ".reading."
"""How the name of a note begins; the number of the process follows."""


@dataclass(frozen=True)
class Shard:
    """The unit of work."""

    number: int
    scans: list[tuple[ScanRow, SourceFiles]]

    @property
    def n_slices(self) -> int:
        """As the manifest has it."""
        return sum(row.n_slices for row, _ in self.scans)

    @property
    def masks(self) -> bool:
        """Whether any of its scans has one."""
        return any(source.mask for _, source in self.scans)


@dataclass(frozen=True)
class Part:
    """What a worker made of a shard: a line of ``unfinished.jsonl``."""

    shard: int
    scans: list[StoredScan]
    rejected: list[tuple[str, str]]
    """Path and reason."""
    files: dict[str, FileInfo]


def decode(row: ScanRow, source: SourceFiles) -> tuple[Scan, NDArray[np.uint16] | None]:
    """Read a scan, and its mask [D,H,W] if it has one.

    Raises:
        ScanError: what the files hold is not, or cannot safely become, a scan or its mask.
        MedclrError: a file cannot be read at all: that is no property of the scan, and must not remove it silently.
    """
    from medclr.scans import read
    from medclr.scans.nifti import read_mask
    from medclr.scans.policy import ACCEPTED, Plane

    try:
        plane: Any = row.plane if row.plane in get_args(Plane) else None
        scan = read(source.image, row.modality, volume=row.volume, plane=plane, policy=ACCEPTED)
        return scan, None if source.mask is None else read_mask(source.mask, scan)
    except MedclrError:
        raise
    except MemoryError:
        raise MedclrError(f"{source.image[0]}: memory is too small to decode it; try fewer --workers") from None
    except Exception as error:  # decoders raise anything on broken files
        if isinstance(error, OSError) and error.errno is not None:
            where = error.filename or source.image[0]
            raise MedclrError(f"{where}: cannot be read ({error.strerror}); mend that and run again") from error
        raise ScanError(f"cannot be decoded ({type(error).__name__})") from error  # its text may quote a header


def write_shard(
    shard: Shard,
    out: Path,
    size_px: int,
    keep_blank: bool = False,
    refused: Mapping[str, str] = {},
    stopped: Callable[[], bool] = lambda: False,
) -> Part:
    """Decode the scans of a shard, and write its slices and its masks; those that shrinking alters as they are, too.

    Args:
        shard: what to decode.
        out: folder of the store; a note there says which scan is being read, should the process die of it.
        size_px: S.
        keep_blank: whether slices that show nothing are written as well.
        refused: scans that are not read, and why.
        stopped: asked before each scan whether to leave.

    Raises:
        Stopped: if so; nothing of the shard is left.
        MedclrError: a file cannot be read, or the disk is full.
    """
    scans: list[StoredScan] = []
    rejected: list[tuple[str, str]] = []
    written: dict[str, FileInfo] = {}
    n_slices, has_masks = 0, shard.masks
    with contextlib.ExitStack() as stack:
        note = stack.enter_context(_noting(out))
        slices = stack.enter_context(_npy(out / stores.slices_name(shard.number), size_px, written))
        if has_masks:
            masks = stack.enter_context(_npy(out / stores.masks_name(shard.number), size_px, written))
            keep = stack.enter_context(_npz(out / stores.truth_name(shard.number), written))
        for row, source in shard.scans:
            if stopped():
                raise Stopped
            note(row.scan_id)
            try:
                if row.scan_id in refused:
                    raise ScanError(refused[row.scan_id])
                scan, mask = decode(row, source)
                encoding = encoding_of(scan, size_px)
                kept = np.arange(len(scan.voxels)) if keep_blank else seen_slices(scan, mask, encoding)  # [n]
            except ScanError as error:
                rejected.append((row.path, source.renamed(str(error))))
                continue
            except MedclrError as error:
                raise MedclrError(source.renamed(str(error))) from None
            stored = stored_scan(row, scan, encoding, kept, mask is not None, shard.number, n_slices)
            try:
                for squares in encode((scan.voxels[d] for d in kept), encoding, size_px):
                    slices(squares)
                if mask is not None:
                    masks(encode_mask(mask[kept], encoding, size_px))
                    if stored.loses_mask:
                        keep(row.scan_id, mask, kept)
                elif has_masks:
                    masks(np.zeros((len(kept), size_px, size_px), dtype=np.uint16))
            except (MedclrError, OSError):
                raise
            except Exception as error:
                raise RuntimeError(f"{row.path}: {source.renamed(str(error))}") from None
            scans.append(stored)
            n_slices += len(kept)
    return Part(shard.number, scans, rejected, written)


def rehearse(row: ScanRow, source: SourceFiles, size_px: int) -> None:
    """Decode a scan, to see whether that ends the process; whatever else is wrong with it, ``write_shard`` will say."""
    with contextlib.suppress(Exception):
        scan, _ = decode(row, source)
        encoding_of(scan, size_px)


@contextlib.contextmanager
def _noting(out: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that notes, in a file of this process, which scan is being read; no file is left if it lives."""
    path = out / f"{NOTE}{os.getpid()}.tmp"

    def note(scan_id: str) -> None:
        with files.mendable(path):
            path.write_text(scan_id, encoding="utf-8")  # not flushed to the disk: it need not outlive the machine

    try:
        yield note
    finally:
        path.unlink(missing_ok=True)


def take_notes(out: Path) -> set[str]:
    """The scans that processes were reading when they died; their notes are removed."""
    found = set()
    for path in out.glob(f"{NOTE}*.tmp"):
        found.add(path.read_text(encoding="utf-8"))
        path.unlink()
    return found


def seen_slices(scan: Scan, mask: NDArray[np.uint16] | None, encoding: Encoding) -> NDArray[np.int64]:
    """The slices [n] that show something, or on which something is marked.

    Raises:
        ScanError: there is none.
    """
    blank = blank_slices(scan, encoding)  # [D]
    if mask is not None:
        blank &= ~mask.any((1, 2))
    if blank.all():
        raise ScanError(f"each of its {len(blank)} slices is blank: there is nothing to see")
    return np.flatnonzero(~blank)


class Stopped(Exception):
    """A worker was told to leave."""


def stored_scan(
    row: ScanRow,
    scan: Scan,
    encoding: Encoding,
    kept: NDArray[np.int64],
    has_mask: bool = False,
    shard: int = 0,
    first_row: int = 0,
) -> StoredScan:
    """The scan's row of ``scans.csv``; ``kept`` [n] are its stored slices."""
    depth, height, width = scan.voxels.shape
    return StoredScan(
        scan_id=row.scan_id,
        patient_id=row.patient_id,
        study_id=row.study_id,
        modality=scan.modality,
        body_part=row.body_part,
        plane=row.plane,
        label=row.label,
        split=row.split,
        sha256=row.sha256,
        volume=row.volume,
        irregular="; ".join(dict.fromkeys(filter(None, [*row.irregular.split("; "), *scan.irregular.split("; ")]))),
        depth=depth,
        height=height,
        width=width,
        blank=tuple(np.setdiff1d(np.arange(depth), kept).tolist()),
        content_top=encoding.top,
        content_left=encoding.left,
        content_height=encoding.height,
        content_width=encoding.width,
        spacing_mm=scan.spacing_mm,
        affine=tuple(scan.affine.ravel().tolist()),
        source_shape=scan.source_shape,
        source_axes=scan.source_axes,
        source_flips=scan.source_flips,
        scale=encoding.scale,
        offset=encoding.offset,
        low=encoding.low,
        high=encoding.high,
        air=encoding.air,
        window_center=None if scan.window is None else scan.window.center,
        window_width=None if scan.window is None else scan.window.width,
        has_mask=has_mask,
        shard=shard,
        first_row=first_row,
    )


@contextlib.contextmanager
def _npy(path: Path, size_px: int, written: dict[str, FileInfo]) -> Iterator[Callable[[NDArray[np.uint16]], None]]:
    """Yield a function that appends [k,S,S] to a new .npy file: no shard has to fit into memory.

    On success the file is entered into ``written``.
    """
    with files.writing(path, flushed=False) as temporary:
        with temporary.open("wb") as file:
            _write_header(file, (0, size_px, size_px))
            start = file.tell()

            def append(squares: NDArray[np.uint16]) -> None:
                file.write(squares.data)  # not tofile, whose error for a full disk has no number

            yield append
            n_slices = (file.tell() - start) // (2 * size_px**2)
            file.seek(0)
            _write_header(file, (n_slices, size_px, size_px))
            assert file.tell() == start, "numpy leaves room for the first axis to grow in place"
        written[path.name] = FileInfo(temporary.stat().st_size, files.sha256(temporary))


Keep = Callable[[str, NDArray[np.uint16], NDArray[np.int64]], None]


@contextlib.contextmanager
def _npz(path: Path, written: dict[str, FileInfo]) -> Iterator[Keep]:
    """Yield a function that adds to a new .npz file, under a name, those slices [n] of a mask [D,H,W] that are stored.

    On success the file is entered into ``written``; if nothing was added there is none. Its bytes follow from what was
    added: zipfile dates what is written piece by piece to 1980.
    """
    with contextlib.ExitStack() as stack:
        archives: list[zipfile.ZipFile] = []  # one, once there is something to add

        def add(name: str, mask: NDArray[np.uint16], kept: NDArray[np.int64]) -> None:
            if not archives:
                temporary = stack.enter_context(files.writing(path, flushed=False))
                archives.append(stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED)))
            with archives[0].open(f"{name}.npy", "w", force_zip64=True) as file:
                _write_header(file, (len(kept), *mask.shape[1:]))
                for d in kept:
                    file.write(mask[d].data)

        yield add
    if archives:
        written[path.name] = FileInfo(path.stat().st_size, files.sha256(path))


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
