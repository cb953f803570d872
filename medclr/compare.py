"""The fair comparison: inits x budgets x seeds, each init on the same patients; it goes on where it was stopped.

What is random in a cell - the labelled patients, their order, the views, new weights - follows from its seed; so the
same seed gives every init the same patients to learn from, and all cells are judged on the same test patients.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medclr import files
from medclr.compare_page import write_report
from medclr.compare_plan import Cell, CompareConfig, dotted, open_comparison, read_config
from medclr.compare_results import Results, read_results, write_tables
from medclr.config import FinetuneConfig
from medclr.data.cases import choose_cases, split_patients, write_cases
from medclr.data.splits import refuse_overlap
from medclr.data.store import Store
from medclr.distill import NOT_ASKED, learnt_from, start_student, train_student
from medclr.distill import read_wish as read_distill
from medclr.embed import extract, scan_means
from medclr.errors import MedclrError, Terminated
from medclr.files import alone
from medclr.finetune import Wish, finetune, read_wish, scans_of
from medclr.models.encoder import Encoder
from medclr.models.start import start_encoder
from medclr.outcomes import Classified, write_outcome
from medclr.probe import logistic, standardise
from medclr.progress import duration, progress
from medclr.scans.modality import modality_of
from medclr.tasks import Task
from medclr.tasks import get as get_task

Run = Callable[[CompareConfig, Cell, Path], float]
"""Computes a cell of a comparison in a folder: leaves predictions.csv and cases.csv in the cell's, returns seconds."""

SHARED = {each.name for each in fields(FinetuneConfig)} - {*NOT_ASKED, "network", "size_px", "seed"}
"""Settings of all inits that students have too; their network and its size are the teacher's."""


@dataclass(frozen=True)
class CompareSummary:
    """What a comparison found, in a few lines."""

    out: Path
    results: Results

    def __str__(self) -> str:
        return f"{self.results}\nthe report is {self.out / 'report.html'}, its numbers {self.out / 'results.csv'}"


def compare(config: Path, out: Path, *, jobs: int | None = None, report_only: bool = False) -> CompareSummary:
    """Compare pretrained encoders with few labelled patients: the same ones for each.

    Args:
        config: YAML file that says what is compared; configs/compare has some.
        out: Folder for the predictions, the table and the report; the same command again goes on.
        jobs: Cells that are computed at the same time; by default what the file says.
        report_only: Compute nothing, and report on the seeds that are there for every init.

    Raises:
        MedclrError: wrong settings, a test patient that an encoder was pretrained on, or an ``out`` that holds another
            comparison.
    """
    plan = read_config(Path(config), **({} if jobs is None else {"jobs": jobs}))
    return run_comparison(plan, Path(out), report_only=report_only)


def run_comparison(
    plan: CompareConfig, out: Path, *, report_only: bool = False, run: Run | None = None
) -> CompareSummary:
    """``compare`` with settings that were read; ``run`` computes a cell."""
    stamps = check(plan)
    with alone(out):
        open_comparison(out, plan)
        if not report_only:
            compute(plan, out, run or run_cell)
        results = read_results(plan, out, stamps)
        write_tables(results, out)
        write_report(results, out)
    return CompareSummary(out, results)


# Before anything is computed ------------------------------------------------------------------------------------------


def check(plan: CompareConfig) -> dict[str, int]:
    """Raise for what would stop a cell hours later.

    Returns:
        Init -> test patients that it was pretrained on; all 0 unless the comparison is transductive.

    Raises:
        MedclrError: wrong settings, a budget that cannot be met, stores of different scans, or an encoder that was
            pretrained on test patients.
    """
    _opened.cache_clear()  # in a notebook, another store may lie at the same path by now
    stamps: dict[str, int] = {}
    first: tuple[str, Any] | None = None
    for name, init in plan.inits.items():
        try:
            wish = wish_of(plan, name)
            store, task = opened(plan, name)
            if "probe" in plan.protocols and getattr(wish.own, "multi_label", False):
                raise MedclrError("a probe cannot tell several labels a scan; take protocol finetune alone")
            for budget in plan.budgets:
                for seed in range(plan.seeds):
                    cases = choose_cases(
                        store,
                        task.strata,
                        str(budget),
                        seed=seed,
                        validation=wish.settings.validation,
                        test_share=plan.test_share,
                    )
                    task.check(scans_of(task, store, cases.train), f"the cases of budget {budget}, seed {seed},")
            start, size = plan.inits[plan.first_of(name)].encoder, wish.settings.size_px
            encoder, _ = start_encoder(start, wish.settings.network, size, store.info.size_px, seed=0)
            learnt = set(encoder.seen_patients)
            if init.teacher:
                learnt |= _student_learns_from(plan, name, cases.test, encoder)
        except MedclrError as error:
            raise MedclrError(f"inits.{name}: {error}") from None
        scans = [store.scans[int(i)] for i in task.scans]
        judged = sorted((scan.scan_id, scan.patient_id, scan.label) for scan in scans), cases.test, task.classes
        if first is None:
            first = name, judged
        elif first[1] != judged:
            raise MedclrError(
                f"inits.{name}: its store has other labelled scans or test patients than that of {first[0]}, so they "
                "cannot be paired; prepare both stores from the same manifest"
            )
        seen = learnt & set(cases.test)
        if not plan.transductive:
            step = "distillation" if init.teacher else "pretraining"
            what = f"the {step} of {name} and the test set (transductive: true goes on, and stamps every figure)"
            refuse_overlap(seen, cases.test, what)
        stamps[name] = len(seen)
    return stamps


def _student_learns_from(plan: CompareConfig, init: str, test: Collection[str], teacher: Encoder) -> set[str]:
    """The patients of the slices, and of the weights, that a student adds to those of its teacher."""
    wish = read_distill(student_words(plan, init))
    wanted = [modality_of(modality).name if modality else "all" for modality in (wish.modality, plan.modality)]
    if wanted[0] != wanted[1]:
        raise MedclrError(f"modality: {wanted[0]}, but its teacher is scored on {wanted[1]}; leave it out")
    if wish.score not in (None, plan.store_of(init)):
        raise MedclrError(f"score: {wish.score}, but its teacher is scored on {plan.store_of(init)}; leave it out")
    store = Store(wish.store)
    seen = {store.scans[int(i)].patient_id for i in learnt_from(wish, store, test)}
    encoder, _ = start_student(wish, teacher, store)
    return seen | encoder.seen_patients


def wish_of(plan: CompareConfig, init: str, **changes: Any) -> Wish:
    """What ``medclr finetune`` would be asked for; MedclrError if some setting is wrong."""
    encoder = plan.inits[plan.first_of(init)].encoder
    asked = {"store": plan.store_of(init), "out": "-", "task": plan.task, "encoder": encoder}
    return read_wish(
        [f"--{key}={_word(value)}" for key, value in {**asked, **plan.settings_of(init), **changes}.items()]
    )


def student_words(plan: CompareConfig, init: str, **changes: Any) -> list[str]:
    """What ``medclr distill`` is asked for: the settings of all that it knows, and its own on top."""
    labels = plan.store_of(init)
    asked: dict[str, Any] = {"store": labels, "out": "-", "teacher": "-", "student": "same", "modality": plan.modality}
    asked |= {key: value for key, value in dotted(plan.settings).items() if key.split(".")[0] in SHARED}
    asked |= dotted(plan.inits[init].settings)
    if Path(asked["store"]) != labels:
        asked = {"score": labels} | asked
    asked |= {"transductive": plan.transductive} | changes
    return [f"--{key}={_word(value)}" for key, value in asked.items()]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)


def opened(plan: CompareConfig, init: str) -> tuple[Store, Task]:
    """The store of an init, and what is labelled in it; kept open for the cells to come."""
    settings = json.dumps(
        {key: value for key, value in plan.settings_of(init).items() if key.startswith(f"{plan.task}.")}
    )
    return _opened(plan.store_of(init), plan.task, plan.modality, settings)


@functools.cache
def _opened(path: Path, name: str, modality: str | None, settings: str) -> tuple[Store, Task]:
    words = [f"--{key}={_word(value)}" for key, value in json.loads(settings).items()]
    own = read_wish([f"--store={path}", "--out=-", f"--task={name}", *words]).own
    store = Store(path)
    return store, get_task(name).Task(own, store, modality)


# The grid -------------------------------------------------------------------------------------------------------------


def compute(plan: CompareConfig, out: Path, run: Run) -> None:
    """Compute all cells that are not there; KeyboardInterrupt leaves those that are.

    Raises:
        MedclrError: a cell cannot be computed; names it.
    """
    for protocol in plan.protocols:
        cells = plan.cells(protocol)
        todo = [cell for cell in cells if not cell.is_done(out)]
        if not todo:
            continue
        untaught = {
            teacher for cell in todo if (teacher := cell.teacher(plan)) and not (teacher.folder(out) / "model").is_dir()
        }
        todo = [cell for cell in cells if cell in untaught or not cell.is_done(out)]
        if protocol == "probe" and run is run_cell:
            for init in plan.inits:
                if any(cell.init == init for cell in todo):
                    write_features(plan, init, out)
        jobs = min(plan.jobs, len(todo))
        done = len(cells) - len(todo)
        started = time.perf_counter()
        try:
            computed = _computed(plan, out, run, todo, jobs)
            with (
                progress(f"compare: {protocol}", len(cells), "cells", done=done) as advance,
                contextlib.closing(computed),
            ):
                for cell, seconds in computed:
                    done += 1
                    advance(1, f"{duration(seconds)} for {cell}")
        except KeyboardInterrupt as stop:
            took = f"after {duration(time.perf_counter() - started)}"
            words = f"stopped {took}, {done} of {len(cells)} {protocol} cells are in {out}; the same command goes on"
            raise type(stop)(words) from None


def _computed(
    plan: CompareConfig, out: Path, run: Run, cells: Sequence[Cell], jobs: int
) -> Generator[tuple[Cell, float]]:
    """Compute cells; side by side, students only when all teachers are there."""
    if jobs == 1:
        yield from _alone(plan, out, run, cells)
        return
    for is_taught in (False, True):
        wave = [cell for cell in cells if (cell.teacher(plan) is not None) == is_taught]
        if wave:
            yield from _shared(plan, out, run, wave, min(jobs, len(wave)))


def _alone(plan: CompareConfig, out: Path, run: Run, cells: Sequence[Cell]) -> Generator[tuple[Cell, float]]:
    for cell in cells:
        yield cell, _compute(plan, out, run, cell)


def _compute(plan: CompareConfig, out: Path, run: Run, cell: Cell) -> float:
    """Compute a cell, and note that it is done; what it prints goes into a file of its own."""
    log = out / "logs" / f"{'-'.join(cell.folder(out).relative_to(out / 'cells').parts)}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            log.open("a", encoding="utf-8") as text,
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            seconds = run(plan, cell, out)
    except MedclrError as error:
        raise MedclrError(f"{cell}: {error}") from None
    files.write_json(cell.folder(out) / "cell.json", {"seconds": round(seconds, 3)})
    return seconds


def _shared(
    plan: CompareConfig, out: Path, run: Run, cells: Sequence[Cell], jobs: int
) -> Generator[tuple[Cell, float]]:
    """Compute cells in ``jobs`` processes, started anew (spawn) because threads and CUDA do not survive a fork."""
    waiting = list(reversed(cells))
    workers: dict[Connection, tuple[Any, Cell | None]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        with _threads(max(1, (os.cpu_count() or 1) // jobs)):
            for _ in range(jobs):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, plan, out, run), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process, None
                _hand_out(ours, workers, waiting)
        while busy := [pipe for pipe, (_, cell) in workers.items() if cell is not None]:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                cell = workers[pipe][1]
                assert cell is not None
                try:
                    answer = pipe.recv()
                except EOFError:
                    raise MedclrError(
                        f"{cell}: its process ended; if nothing stands above, memory ran out: take fewer --jobs"
                    ) from None
                if isinstance(answer, BaseException):
                    raise answer
                _hand_out(pipe, workers, waiting)
                yield cell, answer
    finally:
        for pipe in workers:
            pipe.close()  # who waits for a cell leaves
        for process, cell in workers.values():
            if cell is not None:
                process.terminate()  # who computes one saves what can be saved
        for process, _ in workers.values():
            process.join()


def _hand_out(pipe: Connection, workers: dict[Connection, tuple[Any, Cell | None]], waiting: list[Cell]) -> None:
    cell = waiting.pop() if waiting else None
    workers[pipe] = workers[pipe][0], cell
    if cell is not None:
        pipe.send(cell)


def _serve(pipe: Connection, plan: CompareConfig, out: Path, run: Run) -> None:
    """The life of a process: one cell after the other, until nobody asks for more, or a stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process passes it on
    signal.signal(signal.SIGTERM, _stopped)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            cell = pipe.recv()
            try:
                answer: Any = _compute(plan, out, run, cell)
            except (MedclrError, OSError) as error:
                answer = error
            pipe.send(answer)


def _stopped(signum: int, frame: Any) -> None:
    raise Terminated


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Processes that are started now use ``n`` threads each, unless the user has said how many."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    unset = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, str(n)))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


# A cell ---------------------------------------------------------------------------------------------------------------


def run_cell(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """Compute a cell by its protocol; seconds."""
    runners: Mapping[str, Run] = {"probe": run_probe, "finetune": run_finetune}
    if cell.teacher(plan) is not None:
        return run_student(plan, cell, out)
    return runners[cell.protocol](plan, cell, out)


def run_finetune(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """``medclr finetune`` in the cell's folder."""
    folder = cell.folder(out)
    summary = finetune(
        plan.store_of(cell.init),
        folder,
        task=plan.task,
        encoder=plan.inits[cell.init].encoder,
        cases=cell.budget,
        settings=plan.settings_of(cell.init) | {"seed": cell.seed},
        modality=plan.modality,
        test_share=plan.test_share,
        transductive=plan.transductive,
    )
    _tidy(plan, cell, folder)
    return summary.seconds


def run_student(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """``medclr distill`` in the cell's folder, taught by the model of the teacher's cell."""
    folder, teacher = cell.folder(out), cell.teacher(plan)
    assert teacher is not None
    words = student_words(plan, cell.init, out=folder, teacher=teacher.folder(out), seed=cell.seed)
    summary = train_student(read_distill(words))
    if summary.unscored:
        raise MedclrError(f"{folder}: {summary.unscored}")
    _tidy(plan, cell, folder)
    return summary.seconds


def _tidy(plan: CompareConfig, cell: Cell, folder: Path) -> None:
    """Remove the weights that nobody wants any more."""
    if not plan.keep_models:
        for name in ("checkpoints", "rounds", *(() if cell.init in plan.teachers else ("model",))):
            shutil.rmtree(folder / name, ignore_errors=True)


def run_probe(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """Logistic regression on frozen features, as ``medclr probe`` does it."""
    started = time.perf_counter()
    store, task = opened(plan, cell.init)
    cases = choose_cases(
        store, task.strata, cell.budget, seed=cell.seed, validation=0.0, test_share=plan.test_share
    )  # the penalty is chosen by cross-validation, so nobody is held out
    scans = [store.scans[int(i)] for i in task.scans]
    x = np.load(features_path(plan, cell.init, cell.seed, out))  # [n,F]
    y = np.array([task.classes.index(scan.label) for scan in scans])  # [n]
    patient = np.array([scan.patient_id for scan in scans])  # [n]
    split = split_patients(store, task.strata, plan.test_share)
    z = standardise(x, np.array([split[who] == "train" for who in patient.tolist()]))  # [n,F]
    train, test = (np.flatnonzero(np.isin(patient, who)) for who in (cases.train, cases.test))
    k = len(task.classes)
    task.check(task.scans[train], f"the {len(cases.train)} training cases")
    task.check(task.scans[test], f"the {len(cases.test)} test patients")
    probability = logistic(z[train], y[train], patient[train], z[test], k, cell.seed)  # [t,K]
    truth = np.eye(k, dtype=np.int64)[y[test]]
    ids = [scans[i].scan_id for i in test], [scans[i].patient_id for i in test]
    folder = cell.folder(out)
    write_cases(folder / "cases.csv", cases, task.strata)
    write_outcome(folder / "predictions.csv", Classified(*ids, task.classes, truth, probability))
    return time.perf_counter() - started


def features_path(plan: CompareConfig, init: str, seed: int, out: Path) -> Path:
    """Where the probe's features of an init are kept; random weights are drawn anew for each seed."""
    drawn = f"-{seed}" if plan.inits[init].encoder == "random" else ""
    return out / "features" / f"{Cell('probe', init, '', seed).folder(out).parent.name}{drawn}.npy"


def write_features(plan: CompareConfig, init: str, out: Path) -> None:
    """Features of all labelled scans [n,F], as the frozen encoder sees them, unless they are there."""
    for seed in range(plan.seeds):
        path = features_path(plan, init, seed, out)
        if path.exists():
            continue
        store, task = opened(plan, init)
        settings = wish_of(plan, init).settings
        encoder, report = start_encoder(
            plan.inits[init].encoder, settings.network, settings.size_px, store.info.size_px, seed
        )
        if report is not None:
            print(report, file=sys.stderr)
        encoder.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        scan = store.column("scan")  # [N]
        slices = np.flatnonzero(np.isin(scan, task.scans))
        features, rows = scan_means(extract(encoder, store, slices), scan[slices])  # [n,F], [n]
        assert np.array_equal(rows, task.scans)
        with files.writing(path) as temporary, temporary.open("wb") as file:
            np.save(file, features)
