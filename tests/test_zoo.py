"""Odd files of every kind, laid beside independent readers (``make zoo``), and that the comparison sees differences."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medclr import scans
from medclr.scans.nifti import read_mask
from medclr.scans.scan import Scan
from tests import zoo
from tests.conftest import SHARED, shared_data
from tests.oracles import Reference


@pytest.mark.parametrize("name", ["pydicom", "dicom_zoo", "mr_brain_dicom", "ct_abdomen_dicom", "ct_body"])
def test_every_scan_agrees_with_an_independent_reader(name: str) -> None:
    if name != "pydicom":
        shared_data(name)
    if name.endswith("_dicom") and shutil.which("dcm2niix") is None:
        pytest.skip("dcm2niix is not installed: apt-get install dcm2niix")
    files = dict(zoo.collections(SHARED))[name]
    rows = zoo.visit(name, files)
    assert sorted({path for row in rows for path in row.files}) == files
    assert not [words for row in rows for words in row.trouble]
    assert sum(row.scan is not None for row in rows) >= {"pydicom": 70, "dicom_zoo": 60, "mr_brain_dicom": 8}.get(
        name, 1
    )
    text = zoo.page(rows, [])
    assert str(Path.home()) not in text
    assert all(row.name in text for row in rows)


def test_labels_fall_on_the_same_anatomy_and_only_so() -> None:
    data = shared_data("ct_abdomen_labels_117.nii.gz").parent
    scan = scans.read(sorted((data / "ct_abdomen_dicom").iterdir()))
    mask = read_mask(data / "ct_abdomen_labels_117.nii.gz", like=scan)
    assert [what for what, _, is_so in zoo.anatomy(scan, mask) if not is_so] == []
    for axis in range(3):
        turned = replace(scan, voxels=np.ascontiguousarray(np.flip(scan.voxels, axis)))
        assert [what for what, _, is_so in zoo.anatomy(turned, mask) if not is_so]
    mirrored = replace(scan, affine=np.diag([-1.0, 1.0, 1.0, 1.0]) @ scan.affine)
    assert [what for what, _, is_so in zoo.anatomy(mirrored, mask) if not is_so] == [
        "the liver lies right of the spleen"
    ]


def a_scan() -> Scan:
    voxels = np.random.default_rng(0).normal(0, 100, (3, 4, 5)).astype(np.float32)
    affine = np.diag([3.0, 2.0, 1.0, 1.0])[[2, 1, 0, 3]]  # slices up, rows forward, columns to the right
    return Scan(voxels, affine, (3.0, 2.0, 1.0), "MR", voxels.shape)


def test_voxels_are_compared_where_they_lie() -> None:
    scan = a_scan()
    order = scan.affine[:, [2, 1, 0, 3]]  # [X,Y,Z], as NIfTI has it
    turned = Reference("some", scan.voxels.transpose(2, 1, 0).astype(float), order, (1.0, 2.0, 3.0))
    assert list(zoo.compare(scan, turned, is_placed=True)) == []
    flipped = order @ np.array([[-1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert list(zoo.compare(scan, replace(turned, voxels=turned.voxels[::-1], affine=flipped), is_placed=True)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ref: replace(ref, voxels=ref.voxels[::-1]), "values"),
        (lambda ref: replace(ref, voxels=ref.voxels + 0.01 * (ref.voxels == ref.voxels.max())), "1 of 60 values"),
        (lambda ref: replace(ref, voxels=ref.voxels[:, :3]), "shape"),
        (lambda ref: replace(ref, affine=ref.affine + np.eye(4)[:, [3, 1, 2, 0]] * [0, 0, 0, 0.5]), "elsewhere"),
        (lambda ref: replace(ref, affine=ref.affine @ np.diag([1.01, 1, 1, 1])), "elsewhere"),
        (lambda ref: replace(ref, affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ ref.affine), "elsewhere"),
    ],
)
def test_differences_are_seen(change: Callable[[Reference], Reference], words: str) -> None:
    scan = a_scan()
    same = Reference("some", scan.voxels.astype(float), scan.affine, scan.spacing_mm)
    assert list(zoo.compare(scan, same, is_placed=True)) == []
    (difference,) = zoo.compare(scan, change(same), is_placed=True)
    assert words in difference


def test_what_nobody_can_explain_is_trouble(tmp_path: Path) -> None:
    row = zoo.Row("some", (tmp_path / "a.dcm",), a_scan(), looks=(zoo.Look("X", ()),))
    assert row.trouble == []
    assert "no independent" in replace(row, looks=()).trouble[0]
    assert "5 of 60 values" in replace(row, looks=(zoo.Look("X", ()), zoo.Look("Y", ("5 of 60 values",)))).trouble[0]
    explained = replace(row, files=(tmp_path / "mlut_18.dcm",))
    assert explained.name in {name for name, _ in zoo.EXPLAINED}
    why = zoo.EXPLAINED["mlut_18.dcm", "SimpleITK"].why
    stale = replace(explained, looks=(zoo.Look("SimpleITK", (), why),))
    assert "is explained to differ" in stale.trouble[0]
    alone = replace(explained, looks=(zoo.Look("SimpleITK", ("60 of 60 values",), why),))
    assert alone.trouble == ["some, mlut_18.dcm: agrees with no independent reader"]
