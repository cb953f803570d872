"""`medclr index`: what becomes a row, whose it is, what is rejected, and what a second run changes."""

import csv
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medclr.data.index import IndexSummary, index
from medclr.data.manifest import (
    Manifest,
    read_manifest,
    read_rejected,
    table_paths,
)
from medclr.data.places import find_places
from medclr.data.splits import split_of
from medclr.errors import MedclrError
from medclr.scans.policy import Policy
from medclr.scans.privacy import Pseudonyms, load_key
from tests.conftest import shared_data

SECRETS = ("Doe^Jane", "HOSP-4711", "19700101", "General Hospital", "chest pain")


def write_series(folder: Path, patient: str = "HOSP-4711", series: str = "1", slices: range = range(4)) -> list[Path]:
    """A CT series whose file names run against its geometry; UIDs follow from ``patient`` and ``series``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in slices:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        uid = generate_uid(entropy_srcs=[patient, series, str(i)])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[patient])
        dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[patient, series])
        dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = patient, "Doe^Jane", "19700101"
        dataset.InstitutionName, dataset.StudyDescription = "General Hospital", "chest pain"
        dataset.Modality, dataset.BodyPartExamined, dataset.ImageType = "CT", "CHEST", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 6, 8, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelSpacing, dataset.SliceThickness = [0.75, 0.75], 2.5
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [0, 0, 2.5 * i]
        dataset.PixelData = np.full((6, 8), 1000 + i, np.uint16).tobytes()
        paths.append(folder / f"{200 - i}")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_nifti(path: Path, fill: float = 1.0, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full(shape, fill, np.float32)
    values.flat[0] = 0
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    return path


def write_image(path: Path, fill: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 7), fill, np.uint8)).save(path)
    return path


def write_table(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


class Ward:
    """A folder of scans, and the manifest made of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "scans"
        self.out = tmp_path / "tables" / "ward.csv"
        self.key = tmp_path / "key"
        self.root.mkdir()

    def index(self, **options: Any) -> IndexSummary:
        return index([self.root], self.out, **{"key_file": self.key, **options})

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.out, self.key)

    def path(self, name: str) -> str:
        """What an opaque id stands for, relative to its root."""
        return find_places(self.key, [name])[name].path

    def column(self, name: str) -> dict[str, Any]:
        return {self.path(row.path): getattr(row, name) for row in self.manifest.rows}

    def masks(self) -> dict[str, str]:
        return {path: name and self.path(name) for path, name in self.column("mask_path").items()}

    def reasons(self) -> dict[str, str]:
        return {self.path(r.path): r.reason for r in read_rejected(self.out)}

    def bytes(self) -> Mapping[str, bytes]:
        return {path.name: path.read_bytes() for path in table_paths(self.out)}

    def renamed(self, message: str) -> str:
        """A message with the paths in place of the ids."""
        return re.sub("f-[0-9a-f]{16}", lambda name: self.path(name[0]), message)


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def test_a_mixed_folder(ward: Ward) -> None:
    write_series(ward.root / "ct" / "a")
    write_nifti(ward.root / "mr" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    write_image(ward.root / "xr" / "sub-02_dx.png")
    (ward.root / "readme.txt").write_text("hello")
    (ward.root / ".hidden").write_text("not seen")
    (ward.root / "empty.dcm").touch()
    summary = ward.index()
    assert (summary.scans, summary.patients, summary.slices, summary.added, summary.rejected) == (3, 3, 11, 3, 2)
    assert ward.reasons() == {
        "empty.dcm": "is empty",
        "readme.txt": "is neither DICOM, NIfTI nor a PNG, JPEG or TIFF image",
    }
    ct, mr, xr = sorted(ward.manifest.rows, key=lambda row: row.modality)
    assert (ward.path(ct.path), ct.modality, ct.body_part, ct.plane) == ("ct/a", "CT", "chest", "axial")
    assert (ct.n_slices, ct.rows, ct.columns) == (4, 6, 8)
    assert (ct.spacing_z_mm, ct.spacing_y_mm, ct.spacing_x_mm) == (2.5, 0.75, 0.75)
    assert (mr.modality, mr.plane, mr.n_slices, mr.study_id) == ("MR", "axial", 6, "")
    assert (xr.modality, xr.plane, xr.spacing_x_mm) == ("XR", "", None)
    slices = ward.manifest.files[ct.scan_id].image
    assert [path.name for path in slices] == ["200", "199", "198", "197"]  # by geometry, not by name


def test_no_text_of_the_header_gets_out(ward: Ward) -> None:
    write_series(ward.root / "a")
    write_series(ward.root / "b", slices=range(0, 6, 2))  # copies: rejected, with a reason
    (ward.root / "cut").write_bytes((ward.root / "a" / "200").read_bytes()[:-20])
    ward.index()
    written = b"".join(ward.bytes().values()).decode()
    assert len(read_rejected(ward.out)) == 3
    uids = [generate_uid(entropy_srcs=sources) for sources in (["HOSP-4711"], ["HOSP-4711", "1"])]
    assert [secret for secret in (*SECRETS, *uids) if secret in written] == []
    row = ward.manifest.rows[0]
    key = Pseudonyms(load_key(ward.key))
    assert (row.patient_id, row.study_id) == (key("patient", "HOSP-4711"), key("study", uids[0]))


def test_pseudonyms_are_stable_with_the_key_and_others_without(ward: Ward, tmp_path: Path) -> None:
    write_series(ward.root / "a")
    ward.index()
    first = ward.bytes()
    index([ward.root], tmp_path / "again" / "ward.csv", key_file=ward.key)
    assert (tmp_path / "again" / "ward.csv").read_bytes() == first["ward.csv"]
    index([ward.root], tmp_path / "other" / "ward.csv", key_file=tmp_path / "other_key")
    assert read_manifest(tmp_path / "other" / "ward.csv").rows[0].patient_id != ward.manifest.rows[0].patient_id
    with pytest.raises(MedclrError, match="another key"):
        ward.index(key_file=tmp_path / "other_key")
    assert ward.bytes() == first


def test_a_second_run_reads_only_what_is_new(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(ward.root / "a")
    write_nifti(ward.root / "sub-01_T1w.nii.gz")
    ward.index()
    before = ward.out.read_text().splitlines()
    write_series(ward.root / "b", patient="HOSP-4712")
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.parent.name) or read_bytes(self))
    summary = ward.index()
    monkeypatch.undo()
    assert opened == ["b"] * 4
    assert (summary.scans, summary.added) == (3, 1)
    assert set(before) < set(ward.out.read_text().splitlines())
    grown = ward.bytes()
    assert ward.index().added == 0
    assert ward.bytes() == grown
    shutil.rmtree(ward.out.parent)
    ward.index()
    assert ward.bytes() == grown  # as if it had been indexed at once


def test_new_slices_join_their_series(ward: Ward) -> None:
    write_series(ward.root / "a", slices=range(2))
    write_series(ward.root / "b", patient="HOSP-4712")
    ward.index()
    other = ward.column("scan_id")["b"]
    write_series(ward.root / "a", slices=range(2, 5))
    ward.index()
    assert ward.column("n_slices") == {"a": 5, "b": 4}
    assert ward.column("scan_id")["b"] == other


def test_a_missing_slice_may_arrive_later(ward: Ward) -> None:
    whole = Policy(missing="refuse")
    write_series(ward.root / "b", patient="HOSP-4712")
    slices = write_series(ward.root / "a", slices=range(5))
    late = slices[2].read_bytes()
    slices[2].unlink()
    ward.index(policy=whole)
    assert ward.column("n_slices") == {"b": 4}
    assert len(ward.reasons()) == 4
    slices[2].write_bytes(late)
    ward.index(policy=whole)
    assert ward.column("n_slices") == {"a": 5, "b": 4}
    assert ward.reasons() == {}


def test_a_stack_that_was_split_is_whole_again_when_its_slice_arrives(ward: Ward) -> None:
    slices = write_series(ward.root / "a", slices=range(5))
    late = slices[2].read_bytes()
    slices[2].unlink()
    ward.index()
    assert [row.n_slices for row in ward.manifest.rows] == [2, 2]
    assert {row.irregular for row in ward.manifest.rows} == {"split from a stack in which 1 of 5 slices is missing"}
    slices[2].write_bytes(late)
    ward.index()
    assert [(row.n_slices, row.irregular) for row in ward.manifest.rows] == [(5, "")]


def test_a_changed_file_is_read_again(ward: Ward) -> None:
    path = write_nifti(ward.root / "sub-01_T1w.nii", shape=(4, 5, 6))
    ward.index()
    write_nifti(path, shape=(4, 5, 7))
    ward.index()
    assert ward.column("n_slices") == {"sub-01_T1w.nii": 7}


def test_a_vanished_file_is_not_forgotten_silently(ward: Ward) -> None:
    write_series(ward.root / "a")[0].unlink()
    write_nifti(ward.root / "sub-01_T1w.nii")
    ward.index()
    before = ward.bytes()
    (ward.root / "sub-01_T1w.nii").unlink()
    with pytest.raises(MedclrError, match=r"1 of its files are no longer there, the first is f-") as error:
        ward.index()
    assert "the first is sub-01_T1w.nii;" in ward.renamed(str(error.value))
    assert ward.bytes() == before


def test_a_second_folder_is_added_to_the_same_manifest(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii", 1)
    (ward.root / "notes.txt").write_text("x")
    other = tmp_path / "other"
    write_nifti(other / "sub-01_T1w.nii", 2)
    write_nifti(other / "sub-02_T1w.nii", 3)
    ward.index()
    summary = index([other], ward.out, key_file=ward.key)
    assert (summary.scans, summary.patients, summary.added, summary.rejected) == (3, 2, 2, 1)
    assert ward.index().scans == 3
    with pytest.raises(MedclrError, match="one folder lies in the other"):
        index([tmp_path], ward.out, key_file=ward.key)


def test_a_copy_of_a_folder_does_not_double_its_scans(ward: Ward) -> None:
    write_series(ward.root / "a")
    ward.index()
    ward.root = Path(shutil.copytree(ward.root, ward.root.parent / "copy"))
    assert ward.index().added == 0
    (row,) = ward.manifest.rows
    assert len(ward.manifest.files[row.scan_id].image) == row.n_slices == 4
    assert set(ward.reasons().values()) == {"the same bytes stand at the same path under another root"}


def test_equal_names_under_two_roots_do_not_collide(ward: Ward, tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for fill, root in enumerate(roots, start=1):
        write_nifti(root / "same.nii", 5)
        write_nifti(root / "scan.nii", fill)
    summary = index(roots, ward.out, modality="MR", key_file=ward.key)
    assert (summary.scans, summary.patients) == (3, 3)
    (copy,) = read_rejected(ward.out)
    assert find_places(ward.key, [copy.path])[copy.path].absolute() == tmp_path / "two" / "same.nii"
    assert "the same bytes" in copy.reason


def test_copies_are_one_patient_unless_somebody_says_otherwise(ward: Ward) -> None:
    for name in ("a.nii", "copy_of_a.nii"):
        write_nifti(ward.root / name)
    assert ward.index(modality="MR").patients == 1
    ward.out.unlink()
    summary = ward.index(modality="MR", patient_pattern=r"^(\w+)\.nii")
    assert (summary.patients, summary.shared_copies) == (2, 2)
    assert "2 scans byte for byte the same" in str(summary)


def test_whose_it_is(ward: Ward, tmp_path: Path) -> None:
    for name in ("p1_a.png", "p1_b.png", "p2_a.png", "x.png"):
        write_image(ward.root / name, fill=sum(name.encode()) % 200)
    with pytest.raises(MedclrError, match=r"no usable scan; 4 of 4 files .*does not say whose it is"):
        ward.index(modality="XR")
    assert not ward.out.exists()
    summary = ward.index(modality="XR", patient_pattern=r"(p\d)_")
    assert (summary.scans, summary.patients) == (3, 2)
    assert list(ward.reasons()) == ["x.png"]
    key = Pseudonyms(load_key(ward.key))
    assert ward.column("patient_id")["p2_a.png"] == key("patient", "p2")
    labels = write_table(tmp_path / "l.csv", ("file", "patient_id"), ("x.png", "p1"), ("p1_a.png", "p7"))
    ward.out.unlink()
    ward.index(modality="XR", patient_pattern=r"(p\d)_", labels=labels)
    assert ward.column("patient_id") == {
        "p1_a.png": key("patient", "p7"),
        "p1_b.png": key("patient", "p1"),
        "p2_a.png": key("patient", "p2"),
        "x.png": key("patient", "p1"),
    }


def test_a_pattern_overrules_an_anonymised_header(ward: Ward) -> None:
    for name in ("case1", "case2"):
        write_series(ward.root / name, patient="ANON", series=name)
    assert ward.index().patients == 1
    ward.out.unlink()
    assert ward.index(patient_pattern=r"(case\d)").patients == 2


def test_labels_by_file_by_patient_and_by_series(ward: Ward, tmp_path: Path) -> None:
    write_series(ward.root / "a", patient="HOSP-1")
    write_series(ward.root / "b", patient="HOSP-2")
    write_nifti(ward.root / "n" / "sub-03_T1w.nii.gz", 3)
    wanted = {"a": "no", "b": "yes, surely", "n/sub-03_T1w.nii.gz": "no"}
    by_patient = [("label", "patient_id"), ("no", "HOSP-1"), ("yes, surely", "HOSP-2"), ("no", "sub-03")]
    by_file = [
        ("file", "label"),
        ("a/200", "no"),
        ("a/199", "no"),
        ("b/200", "yes, surely"),
        ("sub-03_T1w.nii.gz", "no"),
    ]
    absolute = [("file", "label"), *((str(ward.root / path), label) for path, label in wanted.items())]
    for table in (by_patient, by_file, absolute):
        ward.index(labels=write_table(tmp_path / "labels.csv", *table))
        assert ward.column("label") == wanted
        ward.out.unlink()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            [("file", "label"), ("a.nii", "x"), ("z.nii", "x")],
            r"1 of its 2 names are of no scan, the first is that of line 3",
        ),
        ([("file", "label"), ("a.nii", "x")], r"1 of 2 scans have no label, the first is f-"),
        ([("file", "label"), ("a.nii", "x"), ("sub-2_T1w.nii", "")], "1 of 2 scans have no label"),
        ([("file", "label"), ("a.nii", "x"), ("a.nii", "y")], "lines 2 and 3 contradict each other"),
        ([("file", "label"), ("a.nii", "x"), ("a", "y")], "lines 2 and 3 say two things of one scan"),
        ([("file", "label"), ("", "x")], "line 2 names no file"),
        ([("patient_id", "label"), ("sub-9", "x")], "1 of its 1 patients have no .* that of line 2"),
        ([("name", "label")], "needs a column"),
        ([("file", "class")], "needs a column"),
        ([("patient_id",)], "needs a column label"),
        ([], "needs a column"),
    ],
)
def test_wrong_labels(ward: Ward, tmp_path: Path, table: list[tuple[str, ...]], message: str) -> None:
    write_nifti(ward.root / "a.nii", 1)
    write_nifti(ward.root / "sub-2_T1w.nii", 2)
    labels = write_table(tmp_path / "labels.csv", *table)
    with pytest.raises(MedclrError, match=message):
        ward.index(modality="MR", labels=labels)
    assert not ward.out.parent.exists()


@pytest.mark.parametrize("table", [[("DOE^JANE", "x")], [("DOE^JANE", "x"), ("DOE^JANE", "y")]])
def test_no_patient_of_a_table_is_quoted(ward: Ward, tmp_path: Path, table: list[tuple[str, ...]]) -> None:
    write_nifti(ward.root / "a.nii", 1)
    labels = write_table(tmp_path / "labels.csv", ("patient_id", "label"), *table)
    with pytest.raises(MedclrError) as error:
        ward.index(modality="MR", labels=labels)
    assert "DOE" not in str(error.value)


def test_paths_may_be_texts(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii", 1)
    write_nifti(tmp_path / "masks" / "a.nii", 1)
    labels = str(write_table(tmp_path / "labels.csv", ("file", "label"), ("a.nii", "x")))
    texts: Any = str(ward.root)  # one root, which is no list of letters
    index(texts, ward.out, labels=labels, masks=str(tmp_path / "masks"), modality="MR", key_file=str(ward.key))
    assert ward.column("label") == {"a.nii": "x"}
    assert ward.column("mask_path") == {"a.nii": ward.manifest.rows[0].mask_path}
    assert ward.path(ward.manifest.rows[0].mask_path) == "a.nii"


def test_unmatched_labels_can_be_allowed(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii", 1)
    write_nifti(ward.root / "b.nii", 2)
    labels = write_table(tmp_path / "labels.csv", ("file", "label"), ("a.nii", "x"), ("z.nii", "y"))
    ward.index(modality="MR", labels=labels, allow_unmatched=True)
    assert ward.column("label") == {"a.nii": "x", "b.nii": ""}


def test_a_label_of_a_rejected_file_is_no_mistake(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii", 1)
    (ward.root / "b.nii").write_bytes((ward.root / "a.nii").read_bytes()[:400])
    labels = write_table(tmp_path / "labels.csv", ("file", "label"), ("a.nii", "x"), ("b.nii", "y"))
    ward.index(modality="MR", labels=labels)
    assert ward.column("label") == {"a.nii": "x"}
    assert "too short" in ward.reasons()["b.nii"]


def test_ambiguous_names_are_refused(ward: Ward, tmp_path: Path) -> None:
    for folder in "ab":
        write_nifti(ward.root / folder / "scan.nii", ord(folder))
    labels = write_table(tmp_path / "labels.csv", ("file", "label"), ("scan.nii", "x"))
    with pytest.raises(MedclrError, match="2 files or scans are called what line 2 says"):
        ward.index(modality="MR", labels=labels)


def test_labels_and_masks_inside_the_folder_are_no_scans(ward: Ward) -> None:
    write_nifti(ward.root / "images" / "one.nii.gz", 1)
    write_nifti(ward.root / "images" / "two.nii.gz", 2)
    write_nifti(ward.root / "masks" / "one.nii.gz", 1)
    write_table(ward.root / "labels.csv", ("file", "label"), ("one.nii.gz", "x"), ("two.nii.gz", "y"))
    summary = ward.index(modality="MR", labels=ward.root / "labels.csv", masks=ward.root / "masks")
    assert (summary.scans, summary.rejected) == (2, 0)
    assert ward.masks() == {"images/one.nii.gz": "one.nii.gz", "images/two.nii.gz": ""}
    row = next(row for row in ward.manifest.rows if row.mask_path)
    assert ward.manifest.files[row.scan_id].mask == ward.root / "masks" / "one.nii.gz"
    assert ward.index(modality="MR", labels=ward.root / "labels.csv", masks=ward.root / "masks").added == 0


def test_a_mask_may_be_named_like_the_folder_of_a_series(ward: Ward, tmp_path: Path) -> None:
    write_series(ward.root / "case.1.2")
    write_nifti(tmp_path / "masks" / "case.1.2.nii.gz")
    ward.index(masks=tmp_path / "masks")
    assert ward.masks() == {"case.1.2": "case.1.2.nii.gz"}
    write_nifti(tmp_path / "masks" / "stray.nii.gz")
    with pytest.raises(MedclrError, match="1 of its 2 names are of no scan, the first is that of f-") as error:
        ward.index(masks=tmp_path / "masks")
    assert "that of stray.nii.gz;" in ward.renamed(str(error.value))
    (tmp_path / "masks" / "stray.nii.gz").rename(tmp_path / "masks" / "case.1.2.nii")
    with pytest.raises(MedclrError, match="are of one scan") as error:
        ward.index(masks=tmp_path / "masks")
    assert "case.1.2.nii and case.1.2.nii.gz are of one scan" in ward.renamed(str(error.value))


def write_dataset(folder: Path, **changes: Any) -> Path:
    dataset = {
        "modality": {"0": "MRI"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a_seg.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    } | changes
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder / "dataset.json"


def test_decathlon(ward: Ward) -> None:
    write_nifti(ward.root / "imagesTr" / "a.nii.gz", 1)
    write_nifti(ward.root / "labelsTr" / "a_seg.nii.gz", 2)
    write_nifti(ward.root / "imagesTs" / "b.nii.gz", 3)
    summary = ward.index(masks=write_dataset(ward.root))
    assert (summary.scans, summary.rejected) == (2, 0)
    assert ward.masks() == {"imagesTr/a.nii.gz": "labelsTr/a_seg.nii.gz", "imagesTs/b.nii.gz": ""}
    assert set(ward.column("modality").values()) == {"MR"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": [{"image": "imagesTr/z.nii.gz", "label": "labelsTr/a_seg.nii.gz"}]}, "of no scan"),
        (
            {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/z.nii.gz"}]},
            "1 names a mask that is not there",
        ),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": 3}]}, "classes belong into --labels"),
        ({"training": []}, "holds no NIfTI masks"),
        ({"training": 3}, "is not a dataset.json"),
    ],
)
def test_wrong_dataset_json(ward: Ward, changes: dict[str, Any], message: str) -> None:
    write_nifti(ward.root / "imagesTr" / "a.nii.gz", 1)
    write_nifti(ward.root / "labelsTr" / "a_seg.nii.gz", 2)
    with pytest.raises(MedclrError, match=message):
        ward.index(masks=write_dataset(ward.root, **changes))


@pytest.mark.parametrize(
    ("name", "message"), [("mask.nii.gz", "is a single mask; give the folder"), ("mask.dat", r"is not a dataset\.json")]
)
def test_a_file_of_masks_that_is_no_table_is_not_quoted(ward: Ward, tmp_path: Path, name: str, message: str) -> None:
    """An error of Python's about bytes that are no text holds them all."""
    write_nifti(ward.root / "sub-01_T1w.nii")
    (tmp_path / name).write_bytes(b"\xff\x00Mustermann" * 1000)
    with pytest.raises(MedclrError, match=message) as error:
        ward.index(masks=tmp_path / name)
    assert "Mustermann" not in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 200


def test_splits_go_by_patient(ward: Ward) -> None:
    for i in range(12):
        write_nifti(ward.root / f"sub-{i // 2}_run-{i}_T1w.nii", i)
    ward.index(split="train=0.5,test=0.5")
    splits = {(row.patient_id, row.split) for row in ward.manifest.rows}
    assert len(splits) == 6
    assert all(split == split_of(patient, {"train": 0.5, "test": 0.5}) for patient, split in splits)


def test_other_options_do_not_change_what_stands(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii", 1)
    ward.index(modality="MR")
    plain = ward.bytes()
    for options, name in (
        ({"modality": "CT"}, "modality"),
        ({"modality": "MR", "patient_pattern": "(a)"}, "patient_id"),
    ):
        with pytest.raises(MedclrError, match=rf"{name} of f-\w+ is .* and would become"):
            ward.index(**options)
    with pytest.raises(MedclrError, match="does not say its modality"):
        ward.index()
    assert ward.bytes() == plain
    labels = write_table(tmp_path / "labels.csv", ("file", "label"), ("a.nii", "x"))
    ward.index(modality="MR", labels=labels)  # a label where there was none is no change of what was known
    assert ward.column("label") == {"a.nii": "x"}
    write_table(labels, ("file", "label"), ("a.nii", "y"))
    with pytest.raises(MedclrError, match=r"label of f-\w+ is 'x' there and would become 'y'"):
        ward.index(modality="MR", labels=labels)


def test_links_and_loops(ward: Ward) -> None:
    write_nifti(ward.root / "a" / "sub-01_T1w.nii")
    (ward.root / "a" / "loop").symlink_to(ward.root)
    (ward.root / "again").symlink_to(ward.root / "a")
    (ward.root / "nowhere").symlink_to(ward.root / "gone")
    assert ward.index().scans == 1
    assert list(ward.reasons()) == ["nowhere"]


def test_volumes_without_orientation_are_still_volumes(ward: Ward) -> None:
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), None), ward.root / "a.nii")
    ward.index(modality="MR")
    assert ward.index(modality="MR").scans == 1
    assert ward.column("plane") == {"a.nii": ""}


def test_a_rejected_file_does_not_take_the_name_of_a_scan(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii")
    (ward.root / "broken").mkdir()
    (ward.root / "broken" / "a.nii").write_text("x")
    ward.index(modality="MR", labels=write_table(tmp_path / "l.csv", ("file", "label"), ("a.nii", "x")))
    assert ward.column("label") == {"a.nii": "x"}


def test_a_manifest_without_its_tables_is_left_alone(ward: Ward) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii")
    ward.index()
    for path in reversed(table_paths(ward.out)[:-1]):
        path.unlink()
        with pytest.raises(MedclrError, match=rf"without {path.name} it cannot be added to"):
            ward.index()


def test_odd_names(ward: Ward) -> None:
    write_nifti(ward.root / 'sub-01_x, "y"\nz_T1w.nii')
    shutil.copy(ward.root / 'sub-01_x, "y"\nz_T1w.nii', os.fsencode(ward.root) + b"/sub-02_\xff_T1w.nii")
    ward.index()
    assert list(ward.column("modality")) == ['sub-01_x, "y"\nz_T1w.nii']
    assert list(ward.reasons()) == ["sub-02_\udcff_T1w.nii"]
    again = ward.out.with_name("kept.csv")
    index([ward.root], again, keep_paths=True, key_file=ward.key)
    assert [row.path for row in read_manifest(again).rows] == ['sub-01_x, "y"\nz_T1w.nii']
    assert [r.path for r in read_rejected(again)] == [f"{ward.root}/sub-02_\\xff_T1w.nii"]


def test_large_files_are_hashed_without_being_held(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii")
    write_series(ward.root / "a")
    ward.index()
    expected = ward.bytes()
    ward.out.unlink()
    monkeypatch.setattr("medclr.data.readings.WHOLE_FILE_BYTES", 0)
    ward.index()
    assert ward.bytes() == expected


def test_one_odd_file_does_not_end_the_run(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii", 1)
    write_image(ward.root / "sub-02_dx.png")

    def crash(path: Path, data: bytes | None = None) -> None:
        raise AttributeError("Doe^Jane")

    monkeypatch.setattr("medclr.scans.image.read_header", crash)
    assert ward.index().scans == 1
    assert ward.reasons() == {"sub-02_dx.png": "cannot be read (unexpected AttributeError)"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "MX"}, "modality 'MX' is unknown"),
        ({"patient_pattern": "("}, "is not a regular expression"),
        ({"patient_pattern": "sub"}, "exactly one group"),
        ({"split": "train"}, "write it as train=0.7"),
        ({"labels": Path("/nowhere.csv")}, r"/nowhere\.csv: cannot be read"),
        ({"masks": Path("/nowhere")}, "no such folder or dataset"),
        ({"key_file": Path("/dev/null/key")}, "cannot be used"),
        ({"masks": Path("scans")}, "holds the folder that is indexed"),
    ],
)
def test_wrong_options_are_named(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(ward.root.parent)
    write_nifti(ward.root / "sub-01_T1w.nii")
    with pytest.raises(MedclrError, match=message):
        ward.index(**options)
    assert not ward.out.parent.exists()


def test_wrong_folders_are_named(ward: Ward, tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="holds no files"):
        ward.index()
    (ward.root / "a.txt").write_text("x")
    with pytest.raises(MedclrError, match=r"no usable scan; 1 of 1 files are like f-\w+: is neither"):
        ward.index()
    for roots, message in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([ward.root / "a.txt"], "is neither a folder, a DICOMDIR nor a zip or tar archive"),
        ([ward.root, ward.root], "lies in the other"),
        ([ward.root, tmp_path], "lies in the other"),
    ):
        with pytest.raises(MedclrError, match=message):
            index(roots, ward.out, key_file=ward.key)
    with pytest.raises(MedclrError, match=r"ends in \.csv"):
        index([ward.root], tmp_path / "manifest", key_file=ward.key)
    assert not ward.out.parent.exists()


def test_a_table_of_something_else_is_not_overwritten(ward: Ward) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii")
    ward.out.parent.mkdir()
    ward.out.write_text("name,age\nJane,5\n")
    with pytest.raises(MedclrError, match=r"without ward\.index\.json it cannot be added to"):
        ward.index()
    assert ward.out.read_text() == "name,age\nJane,5\n"


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("hippocampus", {"modality": "MR", "masks": "labels"}, (180, 180, 6427)),
        ("mr_brain_dicom", {}, (8, 2, 184)),
        ("ct_abdomen_dicom", {}, (1, 1, 20)),
        ("cxr_pediatric", {"modality": "XR", "labels": "labels.csv"}, (3607, 1992, 3607)),
    ],
)
def test_real_scans(tmp_path: Path, name: str, options: dict[str, Any], counts: tuple[int, ...]) -> None:
    folder = shared_data(name)
    options = {key: folder / value if key in ("masks", "labels") else value for key, value in options.items()}
    summary = index([folder], tmp_path / "m.csv", key_file=tmp_path / "key", **options)
    assert (summary.scans, summary.patients, summary.slices, summary.rejected) == (*counts, 0)


def test_label_maps_beside_their_scans_are_no_scans(ward: Ward) -> None:
    for name in ("imagesTr/a_0000", "labelsTr/a", "x/images/b", "x/labels/b", "labels/kept", "y/z", "y/told"):
        write_nifti(ward.root / f"{name}.nii.gz", sum(name.encode()))
    (ward.root / "y" / "dataset.json").write_text(
        json.dumps({"training": [{"image": "z.nii.gz", "label": "told.nii.gz"}]})
    )
    write_nifti(ward.root / "sub-1" / "sub-1_dseg.nii.gz")
    summary = ward.index(modality="MR")
    assert set(ward.column("modality")) == {
        "imagesTr/a_0000.nii.gz",
        "x/images/b.nii.gz",
        "labels/kept.nii.gz",  # nothing beside it says that it is none
        "y/z.nii.gz",
    }
    reasons = ward.reasons()
    assert "labelsTr beside imagesTr" in reasons["labelsTr/a.nii.gz"]
    assert "labels beside images" in reasons["x/labels/b.nii.gz"]
    assert "by a dataset.json" in reasons["y/told.nii.gz"]
    assert "BIDS suffix _dseg" in reasons["sub-1/sub-1_dseg.nii.gz"]
    assert summary.rejected == 5  # and the dataset.json itself
    (ward.root / "y" / "dataset.json").write_text("[3]")  # another program's
    assert ward.index(modality="MR").added == 1


def test_volumes_of_one_file_share_its_label_and_mask(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "a.nii.gz", 1, shape=(4, 5, 6, 3))
    write_nifti(tmp_path / "masks" / "a.nii.gz")
    labels = write_table(tmp_path / "labels.csv", ("file", "label"), ("a.nii.gz", "x"))
    options = {"modality": "MR", "labels": labels, "masks": tmp_path / "masks"}
    assert ward.index(**options).scans == 3
    rows = ward.manifest.rows
    assert sorted(row.volume for row in rows) == [0, 1, 2]
    assert len({row.scan_id for row in rows}) == 3
    assert len({(row.path, row.label, row.mask_path, row.patient_id, row.sha256) for row in rows}) == 1
    first = ward.bytes()
    assert ward.index(**options).added == 0
    assert ward.bytes() == first
    one = index([ward.root], tmp_path / "first.csv", policy=Policy(volumes="first"), key_file=ward.key, **options)
    assert one.scans == 1
    assert read_manifest(tmp_path / "first.csv").rows[0].scan_id in {row.scan_id for row in rows if row.volume == 0}


def test_what_is_not_plain_is_counted_and_another_policy_is_refused(ward: Ward) -> None:
    for name in "ab":
        slices = write_series(ward.root / name, patient=name, slices=range(8))
        slices[3].unlink()
    (ward.root / "one.txt").write_text("x")
    (ward.root / "two.txt").write_text("x")
    summary = ward.index(policy=Policy(missing="allow"))
    assert summary.scans == 2
    assert list(summary.irregular.values()) == [2]
    assert summary.reasons == {"is neither DICOM, NIfTI nor a PNG, JPEG or TIFF image": 2}
    (kind,) = summary.irregular
    assert "N of N slices" in kind
    assert f"  2: {kind}" in str(summary)
    assert "  2: is neither DICOM" in str(summary)
    before = ward.bytes()
    for options in (
        {},
        {"policy": Policy(missing="allow", tilt="refuse")},
        {"policy": Policy("allow"), "plane": "axial"},
    ):
        with pytest.raises(MedclrError, match=r"was made with other (policy\.missing|policy\.tilt|plane) \(see ward"):
            ward.index(**options)
    assert ward.bytes() == before


def test_a_mistyped_key_makes_no_key(ward: Ward, tmp_path: Path) -> None:
    write_nifti(ward.root / "sub-01_T1w.nii")
    ward.index()
    with pytest.raises(MedclrError, match="there is no such key; give the --key-file with which the manifest was made"):
        ward.index(key_file=tmp_path / "kye")
    assert not (tmp_path / "kye").exists()


def test_splits_are_given_once(ward: Ward) -> None:
    for i in range(6):
        write_nifti(ward.root / f"sub-{i}_T1w.nii", i)
    ward.index()
    ward.index(split="train=0.5,test=0.5")
    assert set(ward.column("split").values()) == {"train", "test"}
    with pytest.raises(MedclrError, match="was made with other split"):
        ward.index(split="train=0.9,test=0.1")
    with pytest.raises(MedclrError, match="was made with other split"):
        ward.index()
