"""Intervals and differences against slow loops, scipy and simulated cohorts of which the truth is known."""

import math
import time

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.isotonic import isotonic_regression

from medclr.errors import MedclrError
from medclr.outcomes import Classified, Outcome, Segmented
from medclr.statistics import (
    ascending,
    budget_reaching,
    draw_patients,
    equivalent_budget,
    interval,
    reliability,
    resample,
)

RNG = np.random.default_rng(0)


def two_classes(signal: np.ndarray, y: np.ndarray, patient: np.ndarray | None = None) -> Classified:
    """Scores [r] of the second class, as probabilities."""
    p = 1 / (1 + np.exp(-np.asarray(signal, dtype=float)))
    who = [f"p{i:05d}" for i in (np.arange(len(y)) if patient is None else patient)]
    scan = [f"s{i}" for i in range(len(y))]
    return Classified(scan, who, ("a", "b"), np.eye(2, dtype=np.int64)[y], np.stack([1 - p, p], 1))


def with_dice(values: np.ndarray) -> Segmented:
    """One scan a patient, one class."""
    ids = [f"{i:05d}" for i in range(len(values))]
    return Segmented(ids, ids, ("organ",), np.asarray(values)[:, None], np.ones((len(values), 1)))


def slow(outcomes: list[Outcome], metric: str, resamples: int) -> list[float]:
    """The mean over seeds on each resample, by repeating the rows of each drawn patient."""
    patients = sorted(set(outcomes[0].patient_id))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(patients), len(patients))
        each = []
        for outcome in outcomes:
            times = [sum(patients[c] == who for c in chosen) for who in outcome.patient_id]
            each.append(outcome.score(metric, np.array(times, dtype=float)))
        drawn.append(float(np.mean(each)))
    return drawn


def test_resampling_is_a_loop_over_drawn_patients():
    y, patient = np.tile([0, 1], 12), np.arange(24) // 3
    runs: list[Outcome] = [two_classes(y + RNG.normal(0, 1.5, 24), y, patient) for _ in range(3)]
    for metric in ("macro AUC", "balanced accuracy"):
        drawn = slow(runs, metric, 30)
        assert resample(runs, metric, 30).drawn.mean(0) == pytest.approx(drawn, abs=1e-12)
        found = interval(runs, metric, 30)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)


def test_pieces_of_the_resamples_are_the_whole(monkeypatch):
    y = np.tile([0, 1], 20)
    run = two_classes(y + RNG.normal(0, 1, 40), y)
    whole = resample([run], "macro AUC", 50).drawn
    monkeypatch.setattr("medclr.statistics.AT_ONCE", 300)
    assert np.array_equal(resample([run], "macro AUC", 50).drawn, whole)


def test_each_resample_draws_as_many_patients_as_there_are():
    times = draw_patients(17, 200)
    assert (times.sum(1) == 17).all()
    assert times.mean(0) == pytest.approx(np.ones(17), abs=0.35)


def test_resampling_is_by_patient_not_by_scan():
    """Ten copies of each patient's scan add no information: the interval must not shrink."""
    y = np.tile([0, 1], 20)
    signal = y + RNG.normal(0, 1, 40)
    once = interval([two_classes(signal, y)], "macro AUC", 400)
    copied = interval(
        [two_classes(np.repeat(signal, 10), np.repeat(y, 10), np.repeat(np.arange(40), 10))], "macro AUC", 400
    )
    assert (once.mean, once.low, once.high) == pytest.approx((copied.mean, copied.low, copied.high), abs=1e-12)
    assert once.patients == copied.patients == 40
    assert once.low < once.mean < once.high


def test_the_interval_is_that_of_scipy():
    values = RNG.beta(8, 2, 60)
    found = interval([with_dice(values)], "mean Dice", 4000)
    expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    width = expected.high - expected.low
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)


def test_the_paired_interval_is_that_of_scipy_and_narrower_than_that_of_strangers():
    base = RNG.beta(8, 2, 60)
    better = base + 0.02 + RNG.normal(0, 0.01, 60)
    a, b = (resample([with_dice(values)], "mean Dice", 4000) for values in (better, base))
    found = (a - b).estimate()
    expected = bootstrap((better - base,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert found.low > 0, "the difference is small beside the spread of the patients, but the same for each"
    assert a.estimate().low < b.estimate().high


def test_mean_and_spread_over_seeds():
    y = np.tile([0, 1], 30)
    runs = [two_classes(y + RNG.normal(0, 1, 60), y) for _ in range(4)]
    found = interval(runs, "macro AUC", 200)
    each = [run.score("macro AUC") for run in runs]
    assert (found.mean, found.sd) == pytest.approx((np.mean(each), np.std(each, ddof=1)))
    assert found.low < found.mean < found.high
    assert found.seeds == 4


def test_the_cautious_interval_answers_for_other_seeds():
    """Seeds that differ much widen it, seeds that agree do not, and one seed says nothing of others."""
    values = RNG.beta(8, 2, 80)
    apart = [with_dice(values + shift) for shift in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    found = interval(apart, "mean Dice", 2000)
    assert found.cautious_high - found.cautious_low > 3 * (found.high - found.low)
    # The spread of a mean of s seeds is sd/sqrt(s): 1.96 of it either way, were it normal.
    assert (found.cautious_high - found.cautious_low) / 2 == pytest.approx(1.96 * found.sd / math.sqrt(5), rel=0.15)
    alike = interval([with_dice(values)] * 3, "mean Dice", 500)
    assert (alike.cautious_low, alike.cautious_high) == pytest.approx((alike.low, alike.high))
    one = interval([with_dice(values)], "mean Dice", 50)
    assert math.isnan(one.sd)
    assert math.isnan(one.cautious_low)


def test_resamples_without_a_class_are_left_out():
    y = np.array([0, 0, 0, 1])
    found = resample([two_classes(np.arange(4.0), y)], "macro AUC", 200)
    assert np.isnan(found.drawn).any()
    assert not math.isnan(found.estimate().low)
    nothing = interval([two_classes(np.arange(3.0), np.zeros(3, int))], "macro AUC", 20)
    assert math.isnan(nothing.low)
    assert math.isnan(nothing.mean)


def test_other_patients_are_refused():
    few, many = with_dice(np.ones(4)), with_dice(np.ones(5))
    with pytest.raises(MedclrError, match="different test patients"):
        resample([few, many], "mean Dice", 10)
    with pytest.raises(MedclrError, match="same test patients"):
        resample([few], "mean Dice", 10) - resample([many], "mean Dice", 10)


def test_a_thousand_resamples_of_a_real_cohort_take_seconds():
    y = RNG.integers(0, 3, 600)
    names = [f"p{i}" for i in range(600)]
    runs = [
        Classified(names, names, ("a", "b", "c"), np.eye(3, dtype=np.int64)[y], RNG.dirichlet(np.ones(3), 600))
        for _ in range(5)
    ]
    started = time.process_time()
    resample(runs, "macro AUC", 1000)
    assert time.process_time() - started < 5


def test_ascending_is_isotonic_regression():
    curves = RNG.normal(0, 1, (50, 7)) + np.linspace(0, 2, 7)
    for curve, risen in zip(curves, ascending(curves), strict=True):
        assert risen == pytest.approx(isotonic_regression(curve), abs=1e-12)


@pytest.mark.parametrize(
    ("target", "patients"),
    [
        (0.7, 10),
        (0.5, 10),
        (0.75, math.sqrt(10 * 20)),
        (0.8, 20),
        (0.85, math.sqrt(20 * 80)),
        (0.9, 80),
        (0.91, math.inf),
    ],
)
def test_labels_needed_are_read_from_the_logarithm(target, patients):
    assert budget_reaching([10, 20, 80], np.array([0.7, 0.8, 0.9]), target) == pytest.approx(patients)


def test_a_curve_that_falls_is_made_to_rise_first():
    # 0.8 and 0.7 become 0.75 twice, and 0.85 is half way on to 0.95.
    assert budget_reaching([10, 20, 40], np.array([0.8, 0.7, 0.95]), 0.85) == pytest.approx(20 * math.sqrt(2))
    assert math.isinf(budget_reaching([10, 20], np.array([0.8, 0.8]), math.nan))


def test_the_equivalent_budget_has_an_interval():
    base = RNG.normal(0, 0.05, 100)
    curve = [resample([with_dice(0.6 + 0.1 * i + base)], "mean Dice", 300) for i in range(3)]  # at 10, 20, 40
    exact = equivalent_budget([10, 20, 40], curve, resample([with_dice(0.75 + base)], "mean Dice", 300))
    assert (exact.low, exact.patients, exact.high) == pytest.approx([20 * math.sqrt(2)] * 3), "all shift together"
    noisy = equivalent_budget(
        [10, 20, 40], curve, resample([with_dice(0.75 + RNG.normal(0, 0.3, 100))], "mean Dice", 300)
    )
    assert noisy.low < noisy.patients < noisy.high
    never = equivalent_budget([10, 20, 40], curve, resample([with_dice(0.95 + base)], "mean Dice", 300))
    assert (never.low, never.patients, never.high) == (math.inf, math.inf, math.inf)


def test_reliability_against_a_loop():
    y = RNG.integers(0, 2, 300)
    outcome = two_classes(y + RNG.normal(0, 2, 300), y)
    found = reliability(outcome, bins=5)
    sure, right = outcome.probability.max(1), outcome.probability.argmax(1) == y
    error = 0.0
    for b in range(5):
        here = (sure >= b / 5) & ((sure < (b + 1) / 5) | (b == 4))
        assert found.count[b] == here.sum()
        if here.any():
            assert found.confidence[b] == pytest.approx(sure[here].mean())
            assert found.accuracy[b] == pytest.approx(right[here].mean())
            error += here.mean() * abs(sure[here].mean() - right[here].mean())
        else:
            assert math.isnan(found.accuracy[b])
    assert found.error == pytest.approx(error)


def test_who_says_what_is_true_is_well_calibrated():
    p = RNG.random(20000)
    y = (RNG.random(20000) < p).astype(int)
    names = [str(i) for i in range(20000)]
    truth = np.eye(2, dtype=np.int64)[y]
    honest = Classified(names, names, ("a", "b"), truth, np.stack([1 - p, p], 1))
    assert reliability(honest).error < 0.02
    wrong = Classified(names, names, ("a", "b"), truth, np.stack([p, 1 - p], 1))
    assert reliability(wrong).error > 0.4
    several = Classified(names, names, ("a", "b"), truth, np.stack([1 - p, p], 1), multi_label=True)
    assert reliability(several).count.sum() == 40000


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 cohorts of 80 patients with an AUC that is known: both models get better by their seed's luck."""
    inside, paired, cautious, plain = 0, 0, 0, 0
    cohorts, seeds, n = 300, 5, 80
    y_many = np.tile([0, 1], 20000)
    deviation = 0.25  # of the seeds' signals
    rng = np.random.default_rng(1)

    def auc(signals: np.ndarray) -> float:
        many = [signal * y_many + rng.normal(0, 1, len(y_many)) for signal in signals]
        return float(np.mean([two_classes(each, y_many).score("macro AUC") for each in many]))

    grid = np.linspace(0, 3, 31)
    known = np.array([auc(np.array([signal])) for signal in grid])

    def true_auc(signals: np.ndarray) -> float:
        return float(np.interp(signals, grid, known).mean())

    of_all_seeds = true_auc(1.2 + deviation * rng.normal(0, 1, 20000))
    for _ in range(cohorts):
        y = np.tile([0, 1], n // 2)
        hard = rng.normal(0, 0.7, n)  # what is hard for both models

        def model(signal: float, y: np.ndarray = y, hard: np.ndarray = hard) -> Classified:
            return two_classes(signal * y + hard + rng.normal(0, math.sqrt(1 - 0.49), n), y)

        signals, others = 1.2 + deviation * rng.normal(0, 1, (2, seeds))
        a, b = ([model(s) for s in some] for some in (signals, others))
        found_a, found_b = (resample(some, "macro AUC", 400) for some in (a, b))
        one, difference = found_a.estimate(), (found_a - found_b).estimate()
        inside += one.low <= true_auc(signals) <= one.high
        plain += one.low <= of_all_seeds <= one.high
        cautious += one.cautious_low <= of_all_seeds <= one.cautious_high
        paired += difference.low <= true_auc(signals) - true_auc(others) <= difference.high
    assert 0.90 <= inside / cohorts <= 0.99
    assert 0.90 <= paired / cohorts <= 0.99
    assert cautious / cohorts >= 0.92
    assert plain <= cautious
