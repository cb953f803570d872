"""Scripts -> notebooks: each file of ``src/`` is the source of one, which is run and written with its pictures.

    python notebooks/build.py                    # all of them
    python notebooks/build.py 01_pretrain_on_your_scans
    python notebooks/build.py --text             # where only words have changed: nothing is run

A source is plain Python in the percent format: a line ``# %%`` opens a code cell, ``# %% [markdown]`` one of text, of
which each line is a comment. Cells run one after the other in one namespace, as in Jupyter, and what they print and the
value of their last line become the outputs; no Jupyter is needed. Notebooks run in an empty folder, so that no path of
this machine gets into them.
"""

import ast
import base64
import contextlib
import io
import json
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medclr.files import write_text

HERE = Path(__file__).resolve().parent
PARAMETERS = "parameters"
"""The name, ``# %% parameters``, of the cell with the settings that are meant to be changed."""


@dataclass(frozen=True)
class Cell:
    """One cell, and what it gave when it was run."""

    kind: str
    """code or markdown."""
    name: str
    text: str
    outputs: list[dict[str, Any]] = field(default_factory=list)


def read_source(path: Path) -> list[Cell]:
    """The cells of a script in percent format; what stands above the first is left out."""
    cells: list[tuple[str, str, list[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# %%"):
            name = line.removeprefix("# %%").strip()
            cells.append(("markdown" if name == "[markdown]" else "code", name, []))
        elif cells:
            cells[-1][2].append(re.sub("^# ?", "", line) if cells[-1][0] == "markdown" else line)
    return [Cell(kind, name, "\n".join(lines).strip("\n")) for kind, name, lines in cells]


def run(cells: Sequence[Cell], changed: Mapping[str, Any] | None = None) -> list[Cell]:
    """Run the code cells in one namespace, in the current folder; ``changed`` replaces parameters.

    Raises:
        KeyError: ``changed`` names what the cell of parameters does not set.
    """
    module = types.ModuleType("__main__")
    namespace, done = module.__dict__, []
    for number, cell in enumerate(cells):
        if cell.kind == "code":
            outputs = list(_outputs(cell.text, f"cell {number}", namespace))
            if cell.name == PARAMETERS:
                for name, value in (changed or {}).items():
                    _ = namespace[name]
                    namespace[name] = value
            cell = replace(cell, outputs=outputs)
        done.append(cell)
    return done


def _outputs(source: str, name: str, namespace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a cell: what it prints, and the value of its last line, as a picture if it is one."""
    lines = ast.parse(source, name).body
    last = ast.Expression(lines.pop().value) if lines and isinstance(lines[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(lines, []), name, "exec"), namespace)
        if last is not None:
            value = eval(compile(last, name, "eval"), namespace)
    if words := printed.getvalue():
        yield {"name": "stdout", "output_type": "stream", "text": words.splitlines(keepends=True)}
    if value is not None:
        draw = getattr(value, "_repr_png_", None)
        text = {"text/plain": repr(value).splitlines(keepends=True)}
        data = {"image/png": base64.b64encode(draw()).decode()} if draw else text
        yield {"data": data, "metadata": {}, "output_type": "display_data"}


def notebook(cells: Sequence[Cell]) -> str:
    """The notebook (nbformat 4.5) as text; the same cells give the same text."""
    content = []
    for number, cell in enumerate(cells):
        made: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number:02}", "metadata": {}}
        if cell.kind == "code":
            made |= {"execution_count": None, "outputs": cell.outputs}
            made["metadata"] = {"tags": [PARAMETERS]} if cell.name == PARAMETERS else {}
        content.append(made | {"source": cell.text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    facts = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": content, "metadata": facts, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def with_outputs(cells: Sequence[Cell], made: Path) -> list[Cell]:
    """The cells with the outputs that the notebook ``made`` holds.

    Raises:
        ValueError: some code has changed since it was run.
    """
    old = [cell for cell in json.loads(made.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    if ["".join(cell["source"]) for cell in old] != [cell.text for cell in cells if cell.kind == "code"]:
        raise ValueError(f"{made.name}: its code has changed, so it has to run again; leave out --text")
    outputs = (cell["outputs"] for cell in old)
    return [replace(cell, outputs=next(outputs)) if cell.kind == "code" else cell for cell in cells]


def main(words: Sequence[str]) -> None:
    """Run and write the notebooks of these names, or all; a later one finds what an earlier one made."""
    names = [word for word in words if word != "--text"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for source in sorted((HERE / "src").glob("*.py")):
            if names and source.stem not in names:
                continue
            print(source.stem, file=sys.stderr, flush=True)
            cells, made = read_source(source), HERE / f"{source.stem}.ipynb"
            write_text(made, notebook(with_outputs(cells, made) if "--text" in words else run(cells)))


if __name__ == "__main__":
    main(sys.argv[1:])
