"""Distillation: a trained teacher labels unlabelled slices softly, and a student of another network learns from it.

The third step of SimCLRv2 (Chen et al., arXiv 2006.10029, section 2.3): the student minimises the cross-entropy against
the teacher's probabilities at a temperature (eq. 3), with a labelled term if asked for (eq. 4). Both see the same view
(Beyer et al. 2022, arXiv 2106.05237). Where slices are segmented every pixel has an opinion of its own; those of which
the teacher is unsure may be left out, and the student may be the teacher of a next round (noisy student, Xie et al.,
arXiv 1911.04252).
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr import figures, files, tasks
from medclr.augment.labelled import training_views
from medclr.config import (
    EncoderConfig,
    FinetuneConfig,
    ViewsConfig,
    dataclass_options,
    nearest,
    option_parser,
    parse,
    to_plain,
)
from medclr.data.cases import Cases, read_cases, refuse_seen
from medclr.data.loader import load_batch
from medclr.data.store import Store
from medclr.device import device_of, put_on
from medclr.errors import MedclrError
from medclr.files import alone, write_text
from medclr.finetune import (
    CURVES,
    HARMLESS,
    RUN_FILES,
    Ints,
    State,
    build_tuner,
    digest_of,
    fit,
    match_text,
    scans_of,
    setting_word,
    write_scores,
)
from medclr.memory import keep_freed_memory
from medclr.models.encoder import Encoder
from medclr.models.start import start_encoder
from medclr.models.weights import MatchReport
from medclr.outcomes import Outcome, write_outcome
from medclr.progress import duration
from medclr.runs import open_folder
from medclr.scans.modality import modality_of
from medclr.statistics import Estimate, interval, resample
from medclr.tasks import Task, TaskModel
from medclr.track import read_metrics
from medclr.trained import Trained, export_model, load_model

NOT_ASKED = ("validation", "every", "patience")
"""Settings of supervised training that mean nothing here: nobody validates, and the whole schedule is followed."""


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the settings of training."""

    store: Path
    """Slice store to learn from; it needs no labels."""

    out: Path
    """Run folder; the same command again resumes it."""

    teacher: Path
    """Run folder of `medclr finetune`."""

    student: str = "resnet18"
    """Network of the student: resnet18 or another that pretrain knows, further as network says; or same: the teacher's,
    from its weights on, which has something to learn only with labelled or confidence."""

    init: str = "random"
    """Weights that the student starts from, of the same network: random, imagenet, a run folder of pretraining, or a
    file of torchvision's ResNet weights."""

    split: str | None = None
    """Only slices of this split of the manifest are learnt from; null: train, or all but those of the teacher's test
    patients where the manifest names no splits."""

    modality: str | None = None
    """Only slices of this modality are learnt from and scored; null: the teacher's."""

    score: Path | None = None
    """Slice store with the labels of the teacher's patients, for the score and the labelled term; null: the one that is
    learnt from, if it has them."""

    temperature: float = 1.0
    """Divides the logits of both: above 1 the teacher's doubts weigh more."""

    confidence: float = 0.0
    """Slices, or pixels where slices are segmented, whose likeliest class has less than this probability in the
    teacher's opinion are not learnt from; 0: all are."""

    rounds: int = 1
    """How often a student is trained; from the second round on the student of the round before is the teacher."""

    labelled: float = 0.0
    """Weight of the loss on the teacher's own labelled cases, beside 1 less that for the teacher's opinion."""

    transductive: bool = False
    """Go on although test patients are learnt from, and stamp it on every figure."""

    overwrite: bool = False
    """Replace the run that is in --out."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MedclrError(f"temperature: {self.temperature} is not above 0; 1 to 4 is usual")
        if not 0 <= self.confidence < 1:
            raise MedclrError(f"confidence: {self.confidence} is no probability from 0 to below 1")
        if self.rounds < 1:
            raise MedclrError(f"rounds: {self.rounds} is below 1")
        if not 0 <= self.labelled <= 1:
            raise MedclrError(f"labelled: {self.labelled} is not a weight from 0 to 1")


@dataclass(frozen=True)
class Wish(Asked):
    """All that was asked for."""

    settings: FinetuneConfig = field(default_factory=FinetuneConfig)

    UNTOLD: ClassVar = ("store", "score", "out", "overwrite", "settings")

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain types: the content of config.yaml."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.UNTOLD}
        settings = {name: value for name, value in to_plain(self.settings).items() if name not in NOT_ASKED}
        return {**asked, "teacher": str(self.teacher), **settings}


@dataclass(frozen=True)
class DistillSummary:
    """What a finished run says of itself."""

    out: Path
    student: Mapping[str, Estimate]
    """Scores on the teacher's test patients; empty if their labels are not at hand."""
    teacher: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    """Student less teacher on the same resampled patients."""
    parameters: tuple[int, int]
    """Of the student and of the teacher."""
    steps: int
    seconds: float
    stamp: str
    """'' or that some of the test patients were learnt from."""
    unscored: str
    """Why there is no score; '' if there is one."""

    def __str__(self) -> str:
        stamp = f" ({self.stamp})" if self.stamp else ""
        size = f"student of {self.parameters[0]:,} parameters, teacher of {self.parameters[1]:,}{stamp}"
        rows = [f"not scored: {self.unscored}"]
        if self.student:
            rows = [f"  {'':<24}{'student':>9}{'teacher':>9}  difference (95 % interval over patients)"]
        for name, own in self.student.items():
            d, theirs = self.difference[name], self.teacher[name]
            rows.append(f"  {name:<24}{own.mean:9.3f}{theirs.mean:9.3f}  {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        took = f"{self.out}: {self.steps} steps in {duration(self.seconds)}; the model is in {self.out / 'model'}"
        return "\n".join([size, *rows, took])


class Distillation(Task):
    """What the loop learns from: slices with the teacher's opinion, and perhaps its labelled cases too."""

    def __init__(self, store: Store, trained: Trained, wish: Wish, labelled: tuple[Task, Ints] | None) -> None:
        """``labelled``: the task of the labelled cases, and the scans of the teacher's training cases."""
        self.store, self.teacher, self.wish = store, trained.model, wish
        self.is_multi_label = bool(getattr(trained.config, "multi_label", False))
        self._task = labelled[0] if labelled else None
        self._labelled: Sequence[Any] = labelled[0].items(labelled[1]) if labelled else ()

    def items(self, scans: Ints) -> Sequence[int]:
        """All slices of ``scans``."""
        chosen: list[int] = np.flatnonzero(np.isin(self.store.column("scan"), scans)).tolist()
        return chosen

    def loss(self, model: Any, items: Sequence[int], views: ViewsConfig, *, seed: int, step: int) -> Tensor:
        """Cross-entropy against the teacher on the same views, and the task's own loss on labelled cases."""
        device = next(model.parameters()).device
        batch = model.training_batch(load_batch(self.store, items, model.encoder.config.slices).to(device))
        x, _ = training_views(batch, views, seed=seed, step=step)  # [n,C,s,s]
        with torch.no_grad():
            opinion = self.teacher.slice_logits(x).float()  # [n,K,...]
            trusted = confident(opinion, self.wish.confidence, multi_label=self.is_multi_label)
        logits = model.slice_logits(x).float() / self.wish.temperature
        loss = soft_cross_entropy(logits, opinion / self.wish.temperature, trusted, multi_label=self.is_multi_label)
        if self._task is None:
            return loss
        n = min(len(items), len(self._labelled))
        chosen = np.random.default_rng([seed, step, 5]).permutation(len(self._labelled))[:n]
        own = self._task.loss(model, [self._labelled[i] for i in chosen], views, seed=seed + 1, step=step)
        return (1 - self.wish.labelled) * loss + self.wish.labelled * own


def confident(opinion: Tensor, least: float, *, multi_label: bool = False) -> Tensor | None:
    """Where the likeliest answer of the teacher has a probability of ``least`` at least; None: ``least`` is 0.

    Args:
        opinion: logits [n,K,...] at temperature 1.
        least: a probability.
        multi_label: every class is a question of its own, of yes and no.

    Returns:
        Bool [n,...], with ``multi_label`` [n,K,...]; or None.
    """
    if least == 0:
        return None
    if multi_label:
        return opinion.abs().sigmoid() >= least
    return opinion.softmax(1).amax(1) >= least


def soft_cross_entropy(
    logits: Tensor, opinion: Tensor, trusted: Tensor | None = None, *, multi_label: bool = False
) -> Tensor:
    """-sum_y P_teacher(y) log P_student(y), mean over all else (arXiv 2006.10029, eq. 3); binary with several labels.

    Args:
        logits: of the student, [n,K,...].
        opinion: logits of the teacher, of the same shape.
        trusted: what the mean is taken over, as of ``confident``; 0 where that is nothing; None: all.
        multi_label: every class is a question of its own.
    """
    if multi_label:
        each = F.binary_cross_entropy_with_logits(logits, opinion.sigmoid(), reduction="none")  # [n,K,...]
    else:
        each = -(opinion.softmax(1) * logits.log_softmax(1)).sum(1)  # [n,...]
    if trusted is None:
        return each.mean()
    return torch.where(trusted, each, 0).sum() / trusted.sum().clamp(min=1)


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
    """``medclr distill``."""
    return train_student(read_wish(arguments))


def read_wish(arguments: Sequence[str]) -> Wish:
    """What is asked for: the options are the fields of Asked and of FinetuneConfig.

    Raises:
        MedclrError: an unknown setting (with the nearest known one), a wrong type, or a value that cannot work.
    """

    def add(parser: Any) -> None:
        dataclass_options(parser, Asked)
        dataclass_options(parser, FinetuneConfig, leave_out=NOT_ASKED)

    parser = option_parser("medclr distill", "Train a student on a teacher's opinion.", add, config=True)
    options = parse(parser, arguments)
    asked = {f.name: getattr(options, f.name) for f in fields(Asked)}
    names = [f.name for f in fields(FinetuneConfig) if f.name not in NOT_ASKED]
    settings = FinetuneConfig(**{name: getattr(options, name) for name in names})
    return Wish(**asked, settings=settings)


def learnt_from(wish: Wish, store: Store, test: Collection[str]) -> Ints:
    """The scans of ``store`` whose slices the student would see; ``test`` are the teacher's test patients.

    Raises:
        MedclrError: there are none, or the store has no such split.
    """
    named = {scan.split for scan in store.scans} - {""}
    split = wish.split if wish.split is not None else "train" if "train" in named else ""
    wanted = modality_of(wish.modality).name if wish.modality else None
    left_out = set(test) if wish.split is None and not named else set()  # nobody else keeps them out
    scans = np.unique(store.column("scan")[store.indices(split)]).astype(np.int64)
    chosen = [
        scan
        for scan in scans.tolist()
        if wanted in (None, store.scans[scan].modality) and store.scans[scan].patient_id not in left_out
    ]
    if not chosen:
        which = " ".join(filter(None, [wanted, f"of split {split}" if split else ""]))
        raise MedclrError(f"{store.path}: holds no scans{f' ({which})' if which else ''} to learn from; name another")
    return np.array(chosen, dtype=np.int64)


def train_student(wish: Wish) -> DistillSummary:
    """``distill`` with settings that were read."""
    store, trained = Store(wish.store), load_model(wish.teacher)
    wish = replace(wish, modality=wish.modality or trained.facts["settings"].get("modality"))
    settings = wish.settings
    if wish.student == "same" and not wish.labelled and not wish.confidence:  # both see the same views
        print(
            "medclr: warning: --student same starts where it agrees with the teacher, and so learns next to nothing; "
            "set --labelled, such as 0.5, or --confidence",
            file=sys.stderr,
        )
    cases = _cases_of(trained)
    device = device_of(settings.device)
    keep_freed_memory()
    teacher = trained.model.requires_grad_(False)
    put_on(teacher, device)
    scans = learnt_from(wish, store, cases.test)
    patients = {store.scans[int(i)].patient_id for i in scans}
    model, match = _student(wish, trained, store)
    stamp = refuse_seen(
        patients | trained.patients | model.encoder.seen_patients,
        cases,
        "the student would be trained" if not wish.transductive else "the student was trained",
        "choose another --store, --split, --init or --teacher",
        transductive=wish.transductive,
    )
    task, unscored = _labels(wish, trained, cases)
    labelled = None
    if wish.labelled:
        if task is None:
            raise MedclrError(f"labelled: {unscored}; give the store of the teacher's cases as --score, or set it to 0")
        train = scans_of(task, task.store, cases.train)
        task.check(train, f"the teacher's {len(cases.train)} training cases")
        labelled = task, train
    facts = {
        "settings": wish.resolved,
        "manifest_sha256": store.info.manifest_sha256,
        "modalities": sorted({store.scans[int(i)].modality for i in scans}),
        "planes": sorted({store.scans[int(i)].plane for i in scans} - {""}),
        "patients": sorted(patients | trained.patients | model.encoder.seen_patients),
        "transductive": bool(stamp),
        "stamp": stamp,
    }

    def teach(out: Path, taught: Trained, model: TaskModel) -> State:
        """A round: ``model`` learns from the opinion of ``taught``, and is left in ``out``."""
        origin = {"store": store.info.manifest_sha256, "teacher": files.sha256(trained.path / "model.json")}
        if taught is not trained:  # its weights alone: the harmless settings stand in model.json too
            origin["round"] = taught.facts["sha256"]
        if wish.init != "random":
            origin["init"] = digest_of(model.encoder)
        if task is not None and wish.labelled:
            origin["score"] = task.store.info.manifest_sha256
        put_on(model, device)
        is_new = wish.init == "random" and wish.student != "same"
        state = State(model, build_tuner(model, settings, is_new=is_new), origin)
        state.resume(out)
        fit(out, settings, Distillation(store, taught, wish, labelled), scans, scans[:0], state, is_new=is_new)
        export_model(out / "model", trained.task, model.config, model, facts)
        return state

    with alone(wish.out):
        open_folder(wish.out, wish.resolved, RUN_FILES | {"rounds"}, HARMLESS, overwrite=wish.overwrite)
        write_text(wish.out / "match.txt", match)
        write_text(wish.out / "cases.csv", (trained.path.parent / "cases.csv").read_text(encoding="utf-8"))
        taught = trained
        for number in range(1, wish.rounds):
            folder = wish.out / "rounds" / str(number)
            teach(folder, taught, model)
            taught = load_model(folder)
            put_on(taught.model.requires_grad_(False), device)
            model, _ = _student(wish, taught, store)
        state = teach(wish.out, taught, model)
        student, theirs, difference = _judge(wish, task, cases, model, teacher, stamp)
        figures.curves(wish.out / "figures" / "curves.png", read_metrics(wish.out), CURVES, stamp)
    sizes = _size(model), _size(teacher)
    return DistillSummary(
        wish.out, student, theirs, difference, sizes, state.step, state.seconds, stamp, unscored if task is None else ""
    )


Scores = Mapping[str, Estimate]


def _judge(
    wish: Wish, task: Task | None, cases: Cases, model: TaskModel, teacher: TaskModel, stamp: str
) -> tuple[Scores, Scores, Scores]:
    """Scores of the student, of the teacher, and their difference on the same patients; written down and drawn."""
    if task is None:
        return {}, {}, {}
    test = scans_of(task, task.store, cases.test)
    ours, theirs = task.judge(model, test), task.judge(teacher, test)
    write_outcome(wish.out / "predictions.csv", ours)
    metrics = ours.metrics()
    student = {metric: interval([ours], metric) for metric in metrics}
    write_scores(wish.out / "scores.csv", student, stamp)
    task.draw(model, ours, wish.out / "figures", stamp)
    return student, {metric: interval([theirs], metric) for metric in metrics}, _paired(ours, theirs)


def _paired(ours: Outcome, theirs: Outcome) -> Scores:
    """Student less teacher on the same resampled patients."""
    return {m: (resample([ours], m) - resample([theirs], m)).estimate() for m in ours.metrics()}


def _labels(wish: Wish, trained: Trained, cases: Cases) -> tuple[Task | None, str]:
    """The task on the store with the labels of the teacher's test patients; or None, and why there is none.

    Raises:
        MedclrError: the store that was named for it cannot serve.
    """
    path = wish.score or wish.store
    try:
        task: Task = tasks.get(trained.task).Task(trained.config, Store(path), wish.modality)
        if task.classes != trained.model.classes:
            theirs, ours = (", ".join(classes) for classes in (trained.model.classes, task.classes))
            raise MedclrError(f"{path}: has the classes {ours}, and the teacher {theirs}; name its store as --score")
        _check_size(task.store, trained.model.encoder.store_px)
        if not len(scans_of(task, task.store, cases.test)):
            raise MedclrError(f"{path}: holds none of the teacher's test patients; name their store as --score")
    except MedclrError as error:
        if wish.score:
            raise
        return None, str(error)
    return task, ""


def start_student(wish: Wish, teacher: Encoder, store: Store) -> tuple[Encoder, MatchReport | None]:
    """The student's encoder as it starts; of the teacher only what it is, not what it learnt.

    Raises:
        MedclrError: an unknown network, weights of another one, or slices of another size than the teacher's.
    """
    known = get_args(get_type_hints(EncoderConfig)["name"])
    if wish.student not in ("same", *known):
        raise MedclrError(f"--student {wish.student!r} is unknown{nearest(wish.student, ['same', *known])}")
    if wish.student == "same" and wish.init != "random":
        raise MedclrError(f"--init {wish.init}: the student 'same' starts from the teacher's weights; leave it out")
    _check_size(store, teacher.store_px)
    network, size = _network(wish, teacher.config), wish.settings.size_px or teacher.size_px
    encoder, report = start_encoder(wish.init, network, size, store.info.size_px, wish.settings.seed)
    if encoder.config.name != network.name:
        raise MedclrError(
            f"--init {wish.init}: are weights of {encoder.config.name}, and the student is {network.name}; choose "
            f"--student {encoder.config.name}"
        )
    return encoder, report


def _check_size(store: Store, size_px: int) -> None:
    """Raise MedclrError unless everything is as large in ``store`` as where the teacher learnt."""
    if store.info.size_px != size_px:
        raise MedclrError(
            f"{store.path}: its slices are squares of {store.info.size_px} px, and the teacher learnt from {size_px} "
            f"px; prepare it with --size-px {size_px}"
        )


def _student(wish: Wish, trained: Trained, store: Store) -> tuple[TaskModel, str]:
    """The student as it starts, and what became of its tensors.

    Raises:
        MedclrError: as of ``start_student``, or weights of a decoder that do not fit.
    """
    settings, teacher = wish.settings, trained.model
    encoder, report = start_student(wish, teacher.encoder, store)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: TaskModel = tasks.get(trained.task).Model(trained.config, encoder, teacher.classes)
    from_run = wish.init not in ("random", "imagenet") and Path(wish.init).is_dir()
    try:
        extra = model.start_from(Path(wish.init)) if from_run else []
    except MedclrError as error:
        raise MedclrError(
            f"--init {wish.init}: does not fit the student, which is built as its teacher ({error}); choose another run"
        ) from error
    if wish.student == "same":
        model.load_state_dict(teacher.state_dict())
        names = list(model.state_dict())
        lines = [f"weights from {wish.teacher}", f"loaded {len(names)}", *(f"loaded\t{name}" for name in names)]
        return model, "\n".join(lines) + "\n"
    return model, match_text(report, model, extra)


def _network(wish: Wish, teacher: EncoderConfig) -> EncoderConfig:
    """The student's network: what ``network`` says under the name ``student``, on as many slices as the teacher's.

    Raises:
        MedclrError: ``network`` contradicts that.
    """
    asked = wish.settings.network
    if wish.student == "same":
        if asked not in (EncoderConfig(), teacher):
            raise MedclrError("network: the student 'same' has the teacher's; leave it out, or name a --student")
        return teacher
    if asked.name not in (EncoderConfig().name, wish.student):
        raise MedclrError(f"network.name: {asked.name}, but --student is {wish.student}; leave it out")
    if asked.slices not in (1, teacher.slices):
        raise MedclrError(f"network.slices: {asked.slices}, but the teacher sees {teacher.slices}; leave it out")
    return replace(asked, name=wish.student, slices=teacher.slices)  # type: ignore[arg-type]


def _cases_of(trained: Trained) -> Cases:
    """Who taught and who tests the teacher."""
    path = trained.path.parent / "cases.csv"
    if not path.is_file():
        raise MedclrError(f"{path}: is missing, so nobody knows who tests the teacher; name the whole run folder")
    return read_cases(path)


def _size(model: TaskModel) -> int:
    return sum(p.numel() for p in model.parameters())
