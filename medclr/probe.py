"""Score frozen features with few labelled patients: weighted kNN and logistic regression, with intervals.

The protocol: patients are split once, by hash or by the manifest; budgets are nested, stratified sets of training
patients drawn by seed; every choice (the penalty) is made inside them; test patients are touched by predictions alone.

Shape letters: n labelled scans, t of test patients, F features, C classes.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medclr import figures
from medclr.data.splits import label_budgets, patient_labels, refuse_overlap, split_of
from medclr.data.store import Store
from medclr.embed import extract, scan_means
from medclr.errors import MedclrError
from medclr.files import write_text, writing_folder
from medclr.models.frozen import open_encoder
from medclr.models.weights import ResNetName
from medclr.outcomes import Classified, Floats, Ints, Outcome
from medclr.progress import progress
from medclr.scans.modality import modality_of
from medclr.statistics import interval

Features = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Score:
    """One figure of the report."""

    encoder: str
    classifier: str
    budget: str
    """As asked for: 10 patients, or 10%."""
    train_patients: int
    test_patients: int
    metric: str
    mean: float
    """Over seeds."""
    sd: float
    """Standard deviation over seeds (n - 1); NaN for one seed."""
    low: float
    """95 % interval of the mean, from resampling the test patients (percentile bootstrap)."""
    high: float
    seeds: int


@dataclass(frozen=True)
class ProbeReport:
    """What ``medclr probe`` found."""

    scores: tuple[Score, ...]
    classes: tuple[str, ...]
    out: Path | None = None

    def get(self, classifier: str, budget: str, metric: str) -> Score:
        """One figure by its names."""
        return next(s for s in self.scores if (s.classifier, s.budget, s.metric) == (classifier, budget, metric))

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        first = self.scores[0]
        metrics = list(dict.fromkeys(score.metric for score in self.scores))
        title = f"{first.encoder}: {first.test_patients} test patients, {first.seeds} seeds"
        table = Table(title=title, caption="mean ± SD over seeds, [95 % interval over test patients]")
        table.title_justify = table.caption_justify = "left"
        for name in ("patients", "classifier", *metrics):
            table.add_column(name)
        for budget, classifier in dict.fromkeys((s.budget, s.classifier) for s in self.scores):
            cells = [self.get(classifier, budget, metric) for metric in metrics]
            spread = ["" if math.isnan(s.sd) else f" ± {s.sd:.3f}" for s in cells]
            shown = [f"{s.mean:.3f}{sd}\n[{s.low:.3f}, {s.high:.3f}]" for s, sd in zip(cells, spread, strict=True)]
            budget_text = f"{cells[0].train_patients}" + (f" ({budget})" if budget.endswith("%") else "")
            table.add_row(budget_text, classifier, *shown)
        text = io.StringIO()
        Console(file=text, width=28 + 19 * len(metrics)).print(table)
        return text.getvalue().rstrip() + (f"\nwritten to {self.out}" if self.out else "")


def probe(
    encoder: str,
    store: Path,
    *,
    budgets: list[str] = ["1%", "10%", "100%"],  # noqa: B006  (never changed; a list is what the command line shows)
    seeds: int = 5,
    modality: str | None = None,
    transductive: bool = False,
    size_px: int | None = None,
    out: Path | None = None,
    like: Path | None = None,
    weights: Path | None = None,
    fetch: ResNetName | None = None,
    test_share: float = 0.3,
    resamples: int = 1000,
) -> ProbeReport:
    """Score frozen features with few labelled patients.

    Args:
        encoder: A run folder of ``medclr pretrain``, or ``random`` or ``imagenet``.
        store: Slice store with labels.
        budgets: Labelled training patients: counts (20) or percentages (10%).
        seeds: Draws of each budget.
        modality: Score the scans of this modality alone, in a store that holds several.
        transductive: Go on although the encoder was pretrained on test patients; every figure is then stamped with it.
        size_px: Side of the images that the encoder sees; by default what it was made for.
        out: Folder for the table and the picture; only printed without it.
        like: With ``--encoder random``: a run folder whose network to take. Each seed draws its own weights.
        weights: File with ImageNet weights in torchvision's format, for ``--encoder imagenet``.
        fetch: Download torchvision's weights of this ResNet instead, checked by their hash, for ``--encoder imagenet``.
        test_share: Share of patients held out by a hash of their id, where the manifest names no train and test split.
        resamples: Bootstrap samples of the test patients.

    Raises:
        MedclrError: too few labels or patients, or an encoder that cannot be loaded.
    """
    opened, out = Store(Path(store)), Path(out) if out else None
    wanted = {text: _budget(text) for text in budgets}
    if seeds < 1 or resamples < 1:
        raise MedclrError("--seeds and --resamples must be at least 1")
    with writing_folder(out) if out else nullcontext() as folder:
        data = _labelled(opened, test_share, modality_of(modality).name if modality else None)
        name = encoder if encoder in ("random", "imagenet") else Path(encoder).name
        draws = seeds if encoder == "random" else 1  # random weights are drawn anew for each seed
        features = []
        for seed in range(draws):
            model = open_encoder(encoder, size_px=size_px, like=like, weights=weights, fetch=fetch, seed=seed)
            if not transductive:
                refuse_overlap(model.seen_patients, set(data.patient) - data.train, _OVERLAP)
            elif model.seen_patients & (set(data.patient) - data.train):
                name = f"{Path(encoder).name} (transductive)"
            features.append(extract(model, opened, data.slices))  # [slices,F]
        means = [scan_means(f, opened.column("scan")[data.slices])[0] for f in features]  # [n,F] each
        scores = _score(name, means, data, wanted, seeds, resamples)
        report = ProbeReport(tuple(scores), data.classes, out)
        if folder is not None:
            _write(report, folder)
    return report


_OVERLAP = "the encoder's pretraining and the test set (--transductive true goes on, and stamps it on every figure)"


def _score(
    name: str,
    means: Sequence[NDArray[np.float32]],
    data: "_Labelled",
    budgets: Mapping[str, int | float],
    seeds: int,
    resamples: int,
) -> list[Score]:
    """Fit each classifier at each budget and seed; ``means`` holds features [n,F], one for all seeds or one a seed."""
    in_train = np.isin(data.patient, sorted(data.train))  # [n]
    test = np.flatnonzero(~in_train)  # [t]
    scan_ids, who_test = data.scan_id[test].tolist(), data.patient[test].tolist()  # [t] each
    truth = np.eye(len(data.classes), dtype=np.int64)[data.y[test]]  # [t,C]
    who_train = {p: label for p, label in data.patient_label.items() if p in data.train}
    subsets = [label_budgets(who_train, list(budgets.values()), seed) for seed in range(seeds)]
    inputs: dict[str, Sequence[Features]] = {"knn": means, "logistic": [standardise(x, in_train) for x in means]}
    scores: list[Score] = []
    with progress("probe", len(budgets) * seeds, "fits") as advance:
        for text, budget in budgets.items():
            predicted: dict[str, list[Outcome]] = {kind: [] for kind in CLASSIFIERS}
            for seed, subset in enumerate(subsets):
                train = np.flatnonzero(np.isin(data.patient, subset[budget]))  # [r]
                for kind, fit in CLASSIFIERS.items():
                    x = inputs[kind][seed % len(means)]  # [n,F]
                    y, who = data.y[train], data.patient[train]
                    scores_of = fit(x[train], y, who, x[test], len(data.classes), seed)  # [t,C]
                    predicted[kind].append(Classified(scan_ids, who_test, data.classes, truth, scores_of))
                advance(1)
            for kind, runs in predicted.items():
                for metric in runs[0].metrics():
                    found = interval(runs, metric, resamples)
                    scores.append(
                        Score(name, kind, text, len(subsets[0][budget]), found.patients,
                              metric, found.mean, found.sd, found.low, found.high, seeds)
                    )  # fmt: skip
    return scores


def standardise(x: NDArray[np.float32], rows: NDArray[np.bool_]) -> Floats:
    """Features [n,F] less their mean and over their deviation among ``rows``: all training scans, labels unseen.

    Statistics of the few labelled scans alone would be too noisy to divide by, and the unlabelled ones cost nothing.
    """
    mean, deviation = x[rows].mean(0, dtype=np.float64), x[rows].std(0, dtype=np.float64)
    z: Floats = (x - mean) / np.maximum(deviation, 1e-8)  # float64: in float32 the solver's line search can fail
    return z


@dataclass(frozen=True)
class _Labelled:
    """The labelled scans of a store."""

    slices: Ints
    """Indices of all their slices."""
    y: Ints
    """Class of each scan [n]."""
    scan_id: NDArray[np.str_]
    """[n]."""
    patient: NDArray[np.str_]
    """[n]."""
    classes: tuple[str, ...]
    patient_label: dict[str, str]
    train: set[str]
    """Training patients; all others are test patients."""


def _labelled(store: Store, test_share: float, modality: str | None) -> _Labelled:
    classes = store.info.labels
    slices = np.flatnonzero(store.column("label") >= 0)
    if modality is not None:
        if modality not in store.info.modalities:
            known = ", ".join(store.info.modalities)
            raise MedclrError(f"--modality {modality}: {store.path} has none of it; it has {known}")
        slices = slices[store.column("modality")[slices] == store.info.modalities.index(modality)]
    if len(classes) < 2:
        raise MedclrError(f"{store.path}: a probe needs at least two classes of labels; give `medclr index` --labels")
    scans = [store.scans[s] for s in np.unique(store.column("scan")[slices])]
    patient = np.array([scan.patient_id for scan in scans])  # [n]
    scan_id = np.array([scan.scan_id for scan in scans])  # [n]
    split = {scan.patient_id: scan.split for scan in scans}
    named = set(split.values()) - {""}
    if named and not {"train", "test"} <= named:
        there = ", ".join(sorted(named))
        raise MedclrError(f"{store.path}: its manifest has the splits {there}; a probe needs train and test")
    if not named:
        shares = {"train": 1 - test_share, "test": test_share}
        split = {p: split_of(p, shares) for p in split}
    y = np.array([classes.index(scan.label) for scan in scans])  # [n]
    train = {p for p, name in split.items() if name == "train"}
    kept = np.isin([split[p] for p in patient], ["train", "test"])  # a validation split is left alone
    if not kept.all():
        slices = slices[np.isin(store.column("scan")[slices], np.unique(store.column("scan")[slices])[kept])]
        y, patient, scan_id = y[kept], patient[kept], scan_id[kept]
    in_train = np.isin(patient, sorted(train))
    for side, rows in (("training", in_train), ("test", ~in_train)):
        absent = sorted(set(range(len(classes))) - set(y[rows].tolist()))
        if absent:
            raise MedclrError(f"{store.path}: no {side} patient has label {classes[absent[0]]!r}; label more patients")
    labels = patient_labels(zip(patient.tolist(), [classes[c] for c in y], strict=True))
    return _Labelled(slices, y, scan_id, patient, classes, labels, train)


def _budget(text: str) -> int | float:
    """``10`` patients; ``10%`` or ``0.1`` of them."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text) if "." in text else int(text)
        if 0 < value <= (1 if isinstance(value, float) else math.inf):
            return value
    except ValueError:
        pass
    raise MedclrError(f"--budgets {text!r}: write a number of patients (20), a percentage (10%) or a fraction (0.1)")


class Classifier(Protocol):
    """Fit on training scans, return class scores [t,C] of test scans; choices are made within the training scans."""

    def __call__(
        self,
        x: Features,
        y: Ints,
        patient: NDArray[np.str_],
        x_test: Features,
        classes: int,
        seed: int,
    ) -> Floats: ...


def knn(x: Features, y: Ints, patient: NDArray[np.str_], x_test: Features, classes: int, seed: int) -> Floats:
    """Weighted kNN of Wu et al. 2018 (k = 20, temperature 0.07) on L2-normalised features; scores [t,C]."""

    def unit(v: Features) -> Floats:
        length = np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
        rows: Floats = np.divide(v, np.maximum(length, 1e-12), dtype=np.float64)
        return rows

    similarity = unit(x_test) @ unit(x).T  # [t,r]
    k = min(20, len(x))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [t,k]
    vote = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / 0.07)  # [t,k]
    scores = np.stack([(vote * (y[nearest] == c)).sum(1) for c in range(classes)], axis=1)  # [t,C]
    normalised: Floats = scores / scores.sum(1, keepdims=True)
    return normalised


def logistic(x: Features, y: Ints, patient: NDArray[np.str_], x_test: Features, classes: int, seed: int) -> Floats:
    """L2-regularised multinomial logistic regression of standardised features, classes weighted equally; scores [t,C].

    The penalty is the one of least log-loss in patient-grouped, stratified cross-validation of the training scans.
    """
    z, z_test = x, x_test  # [r,F], [t,F]
    if len(z) < z.shape[1]:
        # The solution lies in the span of the training rows, so rotating onto it changes nothing and saves time.
        _, _, basis = np.linalg.svd(z, full_matrices=False)  # [r,F]
        z, z_test = z @ basis.T, z_test @ basis.T
    model = _logistic(_choose_penalty(z, y, patient, seed)).fit(z, y)
    scores = np.zeros((len(z_test), classes))
    scores[:, model.classes_] = model.predict_proba(z_test)
    return scores


CLASSIFIERS: Mapping[str, Classifier] = {"knn": knn, "logistic": logistic}

PENALTIES: tuple[float, ...] = tuple(10.0 ** (e / 2) for e in range(-10, 3))
"""Values of C, from strong to weak, that cross-validation chooses among."""

DEFAULT_PENALTY = 1e-2
"""Where some class has a lone patient and nothing can be cross-validated."""


def _logistic(c: float, *, warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, class_weight="balanced", max_iter=5000, warm_start=warm_start)


def _choose_penalty(z: Features, y: Ints, patient: NDArray[np.str_], seed: int) -> float:
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.utils.class_weight import compute_sample_weight

    folds = min(5, min(len(np.unique(patient[y == c])) for c in np.unique(y)))
    if folds < 2:
        return DEFAULT_PENALTY
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [p for p in splitter.split(z, y, patient) if len(np.unique(y[p[0]])) == len(np.unique(y))]
    if not parts:
        return DEFAULT_PENALTY
    weight = compute_sample_weight("balanced", y)  # [r]
    models = [_logistic(PENALTIES[0], warm_start=True) for _ in parts]  # each goes on from the penalty before
    best, chosen = math.inf, float(PENALTIES[0])
    for c in PENALTIES:
        loss = 0.0
        for model, (fit, held) in zip(models, parts, strict=True):
            p = model.set_params(C=c).fit(z[fit], y[fit]).predict_proba(z[held])  # [h,C]
            loss += float(log_loss(y[held], p, labels=model.classes_, sample_weight=weight[held])) * len(held)
        if loss > 1.05 * best:  # overfitting has set in, and weaker penalties cost the most
            break
        if loss < best:
            best, chosen = loss, c
    return chosen


def _write(report: ProbeReport, out: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Score)])
    for score in report.scores:
        writer.writerow([f"{v:.6f}" if isinstance(v, float) else v for v in astuple(score)])
    write_text(out / "probe.csv", text.getvalue())
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for s in report.scores:
        if s.metric == "macro AUC":
            series.setdefault(s.classifier, []).append((s.train_patients, s.mean, s.low, s.high))
    first = report.scores[0]
    title = f"{first.encoder}: {first.seeds} seeds, {first.test_patients} test patients, 95 % intervals"
    figures.score_plot(out / "probe.png", series, "macro AUC", title)
