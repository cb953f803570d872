"""Distillation: a trained teacher labels unlabelled slices softly, and a student of another network learns from it.

The third step of SimCLRv2 (Chen et al., arXiv 2006.10029, section 2.3): the student minimises the cross-entropy against
the teacher's probabilities at a temperature (eq. 3), with a labelled term if asked for (eq. 4). Both see the same view
(Beyer et al. 2022, arXiv 2106.05237).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr import figures, tasks
from medclr.augment.labelled import training_views
from medclr.config import (
    EncoderConfig,
    FinetuneConfig,
    ViewsConfig,
    dataclass_options,
    option_parser,
    parse,
    to_plain,
)
from medclr.data.cases import Cases, choose_cases
from medclr.data.loader import load_batch
from medclr.data.splits import refuse_overlap
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.files import alone, write_text
from medclr.finetune import (
    CURVES,
    HARMLESS,
    RUN_FILES,
    Ints,
    State,
    build_tuner,
    device_of,
    fit,
    match_text,
    scans_of,
    setting_word,
    write_scores,
)
from medclr.memory import keep_freed_memory
from medclr.models.start import start_encoder
from medclr.outcomes import Outcome, write_outcome
from medclr.progress import duration
from medclr.runs import open_folder
from medclr.statistics import Estimate, interval, resample
from medclr.tasks import Task, TaskModel
from medclr.track import read_metrics
from medclr.trained import Trained, export_model, load_model


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the settings of training."""

    store: Path
    """Slice store; its labels are not looked at, except for the labelled term and the score."""

    out: Path
    """Run folder; the same command again resumes it."""

    teacher: Path
    """Run folder of `medclr finetune`."""

    student: str = "resnet18"
    """Network of the student: a name as in encoder.name; or same: the teacher's, which then starts from its weights."""

    init: str = "random"
    """Weights that the student starts from: random, imagenet, a run folder of pretraining, or a file."""

    split: str = "train"
    """Slices of this split are learnt from; '': all."""

    temperature: float = 1.0
    """Divides the logits of both: above 1 the teacher's doubts weigh more."""

    labelled: float = 0.0
    """Weight of the loss on the teacher's own labelled cases, beside 1 less that for the teacher's opinion."""

    transductive: bool = False
    """Go on although test patients are among the slices, and stamp it on every figure."""

    overwrite: bool = False
    """Replace the run that is in --out."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MedclrError(f"temperature: {self.temperature} is not above 0; 1 to 4 is usual")
        if not 0 <= self.labelled <= 1:
            raise MedclrError(f"labelled: {self.labelled} is not a weight from 0 to 1")


@dataclass(frozen=True)
class Wish(Asked):
    """All that was asked for."""

    settings: FinetuneConfig = field(default_factory=FinetuneConfig)

    UNTOLD: ClassVar = ("store", "out", "overwrite", "settings")

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain types: the content of config.yaml."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.UNTOLD}
        return {**asked, "teacher": str(self.teacher), **to_plain(self.settings)}


@dataclass(frozen=True)
class DistillSummary:
    """What a finished run says of itself."""

    out: Path
    student: Mapping[str, Estimate]
    """Scores on the teacher's test patients; empty if the store has none of them."""
    teacher: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    """Student less teacher on the same resampled patients."""
    parameters: tuple[int, int]
    """Of the student and of the teacher."""
    steps: int
    seconds: float
    stamp: str

    def __str__(self) -> str:
        size = f"student of {self.parameters[0]:,} parameters, teacher of {self.parameters[1]:,}{self.stamp}"
        rows = [f"  {'':<24}{'student':>9}{'teacher':>9}  difference (95 % interval over patients)"] * bool(
            self.student
        )
        for name, own in self.student.items():
            d, theirs = self.difference[name], self.teacher[name]
            rows.append(f"  {name:<24}{own.mean:9.3f}{theirs.mean:9.3f}  {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        took = f"{self.out}: {self.steps} steps in {duration(self.seconds)}; the model is in {self.out / 'model'}"
        return "\n".join([size, *rows, took])


class Distillation(Task):
    """What the loop learns from: slices with the teacher's opinion, and perhaps the labelled cases too."""

    def __init__(self, task: Task, teacher: TaskModel, wish: Wish, cases: Cases) -> None:
        self.task, self.teacher, self.wish = task, teacher, wish
        self.store, self.config, self.classes = task.store, task.config, task.classes
        self.scans, self.strata = task.scans, task.strata
        self.is_multi_label = bool(getattr(task.config, "multi_label", False))
        self._labelled: Sequence[Any] = ()
        if wish.labelled:
            train = scans_of(task, task.store, cases.train)
            if not len(train):
                raise MedclrError(f"labelled: {task.store.path} holds none of the teacher's cases; set it to 0")
            self._labelled = task.items(train)

    def items(self, scans: Ints) -> Sequence[int]:
        """All slices of ``scans``."""
        chosen: list[int] = np.flatnonzero(np.isin(self.store.column("scan"), scans)).tolist()
        return chosen

    def loss(self, model: Any, items: Sequence[int], views: ViewsConfig, *, seed: int, step: int) -> Tensor:
        """Cross-entropy against the teacher on the same views, and the task's own loss on labelled cases."""
        device = next(model.parameters()).device
        batch = load_batch(self.store, items, model.encoder.config.slices).to(device)
        x, _ = training_views(batch, views, seed=seed, step=step)  # [n,C,s,s]
        with torch.no_grad():
            opinion = self.teacher.slice_logits(x).float() / self.wish.temperature  # [n,K,...]
        logits = model.slice_logits(x).float() / self.wish.temperature
        loss = soft_cross_entropy(logits, opinion, multi_label=self.is_multi_label)
        if not self._labelled:
            return loss
        n = min(len(items), len(self._labelled))
        chosen = np.random.default_rng([seed, step, 5]).permutation(len(self._labelled))[:n]
        own = self.task.loss(model, [self._labelled[i] for i in chosen], views, seed=seed + 1, step=step)
        return (1 - self.wish.labelled) * loss + self.wish.labelled * own

    def judge(self, model: Any, scans: Ints) -> Outcome:
        """As the task judges."""
        return self.task.judge(model, scans)


def soft_cross_entropy(logits: Tensor, opinion: Tensor, *, multi_label: bool = False) -> Tensor:
    """-sum_y P_teacher(y) log P_student(y), mean over all else (arXiv 2006.10029, eq. 3); binary with several labels.

    Args:
        logits: of the student, [n,K,...].
        opinion: logits of the teacher, of the same shape.
        multi_label: every class is a question of its own.
    """
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, opinion.sigmoid())
    return -(opinion.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def distill(
    store: Path | str,
    out: Path | str,
    *,
    teacher: Path | str,
    student: str = "resnet18",
    settings: Mapping[str, Any] | None = None,
) -> DistillSummary:
    """Train a student on a teacher's opinion of unlabelled slices.

    Args:
        store: Slice store.
        out: Run folder; if it holds an unfinished run with the same settings, that run goes on.
        teacher: Run folder of ``medclr finetune``.
        student: Network of the student, such as resnet18; or same.
        settings: Further settings by their name on the command line: ``{"temperature": 2, "steps": 500}``.

    Raises:
        MedclrError: wrong settings, no such teacher, or a test patient of the teacher among the slices.
    """
    asked = {"store": store, "out": out, "teacher": teacher, "student": student, **(settings or {})}
    return command([f"--{key}={setting_word(value)}" for key, value in asked.items()])


def command(arguments: Sequence[str]) -> DistillSummary:
    """``medclr distill``: the options are the fields of Asked and of FinetuneConfig."""

    def add(parser: Any) -> None:
        dataclass_options(parser, Asked)
        dataclass_options(parser, FinetuneConfig)

    parser = option_parser("medclr distill", "Train a student on a teacher's opinion.", add, config=True)
    options = parse(parser, arguments)
    asked = {f.name: getattr(options, f.name) for f in fields(Asked)}
    settings = FinetuneConfig(**{f.name: getattr(options, f.name) for f in fields(FinetuneConfig)})
    return _distill(Wish(**asked, settings=settings))


def _distill(wish: Wish) -> DistillSummary:
    settings, store, trained = wish.settings, Store(wish.store), load_model(wish.teacher)
    device = device_of(settings.device)
    keep_freed_memory()
    teacher = trained.model.to(device).requires_grad_(False)
    module = tasks.get(trained.task)
    task: Task = module.Task(module.Config(**trained.facts["config"]), store)
    if task.classes != teacher.classes:
        raise MedclrError(
            f"{store.path}: has the classes {task.classes}, the teacher {teacher.classes}; give its store"
        )
    cases = choose_cases(store, task.strata, str(_cases_file(trained)), seed=settings.seed)
    scans = np.unique(store.column("scan")[store.indices(wish.split)]).astype(np.int64)
    patients = {store.scans[int(i)].patient_id for i in scans}
    stamp = _guard(patients, cases, transductive=wish.transductive)
    model, match = _student(wish, module, task, teacher, store)
    goal = Distillation(task, teacher, wish, cases)
    with alone(wish.out):
        open_folder(wish.out, wish.resolved, RUN_FILES, HARMLESS, overwrite=wish.overwrite)
        write_text(wish.out / "match.txt", match)
        write_text(wish.out / "cases.csv", cases.csv(task.strata))
        is_new = wish.init == "random" and wish.student != "same"
        state = State(model, build_tuner(model, settings, is_new=is_new), store.info.manifest_sha256)
        state.resume(wish.out)
        model.to(device)
        fit(wish.out, settings, goal, scans, scans[:0], state, is_new=is_new)
        test = scans_of(task, store, cases.test)
        ours, theirs = task.judge(model, test), task.judge(teacher, test)
        write_outcome(wish.out / "predictions.csv", ours)
        metrics = ours.metrics()
        student = {metric: interval([ours], metric) for metric in metrics}
        write_scores(wish.out / "scores.csv", student)
        facts = {
            "settings": wish.resolved,
            "manifest_sha256": store.info.manifest_sha256,
            "modalities": sorted({store.scans[int(i)].modality for i in scans}),
            "patients": sorted(patients | trained.patients | model.encoder.seen_patients),
            "transductive": bool(stamp) or bool(trained.facts.get("transductive")),
        }
        export_model(wish.out / "model", trained.task, task.config, model, facts)
        figures.curves(wish.out / "figures" / "curves.png", read_metrics(wish.out), CURVES)
        task.draw(model, ours, wish.out / "figures")
    return DistillSummary(
        wish.out,
        student,
        {metric: interval([theirs], metric) for metric in metrics},
        {metric: (resample([ours], metric) - resample([theirs], metric)).estimate() for metric in metrics},
        (_size(model), _size(teacher)),
        state.step,
        state.seconds,
        stamp,
    )


def _student(wish: Wish, module: Any, task: Task, teacher: TaskModel, store: Store) -> tuple[TaskModel, str]:
    """The student as it starts, and what became of its tensors."""
    settings = wish.settings
    slices = teacher.encoder.config.slices
    is_same = wish.student == "same"
    network = teacher.encoder.config if is_same else EncoderConfig(wish.student, slices=slices)  # type: ignore[arg-type]
    size = settings.size_px or teacher.encoder.size_px
    encoder, report = start_encoder(wish.init, network, size, store.info.size_px, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: TaskModel = module.Model(task.config, encoder, task.classes)
    if is_same:
        model.load_state_dict(teacher.state_dict())
        return model, f"weights from {wish.teacher}\nloaded {len(model.state_dict())}\n"
    return model, match_text(report, model, ())


def _cases_file(trained: Trained) -> Path:
    path = trained.path.parent / "cases.csv"
    if not path.is_file():
        raise MedclrError(f"{path}: is missing, so nobody knows who tests the teacher; name the whole run folder")
    return path


def _guard(patients: set[str], cases: Cases, *, transductive: bool) -> str:
    """'' or the stamp; MedclrError if test patients are among the slices and that was not allowed."""
    if not transductive:
        what = "the slices to learn from and the teacher's test set (choose --split, or --transductive true stamps it)"
        refuse_overlap(patients, cases.test, what)
    both = patients & set(cases.test)
    return f" (transductive: {len(both)} test patients were learnt from)" if both else ""


def _size(model: TaskModel) -> int:
    return sum(p.numel() for p in model.parameters())
