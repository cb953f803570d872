"""Distillation of masks: each pixel has its opinion, unsure ones stay out, and students become teachers."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cohort import save_manifest, save_nifti
from safetensors.torch import load_file
from torch import Tensor

import medclr
from medclr.data.cases import read_cases
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.distill import Distillation, DistillSummary, confident, distill, soft_cross_entropy
from medclr.errors import MedclrError
from medclr.finetune import finetune
from medclr.outcomes import read_outcome
from medclr.tasks import segment
from medclr.track import read_metrics
from medclr.trained import load_model

TEACHER = {"steps": 60, "batch": 8, "size_px": 16, "device": "cpu", "lr": 0.02, "segment.width": 8}
SMALL = {"steps": 3, "batch": 6, "device": "cpu", "lr": 0.01}


@pytest.fixture(scope="module", autouse=True)
def tiny_networks() -> Iterator[None]:
    with tiny.in_place_of("resnet18", "resnet34"):
        yield


@pytest.fixture(scope="module")
def teacher(volume_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned on two labelled volumes; three more of the training patients have none as far as it knows."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    finetune(volume_store, out, task="segment", cases="2", settings=TEACHER)
    return out


def run(store: Path, out: Path, teacher: Path, student: str = "resnet34", **settings: Any) -> DistillSummary:
    return distill(store, out, teacher=teacher, student=student, settings={**SMALL, **settings})


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def content(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "checkpoints")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# ---- the loss


@pytest.mark.parametrize("least", [0.4, 0.7, 0.999])
def test_only_what_the_teacher_is_sure_of_counts(least: float) -> None:
    torch.manual_seed(0)
    logits, opinion = 2 * torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    total, count = 0.0, 0
    for n, row, column in np.ndindex(3, 5, 6):
        p, q = (x[n, :, row, column].exp() / x[n, :, row, column].exp().sum() for x in (opinion, logits))
        if p.max() >= least:
            total, count = total - float((p * q.log()).sum()), count + 1
    trusted = confident(opinion, least)
    assert trusted is not None
    assert int(trusted.sum()) == count < 90
    assert float(soft_cross_entropy(logits, opinion, trusted)) == pytest.approx(total / max(count, 1), rel=1e-12)


def test_of_several_labels_each_is_trusted_or_not() -> None:
    logits, opinion = torch.tensor([[0.3, -1.0]]), torch.tensor([[3.0, -0.1]])  # 0.95 yes, 0.52 no
    trusted = confident(opinion, 0.9, multi_label=True)
    assert trusted is not None
    assert trusted.tolist() == [[True, False]]
    p, q = opinion.sigmoid()[0, 0], logits.sigmoid()[0, 0]
    expected = float(-(p * q.log() + (1 - p) * (1 - q).log()))
    assert float(soft_cross_entropy(logits, opinion, trusted, multi_label=True)) == pytest.approx(expected)


def test_without_anything_to_trust_nothing_is_learnt() -> None:
    logits, opinion = torch.randn(2, 3, 4, 4).requires_grad_(), torch.zeros(2, 3, 4, 4)
    loss = soft_cross_entropy(logits, opinion, confident(opinion, 0.5))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    assert confident(opinion, 0) is None


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "confidence": 0.8}, {"labelled": 0.4}])
def test_the_loss_of_a_step(
    settings: dict[str, Any], volume_store: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Tensor] = []
    seen: list[Tensor] = []
    total: list[float] = []
    own: list[float] = []
    slice_logits, whole, labelled = segment.Model.slice_logits, Distillation.loss, segment.Task.loss

    def watched(model: Any, x: Tensor) -> Tensor:
        given.append(slice_logits(model, x))
        seen.append(x)
        return given[-1]

    def of_cases(*arguments: Any, **more: Any) -> Tensor:
        own.append(float((value := labelled(*arguments, **more)).detach()))
        return value

    def all_of_it(*arguments: Any, **more: Any) -> Tensor:
        total.append(float((value := whole(*arguments, **more)).detach()))
        return value

    monkeypatch.setattr(segment.Model, "slice_logits", watched)
    monkeypatch.setattr(segment.Task, "loss", of_cases)
    monkeypatch.setattr(Distillation, "loss", all_of_it)
    run(volume_store, tmp_path / "run", teacher, **{**settings, "steps": 1})
    theirs, ours = (logits.detach().double() for logits in given)
    assert theirs.shape == ours.shape == (6, 2, 16, 16)
    assert torch.equal(seen[0], seen[1]), "both see the same view"
    t, least = settings.get("temperature", 1), settings.get("confidence", 0)
    each = -((theirs / t).softmax(1) * (ours / t).log_softmax(1)).sum(1)
    sure = theirs.softmax(1).amax(1) >= least
    assert sure.float().mean() < 1 or not least
    share = settings.get("labelled", 0)
    assert len(own) == (1 if share else 0)
    expected = (1 - share) * float(each[sure].mean()) + (share * own[0] if share else 0)
    assert total[0] == pytest.approx(expected, rel=1e-5)


# ---- a run


def test_a_student_learns_from_volumes_without_masks(volume_store: Path, teacher: Path, tmp_path: Path) -> None:
    summary = run(volume_store, tmp_path / "run", teacher, steps=60, lr=0.02, confidence=0.7, labelled=0.3)
    assert summary.teacher["mean Dice"].mean > 0.7
    assert summary.student["mean Dice"].mean > summary.teacher["mean Dice"].mean - 0.1
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    trained, store = load_model(tmp_path / "run"), Store(volume_store)
    assert trained.patients == {scan.patient_id for scan in store.scans if scan.split == "train"}
    assert trained.model.config.width == 8  # type: ignore[attr-defined]
    assert not trained.patients & set(read_cases(teacher / "cases.csv").test)


def test_the_student_of_a_round_teaches_the_next(volume_store: Path, teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"confidence": 0.6, "labelled": 0.5}
    run(volume_store, tmp_path / "run", teacher, rounds=3, **settings)
    first, second = tmp_path / "run" / "rounds" / "1", tmp_path / "run" / "rounds" / "2"
    alone = run(volume_store, tmp_path / "1", teacher, **settings)
    assert alone.student["mean Dice"].mean >= 0
    for name, tensor in weights(tmp_path / "1").items():
        assert torch.equal(tensor, weights(first)[name]), name
    (first / "cases.csv").write_bytes((teacher / "cases.csv").read_bytes())
    run(volume_store, tmp_path / "2", first, **settings)  # the second by hand
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(tmp_path / "2").items())
    assert not all(torch.equal(tensor, weights(first)[name]) for name, tensor in weights(second).items())


def test_killed_in_any_round_it_ends_the_same(
    volume_store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"rounds": 2, "student": "same"}
    run(volume_store, tmp_path / "whole", teacher, **settings)
    loss = Distillation.loss
    for dying in (2, 4):  # in the first round, and in the second
        calls: list[None] = []

        def deadly(*arguments: Any, dying: int = dying, calls: list[None] = calls, **more: Any) -> Tensor:
            calls.append(None)
            if len(calls) == dying:
                raise KeyboardInterrupt
            return loss(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Distillation, "loss", deadly)
            with pytest.raises(KeyboardInterrupt):
                run(volume_store, tmp_path / "part", teacher, **settings, checkpoint_minutes=0)
    run(volume_store, tmp_path / "part", teacher, **settings)
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    assert "rounds/1/model/model.json" in content(tmp_path / "part")


def test_crops_are_of_the_square_that_the_model_is_asked_about(
    volume_store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    module = sys.modules["medclr.distill"]  # medclr.distill itself is the function
    views = module.training_views

    def watched(batch: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(batch.content)
        return views(batch, *arguments, **more)

    monkeypatch.setattr(module, "training_views", watched)
    run(volume_store, tmp_path / "run", teacher, steps=1)
    assert seen[0].tolist() == [[0, 0, 16, 16]] * 6


def test_test_patients_among_the_volumes_stop_it_or_are_stamped(
    volume_store: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(MedclrError, match="trained on 3 of the 3 test patients"):
        run(volume_store, tmp_path / "run", teacher, split="")
    assert not (tmp_path / "run").exists()
    summary = run(volume_store, tmp_path / "run", teacher, split="", transductive=True, rounds=2)
    assert summary.stamp == "transductive: the student was trained on 3 of the 3 test patients"
    said = json.loads((tmp_path / "run" / "rounds" / "1" / "model" / "model.json").read_text())
    assert said["stamp"] == summary.stamp


def test_a_student_starts_from_a_pretrained_decoder_too(volume_store: Path, teacher: Path, tmp_path: Path) -> None:
    dense = {"method": "dense", "dense.points": 6, "dense.distance": 2.0, "dense.width": 8, "data.split": "train"}
    small = {"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu", "monitor.sample": 8}
    medclr.pretrain(volume_store, tmp_path / "pretrained", settings={**small, **dense})
    run(volume_store, tmp_path / "run", teacher, "resnet18", init=str(tmp_path / "pretrained"))
    text = (tmp_path / "run" / "match.txt").read_text()
    assert "loaded\tdecoder.bottom.conv.weight" in text
    assert "loaded\tencoder.parts.0.0.weight" in text
    medclr.pretrain(volume_store, tmp_path / "wide", settings={**small, **dense, "dense.width": 4})
    with pytest.raises(MedclrError, match=r"wide: does not fit the student.*has 4; .*; choose another run"):
        run(volume_store, tmp_path / "none", teacher, "resnet18", init=str(tmp_path / "wide"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"confidence": 1.0}, "confidence: 1.0 is no probability"), ({"rounds": 0}, "rounds: 0 is below 1")],
)
def test_what_cannot_work_is_one_sentence(
    settings: dict[str, Any], sentence: str, volume_store: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(MedclrError, match=sentence):
        run(volume_store, tmp_path / "run", teacher, **settings)


# ---- whose slices


def two_modalities(folder: Path, split: str) -> Path:
    """A store of MR and CT volumes of the same eight patients, all with masks; named splits or none."""
    rng, rows = np.random.default_rng(0), []
    for number, modality in itertools.product(range(8), ("MR", "CT")):
        mask = np.zeros((16, 16, 3), dtype=np.uint8)
        mask[4:9, 3 + number % 3 : 12] = 1
        voxels = (100 + 80 * mask + rng.normal(0, 5, mask.shape)).astype(np.float32)
        name = f"{modality}{number}.nii"
        files = {"path": save_nifti(folder / name, voxels), "mask": save_nifti(folder / "masks" / name, mask)}
        named = {"split": "train" if number < 5 else "test"} if split else {}
        rows.append({**files, **named, "modality": modality, "patient": f"p{number}"})
    prepare(save_manifest(folder / "scans.csv", rows), folder / "store", size_px=16)
    return folder / "store"


def test_a_student_learns_from_the_teachers_modality_and_is_scored_on_it(tmp_path: Path) -> None:
    store = two_modalities(tmp_path, "named")
    finetune(store, tmp_path / "teacher", task="segment", cases="2", modality="MR", settings=TEACHER | {"steps": 3})
    theirs = read_outcome(tmp_path / "teacher" / "predictions.csv")
    for out, teacher in (("student", "teacher"), ("second", "student")):  # a student may teach in turn
        run(store, tmp_path / out, tmp_path / teacher)
        assert read_outcome(tmp_path / out / "predictions.csv").scan_id == theirs.scan_id
        assert load_model(tmp_path / out).facts["modalities"] == ["MR"]
    run(store, tmp_path / "asked", tmp_path / "teacher", modality="CT")
    assert load_model(tmp_path / "asked").facts["modalities"] == ["CT"]
    assert not set(read_outcome(tmp_path / "asked" / "predictions.csv").scan_id) & set(theirs.scan_id)
    with pytest.raises(MedclrError, match=r"holds no scans \(XR of split train\) to learn from"):
        run(store, tmp_path / "none", tmp_path / "teacher", modality="XR")


def test_without_named_splits_the_teachers_test_patients_are_left_out(tmp_path: Path) -> None:
    store = two_modalities(tmp_path, "")
    finetune(store, tmp_path / "teacher", task="segment", cases="2", settings=TEACHER | {"steps": 3})
    test = set(read_cases(tmp_path / "teacher" / "cases.csv").test)
    summary = run(store, tmp_path / "student", tmp_path / "teacher")
    assert summary.stamp == ""
    everyone = {scan.patient_id for scan in Store(store).scans}
    assert test
    assert load_model(tmp_path / "student").patients == everyone - test
    with pytest.raises(MedclrError, match=f"trained on {len(test)} of the {len(test)} test patients"):
        run(store, tmp_path / "all", tmp_path / "teacher", split="")


def test_the_students_network_is_the_one_that_is_asked_for(volume_store: Path, teacher: Path, tmp_path: Path) -> None:
    run(volume_store, tmp_path / "run", teacher, **{"network.width": 0.5, "network.stem": "small"})
    config = load_model(tmp_path / "run").model.encoder.config
    assert (config.name, config.width, config.stem) == ("resnet34", 0.5, "small")
    for student, settings, sentence in (
        ("same", {"network.width": 0.5}, "network: the student 'same' has the teacher's"),
        ("resnet34", {"network.name": "resnet50"}, "network.name: resnet50, but --student is resnet34"),
        ("resnet34", {"network.slices": 3}, "network.slices: 3, but the teacher sees 1"),
    ):
        with pytest.raises(MedclrError, match=sentence):
            run(volume_store, tmp_path / "none", teacher, student, **settings)
