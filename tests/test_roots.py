"""Archives and DICOMDIRs through `index`: the same scans as from a folder, found once, called by opaque names."""

from pathlib import Path

import pytest

from medclr.errors import MedclrError
from medclr.sources import archive, bring
from tests.test_index import Ward, write_nifti, write_series
from tests.test_sources import write_disc, write_tar, write_zip


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def zip_folder(folder: Path, path: Path) -> Path:
    contents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_zip(path, contents)


def elsewhere(folder: Path, root: Path) -> Ward:
    folder.mkdir()
    ward = Ward(folder)
    ward.root = root
    return ward


def test_a_zip_of_a_folder_is_indexed_as_the_folder(ward: Ward, tmp_path: Path) -> None:
    write_series(ward.root / "Doe^Jane" / "ct")
    write_nifti(ward.root / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    path = zip_folder(ward.root, tmp_path / "export of Doe.zip")
    ward.index()
    expected = {(ward.path(row.path), row.patient_id, row.sha256) for row in ward.manifest.rows}
    zipped = elsewhere(tmp_path / "zipped", path)
    zipped.key.write_bytes(ward.key.read_bytes())
    zipped.key.chmod(0o600)
    zipped.index()
    assert {(zipped.path(row.path), row.patient_id, row.sha256) for row in zipped.manifest.rows} == expected
    assert all(b"Doe" not in data for data in zipped.bytes().values())
    copies = zipped.out.with_suffix(".copies")
    assert copies.stat().st_mode & 0o777 == 0o700
    before = zipped.bytes()
    assert zipped.index().added == 0
    assert zipped.bytes() == before


def test_archives_inside_a_folder(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ward.root.parent / "source"
    for patient in ("A", "B"):
        write_series(source / patient / "ct", patient=patient)
        zip_folder(source / patient, ward.root / "patients" / f"Doe-{patient}.zip")
    write_nifti(ward.root / "sub-01_T1w.nii.gz")  # gzip, but no archive
    write_tar(ward.root / "broken.tar", {"../out": b"x", "note.txt": b"x"})
    (ward.root / "cut.zip").write_bytes((ward.root / "patients" / "Doe-A.zip").read_bytes()[:500])

    pattern = r"(?:Doe|sub)-(\w+)"  # finds the patient in the name of the archive
    summary = ward.index(patient_pattern=pattern)
    assert summary.scans == 3
    assert {ward.path(row.path) for row in ward.manifest.rows} == {
        "patients/Doe-A.zip/ct",
        "patients/Doe-B.zip/ct",
        "sub-01_T1w.nii.gz",
    }
    assert ward.reasons() == {
        "broken.tar/../out": "has a path that leads out of the archive",
        "broken.tar/note.txt": "is neither DICOM, NIfTI nor a PNG, JPEG or TIFF image",
        "cut.zip": "is damaged or incomplete (BadZipFile); fetch it again",
    }
    before = ward.bytes()
    with monkeypatch.context() as patch:
        patch.setattr(archive, "members_of", None)  # nothing is unpacked again
        again = ward.index(patient_pattern=pattern)
    assert (again.added, ward.bytes()) == (0, before)

    (ward.root / "patients" / "Doe-A.zip").unlink()
    with pytest.raises(MedclrError, match=r"4 of its files are no longer there, the first is f-\w+; bring them back"):
        ward.index(patient_pattern=pattern)


def test_copies_that_lie_in_the_folder_that_is_indexed(ward: Ward) -> None:
    source = ward.root.parent / "source"
    write_series(source)
    zip_folder(source, ward.root / "a.zip")
    ward.out = ward.root / "manifest.csv"
    assert ward.index().scans == 1
    assert ward.index().scans == 1
    ward.root = zip_folder(source, ward.root.parent / "b.zip")
    assert ward.index().scans == 2


def test_a_dicomdir_is_indexed(ward: Ward, tmp_path: Path) -> None:
    path = write_disc(tmp_path / "disc")
    listed = bring(path, tmp_path).files
    assert listed is not None
    write_series(tmp_path / "disc" / "elsewhere", patient="not listed")
    ward.root = path
    assert ward.index().scans == 1
    (row,) = ward.manifest.rows
    assert (row.n_slices, ward.reasons()) == (4, {})
    (tmp_path / "disc" / listed[3]).unlink()
    other = elsewhere(tmp_path / "other", path)
    other.index()
    assert other.reasons() == {listed[3]: "stands in the DICOMDIR but is not there"}
