"""What a model said of labelled scans, and its scores: one row a scan, weighted by patient.

An outcome is written as ``predictions.csv`` and read back, so that figures are made again without the model. Weights of
rows are what a bootstrap over patients needs: how often each row's patient was drawn.

Letters: r rows, one a scan; K classes; P patients; w weightings of the rows.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from medclr.errors import MedclrError
from medclr.files import write_text

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Judged predictions: the base of all kinds."""

    scan_id: Sequence[str]
    """[r]."""
    patient_id: Sequence[str]
    """[r]."""
    classes: tuple[str, ...]
    """Names of the K classes (of segmentation: without the background)."""

    kind: ClassVar[str]

    def metrics(self) -> tuple[str, ...]:
        """Names of the scores; the first is the one that decides."""
        raise NotImplementedError

    def score(self, metric: str, weight: Floats | None = None) -> float:
        """One score of rows with weights [r] (None: 1 each); NaN where it has none, say a class that has no weight."""
        return float(self.scores(metric, np.ones((1, len(self.scan_id))) if weight is None else weight[None])[0])

    def scores(self, metric: str, weights: Floats) -> Floats:
        """``score`` [w] for each of many weightings [w,r] at once, as a bootstrap needs it."""
        raise NotImplementedError

    def columns(self) -> dict[str, Sequence[str | float | int]]:
        """The columns of predictions.csv beside scan_id and patient_id."""
        raise NotImplementedError

    def nowhere(self) -> tuple[str, ...]:
        """Classes that some scan shows or the model names, and that model and truth agree on in none."""
        return ()


@dataclass(frozen=True)
class Classified(Outcome):
    """Classes of scans."""

    truth: Ints
    """[r,K], 1 where the scan is of the class."""
    probability: Floats
    """[r,K]; rows add up to 1 unless several classes can be true."""
    multi_label: bool = False

    kind: ClassVar[str] = "classified"

    def metrics(self) -> tuple[str, ...]:
        """Macro AUC, balanced accuracy (one label a scan), and the AUC of each of more than two classes."""
        each = tuple(f"AUC {name}" for name in self.classes) if len(self.classes) > 2 or self.multi_label else ()
        return ("macro AUC", *(() if self.multi_label else ("balanced accuracy",)), *each)

    def scores(self, metric: str, weights: Floats) -> Floats:
        """See ``Outcome``."""
        if metric == "balanced accuracy":
            right = self.truth[np.arange(len(self.truth)), self.probability.argmax(1)]  # [r]
            total, hits = weights @ self.truth, (weights * right) @ self.truth  # [w,K]
            share: Floats = np.divide(hits, total, out=np.full(total.shape, np.nan), where=total > 0).mean(1)
            return share
        chosen = (
            range(len(self.classes)) if metric == "macro AUC" else [self.classes.index(metric.removeprefix("AUC "))]
        )
        aucs = [weighted_aucs(self.probability[:, c], self.truth[:, c] == 1, weights) for c in chosen]
        mean: Floats = np.mean(aucs, axis=0)
        return mean

    def columns(self) -> dict[str, Sequence[str | float | int]]:
        """The true classes, parted by '|', and a probability for each."""
        named = ["|".join(np.array(self.classes)[row == 1]) for row in self.truth]
        return {
            "label": named,
            **{f"p {name}": p.tolist() for name, p in zip(self.classes, self.probability.T, strict=True)},
        }


@dataclass(frozen=True)
class Segmented(Outcome):
    """Segmentations of scans, each against its mask, in the source's geometry."""

    dice: Floats
    """[r,K]; NaN where neither mask nor prediction has the class."""
    hd95_mm: Floats
    """[r,K], 95 % Hausdorff distance; NaN as above, the scan's diagonal where one of the two alone has the class."""

    kind: ClassVar[str] = "segmented"

    def metrics(self) -> tuple[str, ...]:
        """Means over the classes, and each class."""
        each = self.classes if len(self.classes) > 1 else ()
        return ("mean Dice", "mean HD95 mm", *(f"Dice {name}" for name in each), *(f"HD95 mm {name}" for name in each))

    def scores(self, metric: str, weights: Floats) -> Floats:
        """The mean over patients of the mean over a patient's scans; see ``Outcome``."""
        row = self.rows(metric)  # [r]
        has = ~np.isnan(row)
        who = np.unique(np.asarray(self.patient_id), return_inverse=True)[1]  # [r]
        scans = np.bincount(who[has], minlength=int(who.max(initial=0)) + 1)  # [P], of each patient with a value
        w = weights[:, has] / scans[who[has]]
        total = w.sum(1)  # [w]
        mean: Floats = np.divide(w @ row[has], total, out=np.full(len(weights), np.nan), where=total > 0)
        return mean

    def nowhere(self) -> tuple[str, ...]:
        """Classes whose Dice is 0 in every scan that has one."""
        has = ~np.isnan(self.dice)  # [r,K]
        missed = has.any(0) & (np.where(has, self.dice, 0) == 0).all(0)  # [K]
        return tuple(name for name, is_missed in zip(self.classes, missed, strict=True) if is_missed)

    def rows(self, metric: str) -> Floats:
        """What each scan contributes to a metric [r]; NaN where it has no value."""
        kind = next(kind for kind in ("mean Dice", "mean HD95 mm", "Dice ", "HD95 mm ") if metric.startswith(kind))
        values = self.hd95_mm if "HD95" in kind else self.dice  # [r,K]
        if not kind.startswith("mean "):
            one: Floats = values[:, self.classes.index(metric.removeprefix(kind))]
            return one
        known = (~np.isnan(values)).sum(1)  # [r]
        mean: Floats = np.divide(np.nansum(values, 1), known, out=np.full(len(values), np.nan), where=known > 0)
        return mean

    def columns(self) -> dict[str, Sequence[str | float | int]]:
        """Dice and distance of each class."""
        dice = {f"Dice {name}": values.tolist() for name, values in zip(self.classes, self.dice.T, strict=True)}
        return dice | {
            f"HD95 mm {name}": values.tolist() for name, values in zip(self.classes, self.hd95_mm.T, strict=True)
        }


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], weight: Floats) -> float:
    """Area under the ROC curve of scores [r] with row weights [r]; ties count half. NaN without both kinds."""
    return float(weighted_aucs(scores, positive, weight[None])[0])


def weighted_aucs(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """``weighted_auc`` [w] for each of many weightings [w,r]."""
    order = np.argsort(scores, kind="stable")
    up, down = order[positive[order]], order[~positive[order]]  # rows of the positives and of the others, ascending
    weight = weights[:, up]  # [w,u]
    before = np.cumsum(np.pad(weights[:, down], ((0, 0), (1, 0))), axis=1)  # [w,d+1], weight of the first others
    lower = np.searchsorted(scores[down], scores[up], "left")  # [u], how many others score less
    upper = np.searchsorted(scores[down], scores[up], "right")  # [u], less or the same: those count half
    area = np.einsum("wu,wu->w", weight, before[:, lower] + before[:, upper]) / 2
    total = weight.sum(1) * before[:, -1]  # [w]
    share: Floats = np.divide(area, total, out=np.full(len(weights), np.nan), where=total > 0)
    return share


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write predictions.csv, atomically: scan_id, patient_id and the columns of the outcome."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    columns = outcome.columns()
    writer.writerow(["scan_id", "patient_id", *columns])
    for row in zip(outcome.scan_id, outcome.patient_id, *columns.values(), strict=True):
        writer.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    write_text(path, text.getvalue())


def read_outcome(path: Path) -> Outcome:
    """The outcome that ``write_outcome`` wrote.

    Raises:
        MedclrError: the file cannot be read as one.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            names = list(reader.fieldnames or ())
        if "scan_id" not in names:
            raise ValueError("it has no column scan_id")
        who = [row["scan_id"] for row in rows], [row["patient_id"] for row in rows]

        def values(prefix: str) -> tuple[tuple[str, ...], Floats]:
            chosen = [name for name in names if name.startswith(prefix)]
            table = np.array([[float(row[name]) for name in chosen] for row in rows], dtype=float)
            return tuple(name.removeprefix(prefix) for name in chosen), table.reshape(len(rows), len(chosen))

        if "label" in names:
            classes, probability = values("p ")
            true = [[label] if (label := row["label"]) in classes else label.split("|") for row in rows]
            if unknown := {name for each in true for name in each if name} - set(classes):
                raise ValueError(f"label {min(unknown)!r} has no column of probabilities")
            truth = np.array([[int(name in each) for name in classes] for each in true]).reshape(probability.shape)
            several = any(len(each) != 1 or each == [""] for each in true) or not np.allclose(
                probability.sum(1), 1, atol=1e-4
            )
            return Classified(*who, classes, truth, probability, several)
        classes, dice = values("Dice ")
        return Segmented(*who, classes, dice, values("HD95 mm ")[1])
    except (OSError, KeyError, ValueError) as error:
        raise MedclrError(
            f"{path}: cannot be read as predictions of medclr ({error}); run the command again"
        ) from error
