"""Scores of predictions against scikit-learn and slow loops, and predictions that survive the way to disk and back."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medclr.errors import MedclrError
from medclr.outcomes import Classified, Segmented, read_outcome, weighted_auc, write_outcome

RNG = np.random.default_rng(0)


def classified(r: int = 200, classes: tuple[str, ...] = ("a", "b", "c")) -> Classified:
    """One label a scan, two scans a patient; probabilities in steps, so that some are equal."""
    y = np.arange(r) % len(classes)
    probability = np.round(RNG.dirichlet(np.ones(len(classes)), r) + 0.5 * np.eye(len(classes))[y], 1)
    probability = np.round(probability / probability.sum(1, keepdims=True), 6)
    truth = np.eye(len(classes), dtype=np.int64)[y]
    return Classified([f"s{i}" for i in range(r)], [f"p{i // 2}" for i in range(r)], classes, truth, probability)


def several(r: int = 120) -> Classified:
    """Several labels a scan, and scans with none."""
    truth = (RNG.random((r, 3)) < 0.4).astype(np.int64)
    probability = np.clip(0.3 * truth + RNG.random((r, 3)) * 0.7, 0, 1)
    ids = [f"s{i}" for i in range(r)]
    return Classified(ids, ids, ("mass", "node, calcified", "x"), truth, probability, multi_label=True)


def segmented() -> Segmented:
    """Five scans of three patients; one lacks a class, one has none."""
    dice = np.array([[0.9, 0.8], [0.7, math.nan], [0.5, 0.3], [math.nan, math.nan], [0.6, 0.9]])
    hd95 = np.array([[1.0, 2.0], [3.0, math.nan], [40.0, 9.0], [math.nan, math.nan], [5.5, 1.25]])
    return Segmented(list("vwxyz"), ["p1", "p1", "p2", "p2", "p3"], ("anterior", "posterior"), dice, hd95)


def test_weighted_auc_equals_repeating_rows_with_ties():
    scores = RNG.integers(0, 6, 80).astype(float)
    positive = RNG.random(80) < 0.4
    weight = RNG.integers(0, 4, 80)
    expected = roc_auc_score(np.repeat(positive, weight), np.repeat(scores, weight))
    assert weighted_auc(scores, positive, weight.astype(float)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rows", [0, 4])
def test_weighted_auc_without_both_kinds_is_nan(rows):
    assert math.isnan(weighted_auc(np.arange(float(rows)), np.ones(rows, bool), np.ones(rows)))


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_scores_of_a_classification_equal_scikit_learn_with_weights(classes):
    outcome = classified(classes=classes)
    y, p = outcome.truth.argmax(1), outcome.probability
    weight = RNG.integers(0, 4, len(y)).astype(float)
    aucs = [roc_auc_score(y == c, p[:, c], sample_weight=weight) for c in range(len(classes))]
    accuracy = balanced_accuracy_score(y, p.argmax(1), sample_weight=weight)
    assert outcome.score("macro AUC", weight) == pytest.approx(np.mean(aucs), abs=1e-12)
    assert outcome.score("balanced accuracy", weight) == pytest.approx(accuracy, abs=1e-12)
    assert outcome.score("AUC b", weight) == pytest.approx(aucs[1], abs=1e-12)
    assert outcome.score("balanced accuracy") == pytest.approx(balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
    assert outcome.metrics()[:2] == ("macro AUC", "balanced accuracy")
    assert outcome.metrics()[2:] == (() if len(classes) == 2 else ("AUC a", "AUC b", "AUC c"))


def test_scores_of_several_labels_equal_scikit_learn():
    outcome = several()
    weight = RNG.integers(0, 4, len(outcome.truth)).astype(float)
    expected = roc_auc_score(outcome.truth, outcome.probability, average="macro", sample_weight=weight)
    assert outcome.score("macro AUC", weight) == pytest.approx(expected, abs=1e-12)
    assert "balanced accuracy" not in outcome.metrics()
    assert "AUC node, calcified" in outcome.metrics()


@pytest.mark.parametrize("outcome", [classified(), several(), segmented()], ids=["one", "several", "segmented"])
def test_many_weightings_at_once_are_the_scores_one_by_one(outcome):
    weights = RNG.integers(0, 3, (20, len(outcome.scan_id))).astype(float)
    weights[3] = 0
    for metric in outcome.metrics():
        each = [outcome.score(metric, weight) for weight in weights]
        assert outcome.scores(metric, weights) == pytest.approx(each, abs=1e-12, nan_ok=True)
        assert math.isnan(each[3])


def test_a_class_without_weight_has_no_score():
    outcome = classified()
    weight = 1.0 - outcome.truth[:, 2]
    assert math.isnan(outcome.score("macro AUC", weight))
    assert math.isnan(outcome.score("balanced accuracy", weight))
    assert not math.isnan(outcome.score("AUC a", weight))


def test_dice_is_the_mean_over_patients_of_the_mean_over_their_scans():
    outcome = segmented()
    assert outcome.score("mean Dice") == pytest.approx(((0.85 + 0.7) / 2 + 0.4 + 0.75) / 3)
    assert outcome.score("Dice posterior") == pytest.approx((0.8 + 0.3 + 0.9) / 3)
    assert outcome.score("HD95 mm anterior") == pytest.approx((2.0 + 40 + 5.5) / 3)
    assert outcome.score("mean HD95 mm") == pytest.approx(((1.5 + 3) / 2 + 24.5 + 3.375) / 3)
    assert outcome.score("mean Dice", np.array([2.0, 2, 0, 0, 1])) == pytest.approx((2 * 0.775 + 0.75) / 3)
    assert math.isnan(outcome.score("mean Dice", np.array([0.0, 0, 0, 1, 0])))


def test_names_of_classes_do_not_confuse_the_metrics():
    names = ("HD95", "mean", "x mm y")
    outcome = Segmented(["s"], ["p"], names, np.array([[0.1, 0.2, 0.3]]), np.array([[1.0, 2.0, 3.0]]))
    assert [outcome.score(f"Dice {name}") for name in names] == pytest.approx([0.1, 0.2, 0.3])
    assert [outcome.score(f"HD95 mm {name}") for name in names] == pytest.approx([1, 2, 3])


def test_a_class_that_is_found_in_no_scan_is_named():
    assert segmented().nowhere() == classified().nowhere() == ()
    dice = np.array([[0.0, 0.0, math.nan], [0.0, 0.1, math.nan], [math.nan, 0.0, math.nan]])
    outcome = Segmented(list("abc"), list("abc"), ("head", "tail", "absent"), dice, dice)
    assert outcome.nowhere() == ("head",)


@pytest.mark.parametrize("outcome", [classified(), several(), segmented()], ids=["one", "several", "segmented"])
def test_predictions_survive_the_round_trip(outcome, tmp_path):
    write_outcome(tmp_path / "predictions.csv", outcome)
    read = read_outcome(tmp_path / "predictions.csv")
    assert type(read) is type(outcome)
    assert (list(read.scan_id), list(read.patient_id)) == (list(outcome.scan_id), list(outcome.patient_id))
    assert (read.classes, read.metrics()) == (outcome.classes, outcome.metrics())
    for metric in outcome.metrics():
        assert read.score(metric) == pytest.approx(outcome.score(metric), abs=1e-8)


def test_a_class_may_have_a_bar_in_its_name(tmp_path):
    truth = np.array([[1, 0], [0, 1]])
    outcome = Classified(["s", "t"], ["p", "q"], ("a|b", "c"), truth, np.array([[0.9, 0.1], [0.2, 0.8]]))
    write_outcome(tmp_path / "predictions.csv", outcome)
    read = read_outcome(tmp_path / "predictions.csv")
    assert isinstance(read, Classified)
    assert (read.truth.tolist(), read.multi_label) == (truth.tolist(), False)


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", "scan_id,patient_id,label,p a\ns,p,zebra,1\n", "scan_id,patient_id,Dice a,HD95 mm a\ns,p,x,1\n"],
)
def test_what_cannot_be_read_is_one_sentence(text, tmp_path):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(MedclrError, match=r"predictions\.csv: cannot be read as predictions") as error:
        read_outcome(tmp_path / "predictions.csv")
    assert "\n" not in str(error.value)
