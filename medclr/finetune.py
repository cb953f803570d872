"""THE supervised loop: a few labelled cases in, a model and an honest score out.

A run is a function of its settings and its store: the cases, the sample order, the views and the new weights are keyed
by the seed, so a run that was killed and resumed ends with the same weights.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from medclr import checkpoint, figures, tasks
from medclr.augment import chain
from medclr.config import (
    FinetuneConfig,
    chosen_first,
    dataclass_options,
    option_parser,
    parse,
    to_plain,
)
from medclr.data.cases import Cases, choose_cases, refuse_seen, write_cases
from medclr.data.store import Store
from medclr.device import device_of, put_on
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.files import LOCK_NAME, alone, write_text
from medclr.memory import keep_freed_memory
from medclr.models.encoder import Encoder
from medclr.models.start import start_encoder
from medclr.models.weights import MatchReport
from medclr.optim.lars import param_groups
from medclr.optim.schedule import warmup_cosine
from medclr.outcomes import write_outcome
from medclr.progress import duration, progress
from medclr.runs import open_folder
from medclr.statistics import Estimate, interval
from medclr.stop import StopRequest
from medclr.tasks import Task, TaskModel
from medclr.track import Tracker, read_metrics
from medclr.trained import export_model

Ints = np.ndarray[Any, np.dtype[np.int64]]

RUN_FILES = {
    "config.yaml", "cases.csv", "match.txt", "metrics.jsonl", "checkpoints", "model", "predictions.csv", "scores.csv",
    "figures", LOCK_NAME,
}  # fmt: skip
"""All that a run writes, and so all that --overwrite may remove."""

HARMLESS: frozenset[str] = frozenset({"checkpoint_minutes", "device"})
"""Settings that may differ when a run is resumed."""

CURVES = {"loss": "training loss", "score": "validation score", "lr": "learning rate"}


@dataclass(frozen=True)
class FinetuneSummary:
    """What a finished run says of itself."""

    out: Path
    scores: Mapping[str, Estimate]
    cases: Cases
    steps: int
    seconds: float
    stamp: str
    """'' or that the encoder was pretrained on some of the test patients."""
    nowhere: tuple[str, ...] = ()
    """Classes that were found in no test scan."""

    def __str__(self) -> str:
        n = self.cases
        held = f", {len(n.validation)} to validate" if n.validation else ""
        stamp = f" ({self.stamp})" if self.stamp else ""
        title = f"{len(n.train)} training cases{held}, {len(n.test)} test patients{stamp}"
        lines = [f"{title} (95 % interval over patients)"]
        lines += [f"  {name:<24}{s.mean:8.3f}  [{s.low:.3f}, {s.high:.3f}]" for name, s in self.scores.items()]
        if self.nowhere:
            lines.append(f"found nowhere: {', '.join(self.nowhere)}; give it more steps, or a higher lr")
        took = f"{self.out}: {self.steps} steps in {duration(self.seconds)}"
        return "\n".join([*lines, f"{took}; the model is in {self.out / 'model'}"])


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the settings."""

    store: Path
    """Slice store with labels or masks."""

    out: Path
    """Run folder; the same command again resumes it."""

    task: str = "classify"
    """What to learn: classify or segment."""

    encoder: str = "random"
    """A run folder of `medclr pretrain`, imagenet, random, or a file of torchvision's ResNet weights."""

    cases: str = "100%"
    """Labelled training patients: 5, 10%, or a file of ids; a run's cases.csv repeats its split."""

    modality: str | None = None
    """Only the scans of this modality."""

    test_share: float = 0.3
    """Share of patients held out by a hash of the id, where the manifest names no train and test split."""

    transductive: bool = False
    """Go on although the encoder was pretrained on test patients, and stamp it on every figure."""

    overwrite: bool = False
    """Replace the run that is in --out."""

    manifests: Path | None = Path("data_manifests")
    """Folder that gets a copy of cases.csv, named after the run, if there is such a folder; null: no copy."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise MedclrError(f"test_share: {self.test_share} is no share of the patients above 0 and below 1")


@dataclass(frozen=True)
class Wish(Asked):
    """All that was asked for."""

    settings: FinetuneConfig = field(default_factory=FinetuneConfig)
    own: Any = None
    """The task's Config."""

    ASKED: ClassVar = ("task", "encoder", "cases", "modality", "test_share", "transductive")

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain types: the content of config.yaml."""
        asked = {name: getattr(self, name) for name in self.ASKED}
        return {**asked, **to_plain(self.settings), self.task: to_plain(self.own)}


def finetune(
    store: Path | str,
    out: Path | str,
    *,
    task: str,
    encoder: str = "random",
    cases: str = "100%",
    config: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    modality: str | None = None,
    test_share: float = 0.3,
    transductive: bool = False,
    overwrite: bool = False,
) -> FinetuneSummary:
    """Train a model on a few labelled cases, and score it on the test patients.

    Args:
        store: Slice store with labels or masks.
        out: Run folder; if it holds an unfinished run with the same settings, that run goes on.
        task: A file of ``medclr/tasks``: classify or segment.
        encoder: A run folder of ``medclr pretrain``, imagenet, random, or a file of torchvision's ResNet weights.
        cases: Labelled training patients: 5, 10%, or a file of patient ids; a run's cases.csv repeats its split.
        config: YAML file with settings.
        settings: Settings by their dotted name: ``{"steps": 100, "classify.pool": "attention"}``.
        modality: Only the scans of this modality.
        test_share: Share of patients held out by a hash of their id, where the manifest names no train and test split.
        transductive: Go on although the encoder was pretrained on test patients; every figure is stamped with it.
        overwrite: Replace a run that is already in ``out``.

    Raises:
        MedclrError: wrong settings, too few cases, a test patient that was seen in pretraining, or weights that match
            nothing.
    """
    asked: dict[str, Any] = {"store": store, "out": out, "task": task, "encoder": encoder, "cases": cases}
    asked |= {"modality": modality, "test_share": test_share, "transductive": transductive, "overwrite": overwrite}
    asked |= {"manifests": None}  # only the command line leaves something where it was called
    words = ["--config", str(config)] if config else []
    words += [f"--{key}={setting_word(value)}" for key, value in {**asked, **(settings or {})}.items()]
    return command(words)


def command(arguments: Sequence[str]) -> FinetuneSummary:
    """``medclr finetune``: the options are the fields of FinetuneConfig and of the chosen task's Config."""
    return train(read_wish(arguments))


def read_wish(arguments: Sequence[str]) -> Wish:
    """Parse the options of ``medclr finetune``.

    Raises:
        MedclrError: an unknown setting, a wrong type, or a value that cannot work.
    """
    name = chosen_first(arguments, "task") or "classify"
    module = tasks.get(name)

    def add(parser: Any) -> None:
        for group, name_of in ((Asked, None), (FinetuneConfig, None), (module.Config, name)):
            dataclass_options(parser, group, name_of)

    parser = option_parser("medclr finetune", "Train a model on a few labelled cases.", add, config=True)
    options = parse(parser, arguments)
    settings = FinetuneConfig(**{f.name: getattr(options, f.name) for f in fields(FinetuneConfig)})
    asked = {f.name: getattr(options, f.name) for f in fields(Asked)}
    return Wish(**asked, settings=settings, own=getattr(options, name))


@dataclass
class State:
    """All that a run needs to go on, besides its settings: the content of a checkpoint."""

    model: TaskModel
    optimizer: torch.optim.Optimizer
    origin: dict[str, str]
    """What else the run follows from, such as its store, and the SHA-256 of each: settings only have their paths."""
    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    best: float = -math.inf
    """Best validation score."""
    best_step: int = 0
    looks: int = 0
    """Looks at the validation cases since then."""
    kept: dict[str, Any] = field(default_factory=dict)
    """The weights of that step; empty without validation cases."""

    FACTS: ClassVar = ("origin", "step", "seconds", "best", "best_step", "looks", "kept")

    def content(self) -> dict[str, Any]:
        """Tensors and plain types."""
        facts = {name: getattr(self, name) for name in self.FACTS}
        return facts | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resume(self, out: Path) -> None:
        """Go on from the newest whole checkpoint, if there is one; MedclrError if it has another origin."""
        newest = checkpoint.latest(out)
        if newest is None:
            return
        saved = checkpoint.load(newest)
        was = saved.get("origin", {})
        if changed := [name for name, digest in self.origin.items() if was.get(name) != digest]:
            raise MedclrError(
                f"{out}: was begun with another content of its {changed[0]}; choose another --out, or --overwrite true"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in self.FACTS:
            setattr(self, name, saved[name])

    def look(self, score: float) -> None:
        """Note the validation score of this step, and keep the weights if none was better."""
        self.looks += 1
        if score > self.best:
            self.best, self.best_step, self.looks = score, self.step, 0
            self.kept = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}


def train(wish: Wish) -> FinetuneSummary:
    """Do what was asked for."""
    settings, store = wish.settings, Store(wish.store)
    device = device_of(settings.device)
    chain.check(settings.views, store.info.modalities)
    keep_freed_memory()
    module = tasks.get(wish.task)
    task: Task = module.Task(wish.own, store, wish.modality)
    cases = choose_cases(
        store, task.strata, wish.cases, seed=settings.seed, validation=settings.validation, test_share=wish.test_share
    )
    scans = {role: scans_of(task, store, getattr(cases, role)) for role in ("train", "validation", "test")}
    task.check(scans["train"], f"the {len(cases.train)} training cases")
    task.check(scans["test"], f"the {len(cases.test)} test patients")
    encoder, report = start_encoder(wish.encoder, settings.network, settings.size_px, store.info.size_px, settings.seed)
    stamp = refuse_seen(
        encoder.seen_patients,
        cases,
        "the encoder was pretrained",
        "choose an encoder that was pretrained without them (data.split)",
        transductive=wish.transductive,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: TaskModel = module.Model(task.config, encoder, task.classes)
    from_run = wish.encoder not in ("random", "imagenet") and Path(wish.encoder).is_dir()
    extra = model.start_from(Path(wish.encoder)) if from_run else []
    origin = {"store": store.info.manifest_sha256, "cases": digest(cases.csv(task.strata))}
    if report is not None:
        origin["encoder"] = digest_of(encoder)
    put_on(model, device)
    with alone(wish.out):
        open_folder(wish.out, wish.resolved, RUN_FILES, HARMLESS, overwrite=wish.overwrite)
        write_cases(wish.out / "cases.csv", cases, task.strata)
        if wish.manifests is not None and wish.manifests.is_dir():
            copy_cases(wish.out, wish.manifests)
        write_text(wish.out / "match.txt", match_text(report, model, extra))
        if report:
            print(report, file=sys.stderr)
        state = State(model, build_tuner(model, settings, is_new=report is None), origin)
        state.resume(wish.out)
        fit(wish.out, settings, task, scans["train"], scans["validation"], state, is_new=report is None)
        return _finish(wish, task, cases, scans["test"], state, stamp)


def fit(
    out: Path, settings: FinetuneConfig, task: Task, train: Ints, validation: Ints, state: State, *, is_new: bool
) -> None:
    """Train until the schedule ends, or until the validation scans no longer get better; then take the best weights.

    Args:
        out: the run folder, for checkpoints and metrics.
        settings: of the run.
        task: what is learnt.
        train: scans to learn from.
        validation: scans to choose the step by, or none.
        state: where to begin; holds the trained model in the end.
        is_new: whether the encoder starts from random weights.
    """
    model = state.model
    total, validates = settings.steps, len(validation) > 0
    items = task.items(train)
    views = replace(settings.views, size_px=model.encoder.size_px)
    frozen = 0 if is_new else round(settings.frozen_steps * total)
    peaks = [group["peak"] for group in state.optimizer.param_groups]
    device = next(model.parameters()).device
    before, started = state.seconds, time.perf_counter()
    saved_at = started
    note = ""

    def save() -> None:
        state.seconds = before + time.perf_counter() - started
        checkpoint.save(out, state.step, state.content(), keep=1)

    with (
        Tracker(out, step=state.step, backend=None) as tracker,
        progress(out.name, total, "steps", done=state.step) as advance,
        StopRequest(Group()) as stop,
    ):
        while state.step < total and not (validates and state.looks >= settings.patience):
            step = state.step
            set_free(
                model, 0 if step < frozen else settings.free_stages, follows=is_new or settings.batch_norm == "train"
            )
            factor = warmup_cosine(step, total, round(settings.warmup * total))
            for group, peak in zip(state.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with (
                keyed_noise(settings.seed, step, device),
                torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"),
            ):
                loss = task.loss(model, _batch(items, settings, step), views, seed=settings.seed, step=step)
            if not loss.isfinite():
                raise MedclrError(f"{out}: the loss of step {step} is not finite; lower lr, or use float32")
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
            state.step += 1
            row = {"loss": float(loss.detach()), "lr": settings.lr * factor}
            if validates and (state.step % settings.every == 0 or state.step == total):
                model.eval()
                outcome = task.judge(model, validation)
                row["score"] = outcome.score(outcome.metrics()[0])
                if math.isfinite(row["score"]):  # not, say, if no validation case has some class
                    state.look(row["score"])
                note = f" · {outcome.metrics()[0]} {row['score']:.3f}"
            tracker.write(state.step, {key: value for key, value in row.items() if math.isfinite(value)})
            advance(1, f"loss {row['loss']:.3f}{note}")
            if stop.asked() and state.step < total:
                save()
                raise stop.leaving(state.step, total, out)
            if time.perf_counter() - saved_at > 60 * settings.checkpoint_minutes:
                save()
                saved_at = time.perf_counter()
    save()
    if state.kept:
        model.load_state_dict(state.kept)
    model.eval()


def _finish(wish: Wish, task: Task, cases: Cases, test: Ints, state: State, stamp: str) -> FinetuneSummary:
    """Judge the test patients once, and write what is kept."""
    model, out, store = state.model, wish.out, task.store
    outcome = task.judge(model, test)
    write_outcome(out / "predictions.csv", outcome)
    scores = {metric: interval([outcome], metric) for metric in outcome.metrics()}
    write_scores(out / "scores.csv", scores, stamp)
    trained = set(cases.train) | set(cases.validation)
    learnt = [scan for i in task.scans if (scan := store.scans[int(i)]).patient_id in trained]
    facts = {
        "settings": wish.resolved,
        "manifest_sha256": store.info.manifest_sha256,
        "modalities": sorted({scan.modality for scan in learnt}),
        "planes": sorted({scan.plane for scan in learnt if scan.plane}),
        "patients": sorted(trained | model.encoder.seen_patients),
        "transductive": bool(stamp),
        "stamp": stamp,
    }
    export_model(out / "model", wish.task, model.config, model, facts)
    rows = read_metrics(out)
    figures.curves(out / "figures" / "curves.png", rows, CURVES, stamp)
    task.draw(model, outcome, out / "figures", stamp)
    return FinetuneSummary(out, scores, cases, state.step, state.seconds, stamp, outcome.nowhere())


def copy_cases(out: Path, manifests: Path) -> None:
    """Leave cases.csv where the manifests are; one of another run is left as it is, which is said."""
    text, copy = (out / "cases.csv").read_text(encoding="utf-8"), manifests / f"{out.resolve().name}.cases.csv"
    if not copy.exists():
        write_text(copy, text)
    elif copy.read_bytes() != text.encode():
        print(f"{copy} has other cases and is left as it is; those of this run are in {out}", file=sys.stderr)


def write_scores(path: Path, scores: Mapping[str, Estimate], stamp: str) -> None:
    """Write scores.csv: metric, value, its 95 % interval over patients, their number, and the stamp of the run."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "value", "low", "high", "patients", "note"])
    for metric, score in scores.items():
        writer.writerow([metric, *(f"{v:.6f}" for v in (score.mean, score.low, score.high)), score.patients, stamp])
    write_text(path, text.getvalue())


def setting_word(value: Any) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool | list | tuple) else str(value)


@contextlib.contextmanager
def keyed_noise(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """What torch draws inside, such as dropout, follows from (seed, step), and leaves no trace outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng([seed, 6, step]).integers(2**63)))
        yield


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(encoder: Encoder) -> str:
    """SHA-256 of an encoder's tensors, and of whom they have seen."""
    found = hashlib.sha256("\0".join(sorted(encoder.seen_patients)).encode())
    for name, tensor in encoder.state_dict().items():
        found.update(name.encode())
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def _batch(items: Sequence[Any], settings: FinetuneConfig, step: int) -> list[Any]:
    """The items of a step: one shuffled pass after the other, each keyed by (seed, its number)."""
    n = len(items)
    size = min(settings.batch, max(n, 2))
    places = range(step * size, (step + 1) * size)
    orders = {p // n: np.random.default_rng([settings.seed, 4, p // n]).permutation(n) for p in (places[0], places[-1])}
    orders |= {e: np.random.default_rng([settings.seed, 4, e]).permutation(n) for e in range(min(orders), max(orders))}
    return [items[int(orders[p // n][p % n])] for p in places]


def set_free(model: TaskModel, stages: int, *, follows: bool) -> None:
    """Train mode and gradient for all that is new and for the last ``stages`` of the rest, which stays as it is.

    Args:
        model: whose ``stages`` are meant.
        stages: 0 freezes all of it.
        follows: whether the batch norm of free stages takes its statistics from the batch.
    """
    model.train()
    depth = model.stages()
    for i, stage in enumerate(depth):
        is_free = i >= len(depth) - stages
        for part in stage:
            part.requires_grad_(is_free)
            part.train(is_free and follows)


def build_tuner(model: TaskModel, settings: FinetuneConfig, *, is_new: bool) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each stage of the encoder; an encoder that is new learns like the rest."""
    depth = model.stages()
    own = {id(p) for stage in depth for part in stage for p in part.parameters()}
    rates: list[tuple[nn.Module, float]] = []
    for i, stage in enumerate(depth):
        rate = settings.lr * (1.0 if is_new else settings.encoder_lr * settings.layer_decay ** (len(depth) - 1 - i))
        rates.append((nn.ModuleList(stage), rate))
    groups: list[dict[str, Any]] = []
    for part, rate in rates:
        groups += [group | {"peak": rate, "lr": rate} for group in param_groups(part, settings.weight_decay)]
    for group in param_groups(model, settings.weight_decay):
        new = [p for p in group["params"] if id(p) not in own]
        groups.append({**group, "params": new, "peak": settings.lr, "lr": settings.lr})
    plain = [
        {k: v for k, v in g.items() if k in ("params", "weight_decay", "lr", "peak")} for g in groups if g["params"]
    ]
    return torch.optim.AdamW(plain, lr=settings.lr)


def match_text(report: MatchReport | None, model: TaskModel, extra: Sequence[str]) -> str:
    """What became of every tensor: loaded, reshaped, left in the file, or new."""
    taken = ((), ()) if report is None else (report.matched, report.reshaped)
    loaded, reshaped = ([f"encoder.{name}" for name in names] for names in taken)
    known = {*loaded, *reshaped, *extra}
    new = [name for name in model.state_dict() if name not in known]
    lines = [f"weights from {report.source}" if report else "no weights: everything is new"]
    kinds: dict[str, Sequence[str]] = {"new": new}
    if report:
        kinds = {"loaded": [*loaded, *extra], "reshaped": reshaped, "left": report.unexpected} | kinds
    lines += [f"{kind} {len(found)}" for kind, found in kinds.items()]
    lines += [f"{kind}\t{name}" for kind, found in kinds.items() for name in found]
    return "\n".join(lines) + "\n"


def scans_of(task: Task, store: Store, patients: Sequence[str]) -> Ints:
    """The scans of some patients that carry what the task learns from."""
    wanted = set(patients)
    return np.array([i for i in task.scans if store.scans[int(i)].patient_id in wanted], dtype=np.int64)
