"""A run folder: made once, accepted again by the same settings, never touched by others."""

from pathlib import Path
from typing import Any

import pytest

from medclr.config import read_yaml
from medclr.errors import MedclrError
from medclr.files import LOCK_NAME
from medclr.runs import open_folder

WRITTEN = {"config.yaml", "model", "metrics.jsonl", LOCK_NAME}
SETTINGS: dict[str, Any] = {"seed": 0, "lr": 0.1, "device": "cpu", "views": {"size_px": 16}}


def opened(out: Path, overwrite: bool = False, **changes: Any) -> None:
    open_folder(out, {**SETTINGS, **changes}, WRITTEN, {"device"}, overwrite=overwrite)


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    opened(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "weights").write_text("hard won")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "run"


def test_the_same_settings_are_let_in(run: Path) -> None:
    before = content(run)
    opened(run)
    assert content(run) == before
    assert read_yaml(run / "config.yaml") == SETTINGS


def test_what_cannot_change_the_result_may_differ_and_is_written_down(run: Path) -> None:
    opened(run, device="cuda")
    assert read_yaml(run / "config.yaml")["device"] == "cuda"
    assert (run / "model" / "weights").exists()


def test_other_settings_are_named_and_nothing_is_touched(run: Path) -> None:
    before = content(run)
    with pytest.raises(MedclrError, match=r"\(lr was 0.1 and is now 0.2; views.size_px was 16 and is now 32\); choose"):
        opened(run, lr=0.2, views={"size_px": 32}, device="cuda")
    assert content(run) == before
    with pytest.raises(MedclrError) as error:
        opened(run, **{f"a{i:02d}": i for i in range(20)})
    assert "a07 was None and is now 7; and 12 more); choose" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["thesis.txt", ".hidden", "config.yml"])
def test_a_folder_that_is_no_run_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("three years")
    for overwrite in (False, True):
        with pytest.raises(MedclrError, match="is not a run of medclr"):
            opened(tmp_path, overwrite)
    assert content(tmp_path) == {name: b"three years"}
    with pytest.raises(MedclrError, match="is not a run of medclr"):
        opened(tmp_path / name)


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path) -> None:
    for name in (LOCK_NAME, ".config.yaml.1234.tmp"):
        (tmp_path / name).touch()
    opened(tmp_path)
    assert read_yaml(tmp_path / "config.yaml") == SETTINGS
    (tmp_path / ".scores.csv.99.tmp").touch()
    opened(tmp_path, overwrite=True, lr=1.0)


def test_overwriting_removes_a_run_and_nothing_else(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    before = content(run)
    with pytest.raises(MedclrError, match=r"holds notes\.txt, which no run wrote, and is not overwritten"):
        opened(run, overwrite=True, lr=0.2)
    assert content(run) == before
    (run / "notes.txt").unlink()
    (run / LOCK_NAME).touch()
    opened(run, overwrite=True, lr=0.2)
    assert set(content(run)) == {"config.yaml", LOCK_NAME}
    assert read_yaml(run / "config.yaml")["lr"] == 0.2


def test_a_damaged_config_is_one_sentence(run: Path) -> None:
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(MedclrError, match="cannot be read as YAML"):
        opened(run)
