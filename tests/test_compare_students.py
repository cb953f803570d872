"""Comparisons in which one model teaches another: what distillation adds, on the same patients."""

import contextlib
import csv
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import medclr
from medclr import checkpoint
from medclr.compare import check, compute, run_comparison, student_words
from medclr.compare_plan import CompareConfig, InitConfig, found, read_config
from medclr.config import EncoderConfig
from medclr.data.index import index
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.distill import read_wish as read_distill
from medclr.errors import MedclrError

INITS = {
    "distilled": InitConfig("same", teacher="random", settings={"steps": 3, "batch": 6, "device": "cpu", "lr": 0.01}),
    "random": InitConfig("random"),
}
"""The student is named first, and comes second."""
SMALL = {"size_px": 16, "steps": 4, "batch": 4, "device": "cpu", "network.name": "resnet18"}


def plan_of(store: Path, **changes: Any) -> CompareConfig:
    return replace(CompareConfig(store, INITS, budgets=(4,), seeds=1, settings=SMALL, resamples=100), **changes)


@pytest.fixture(autouse=True)
def tiny_networks() -> Any:
    with tiny.in_place_of("resnet18"):
        yield


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclr.compare_page._Report._draw", lambda report, name, figure, caption: None)


def cell(out: Path, init: str) -> Path:
    return out / "cells" / "finetune" / init / "4" / "0"


def test_a_student_learns_from_the_teacher_of_its_cell_as_distill_does(
    image_store: Path, tmp_path: Path, no_pictures: None
) -> None:
    plan, out = plan_of(image_store), tmp_path / "c"
    run_comparison(plan, out)
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["init"], row["reference"]) for row in rows} == {("random", ""), ("distilled", "random")}
    by_hand = {**INITS["distilled"].settings, "seed": 0}
    medclr.distill(image_store, tmp_path / "d", teacher=cell(out, "random"), student="same", settings=by_hand)
    theirs = (tmp_path / "d" / "predictions.csv").read_bytes()
    assert (cell(out, "distilled") / "predictions.csv").read_bytes() == theirs
    assert theirs != (cell(out, "random") / "predictions.csv").read_bytes()
    assert (cell(out, "random") / "model").is_dir()  # for students to come
    assert not (cell(out, "distilled") / "model").exists()


def test_a_student_that_is_added_has_its_teacher_trained_again(
    image_store: Path, tmp_path: Path, no_pictures: None
) -> None:
    plan, out = plan_of(image_store), tmp_path / "c"
    run_comparison(replace(plan, inits={"random": INITS["random"]}), out)
    assert not (cell(out, "random") / "model").exists()
    before = (cell(out, "random") / "predictions.csv").read_bytes()
    run_comparison(plan, out)
    assert (cell(out, "random") / "predictions.csv").read_bytes() == before
    shutil.rmtree(tmp_path / "c")
    run_comparison(plan, out)
    assert (cell(out, "random") / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("a: {encoder: same}", "inits.a: encoder 'same' is the model of a teacher"),
        (
            "a: {encoder: same, teacher: rnadom}",
            "inits.a: teacher 'rnadom' is none of the inits; the nearest known one",
        ),
        ("a: {encoder: imagenet, teacher: random}", "inits.a: write encoder: same"),
        ("a: {encoder: same, teacher: random, store: s}", "inits.a: its store is that of its teacher"),
        (
            "a: {encoder: same, teacher: b}\n  b: {encoder: same, teacher: random}",
            "inits.a: its teacher b has a teacher",
        ),
    ],
)
def test_a_teacher_that_cannot_be_is_named(tmp_path: Path, lines: str, named: str) -> None:
    (tmp_path / "c.yaml").write_text(f"store: s\ninits:\n  random: {{encoder: random}}\n  {lines}\n")
    with pytest.raises(MedclrError) as error:
        read_config(tmp_path / "c.yaml")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_what_would_stop_a_student_stops_before_the_first_cell(image_store: Path, tmp_path: Path) -> None:
    for settings, sentence in (
        ({"temprature": 2}, "inits.distilled: unknown setting --temprature; the nearest"),
        ({"confidence": 2}, "inits.distilled: confidence: 2"),
        ({"student": "resnet81"}, "inits.distilled: --student 'resnet81' is unknown; the nearest"),
        (
            {"init": "imagenet"},
            "inits.distilled: --init imagenet: the student 'same' starts from",
        ),
        ({"network.width": 0.5}, "inits.distilled: network: the student 'same' has the teacher's"),
        ({"modality": "CT"}, "inits.distilled: modality: CT, but its teacher is scored on all; leave it out"),
        ({"score": str(tmp_path)}, "inits.distilled: score: "),
        ({"split": ""}, "patients are in both the distillation of distilled and the test set"),
    ):
        student = InitConfig("same", teacher="random", settings=settings)
        plan = plan_of(image_store, inits={"random": INITS["random"], "distilled": student})
        with pytest.raises(MedclrError) as error:
            run_comparison(plan, tmp_path / "c")
        assert sentence in str(error.value)
    assert not (tmp_path / "c").exists()
    assert check(replace(plan, transductive=True))["distilled"] > 0


@pytest.fixture
def without_labels(image_store: Path, tmp_path: Path) -> Path:
    """A store of the same 24 patients that knows neither labels nor splits."""
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    lines = "".join(f"{number:02d}.png,patient {number}\n" for number in range(24))
    (tmp_path / "who.csv").write_text(f"file,patient_id\n{lines}")
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("00" * 32)  # that of image_store, and so the same pseudonyms
    index([tmp_path], tmp_path / "m.csv", labels=tmp_path / "who.csv", modality="XR", key_file=key)
    prepare(tmp_path / "m.csv", tmp_path / "store", size_px=32, key_file=key)
    patients = [{scan.patient_id for scan in Store(path).scans} for path in (tmp_path / "store", image_store)]
    assert patients[0] == patients[1]
    return tmp_path / "store"


def test_a_student_may_learn_from_a_store_of_its_own(
    image_store: Path, without_labels: Path, tmp_path: Path, no_pictures: None
) -> None:
    """It is scored on the teacher's, and the test patients among its slices are found before the first cell."""
    settings = {**INITS["distilled"].settings, "store": str(without_labels)}

    def plan(**own: Any) -> CompareConfig:
        student = InitConfig("same", teacher="random", settings=settings | own)
        return plan_of(image_store, inits={"random": INITS["random"], "distilled": student})

    out = tmp_path / "c"
    results = run_comparison(plan(), out).results
    assert [(row.init, row.reference) for row in results.taught] == [("distilled", "random")]
    test = {scan.patient_id for scan in Store(image_store).scans if scan.split == "test"}
    run_comparison(replace(plan(), keep_models=True, seeds=2), out)
    kept = json.loads((cell(out, "distilled").parent / "1" / "model" / "model.json").read_text())
    assert set(kept["patients"]) == {scan.patient_id for scan in Store(without_labels).scans} - test
    with pytest.raises(MedclrError, match="are in both the distillation of distilled and the test set"):
        run_comparison(plan(split=""), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert check(replace(plan(split=""), transductive=True))["distilled"] == len(test)


def test_what_the_students_weights_have_seen_counts(image_store: Path, tmp_path: Path) -> None:
    test = next(scan.patient_id for scan in Store(image_store).scans if scan.split == "test")
    facts = {"patients": [test], "store_px": 32}
    checkpoint.export_encoder(tmp_path / "run" / "encoder", tiny.used(tiny.Tiny()), facts)
    settings = {**INITS["distilled"].settings, "student": "resnet18", "init": str(tmp_path / "run")}
    student = InitConfig("same", teacher="random", settings=settings)
    plan = plan_of(image_store, inits={"random": INITS["random"], "distilled": student})
    with pytest.raises(MedclrError, match="are in both the distillation of distilled and the test set"):
        check(plan)
    assert found(plan)["distilled"]["weights"] != found(plan)["random"]["weights"]


def test_a_student_sees_as_many_slices_as_its_teacher(image_store: Path, tmp_path: Path) -> None:
    pretrained = tiny.used(tiny.Tiny(EncoderConfig(slices=3)))
    checkpoint.export_encoder(tmp_path / "run" / "encoder", pretrained, {"store_px": 32, "patients": []})
    student = InitConfig("same", teacher="random", settings={"student": "resnet18", "init": str(tmp_path / "run")})
    inits = {"random": INITS["random"], "distilled": student}
    assert check(plan_of(image_store, inits=inits, settings=SMALL | {"network.slices": 3})).keys() == inits.keys()
    with pytest.raises(MedclrError, match="its encoder sees 3 slices as channels, and 1 are asked for"):
        check(plan_of(image_store, inits=inits))


def test_a_student_sees_everything_as_large_as_its_teacher(
    image_store: Path, without_labels: Path, tmp_path: Path
) -> None:
    prepare(tmp_path / "m.csv", tmp_path / "half", size_px=16, key_file=tmp_path / "key")
    for name, told in ((without_labels.name, ""), ("half", "squares of 16 px, and the teacher learnt from 32 px")):
        student = InitConfig("same", teacher="random", settings={"store": str(tmp_path / name), "labelled": 0.5})
        plan = plan_of(image_store, inits={"random": INITS["random"], "distilled": student})
        with pytest.raises(MedclrError, match=told) if told else contextlib.nullcontext():
            check(plan)


def test_a_store_that_took_the_place_of_another_is_read(
    image_store: Path, without_labels: Path, tmp_path: Path
) -> None:
    """In one process, as in a notebook: a relative path in another folder, or a store that was made anew."""
    shutil.copytree(image_store, tmp_path / "here")
    plan = plan_of(tmp_path / "here", inits={"random": INITS["random"]})
    check(plan)
    shutil.rmtree(tmp_path / "here")
    shutil.copytree(without_labels, tmp_path / "here")
    with pytest.raises(MedclrError, match="classification needs labelled scans"):
        check(plan)


def test_what_was_judged_on_other_scans_is_not_paired(image_store: Path, tmp_path: Path, no_pictures: None) -> None:
    plan, out = plan_of(image_store), tmp_path / "c"
    run_comparison(plan, out)
    path = cell(out, "distilled") / "predictions.csv"
    first = path.read_text().splitlines()[1].split(",")[0]
    path.write_text(path.read_text().replace(first, "another"))
    with pytest.raises(MedclrError, match="finetune, distilled, 4 patients was judged on other scans than random"):
        run_comparison(plan, out)


def test_students_have_the_settings_of_all(image_store: Path) -> None:
    settings = SMALL | {"lr": 0.3, "precision": "bfloat16", "views": {"noise": 0.7, "strength": 0.1}, "validation": 0.0}
    student = InitConfig("same", teacher="random", settings={"steps": 9, "views.strength": 0.2})
    plan = plan_of(image_store, inits={"random": INITS["random"], "distilled": student}, settings=settings)
    its = read_distill(student_words(plan, "distilled")).settings
    assert (its.steps, its.batch, its.lr, its.precision, its.device) == (9, 4, 0.3, "bfloat16", "cpu")
    assert (its.views.noise, its.views.strength) == (0.7, 0.2)
    assert (its.size_px, its.network) == (None, EncoderConfig()), "the teacher's"


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_student_comes_before_its_teacher(image_store: Path, tmp_path: Path, monkeypatch: Any, jobs: int) -> None:
    """Side by side, cells of one call may come in any order: those of a teacher must be in a call before."""
    calls: list[list[str]] = []

    def noted(plan: CompareConfig, out: Path, run: Any, cells: Any, *number: int) -> Any:
        calls.append([cell.init for cell in cells])
        yield from ((cell, 0.0) for cell in cells)

    for name in ("_alone", "_shared"):
        monkeypatch.setattr(importlib.import_module("medclr.compare"), name, noted)
    compute(plan_of(image_store, seeds=2, jobs=jobs), tmp_path, run=lambda plan, cell, out: 0.0)
    in_turn, waves = [["random", "distilled"] * 2], [["random"] * 2, ["distilled"] * 2]
    assert calls == (in_turn if jobs == 1 else waves)
