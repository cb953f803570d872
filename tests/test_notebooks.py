"""Every notebook runs from top to bottom, as Jupyter would run it, and carries no output of anybody's machine."""

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> object:
    """Run a cell; the value of its last line, if that is an expression."""
    lines = ast.parse(source, name).body
    last = ast.Expression(lines.pop().value) if lines and isinstance(lines[-1], ast.Expr) else None
    exec(compile(ast.Module(lines, []), name, "exec"), namespace)
    return eval(compile(last, name, "eval"), namespace) if last else None


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown = run_cell("".join(cell["source"]), f"{path.name}, cell {cell['id']}", namespace)
        if (draw := getattr(shown, "_repr_png_", None)) is not None:
            assert len(draw()) > 1000, f"cell {cell['id']} shows no picture"
    assert not list(tmp_path.glob("medclr-*")), "a notebook cleans up"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_stripped(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    assert notebook["nbformat_minor"] >= 5
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs before committing"
    for place in ("/home/", "/tmp/", "/Users/", "C:\\\\"):
        assert place not in text
