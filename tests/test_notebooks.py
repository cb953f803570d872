"""Every notebook is what its source says, shows its pictures, and runs from top to bottom."""

import base64
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
TINY: dict[str, dict[str, Any]] = {
    "01_pretrain_on_your_scans": {"PATIENTS": 4, "EPOCHS": 1, "BATCH": 16, "SIZE_PX": 24},
    "02_few_labels_vs_imagenet_classification": {
        "PATIENTS": 16, "EPOCHS": 1, "BATCH": 8, "SIZE_PX": 72, "BUDGETS": [2, 4], "SEEDS": 1, "STEPS": 2,
    },
    "03_few_labels_segmentation": {
        "PATIENTS": 6, "EPOCHS": 1, "BATCH": 8, "SIZE_PX": 24, "CASES": 2, "STEPS": 2,
    },
    "04_look_inside_embeddings": {"PATIENTS": 4, "EPOCHS": 1, "BATCH": 16, "SIZE_PX": 24},
}  # fmt: skip
"""So small that nothing is learnt, but every cell runs."""


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


build = load_build()


def pictures(outputs: list[dict[str, Any]]) -> list[Image.Image]:
    found = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in found]


def check_run(cells: list[Any]) -> None:
    """Something is printed or shown in every notebook, and no picture is blank."""
    shown = [picture for cell in cells for picture in pictures(cell.outputs)]
    assert len(shown) >= 3
    for picture in shown:
        assert np.asarray(picture.convert("L")).std() > 5


def test_every_source_has_a_notebook_and_a_tiny_size() -> None:
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(TINY)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
class TestCommitted:
    def test_is_what_its_source_says(self, source: Path) -> None:
        made = json.loads((FOLDER / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
        cells = build.read_source(source)
        assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == [
            (cell.kind, cell.text) for cell in cells
        ], "run `make notebooks`, or, if only words have changed, python notebooks/build.py --text"

    def test_is_valid_shows_pictures_and_no_path(self, source: Path) -> None:
        text = (FOLDER / f"{source.stem}.ipynb").read_text(encoding="utf-8")
        assert len(text) < 1_000_000
        made = json.loads(text)
        assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
        cells = made["cells"]
        assert len({cell["id"] for cell in cells}) == len(cells)
        for cell in cells:
            assert cell["cell_type"] in ("code", "markdown")
            assert cell.keys() - {"outputs", "execution_count"} == {"cell_type", "id", "metadata", "source"}
            assert all(line.endswith("\n") for line in cell["source"][:-1])
            assert ("outputs" in cell) == (cell["cell_type"] == "code")
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
        shown = pictures(outputs)
        assert len(shown) >= 3
        assert max(picture.width for picture in shown) <= 1200
        for place in ("/home/", "/tmp/", "/Users/", "C:\\\\", "/work/", "/root/"):
            assert place not in text


def test_tiny_notebook_1_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_run(build.run(build.read_source(SOURCES[0]), TINY[SOURCES[0].stem]))
    assert {path.name for path in tmp_path.iterdir()} == {"medclr_work"}, "all that it writes is in one folder"


@pytest.mark.slow
def test_tiny_notebook_4_goes_on_with_what_1_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, last = SOURCES[0], SOURCES[3]
    build.run(build.read_source(first), TINY[first.stem])
    before = (tmp_path / "medclr_work/phantoms/run/metrics.jsonl").read_bytes()
    check_run(build.run(build.read_source(last), TINY[last.stem]))
    assert (tmp_path / "medclr_work/phantoms/run/metrics.jsonl").read_bytes() == before, "trains nothing anew"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda path: path.stem)
def test_tiny_notebook_runs_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_run(build.run(build.read_source(source), TINY[source.stem]))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_own_scans_run_by_changing_the_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medclr.data.phantom import write_cohort

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the key of the pseudonyms is drawn there
    own = tmp_path / "own"
    write_cohort(tmp_path / "cohort", patients=16, seed=4, size_px=48)
    part = "xr" if source.stem.startswith("02") else "mr"
    shutil.copytree(tmp_path / "cohort" / part, own)
    changed = {"SCANS": own} | {k: v for k, v in TINY[source.stem].items() if k != "PATIENTS"}
    if source.stem.startswith("02"):
        changed["LABELS"] = tmp_path / "cohort" / "labels.csv"
    if source.stem.startswith("03"):
        changed["MASKS"] = tmp_path / "cohort" / "mr_masks"
    check_run(build.run(build.read_source(source), changed))
    run = "run_dense" if source.stem.startswith("03") else "run"
    assert (tmp_path / "medclr_work" / "own" / run / "encoder").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_notebooks_run_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in SOURCES:
        check_run(build.run(build.read_source(source)))


class TestBuild:
    SOURCE = (
        '"""Left out."""\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %% parameters\nN = 2\n\n# %%\nprint(N)\nN + 1\n'
    )

    def cells(self, tmp_path: Path, text: str = SOURCE) -> list[Any]:
        (tmp_path / "x.py").write_text(text)
        found: list[Any] = build.read_source(tmp_path / "x.py")
        return found

    def test_cells_of_a_source(self, tmp_path: Path) -> None:
        found = [(cell.kind, cell.name, cell.text) for cell in self.cells(tmp_path)]
        assert found == [
            ("markdown", "[markdown]", "# Title\n\nText."),
            ("code", "parameters", "N = 2"),
            ("code", "", "print(N)\nN + 1"),
        ]

    def test_outputs_are_what_is_printed_and_the_last_value(self, tmp_path: Path) -> None:
        done = build.run(self.cells(tmp_path), {"N": 5})
        assert done[1].outputs == []
        stream, value = done[2].outputs
        assert stream == {"name": "stdout", "output_type": "stream", "text": ["5\n"]}
        assert value["data"] == {"text/plain": ["6"]}

    def test_a_picture_is_shown_as_one(self, tmp_path: Path) -> None:
        source = "# %%\nfrom PIL import Image\nImage.new('L', (3, 2))\n"
        (picture,) = pictures(build.run(self.cells(tmp_path, source))[0].outputs)
        assert picture.size == (3, 2)

    def test_an_unknown_parameter_and_an_error_are_raised(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError, match="M"):
            build.run(self.cells(tmp_path), {"M": 5})
        with pytest.raises(ZeroDivisionError):
            build.run(self.cells(tmp_path, "# %%\n1 / 0\n"))

    def test_words_change_without_running_and_code_does_not(self, tmp_path: Path) -> None:
        made = tmp_path / "x.ipynb"
        made.write_text(build.notebook(build.run(self.cells(tmp_path))))
        cells = build.with_outputs(self.cells(tmp_path, self.SOURCE.replace("Text", "Words")), made)
        assert cells[0].text == "# Title\n\nWords."
        assert cells[2].outputs[0]["text"] == ["2\n"]
        with pytest.raises(ValueError, match="has to run again"):
            build.with_outputs(self.cells(tmp_path, self.SOURCE.replace("N + 1", "N + 2")), made)
