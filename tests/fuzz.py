"""Thousands of damaged files through the road that every scan takes: each gives a Scan or a ScanError.

    python -m tests.fuzz [--n 5000] [--seed 0] [--zoo DIR] [--keep DIR] [--only NUMBER]

Workers decode, one mutant at a time; their parent watches from outside. A mutant fails if it raises anything else,
warns, takes more than 10 s (of its own processor time, so that a busy machine is no failure; but not more than twice
that by the clock), more than 2 GB of memory, or kills its worker. Failures are kept as files with their recipe;
``--only`` makes one of them again.
"""

import argparse
import contextlib
import gc
import math
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

from medclr.progress import progress
from tests.mutants import Mutant, format_of, mutant
from tests.originals import originals

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LIMIT_S = 10.0
LIMIT_MB = 2000.0
PATIENCE = 2  # by the clock, a mutant may take so many times its limit
GUARD_MB = 6000  # address space that a worker may take: protects the machine, and is not what is measured


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    number: int
    format: str
    kind: str
    """scan, refused, or FAIL with what happened."""
    seconds: float
    megabytes: float
    """Growth of the resident memory at its highest."""
    detail: str = ""


Road = Callable[[Path], str]


class WrongError(Exception):
    """A reader contradicts itself."""


def road(path: Path) -> str:
    """What index and prepare do with a file. 'scan' or 'refused'; whatever is raised is the reader's fault."""
    from medclr import scans
    from medclr.errors import ScanError
    from medclr.scans.policy import ACCEPTED

    data = path.read_bytes()
    known = scans.reader_of(data[: scans.HEAD_BYTES])
    if known is None:
        return "refused"
    _, reader = known
    try:
        header = reader.read_header(path, data)
    except ScanError:
        with contextlib.suppress(ScanError):
            scans.read([path], "OT")
        return "refused"
    found, rejected = reader.find([header])
    if not found and not rejected:
        raise WrongError("find loses the file")
    if not found:
        return "refused"
    kinds = set()
    for scan in {0: found[0], 1: found[len(found) // 2], 2: found[-1]}.values():
        try:
            read = scans.read(scan.files, scan.modality or "OT", volume=scan.volume, policy=ACCEPTED)
        except ScanError:
            kinds.add("refused")
            continue
        kinds.add("scan")
        lengths_mm = np.linalg.norm(read.affine[:3, :3], axis=0)
        if not np.isfinite(read.voxels).all():
            raise WrongError("holds values that are not finite")
        if read.voxels.shape != scan.shape:
            raise WrongError(f"found {scan.shape} and read {read.voxels.shape}")
        if not np.allclose([lengths_mm, read.spacing_mm], scan.spacing_mm, rtol=1e-4, atol=0):
            raise WrongError(f"found {scan.spacing_mm} mm, read {read.spacing_mm} mm, affine {lengths_mm} mm")
    return "scan" if "scan" in kinds else "refused"


def work(pipe: Connection, seed: int, zoo: Path | None, road: Road) -> None:
    """A worker: numbers in, outcomes out, until it is killed."""
    from medclr import scans

    for name in scans.READERS:  # what they import is not the mutant's memory
        scans.reader_of(b"")
        __import__(f"medclr.scans.{name}")
    pool = originals(zoo)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codecs in C complain there
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GUARD_MB * 2**20, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        pipe.send(None)
        while True:
            number = pipe.recv()
            made = mutant(pool, seed, number)
            paths = write(made, Path(folder))
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
            before, start, detail = _resident("VmRSS"), time.process_time(), ""
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                try:
                    kind = road(paths[0])
                except BaseException as error:  # codecs written in Rust panic with one
                    kind, detail = f"FAIL {type(error).__name__}", traceback.format_exc()
            seconds, megabytes = time.process_time() - start, _resident("VmHWM") - before
            if raised and not kind.startswith("FAIL"):
                kind, detail = f"FAIL {raised[0].category.__name__}", str(raised[0])
            pipe.send(Outcome(number, made.format, kind, seconds, megabytes, detail))
            for path in paths:
                path.unlink()


def _resident(what: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def write(made: Mutant, folder: Path) -> list[Path]:
    """The mutant's files in ``folder``."""
    paths = []
    for name, data in made.files:
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths


@dataclass
class Worker:
    """A worker as its parent sees it."""

    seed: int
    zoo: Path | None
    road: Road
    number: int = -1
    started: float = math.inf
    is_lost: bool = False
    process: SpawnProcess = field(init=False)
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.seed, self.zoo, self.road), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # ready

    def give(self, number: int) -> None:
        self.number, self.started = number, time.monotonic()
        self.pipe.send(number)

    def outcome(self, limit_s: float, limit_mb: float) -> Outcome | None:
        """What became of its mutant; None: it is still at it. A worker that is lost takes no other."""
        took = time.monotonic() - self.started
        fate = "time"
        if self.pipe.poll():
            try:
                outcome: Outcome = self.pipe.recv()
                if outcome.seconds > limit_s:
                    return replace(outcome, kind="FAIL time")
                return replace(outcome, kind="FAIL memory") if outcome.megabytes > limit_mb else outcome
            except (EOFError, ConnectionError):
                self.process.join()
                fate = f"died ({self.process.exitcode})"
        elif took <= PATIENCE * limit_s:
            return None
        self.is_lost = True
        return Outcome(self.number, format_of(originals(self.zoo), self.number), f"FAIL {fate}", took, 0.0)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(
    numbers: Sequence[int],
    seed: int,
    zoo: Path | None = None,
    *,
    workers: int = 2,
    road: Road = road,
    limit_s: float = LIMIT_S,
    limit_mb: float = LIMIT_MB,
) -> list[Outcome]:
    """Run the mutants of these numbers, each in a worker that may die of it."""
    todo, outcomes = list(reversed(numbers)), []
    crew = [Worker(seed, zoo, road) for _ in range(min(workers, len(todo)))]
    for worker in crew:
        worker.give(todo.pop())
    with progress("damaged files", len(numbers), "files") as advance:
        while crew:
            wait([worker.pipe for worker in crew], timeout=1)
            for worker in list(crew):
                outcome = worker.outcome(limit_s, limit_mb)
                if outcome is None:
                    continue
                outcomes.append(outcome)
                advance(1)
                if worker.is_lost or not todo:
                    worker.stop()
                    crew.remove(worker)
                if worker.is_lost and todo:
                    worker = Worker(seed, zoo, road)
                    crew.append(worker)
                if todo:
                    worker.give(todo.pop())
    return outcomes


def report(outcomes: Sequence[Outcome]) -> Any:
    """Counts a format, the slowest and the largest, as a table."""
    from rich.table import Table

    table = Table(
        "format", *(f"{name}" for name in ("mutants", "scan", "ScanError", "FAIL", "slowest s", "largest MB"))
    )
    by_format: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_format[outcome.format].append(outcome)
    for name, some in [*sorted(by_format.items()), ("all", list(outcomes))]:
        counts = [sum(o.kind.startswith(kind) for o in some) for kind in ("scan", "refused", "FAIL")]
        largest = max(o.megabytes for o in some)
        row = (len(some), *counts, f"{max(o.seconds for o in some):.2f}", f"{largest:,.0f}")
        table.add_row(name, *map(str, row))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if anything failed."""
    from rich.console import Console

    shared = Path(os.environ.get("MEDCLR_SHARED_DATA", SHARED)) / "dicom_zoo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoo", type=Path, default=shared if shared.exists() else None,
                        help="a further folder of DICOM files to make mutants of")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="where the failing mutants are kept; a temporary folder if not given")
    parser.add_argument("--only", type=int, help="run the mutant of this number alone")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    console = Console()
    numbers = range(given.n) if given.only is None else [given.only]
    outcomes = fuzz(numbers, given.seed, given.zoo, workers=given.workers)
    console.print(report(outcomes))
    failed = [outcome for outcome in outcomes if outcome.kind.startswith("FAIL")]
    if failed:
        keep = given.keep or Path(tempfile.mkdtemp(prefix="medclr-fuzz-"))
        for outcome in sorted(failed, key=lambda outcome: (outcome.kind, outcome.number)):
            made = mutant(originals(given.zoo), given.seed, outcome.number)
            folder = keep / f"{given.seed}-{outcome.number}"
            folder.mkdir(parents=True, exist_ok=True)
            write(made, folder)
            story = (
                f"{outcome.kind} {outcome.seconds:.1f} s {outcome.megabytes:,.0f} MB\n{made.format}\n{made.recipe}\n"
            )
            (folder / "recipe.txt").write_text(f"{story}{outcome.detail}", encoding="utf-8")
            console.print(f"[red]{outcome.kind}[/] {outcome.number} {made.format} {made.recipe[:200]}", highlight=False)
        console.print(f"{len(failed)} of {len(outcomes)} failed; they are kept in {keep}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
