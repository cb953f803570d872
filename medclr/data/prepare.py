"""Manifest -> slice store: each scan is decoded a single time.

The manifest's scans, in order, are cut into shards; a shard is the unit of work. A worker decodes its scans and writes
the shard; what it found becomes a line of ``unfinished.jsonl``. So an interrupted run goes on with the shards that have
no line. At the end the lines become the tables, and ``store.json`` comes last. Neither the number of workers nor an
interruption changes a byte of the store.
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
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import medclr
from medclr import files
from medclr.data import store as stores
from medclr.data import tables
from medclr.data.manifest import Manifest, ScanRow, SourceFiles, read_manifest
from medclr.data.shard import Part, Shard, rehearse, take_notes, write_shard
from medclr.data.store import UNFINISHED, FileInfo, Store, StoreInfo
from medclr.errors import MedclrError
from medclr.progress import progress
from medclr.scans.modality import MODALITIES

SHARD_BYTES = 256 * 2**20
"""A shard's slices take no more, unless a single scan does."""

SHARDS = 32
"""A small cohort is cut into about as many shards, so that many workers have something to do..."""

SHARD_SLICES = 64
"""...of at least so many slices each, which take a good part of a second: as long as it takes to start a worker."""

MASK_DEFLATES = 32
"""A mask that is kept at the resolution of its source takes less than such a part of 2 bytes a voxel: one of 117 organs
takes a 37th on 101 x 122 voxels a slice, a 229th on 512 x 512."""


@dataclass(frozen=True)
class PrepareSummary:
    """What stands in a store."""

    store: Path
    n_slices: int
    n_scans: int
    n_patients: int
    n_rejected: int
    n_blank: int
    """Slices that show nothing and were left out."""
    was_complete: bool
    """The store stood there already and nothing was done."""

    def __str__(self) -> str:
        state = "is complete already" if self.was_complete else "is written"
        counts = (self.n_slices, "slice"), (self.n_scans, "scan"), (self.n_patients, "patient")
        text = f"{self.store} {state}: " + " of ".join(f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in counts)
        if self.n_blank:
            text += f"\n{self.n_blank:,} blank slices are left out (scans.csv says which)"
        if self.n_rejected:
            text += f"\n{self.store / 'rejected.csv'}: {self.n_rejected:,} scans could not be decoded, and why"
        return text


def prepare(
    manifest: Path,
    out: Path,
    *,
    size_px: int = 224,
    workers: int = 1,
    keep_blank: bool = False,
    key_file: Path | None = None,
) -> PrepareSummary:
    """Decode each scan of a manifest once, into a slice store.

    An interrupted run goes on when the same command is given again. A scan that cannot be decoded is listed in
    rejected.csv of the store, with the reason. A script that asks for several workers must guard its entry with
    ``if __name__ == "__main__"``, as each of them imports it.

    Args:
        manifest: NAME.csv that medclr index wrote.
        out: folder of the store; new, or left by the same command.
        size_px: side of the square slices. A slice that is larger is shrunk to fit, its aspect in millimetres kept; a
            smaller one is never enlarged, and its values stay exact. Shrunk CT is rounded to whole Hounsfield units; of
            a shrunk mask the original is kept as well, to judge against.
        workers: processes that decode side by side.
        keep_blank: store slices that show nothing as well. Otherwise they are left out and counted; a slice on which a
            mask marks something is always stored.
        key_file: the key of the manifest, beside which stands where its files lie; if not given, ~/.config/medclr/key.

    Raises:
        MedclrError: the manifest or a file of it is missing or has changed, no scan can be decoded, ``out`` holds
            something else or is being written by another process, or the disk is full.
    """
    if size_px < 1 or workers < 1:
        raise MedclrError(f"size_px {size_px} and workers {workers}: both must be at least 1")
    manifest, out = Path(manifest), Path(out)
    table = read_manifest(manifest, Path(key_file) if key_file else None)
    claim = {
        "format_version": stores.FORMAT_VERSION,
        "medclr_version": medclr.__version__,
        "manifest_name": manifest.name,
        "manifest_sha256": table.sha256,
        "size_px": size_px,
        "keep_blank": keep_blank,
    }
    if (info := _finished(out, claim)) is not None:
        return _summary(out, info, was_complete=True)

    shards = plan(table, size_px)
    n_slices = [shard.n_slices for shard in shards]
    with files.alone(out):
        if (info := _finished(out, claim)) is not None:  # by another, before this one had the folder to itself
            return _summary(out, info, was_complete=True)
        parts = _resume(out, claim)
        missing = [shard for shard in shards if shard.number not in parts]
        _check_sources(table, missing)
        _check_space(out, missing, size_px)
        writer = _Writer(out, size_px, keep_blank, workers)
        writer.try_alone(missing)  # what an earlier run may have died of
        done = sum(n_slices[number] for number in parts)
        files.write_text(out / UNFINISHED, "\n".join([json.dumps(claim), *map(_part_line, parts.values()), ""]))
        with (
            files.mendable(out / UNFINISHED),
            (out / UNFINISHED).open("a", encoding="utf-8") as journal,
            progress("preparing", sum(n_slices), "slices", done) as advance,
            contextlib.closing(writer.write(missing)) as written,
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


# All shards, side by side


@dataclass
class _Writer:
    """What all shards have in common."""

    out: Path
    size_px: int
    keep_blank: bool
    workers: int
    refused: dict[str, str] = field(default_factory=dict)
    """Scans that end the process that decodes them, and how."""

    def write(self, shards: Sequence[Shard]) -> Generator[Part]:
        """Yield each part as its shard is written; on an error or Ctrl-C all workers leave, with nothing half-written.

        If a worker dies, what was being read is tried alone: a scan that again ends its process is refused, and the
        rest goes on.
        """
        if self.workers == 1:
            for shard in shards:
                yield write_shard(shard, self.out, self.size_px, self.keep_blank, self.refused)
            return
        waiting = {shard.number: shard for shard in shards}
        while waiting:
            try:
                with contextlib.closing(self._side_by_side(list(waiting.values()))) as written:
                    for part in written:
                        del waiting[part.shard]
                        yield part
            except BrokenProcessPool as error:
                if not self.try_alone(list(waiting.values())):
                    raise MedclrError(
                        "a worker process was killed, most likely because memory ran out; run the same command again"
                        " with fewer --workers to go on"
                    ) from error

    def _side_by_side(self, shards: Sequence[Shard]) -> Generator[Part]:
        # Spawn: a forked child would inherit locks held by the caller's threads (torch, Arrow, the progress bar).
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        settings = self.out, self.size_px, self.keep_blank, self.refused
        with ProcessPoolExecutor(min(self.workers, len(shards)), context, _start_worker, (stop,)) as pool:
            try:
                with _deaf_to_ctrl_c():
                    futures = [pool.submit(_work, shard, *settings) for shard in shards]
                for future in as_completed(futures):
                    yield future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def try_alone(self, shards: Sequence[Shard]) -> bool:
        """Decode what processes were reading when they died, one scan after the other, in a process that does nothing
        else; whether any ended that too, and is now ``refused``."""
        noted = take_notes(self.out)
        suspects = [scan for shard in shards for scan in shard.scans if scan[0].scan_id in noted]
        context = multiprocessing.get_context("spawn")
        before = len(self.refused)
        while suspects:
            current = context.Value("i", -1, lock=False)
            process = context.Process(target=_try, args=(suspects, self.size_px, current), daemon=True)
            with _deaf_to_ctrl_c():
                process.start()
            try:
                process.join()
            finally:
                process.kill()
            if not process.exitcode or current.value < 0:  # all survived, or it could not even begin
                break
            row, _ = suspects[current.value]
            self.refused[row.scan_id] = (
                f"ends the process that decodes it ({_ending(process.exitcode)}); it was tried twice"
            )
            suspects = suspects[current.value + 1 :]
        return len(self.refused) > before


def _ending(code: int) -> str:
    """What an exit status means."""
    if code > 0:
        return f"status {code}"
    number = signal.Signals(-code)
    return number.name + (", as when memory runs out" if number == signal.SIGKILL else "")


def _try(suspects: Sequence[tuple[ScanRow, SourceFiles]], size_px: int, current: Any) -> None:
    """Decode scans; ``current`` says which one, counted from 0."""
    for number, (row, source) in enumerate(suspects):
        current.value = number
        rehearse(row, source, size_px)


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


def _work(shard: Shard, out: Path, size_px: int, keep_blank: bool, refused: Mapping[str, str]) -> Part:
    return write_shard(shard, out, size_px, keep_blank, refused, _stop.is_set)


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
            f"{some['manifest_name']} (SHA-256 {some['manifest_sha256'][:12]}) at {some['size_px']} px"
            f"{' with blank slices' * some['keep_blank']} by medclr {some['medclr_version']}"
            for some in (found, claim)
        )
        raise MedclrError(f"{out}: holds a store of {there}, not of {here}; choose another --out or delete it")


def _part_line(part: Part) -> str:
    return json.dumps(
        {
            **vars(part),
            "scans": tables.scans_csv(part.scans),
            "files": {name: vars(written) for name, written in part.files.items()},
        }
    )


def _parse_part(line: str) -> Part:
    values = json.loads(line)
    values["scans"] = tables.parse_scans(values["scans"].encode())
    values["rejected"] = [(path, reason) for path, reason in values["rejected"]]
    values["files"] = {name: FileInfo(**written) for name, written in values["files"].items()}
    return Part(**values)


def _check_sources(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise unless all files that are still to be decoded are there and as large as when they were indexed."""
    wanted = {row.scan_id for shard in shards for row, _ in shard.scans}
    for row, place in manifest.located:
        if row.scan_id not in wanted:
            continue
        try:
            size = place.absolute().stat().st_size
        except OSError as error:
            raise MedclrError(
                f"{row.name}: cannot be read ({error.strerror}); bring it back, or run medclr index again"
            ) from error
        if size != row.size:
            raise MedclrError(f"{row.name}: has changed since it was indexed; run medclr index again")


def _check_space(out: Path, shards: Sequence[Shard], size_px: int) -> None:
    """Raise if the disk is too small for what is still to be written."""
    needed = sum(shard.n_slices * size_px**2 * (4 if shard.masks else 2) for shard in shards)
    rows = [row for shard in shards for row, source in shard.scans if source.mask]
    needed += sum(2 * row.n_slices * row.rows * row.columns // MASK_DEFLATES for row in rows)
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
    tables.write_table(out / "slices.arrow", tables.slice_table(scans, modalities, labels))
    files.write_text(out / "scans.csv", tables.scans_csv(scans))
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
        n_slices=sum(scan.n_slices for scan in scans),
        n_blank=sum(len(scan.blank) for scan in scans),
        n_scans=len(scans),
        n_patients=len({scan.patient_id for scan in scans}),
        n_rejected=len(rejected),
        modalities=modalities,
        labels=labels,
        masks=any(scan.has_mask for scan in scans),
        shard_slices=tuple(sum(scan.n_slices for scan in part.scans) for part in parts),
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
    counts = info.n_slices, info.n_scans, info.n_patients, info.n_rejected, info.n_blank
    return PrepareSummary(out, *counts, was_complete)
