"""Manifest -> slice store: each scan is decoded a single time.

The manifest's scans, in order, are cut into shards; a shard is the unit of work. A worker decodes its scans and writes
the shard; what it found becomes a line of ``unfinished.jsonl``. So an interrupted run goes on with the shards that have
no line. At the end the lines become the tables, and ``store.json`` comes last. Neither the number of workers nor an
interruption changes a byte of the store.

Shape letters: D slices, H rows, W columns of a scan; S = size_px; h rows, w columns of the content of the square.
"""

import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import medclr
from medclr import files
from medclr.data import store as stores
from medclr.data.manifest import Manifest, ScanRow, SourceFiles, read_manifest
from medclr.data.store import UNFINISHED, FileInfo, Store, StoredScan, StoreInfo
from medclr.errors import MedclrError, ScanError
from medclr.progress import progress
from medclr.scans.modality import MODALITIES
from medclr.scans.scan import Scan

SHARD_BYTES = 256 * 2**20
"""A shard's slices take no more, unless a single scan does."""

SHARDS = 32
"""A small cohort is cut into about as many shards, so that many workers have something to do..."""

SHARD_SLICES = 64
"""...of at least so many slices each, which take a good part of a second: as long as it takes to start a worker."""

PERCENTILE_VOXELS = 2**15
"""The percentiles of a scan are taken over about so many of its voxels: their rank is then right within 0.1 %."""


@dataclass(frozen=True)
class PrepareSummary:
    """What stands in a store."""

    store: Path
    n_slices: int
    n_scans: int
    n_patients: int
    n_rejected: int
    was_complete: bool
    """The store stood there already and nothing was done."""

    def __str__(self) -> str:
        state = "is complete already" if self.was_complete else "is written"
        counts = (self.n_slices, "slice"), (self.n_scans, "scan"), (self.n_patients, "patient")
        text = f"{self.store} {state}: " + " of ".join(f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in counts)
        if self.n_rejected:
            text += f"\n{self.store / 'rejected.csv'}: {self.n_rejected:,} scans could not be decoded, and why"
        return text


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


def prepare(manifest: Path, out: Path, *, size_px: int = 224, workers: int = 1) -> PrepareSummary:
    """Decode each scan of a manifest once, into a slice store.

    An interrupted run goes on when the same command is given again. A scan that cannot be decoded is listed in
    rejected.csv of the store, with the reason. A script that asks for several workers must guard its entry with
    ``if __name__ == "__main__"``, as each of them imports it.

    Args:
        manifest: NAME.csv that medclr index wrote.
        out: folder of the store; new, or left by the same command.
        size_px: side of the square slices. A slice that is larger is shrunk to fit, its aspect in millimetres kept; a
            smaller one is never enlarged, and its values stay exact. Shrunk CT is rounded to whole Hounsfield units.
        workers: processes that decode side by side.

    Raises:
        MedclrError: the manifest or a file of it is missing or has changed, no scan can be decoded, ``out`` holds
            something else or is being written by another process, or the disk is full.
    """
    if size_px < 1 or workers < 1:
        raise MedclrError(f"size_px {size_px} and workers {workers}: both must be at least 1")
    manifest, out = Path(manifest), Path(out)
    table = read_manifest(manifest)
    claim = {
        "format_version": stores.FORMAT_VERSION,
        "medclr_version": medclr.__version__,
        "manifest_name": manifest.name,
        "manifest_sha256": table.sha256,
        "size_px": size_px,
    }
    if (info := _finished(out, claim)) is not None:
        return _summary(out, info, was_complete=True)

    shards = plan(table, size_px)
    parts = _resume(out, claim)
    missing = [shard for shard in shards if shard.number not in parts]
    _check_sources(table, missing)
    _check_space(out, missing, size_px)
    n_slices = [shard.n_slices for shard in shards]
    done = sum(n_slices[number] for number in parts)
    with files.alone(out):
        files.write_text(out / UNFINISHED, "\n".join([json.dumps(claim), *map(_part_line, parts.values()), ""]))
        with (
            files.mendable(out / UNFINISHED),
            (out / UNFINISHED).open("a", encoding="utf-8") as journal,
            progress("preparing", sum(n_slices), "slices", done) as advance,
            contextlib.closing(_write_shards(missing, out, size_px, workers)) as written,
        ):
            for part in written:
                print(_part_line(part), file=journal, flush=True)
                parts[part.shard] = part
                advance(n_slices[part.shard])
        info = _finish(out, claim, [parts[shard.number] for shard in shards])
    return _summary(out, info, was_complete=False)


def plan(manifest: Manifest, size_px: int) -> list[Shard]:
    """Cut a manifest into shards: whole scans in the manifest's order, until a shard has its number of slices."""
    total = sum(row.n_slices for row in manifest.rows)
    target = min(max(math.ceil(total / SHARDS), SHARD_SLICES), SHARD_BYTES // (2 * size_px**2))
    sources = manifest.files
    shards: list[Shard] = []
    room = 0
    for row in manifest.rows:
        if not shards or row.n_slices > room:
            shards.append(Shard(len(shards), []))
            room = target
        shards[-1].scans.append((row, sources[row.scan_id]))
        room -= row.n_slices
    return shards


# One scan -> square slices


@dataclass(frozen=True)
class Encoding:
    """How the slices of one scan become squares of uint16: physical = offset + scale * stored."""

    top: int
    """Where the content lies in the square, in pixels."""
    left: int
    height: int
    """h, at most H and S."""
    width: int
    scale: float
    offset: float
    low: float
    """0.5 and 99.5 percentiles of the scan, physical units."""
    high: float
    air: float
    """Physical value of the padding."""


def encoding_of(scan: Scan, size_px: int) -> Encoding:
    """Choose the grid and the number range of a scan.

    The grid: square pixels, as large as the coarser of the two spacings or as it takes to fit; so nothing is enlarged,
    and a slice with square pixels that fits is not resampled at all. It is centred.

    The numbers: whole-numbered voxels that span at most 65535 are stored as they are, less their minimum (scale 1), if
    they are not resampled, or if they are in absolute units (CT), to whole ones of which they are then rounded. In all
    other cases the scan's own range is spread over the 16 bits; rounding errs by at most half of (max - min) / 65535.

    Raises:
        ScanError: all voxels are equal.
    """
    _, height, width = scan.voxels.shape
    _, spacing_h, spacing_w = scan.spacing_mm
    pixel_mm = max(spacing_h, spacing_w, height * spacing_h / size_px, width * spacing_w / size_px)
    h = min(max(round(height * spacing_h / pixel_mm), 1), height, size_px)
    w = min(max(round(width * spacing_w / pixel_mm), 1), width, size_px)

    lowest, highest = float(scan.voxels.min()), float(scan.voxels.max())
    low, high = _percentiles(scan.voxels)
    if low == high:  # nearly all voxels are alike, as in a mask-like or mostly empty scan
        low, high = lowest, highest
    modality = MODALITIES[scan.modality]
    air = lowest if modality.air is None else modality.air
    bottom, top = min(lowest, air), max(highest, air)
    scale = float(np.float32((top - bottom) / 65535))
    if lowest == highest or scale == 0:
        raise ScanError(f"every voxel is {lowest:g}: there is nothing to see")
    keeps_units = (h, w) == (height, width) or modality.scaling == "window"  # such as Hounsfield's
    if keeps_units and top - bottom <= 65535 and bottom.is_integer() and _whole(scan.voxels):
        scale = 1.0
    return Encoding((size_px - h) // 2, (size_px - w) // 2, h, w, scale, bottom, low, high, air)


def encode(voxels: NDArray[np.float32], encoding: Encoding, size_px: int) -> Iterator[NDArray[np.uint16]]:
    """[D,H,W] in physical units -> D times [S,S] as stored; the array that is yielded is used again.

    Shrinking averages over the pixels that fall together, with a triangle filter as wide as two new pixels.
    """
    e = encoding
    square = np.full((size_px, size_px), np.rint((e.air - e.offset) / e.scale), dtype=np.uint16)  # [S,S]
    content = square[e.top : e.top + e.height, e.left : e.left + e.width]  # [h,w]
    work = np.empty(content.shape, dtype=np.float32)  # [h,w]
    for image in voxels:  # [H,W]
        if image.shape != content.shape:
            image = np.asarray(Image.fromarray(image).resize((e.width, e.height), Image.Resampling.BILINEAR))  # [h,w]
        np.subtract(image, np.float32(e.offset), out=work)
        if e.scale != 1:
            work /= np.float32(e.scale)
        np.rint(work, out=work)
        np.clip(work, 0, 65535, out=work)
        content[...] = work
        yield square


def encode_mask(mask: NDArray[np.uint16], encoding: Encoding, size_px: int) -> NDArray[np.uint16]:
    """[D,H,W] labels -> [D,S,S] on the grid of the stored slices, by nearest neighbour; 0 around."""
    e = encoding
    rows, columns = stores.nearest(mask.shape[1], e.height), stores.nearest(mask.shape[2], e.width)
    squares = np.zeros((len(mask), size_px, size_px), dtype=np.uint16)  # [D,S,S]
    squares[:, e.top : e.top + e.height, e.left : e.left + e.width] = mask[:, rows[:, None], columns]
    return squares


def _percentiles(voxels: NDArray[np.float32]) -> tuple[float, float]:
    """0.5 and 99.5 percentiles, over every k-th voxel, k prime to H*W so that no row or column is preferred."""
    step = math.ceil(voxels.size / PERCENTILE_VOXELS)
    while math.gcd(step, voxels[0].size) != 1:
        step += 1
    sample = voxels.reshape(-1)[::step]
    ranks = [round(share * (len(sample) - 1)) for share in (0.005, 0.995)]
    low, high = np.partition(sample, ranks)[ranks]
    return float(low), float(high)


def _whole(voxels: NDArray[np.float32]) -> bool:
    """Whether all are whole numbers; slice by slice, as the first fraction settles it."""
    return all(np.array_equal(image, np.rint(image)) for image in voxels)


# One shard -> its files and its part


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
        raise ScanError(f"{type(error).__name__}: {error}") from error


def write_shard(shard: Shard, out: Path, size_px: int, stopped: Callable[[], bool] = lambda: False) -> Part:
    """Decode the scans of a shard, and write its slices and its masks.

    Args:
        shard: what to decode.
        out: folder of the store.
        size_px: S.
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
        slices = stack.enter_context(_npy(out / stores.slices_name(shard.number), size_px, written))
        if has_masks:
            masks = stack.enter_context(_npy(out / stores.masks_name(shard.number), size_px, written))
        for row, source in shard.scans:
            if stopped():
                raise Stopped
            try:
                scan, mask = decode(row, source)
                encoding = encoding_of(scan, size_px)
            except ScanError as error:
                rejected.append((row.path, _without_folders(str(error), source)))
                continue
            try:
                for square in encode(scan.voxels, encoding, size_px):
                    slices(square)
                if mask is not None:
                    masks(encode_mask(mask, encoding, size_px))
                elif has_masks:
                    masks(np.zeros((len(scan.voxels), size_px, size_px), dtype=np.uint16))
            except (MedclrError, OSError):
                raise
            except Exception as error:
                raise RuntimeError(f"{source.image[0]}: {error}") from error
            scans.append(_stored_scan(row, scan, encoding, mask is not None, shard.number, n_slices))
            n_slices += len(scan.voxels)
    return Part(shard.number, scans, rejected, written)


def _without_folders(reason: str, source: SourceFiles) -> str:
    """A store may be shared: where the ward keeps its scans stays in the manifest's table of files."""
    for file in (*source.image, *([source.mask] if source.mask else [])):
        reason = reason.replace(str(file), file.name)
    return reason


class Stopped(Exception):
    """A worker was told to leave."""


def _stored_scan(
    row: ScanRow, scan: Scan, encoding: Encoding, has_mask: bool, shard: int, first_row: int
) -> StoredScan:
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
        depth=depth,
        height=height,
        width=width,
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
        has_mask=has_mask,
        shard=shard,
        first_row=first_row,
    )


@contextlib.contextmanager
def _npy(path: Path, size_px: int, written: dict[str, FileInfo]) -> Iterator[Callable[[NDArray[np.uint16]], None]]:
    """Yield a function that appends [S,S] or [D,S,S] to a new .npy file: no shard has to fit into memory.

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


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})


# All shards, side by side


def _write_shards(shards: Sequence[Shard], out: Path, size_px: int, workers: int) -> Generator[Part]:
    """Yield each part as its shard is written; on an error or Ctrl-C all workers leave, with nothing half-written."""
    if workers == 1:
        for shard in shards:
            yield write_shard(shard, out, size_px)
        return
    # Spawn: a forked child would inherit locks held by the caller's threads (torch, Arrow, the progress bar).
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(min(workers, max(len(shards), 1)), context, _start_worker, (stop,)) as pool:
        try:
            with _deaf_to_ctrl_c():
                futures = [pool.submit(_work, shard, out, size_px) for shard in shards]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise MedclrError(
                "a worker process was killed, most likely because memory ran out; run the same command again with fewer"
                " --workers to go on"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here never see SIGINT: a terminal sends it to all, and the parent tells its workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_stop: Event


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(shard: Shard, out: Path, size_px: int) -> Part:
    return write_shard(shard, out, size_px, _stop.is_set)


# Before and after


def _finished(out: Path, claim: dict[str, Any]) -> StoreInfo | None:
    """What stands in ``out`` if that is already the store that was asked for.

    Raises:
        MedclrError: it is something else.
    """
    if (out / "store.json").exists():
        info = Store(out).info
        _check_claim(out, {**asdict(info), "medclr_version": claim["medclr_version"]}, claim)  # made by any is made
        return info
    is_new = not out.exists() or (out.is_dir() and all(path.suffix == ".tmp" for path in out.iterdir()))
    if not is_new and not (out / UNFINISHED).exists():
        raise MedclrError(f"{out}: exists and is not a slice store; choose another --out")
    return None


def _resume(out: Path, claim: dict[str, Any]) -> dict[int, Part]:
    """What an interrupted run has left whole, by the number of the shard.

    Raises:
        MedclrError: it was a run of another manifest, or with other settings.
    """
    try:
        first, *lines = (out / UNFINISHED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    _check_claim(out, json.loads(first), claim)
    parts: dict[int, Part] = {}
    with progress("checking what is there", len(lines), "shards") as advance:
        for line in lines:
            with contextlib.suppress(ValueError, FileNotFoundError):  # cut short as the run was killed, or not on disk
                part = _parse_part(line)
                if all(files.sha256(out / name) == written.sha256 for name, written in part.files.items()):
                    parts[part.shard] = part
            advance(1)
    return parts


def _check_claim(out: Path, found: dict[str, Any], claim: dict[str, Any]) -> None:
    if any(found[name] != claim[name] for name in claim if name != "manifest_name"):
        there, here = (
            f"{some['manifest_name']} (SHA-256 {some['manifest_sha256'][:12]}) at {some['size_px']} px by medclr"
            f" {some['medclr_version']}"
            for some in (found, claim)
        )
        raise MedclrError(f"{out}: holds a store of {there}, not of {here}; choose another --out or delete it")


def _part_line(part: Part) -> str:
    return json.dumps(
        {
            **vars(part),
            "scans": [*map(stores.scan_cells, part.scans)],
            "files": {name: vars(written) for name, written in part.files.items()},
        }
    )


def _parse_part(line: str) -> Part:
    values = json.loads(line)
    values["scans"] = [stores.parse_scan(cells) for cells in values["scans"]]
    values["rejected"] = [(path, reason) for path, reason in values["rejected"]]
    values["files"] = {name: FileInfo(**written) for name, written in values["files"].items()}
    return Part(**values)


def _check_sources(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise unless all files that are still to be decoded are there and as large as when they were indexed."""
    wanted = {row.scan_id for shard in shards for row, _ in shard.scans}
    for row in manifest.file_rows:
        if row.scan_id not in wanted:
            continue
        path = row.absolute()
        try:
            size = path.stat().st_size
        except OSError as error:
            raise MedclrError(
                f"{path}: cannot be read ({error.strerror}); bring it back, or run medclr index again"
            ) from error
        if size != row.size:
            raise MedclrError(f"{path}: has changed since it was indexed; run medclr index again")


def _check_space(out: Path, shards: Sequence[Shard], size_px: int) -> None:
    """Raise if the disk is too small for what is still to be written."""
    needed = sum(shard.n_slices * size_px**2 * (4 if shard.masks else 2) for shard in shards)
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if needed > free:
        raise MedclrError(
            f"{out}: the store needs {needed / 1e6:,.0f} MB more and the disk has {free / 1e6:,.0f} MB; make room,"
            " choose another --out or a smaller --size-px"
        )


def _finish(out: Path, claim: dict[str, Any], parts: Sequence[Part]) -> StoreInfo:
    """Merge the parts into the tables, see that all is on the disk, write ``store.json``, and clear up."""
    scans = [scan for part in parts for scan in part.scans]
    rejected = [row for part in parts for row in part.rejected]
    if not scans:
        shutil.rmtree(out)
        path, reason = rejected[0]
        raise MedclrError(
            f"{claim['manifest_name']}: none of its {len(rejected)} scans can be decoded; the first, {path}: {reason}"
        )
    present = {scan.modality for scan in scans}
    modalities = tuple(name for name in MODALITIES if name in present)
    labels = tuple(sorted({scan.label for scan in scans} - {""}))
    stores.write_table(out / "slices.arrow", stores.slice_table(scans, modalities, labels))
    files.write_text(out / "scans.csv", stores.scans_csv(scans))
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rejected])
    files.write_text(out / "rejected.csv", text.getvalue())
    written = {name: info for part in parts for name, info in part.files.items()}
    with ThreadPoolExecutor(16) as pool:  # one by one, each file would wait for the disk's journal anew
        for _ in pool.map(_flush, [out / name for name in written]):
            pass
    for name in ("slices.arrow", "scans.csv", "rejected.csv"):
        written[name] = FileInfo((out / name).stat().st_size, files.sha256(out / name))
    info = StoreInfo(
        **claim,
        n_slices=sum(scan.depth for scan in scans),
        n_scans=len(scans),
        n_patients=len({scan.patient_id for scan in scans}),
        n_rejected=len(rejected),
        modalities=modalities,
        labels=labels,
        masks=any(scan.has_mask for scan in scans),
        shard_slices=tuple(sum(scan.depth for scan in part.scans) for part in parts),
        files=written,
    )
    files.write_json(out / "store.json", asdict(info))
    (out / UNFINISHED).unlink()
    for stale in out.glob(".*.tmp"):  # of runs that were killed
        stale.unlink()
    return info


def _flush(path: Path) -> None:
    try:
        with files.mendable(path):
            files.flush(path)
    except MedclrError:
        path.unlink()  # nobody knows what of it reached the disk: it is to be written again
        raise


def _summary(out: Path, info: StoreInfo, was_complete: bool) -> PrepareSummary:
    return PrepareSummary(out, info.n_slices, info.n_scans, info.n_patients, info.n_rejected, was_complete)
