"""The probe's classifiers against scikit-learn and slow loops, and its protocol: patients never leak."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import medclr
from medclr.errors import MedclrError
from medclr.probe import _budget, knn, logistic

RNG = np.random.default_rng(0)


def macro_auc(scores: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(scores.shape[1])]))


def cohort(n_patients: int, scans: int, classes: int, features: int, signal: float):
    patient = np.repeat([f"p{i:03d}" for i in range(n_patients)], scans)
    y = np.repeat(np.arange(n_patients) % classes, scans)
    x = RNG.normal(size=(len(y), features)) + signal * np.eye(classes, features)[y]
    return x.astype(np.float32), y, patient


@pytest.mark.parametrize("classifier", [knn, logistic])
@pytest.mark.parametrize("n_patients", [6, 60])  # fewer and more rows than features
def test_classifiers_learn_a_signal_and_nothing_from_noise(classifier, n_patients):
    x_test, y_test, _ = cohort(120, 1, 3, 20, 5.0)
    x, y, patient = cohort(n_patients, 2, 3, 20, 5.0)
    scores = classifier(x, y, patient, x_test, 3, 0)
    assert scores.shape == (120, 3)
    assert np.allclose(scores.sum(1), 1)
    assert macro_auc(scores, y_test) > 0.85
    noise = classifier(RNG.normal(size=x.shape).astype(np.float32), y, patient, x_test, 3, 0)
    assert macro_auc(noise, y_test) == pytest.approx(0.5, abs=0.25)


def test_logistic_in_the_span_of_few_rows_equals_the_full_solution():
    """The rotation onto the training rows' span is exact, not an approximation."""
    from medclr.probe import DEFAULT_PENALTY, _logistic

    x, y, patient = cohort(3, 1, 3, 50, 2.0)  # one patient a class: the default penalty
    x_test = cohort(30, 1, 3, 50, 2.0)[0]
    expected = _logistic(DEFAULT_PENALTY).fit(x, y).predict_proba(x_test)
    assert np.allclose(logistic(x, y, patient, x_test, 3, 0), expected, atol=1e-3)


def test_knn_against_a_loop():
    x, y, patient = cohort(30, 1, 3, 8, 1.0)
    x_test = cohort(5, 1, 3, 8, 1.0)[0]
    scores = knn(x, y, patient, x_test, 3, 0)
    for i in range(5):
        cosine = [float(x_test[i] @ v / np.linalg.norm(x_test[i]) / np.linalg.norm(v)) for v in x]
        votes = np.zeros(3)
        for j in np.argsort(cosine)[::-1][:20]:
            votes[y[j]] += math.exp(cosine[j] / 0.07)
        assert scores[i] == pytest.approx(votes / votes.sum(), abs=1e-6)


def test_budgets_are_patients_or_percentages():
    assert _budget("20") == 20
    assert _budget("10%") == pytest.approx(0.1)
    assert _budget("0.1") == pytest.approx(0.1)
    for wrong in ("0", "-3", "101%", "many", "1.5"):
        with pytest.raises(MedclrError, match="number of patients"):
            _budget(wrong)


@pytest.fixture(scope="module")
def run(image_store, tmp_path_factory):
    """A run that has seen every patient, those of the test split too."""
    out = tmp_path_factory.mktemp("runs") / "all"
    medclr.pretrain(image_store, out, settings={"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu"})
    return out


def test_an_encoder_that_saw_a_test_patient_is_refused_or_stamped(run, image_store):
    with pytest.raises(MedclrError, match=r"patients are in both .*transductive"):
        medclr.probe(str(run), image_store, budgets=["4"], seeds=1, resamples=10)
    report = medclr.probe(str(run), image_store, budgets=["4"], seeds=1, resamples=10, transductive=True)
    assert {score.encoder for score in report.scores} == {"all (transductive)"}


def test_the_whole_probe_writes_its_table_and_picture(image_store, tmp_path):
    settings = {"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu", "data.split": "train"}
    medclr.pretrain(image_store, tmp_path / "run", settings=settings)
    out = tmp_path / "probe"
    report = medclr.probe(
        str(tmp_path / "run"), image_store, budgets=["4", "0.5", "100%"], seeds=2, resamples=20, out=out
    )
    assert {path.name for path in out.iterdir()} == {"probe.csv", "probe.png"}
    assert report.get("logistic", "100%", "macro AUC").train_patients > 4
    assert "macro AUC" in str(report)
    with pytest.raises(MedclrError, match="exists already"):
        medclr.probe("random", image_store, out=out)


def test_random_draws_weights_for_each_seed_in_the_network_of_a_run(run, image_store):
    report = medclr.probe("random", image_store, like=run, budgets=["100%"], seeds=3, resamples=10)
    assert report.get("knn", "100%", "macro AUC").sd > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budgets": ["1000"]}, "1000"),
        ({"budgets": ["1"]}, "fewer patients than the 2 classes"),
        ({"modality": "CT"}, "--modality CT"),
        ({"seeds": 0}, "at least 1"),
        ({"fetch": "resnet18"}, "--fetch"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(image_store, tmp_path, arguments, sentence):
    with pytest.raises(MedclrError) as error:
        medclr.probe("random", image_store, out=tmp_path / "probe", **arguments)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir())
