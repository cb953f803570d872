"""What a comparison may claim: means over seeds, intervals over patients, paired differences, label equivalence.

Resampling is by patient, never by scan: the scans of a patient are drawn together. Two models that are compared are
scored on the same drawn patients, so that what makes a draw easy for both cancels from their difference.

Letters: r rows of an outcome, P test patients, R resamples, s seeds, b budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from medclr.errors import MedclrError
from medclr.outcomes import Classified, Floats, Ints, Outcome

PERCENTILES = (2.5, 97.5)
"""Of a 95 % interval."""

AT_ONCE = 2_000_000
"""Weights that are held at a time: so many rows times resamples."""


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, with what is known of its uncertainty."""

    mean: float
    """Over seeds."""
    sd: float
    """Standard deviation over seeds (n - 1); NaN for one seed."""
    low: float
    """This and the next: 95 % interval of the mean over these seeds, from resampling the test patients."""
    high: float
    cautious_low: float
    """This and the next: 95 % interval from resampling test patients and seeds together, wider: it answers for seeds
    that were not run. NaN for one seed."""
    cautious_high: float
    seeds: int
    patients: int


@dataclass(frozen=True)
class Resampled:
    """A score of each seed, on all test patients and on each resample of them; those of two models are paired."""

    point: Floats
    """[s]."""
    drawn: Floats
    """[s,R]; NaN where a resample has no score, say because a class is not in it."""
    patients: int

    def __sub__(self, other: Self) -> "Resampled":
        """The difference, seed by seed and resample by resample: both must be of the same patients and seeds."""
        if self.patients != other.patients or self.drawn.shape != other.drawn.shape:
            raise MedclrError("a paired difference needs the same test patients, seeds and resamples on both sides")
        return Resampled(self.point - other.point, self.drawn - other.drawn, self.patients)

    def estimate(self) -> Estimate:
        """Mean, spread and both intervals (percentile bootstrap)."""
        seeds, resamples = self.drawn.shape
        mean, spread = float(np.mean(self.point)), math.nan
        low, high = _percentiles(self.drawn.mean(0))
        wide_low = wide_high = math.nan
        if seeds > 1:
            spread = float(np.std(self.point, ddof=1))
            # s - 1 of s seeds: the mean of s drawn seeds would vary too little, by (s - 1)/s (Rao and Wu 1988).
            pick = np.random.default_rng(1).integers(0, seeds, (seeds - 1, resamples))
            wide_low, wide_high = _percentiles(np.take_along_axis(self.drawn, pick, 0).mean(0))
        return Estimate(mean, spread, low, high, wide_low, wide_high, seeds, self.patients)


def _percentiles(drawn: Floats) -> tuple[float, float]:
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, PERCENTILES)
    return float(low), float(high)


def draw_patients(patients: int, resamples: int) -> Ints:
    """How often each patient is in each resample [R,P]; the same for the same numbers."""
    drawn = np.random.default_rng(0).integers(0, patients, (resamples, patients))  # [R,P], which
    times = np.zeros((resamples, patients), dtype=np.int64)
    np.add.at(times, (np.arange(resamples)[:, None], drawn), 1)
    return times


def resample(outcomes: Sequence[Outcome], metric: str, resamples: int = 1000) -> Resampled:
    """Score the outcomes of several seeds on resampled test patients.

    Args:
        outcomes: one a seed, of the same patients.
        metric: one of their ``metrics()``.
        resamples: R.

    Raises:
        MedclrError: the outcomes are of different patients.
    """
    patients = sorted(set(outcomes[0].patient_id))
    times = draw_patients(len(patients), resamples)
    drawn = np.empty((len(outcomes), resamples))
    for seed, outcome in enumerate(outcomes):
        names, who = np.unique(np.asarray(outcome.patient_id), return_inverse=True)  # [P], [r]
        if names.tolist() != patients:
            raise MedclrError("the predictions that are compared are of different test patients; compute them again")
        step = max(1, AT_ONCE // len(who))
        for start in range(0, resamples, step):
            some = slice(start, start + step)
            drawn[seed, some] = outcome.scores(metric, times[some][:, who].astype(np.float64))
    return Resampled(np.array([outcome.score(metric) for outcome in outcomes]), drawn, len(patients))


def interval(outcomes: Sequence[Outcome], metric: str, resamples: int = 1000) -> Estimate:
    """Mean over seeds of a score, its spread, and its intervals over test patients; see ``resample``."""
    return resample(outcomes, metric, resamples).estimate()


def ascending(curves: Floats) -> Floats:
    """Curves [...,b] made to rise: the closest ones that do, by least squares (isotonic regression)."""
    b = curves.shape[-1]
    total = np.concatenate([np.zeros((*curves.shape[:-1], 1)), np.cumsum(curves, -1)], -1)  # [...,b+1]
    risen = np.empty_like(curves)
    for i in range(b):  # the largest over the starts of the smallest over the ends of the mean between them
        best = np.full(curves.shape[:-1], -np.inf)
        for start in range(i + 1):
            ends = np.arange(i, b)
            means = (total[..., ends + 1] - total[..., start, None]) / (ends + 1 - start)
            best = np.maximum(best, means.min(-1))
        risen[..., i] = best
    return risen


def budget_reaching(budgets: Sequence[float], curve: Floats, target: float) -> float:
    """How many labelled patients a model needs for a score.

    Between budgets the score is taken to rise with the logarithm of the patients.

    Args:
        budgets: numbers of patients, ascending [b].
        curve: scores at the budgets, larger is better; made to rise by ``ascending`` [b].
        target: the score.

    Returns:
        Patients; inf: more than the largest budget; the smallest budget stands for all below it.
    """
    risen = ascending(np.asarray(curve, dtype=np.float64))
    target -= 1e-12  # what equals a budget's score is reached there, however it was rounded
    if not target <= risen[-1]:
        return math.inf
    i = int(np.argmax(risen >= target))
    if i == 0:
        return float(budgets[0])
    share = (target - risen[i - 1]) / (risen[i] - risen[i - 1])
    return float(budgets[i - 1] * (budgets[i] / budgets[i - 1]) ** share)


@dataclass(frozen=True)
class Equivalence:
    """How many labelled patients the reference needs for the score of another model."""

    patients: float
    """inf: more than the largest budget; the smallest budget stands for all below it."""
    low: float
    """This and the next: 95 % interval, from resampling the test patients; inf as above."""
    high: float


def equivalent_budget(budgets: Sequence[float], reference: Sequence[Resampled], other: Resampled) -> Equivalence:
    """How many labelled patients the reference needs to reach the score of ``other``.

    Args:
        budgets: numbers of patients, ascending [b].
        reference: its scores at the budgets, larger is better.
        other: the score to reach, on the same resamples.
    """
    curves = np.stack([each.drawn.mean(0) for each in reference], -1)  # [R,b]
    targets = other.drawn.mean(0)  # [R]
    known = ~np.isnan(curves).any(-1) & ~np.isnan(targets)
    found = np.sort([budget_reaching(budgets, c, t) for c, t in zip(curves[known], targets[known], strict=True)])
    # Of values that may be infinite, percentiles are values that occur: there is nothing between them.
    ranks = [min(len(found) - 1, int(p / 100 * len(found))) for p in PERCENTILES]
    low, high = (float(found[rank]) for rank in ranks) if len(found) else (math.nan, math.nan)
    point = budget_reaching(budgets, np.array([each.point.mean() for each in reference]), float(other.point.mean()))
    return Equivalence(point, low, high)


@dataclass(frozen=True)
class Reliability:
    """How often a classifier is right where it says that it is sure to a certain degree."""

    confidence: Floats
    """[bins], mean probability of what fell into each bin; NaN where nothing did."""
    accuracy: Floats
    """[bins], share of it that was right."""
    count: Ints
    """[bins]."""
    error: float
    """Expected calibration error: the mean distance of the two, weighted by count (Guo et al. 2017)."""


def reliability(outcome: Classified, bins: int = 10) -> Reliability:
    """Reliability in equally wide bins: of the likeliest class, or with several labels of every class."""
    if outcome.multi_label:
        sure, right = outcome.probability.ravel(), outcome.truth.ravel() == 1
    else:
        sure, chosen = outcome.probability.max(1), outcome.probability.argmax(1)
        right = outcome.truth[np.arange(len(chosen)), chosen] == 1
    bin_of = np.minimum((sure * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_of, minlength=bins)

    def means(values: NDArray[np.float64]) -> Floats:
        sums = np.bincount(bin_of, values, minlength=bins)
        mean: Floats = np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)
        return mean

    confidence, accuracy = means(sure), means(right.astype(np.float64))
    gaps = np.abs(confidence - accuracy)
    return Reliability(confidence, accuracy, count, float(np.nansum(gaps * count) / count.sum()))
