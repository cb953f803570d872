"""The manifest tables."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medclr import files
from medclr.data.manifest import (
    FileRow,
    Rejected,
    ScanRow,
    files_path,
    read_manifest,
    read_rejected,
    write_manifest,
)
from medclr.errors import MedclrError


def scan(scan_id: str, patient_id: str = "p-1", **changes: Any) -> ScanRow:
    row = ScanRow(scan_id, patient_id, "", "MR", "brain", "axial", f"{scan_id}.nii", 3, 4, 5, 2.5, 0.9765625, 1.0, "ab")
    return replace(row, **changes)


def image_of(row: ScanRow, name: str = "a.nii") -> FileRow:
    return FileRow(row.scan_id, "image", "/scans", name, 10, 1_700_000_000_000_000_001, "", "")


def write(folder: Path, *rows: ScanRow) -> Path:
    return write_manifest(folder / "m.csv", rows, map(image_of, rows), []).path


def rewrite(path: Path, change: Callable[[list[list[str]]], object]) -> None:
    with path.open(newline="") as file:
        table = list(csv.reader(file))
    change(table)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    b = scan("s-b", "p-2", label='says "no", then\nyes', mask_path="m, 1.nii")
    a = scan("s-a", "p-1", spacing_z_mm=None, spacing_y_mm=None, spacing_x_mm=None, split="train")
    slices = [image_of(b, f"{name}.dcm") for name in "cab"]  # geometric order, not that of the names
    mask = FileRow("s-b", "mask", "/masks", "m, 1.nii", 1, 2, "", "")
    rejected = [Rejected("/scans/z", "is empty"), Rejected("/scans/y", "is, too")]
    written = write_manifest(tmp_path / "m.csv", [b, a], [mask, *slices, image_of(a)], rejected)

    manifest = read_manifest(tmp_path / "m.csv")
    assert manifest == written
    assert manifest.rows == [a, b]
    assert [path.name for path in manifest.files["s-b"].image] == ["c.dcm", "a.dcm", "b.dcm"]
    assert manifest.files["s-b"].mask == Path("/masks/m, 1.nii")
    assert manifest.files["s-a"].mask is None
    assert manifest.sha256 == files.sha256(tmp_path / "m.csv")
    assert read_rejected(tmp_path / "m.csv") == sorted(rejected, key=lambda r: r.path)


def test_the_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    rows = [scan(f"s-{i}", f"p-{i % 3}") for i in range(6)]
    first = write(tmp_path / "1", *rows).read_bytes()
    assert first == write(tmp_path / "2", *reversed(rows)).read_bytes()


def test_a_spreadsheet_may_reorder_columns_and_add_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, scan("s-a"))
    rewrite(path, lambda table: [row.reverse() for row in table])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_manifest(path).rows == [scan("s-a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [row.pop(1) for row in t], "column patient_id is missing"),
        (lambda t: [row.append("name") for row in t], "column 'name' is unknown"),
        (lambda t: t[1].pop(), "line 2: 18 cells where 19"),
        (lambda t: t[1].__setitem__(7, "many"), "line 2: invalid literal for int"),
        (lambda t: t[1].__setitem__(3, "XX"), "modality 'XX'"),
        (lambda t: t[1].__setitem__(7, "0"), "no slices"),
        (lambda t: t[1].__setitem__(1, ""), "no scan_id or patient_id"),
        (lambda t: t.append(t[1]), "s-a stands twice"),
        (lambda t: t.append(["s-b", *t[1][1:18], "test"]), "p-1 stands in two splits, '' and 'test'"),
        (lambda t: t.append(["s-b", *t[1][1:]]), "no file for scan s-b"),
        (lambda t: t.pop(), "s-a is not in m.csv"),
        (lambda t: t.clear(), "column scan_id, patient_id"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Callable[[list[list[str]]], object], message: str) -> None:
    path = write(tmp_path, scan("s-a"))
    rewrite(path, change)
    with pytest.raises(MedclrError, match=message):
        read_manifest(path)


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match=r"m\.csv: no such file"):
        read_manifest(tmp_path / "m.csv")
    path = write(tmp_path, scan("s-a"))
    files_path(path).unlink()
    with pytest.raises(MedclrError, match=r"m\.files\.csv: no such file"):
        read_manifest(path)


def test_contradicting_rows_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="two splits"):
        write(tmp_path, scan("s-a", split="train"), scan("s-b", split="test"))
    assert not list(tmp_path.iterdir())
