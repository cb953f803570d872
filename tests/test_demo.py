"""The demo: the whole road on phantoms, with commands that work when typed."""

import importlib
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medclr.cli import main
from medclr.data import phantom
from medclr.demo import demo
from medclr.errors import MedclrError
from medclr.scans import privacy

SMALL = {
    "epochs": 2,
    "batch": 16,
    "views.size_px": 16,
    "data.slices_per_scan": 2,
    "monitor.sample": 32,
    "device": "cpu",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few slices, few steps, and a key under which both classes have training and test patients."""
    thin = [replace(scanner, ct_slices=5, ct_slice_mm=50, mr_slices=5, mr_slice_mm=25) for scanner in phantom.SCANNERS]
    monkeypatch.setattr(phantom, "SCANNERS", tuple(thin))
    module = importlib.import_module("medclr.demo")
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | SMALL)
    monkeypatch.setattr(module, "FEW", module.FEW | {"steps": 2, "batch": 4, "device": "cpu"})
    monkeypatch.setattr(privacy.os, "urandom", lambda count: b"\0" * count)


def test_the_whole_road_and_its_commands(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "demo", tmp_path / "again"
    summary = demo(out, patients=16)
    assert {path.parent.name for path in summary.pictures} == {"figures", "predictions", "demo"}
    for picture in summary.pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 200
            assert image.convert("L").getextrema() != (255, 255)
    for words in ("run: ", "random: ", "knn", "logistic", "macro AUC", *map(str, summary.pictures)):
        assert words in str(summary)
    assert not list(out.rglob("*.tmp"))

    said = capsys.readouterr().out
    commands = [line.removeprefix("$ medclr ") for line in said.splitlines() if line.startswith("$ medclr ")]
    road = ["index", "prepare", "pretrain", "probe", "probe", "finetune", "predict", "embed"]
    assert [command.split()[0] for command in commands] == road
    shutil.copytree(out / "scans", again / "scans")
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in commands:
        assert main(shlex.split(command.replace(str(out), str(again)))) == 0, command
    for made in (path.relative_to(out) for path in out.rglob("*.png")):
        assert (again / made).exists(), made


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(MedclrError, match="exists already; remove it or choose another folder"):
            demo(out)
    assert (tmp_path / "thesis.txt").read_text() == "three years"
    assert len(list(tmp_path.iterdir())) == 1


def test_too_few_patients_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="--patients must be at least"):
        demo(tmp_path / "demo", patients=7)
    assert not list(tmp_path.iterdir())
