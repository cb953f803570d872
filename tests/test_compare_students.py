"""Comparisons in which one model teaches another: what distillation adds, on the same patients."""

import csv
import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import medclr
from medclr.compare import check, compute, run_comparison
from medclr.compare_plan import CompareConfig, InitConfig, read_config
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
        ({"split": ""}, "patients are in both the distillation of distilled and the test set"),
    ):
        student = InitConfig("same", teacher="random", settings=settings)
        plan = plan_of(image_store, inits={"random": INITS["random"], "distilled": student})
        with pytest.raises(MedclrError) as error:
            run_comparison(plan, tmp_path / "c")
        assert sentence in str(error.value)
    assert not (tmp_path / "c").exists()
    assert check(replace(plan, transductive=True))["distilled"] > 0


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
