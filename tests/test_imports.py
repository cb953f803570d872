"""Imports flow one way, and what must start fast imports neither torch nor MONAI. Read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "medclr"
LAYERS = (  # a file may import what stands above it, and its own folder
    "errors", "files", "config", "progress figures report track monitor memory clock runs device",
    "checkpoint distributed", "stop", "scans", "sources", "data", "augment models losses optim outcomes figures_masks",
    "statistics methods tasks", "embed describe trained",
    "step look request gallery", "pretrain finetune probe", "distill predict plan",
    "compare_plan", "compare_results", "compare_figures", "compare_page", "compare", "demo", "cli", "__main__",
)  # fmt: skip
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
ONLY = {  # parts that know less than their layer would allow
    "checkpoint": {"config", "errors", "files"},
    "distributed": {"config", "errors", "files"},
    "losses": {"errors"},
    "optim": {"errors"},
}
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__"): path for path in ROOT.rglob("*.py")
}
del FILES["__init__"]  # the public API, which imports each function when it is first used
FAST = [name for name in FILES if name.split("/")[0] in ("scans", "sources", "config", "cli", "__main__")]
FAST.append("data/manifest")


def imports(path: Path, *, run: bool) -> Iterator[str]:
    """Names imported by a file, as dotted paths; with ``run`` only those that importing the file itself imports."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if not (run and (later or typing)):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(dotted: str) -> str | None:
    """'medclr.scans.scan.Scan' -> 'scans/scan', or None where no file of ours is meant."""
    parts = dotted.split(".")[1:] if dotted.startswith("medclr.") else []
    names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in FILES), None)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_flow_one_way(name: str) -> None:
    part = name.split("/")[0]
    assert part in LAYER, f"{part} has no place in LAYERS yet"
    for dotted in imports(FILES[name], run=False):
        target = (file_of(dotted) or part).split("/")[0]
        assert target == part or LAYER[target] < LAYER[part], f"{name} imports {dotted}"
        assert target == part or target in ONLY.get(part, {target}), f"{name} imports {dotted}"
        if part in ("losses", "optim"):
            assert dotted.split(".")[0] in {"torch", "medclr", *sys.stdlib_module_names}, f"{name} imports {dotted}"


@pytest.mark.parametrize("name", FAST)
def test_fast_starters_import_neither_torch_nor_monai(name: str) -> None:
    seen, todo = set(), [name]
    while todo:
        here = todo.pop()
        seen.add(here)
        for dotted in imports(FILES[here], run=True):
            assert dotted.split(".")[0] not in ("torch", "monai", "torchvision"), f"{name} imports {dotted} by {here}"
            target = file_of(dotted)
            if target:
                todo.extend({target, target.split("/")[0]} - seen)  # a folder's __init__ runs too


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\nif x:\n    from d import e\ndef f():\n    import medclr.g\n"
    (tmp_path / "module.py").write_text(source)
    assert list(imports(tmp_path / "module.py", run=False)) == ["a.b", "c", "d.e", "medclr.g"]
    assert list(imports(tmp_path / "module.py", run=True)) == ["a.b", "d.e"]
    assert file_of("medclr.losses.nt_xent.nt_xent") == "losses/nt_xent"
    assert file_of("medclr.files") == "files"
    assert file_of("torch.nn") is None
    assert {"data/manifest", "cli", "config", "scans"} <= set(FAST)
