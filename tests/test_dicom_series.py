"""Which DICOM files make a scan: series, what divides them, copies, patients, and what is sorted out."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, CT, NOWHERE, PATIENT, SAGITTAL, XRAY, find, only_reason, slab, write
from pydicom.uid import SecondaryCaptureImageStorage

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.policy import ACCEPTED, Policy


def test_a_series_is_divided_by_orientation_and_kind(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3, 6])
    slab(tmp_path / "b", [0], ImageOrientationPatient=list(SAGITTAL))
    slab(tmp_path / "c", [100.0], ImageType=["DERIVED", "SECONDARY", "MIP"])
    slab(tmp_path / "d", [0, 3], EchoNumbers=2)
    found, rejects = find(tmp_path)
    assert not rejects
    assert [(scan.files[0].parent.name, len(scan.files), scan.plane) for scan in found] == [
        ("a", 3, "axial"), ("b", 1, "sagittal"), ("c", 1, "axial"), ("d", 2, "axial"),
    ]  # fmt: skip
    assert len({scan.series for scan in found}) == 4
    assert {(scan.patient, scan.study) for scan in found} == {(PATIENT, "1.2.3")}


@pytest.mark.parametrize("elements", [{"Modality": "MR"}, CT])
def test_localizers_are_sorted_out_of_their_series(tmp_path: Path, elements: dict[str, Any]) -> None:
    slab(tmp_path / "a", [0, 3, 6], **elements)
    slab(tmp_path / "b", [9], **elements | {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    (scan,), rejects = find(tmp_path)
    assert len(scan.files) == 3
    assert [f"is a localizer, made to plan the {scan.modality} scan" in reason for _, reason in rejects] == [True]


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_pictures_of_a_scan_are_sorted_out_of_its_study(tmp_path: Path, modality: str) -> None:
    grey = {**CT, "Modality": modality}
    slab(tmp_path / "scan", [0, 3, 6], **grey)
    nowhere = {**grey, **NOWHERE, "SOPClassUID": SecondaryCaptureImageStorage}
    write(tmp_path / "capture", np.zeros((4, 5), np.uint8), **nowhere)
    write(
        tmp_path / "page", np.zeros((4, 5), np.uint16), **grey | {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}
    )
    write(tmp_path / "colour", np.zeros((4, 5, 3), np.uint8), **grey)
    (scan,), rejects = find(tmp_path)
    assert len(scan.files) == 3
    assert {path.name: reason.split(" filed")[0] for path, reason in rejects} == {
        "capture": "is a secondary capture", "page": "is a secondary capture", "colour": "is in colour and",
    }  # fmt: skip
    for other in ("OT", "XC"):  # elsewhere a capture is what it is
        path = write(tmp_path / other, np.arange(20, dtype=np.uint8).reshape(4, 5), **nowhere | {"Modality": other})
        assert dicom.read([path]).modality == "OT"


def test_a_converted_scan_with_geometry_is_no_screenshot(tmp_path: Path) -> None:
    slab(tmp_path, [0, 3, 6], **CT | {"SOPClassUID": SecondaryCaptureImageStorage})
    (scan,), _ = find(tmp_path)
    assert (scan.modality, scan.shape) == ("CT", (3, 4, 5))


def test_sizes_in_one_series(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3, 6])
    for i in range(2):
        write(tmp_path / "b" / str(i), np.zeros((8, 5), np.uint16), ImagePositionPatient=[1, 2, 9 + 3 * i])
    found, rejects = find(tmp_path)
    assert not rejects
    assert [scan.shape for scan in found] == [(3, 4, 5), (2, 8, 5)]
    assert {scan.irregular for scan in found} == {"split from a series with 2 sizes of slices"}
    reason = only_reason(tmp_path, Policy(sizes="refuse"))
    assert reason == "has 2 sizes of slices in its series, which --policy.sizes refuse keeps out"


def test_burned_in_annotation(tmp_path: Path) -> None:
    path = write(tmp_path / "a", np.zeros((4, 5), np.uint8), **XRAY | {"BurnedInAnnotation": "YES"})
    plain = write(tmp_path / "b", np.zeros((4, 5), np.uint8), **XRAY | {"BurnedInAnnotation": "NO"})
    (scan,), ((rejected, reason),) = find(tmp_path)
    assert (scan.files, scan.irregular, rejected) == ((plain,), "", path)
    assert "Burned In Annotation is YES" in reason
    assert "--policy.burned_in allow" in reason
    with pytest.raises(ScanError, match="burned"):
        dicom.read([path])
    found, _ = find(tmp_path, Policy(burned_in="allow"))
    assert [scan.irregular for scan in found] == ["Burned In Annotation is YES", ""]
    assert dicom.read([path], policy=ACCEPTED).irregular == "Burned In Annotation is YES"


@pytest.mark.parametrize("element", ["EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "AcquisitionNumber"])
def test_volumes_that_share_positions_are_told_apart(tmp_path: Path, element: str) -> None:
    for value in (1, 2, 3):
        slab(tmp_path / str(value), [0, 3, 6, 9], **{element: value})
    found, rejects = find(tmp_path)
    assert not rejects
    assert [{path.parent.name for path in scan.files} for scan in found] == [{"1"}, {"2"}, {"3"}]
    assert len({scan.series for scan in found}) == 3


def test_two_elements_together_tell_volumes_apart(tmp_path: Path) -> None:
    for b_value in (0, 1000):
        for time in (1, 2):
            slab(tmp_path / f"{b_value}-{time}", [0, 3, 6], DiffusionBValue=b_value, TemporalPositionIdentifier=time)
    found, _ = find(tmp_path)
    assert [len(scan.files) for scan in found] == [3] * 4
    assert all(len({path.parent for path in scan.files}) == 1 for scan in found)


def moments(folder: Path, element: str, times: dict[str, list[float]]) -> None:
    """Slices at 0, 3, 6, ... mm; of each named volume, one at each position, at these times."""
    for name, clock in times.items():
        for i, time in enumerate(clock):
            write(folder / name / str(i), np.zeros((4, 5), np.uint16), ImagePositionPatient=[0, 0, 3 * i],
                  **{element: f"{time:.2f}"})  # fmt: skip


def volumes(folder: Path) -> list[set[str]]:
    found, rejects = find(folder)
    assert not rejects
    return [{path.parent.name for path in scan.files} for scan in found]


def test_a_jittering_trigger_time_tells_the_phases_of_the_heart(tmp_path: Path) -> None:
    """Another breath, another heart rate: the third phase of one slice may lie behind the fourth of another."""
    moments(tmp_path, "TriggerTime", {str(k): [k * 30.0, k * 33.25, k * 41.5] for k in range(8)})
    assert volumes(tmp_path) == [{str(k)} for k in range(8)]


def test_other_clocks_tell_volumes_only_if_one_ends_before_the_next(tmp_path: Path) -> None:
    moments(tmp_path / "swept", "AcquisitionTime", {"a": [100000, 100001, 100002], "b": [100003, 100004, 100005]})
    assert volumes(tmp_path / "swept") == [{"a"}, {"b"}]
    moments(tmp_path / "mixed", "AcquisitionTime", {"a": [100000, 100002, 100004], "b": [100001, 100003, 100005]})
    assert "nothing tells volumes apart" in only_reason(tmp_path / "mixed")


def test_an_incomplete_phase_is_not_guessed(tmp_path: Path) -> None:
    moments(tmp_path, "TriggerTime", {"a": [0, 1, 2], "b": [30, 31]})
    assert "nothing tells volumes apart" in only_reason(tmp_path)


def test_volumes_moved_a_little_against_each_other_are_not_mixed(tmp_path: Path) -> None:
    slab(tmp_path / "1", [0, 3, 6, 9], DiffusionBValue=0)
    slab(tmp_path / "2", [0.2, 3.2, 6.2, 9.2], DiffusionBValue=1000)
    found, rejects = find(tmp_path)
    assert not rejects
    assert [({path.parent.name for path in scan.files}, scan.shape[0]) for scan in found] == [({"1"}, 4), ({"2"}, 4)]
    assert [scan.irregular for scan in found] == ["", ""]


def test_an_incomplete_time_point_does_not_cost_the_others(tmp_path: Path) -> None:
    slab(tmp_path / "1", [0, 3, 6, 9], TemporalPositionIdentifier=1)
    slab(tmp_path / "2", [0, 3, 9], TemporalPositionIdentifier=2)
    found, rejects = find(tmp_path)
    assert not rejects
    assert sorted((len(scan.files), scan.irregular != "") for scan in found) == [(1, True), (2, True), (4, False)]
    found, rejects = find(tmp_path, Policy(missing="refuse"))
    assert [len(scan.files) for scan in found] == [4]
    assert {path.parent.name for path, _ in rejects} == {"2"}


# Copies


def test_a_second_copy_is_left_out(tmp_path: Path) -> None:
    files = slab(tmp_path, [0, 3, 6])
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "copy.dcm").write_bytes(files[1].read_bytes())
    dataset = pydicom.dcmread(files[2])
    dataset.StudyDescription = "written again elsewhere"
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "z" / "encoded.dcm")
    (scan,), rejects = find(tmp_path)
    assert scan.files == tuple(files)
    assert [path.name for path, _ in rejects] == ["copy.dcm", "encoded.dcm"]
    assert {reason for _, reason in rejects} == {"is a copy of another file (same SOP Instance UID, same pixels)"}


def test_two_images_under_one_uid_are_both_refused(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3, 6], SeriesInstanceUID="1.8")
    for i, (value, z) in enumerate([(0, 9), (1, 9)]):
        write(tmp_path / str(i), np.full((4, 5), value, np.uint16), SOPInstanceUID="1.2.3.5", SeriesInstanceUID="1.9",
              ImagePositionPatient=[0, 0, z])  # fmt: skip
    for z in (0, 3):  # nor is one image at two places
        write(tmp_path / f"z{z}", np.zeros((4, 5), np.uint16), SOPInstanceUID="1.2.3.6", SeriesInstanceUID="1.9",
              ImagePositionPatient=[0, 0, z])  # fmt: skip
    (scan,), rejects = find(tmp_path)
    assert len(scan.files) == 3
    assert [path.name for path, _ in rejects] == ["0", "1", "z0", "z3"]
    assert {reason for _, reason in rejects} == {
        "shares its SOP Instance UID with a file that holds another image; which one is meant?"
    }


def test_a_damaged_copy_does_not_cost_the_sound_one(tmp_path: Path) -> None:
    sound = write(tmp_path / "sound", np.arange(20, dtype=np.uint16).reshape(4, 5), BitsStored=12)
    dataset = pydicom.dcmread(sound)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.PixelData = dataset.PixelData[:70] + b"\x81" * 40 + dataset.PixelData[110:]
    dataset.save_as(tmp_path / "damaged")
    (scan,), ((path, reason),) = find(tmp_path)
    assert (scan.files, path.name) == ((sound,), "damaged")
    assert "copy" not in reason


# Whose it is, tag by tag


def test_patients_without_id_are_kept_apart_by_their_study(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3], PatientID="", StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    slab(tmp_path / "b", [0, 3], PatientID=None, StudyInstanceUID="1.2", SeriesInstanceUID="1.2.1")
    slab(tmp_path / "c", [0, 3], PatientID=" ", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.2")
    slab(tmp_path / "d", [0, 3], PatientID="", StudyInstanceUID=None, SeriesInstanceUID="1.3.1")
    slab(tmp_path / "e", [0, 3], PatientID="", StudyInstanceUID=None, SeriesInstanceUID="1.3.2")
    found, rejects = find(tmp_path)
    assert not rejects
    patients = [scan.patient for scan in found]
    assert patients[1] == patients[2] != patients[0]
    assert "1.1" in patients[0]
    assert len({*patients}) == 4
    assert "1.3.1" in patients[3]


def test_files_of_nobody_are_not_merged(tmp_path: Path) -> None:
    """No patient, study or series: each instance stands for itself, whatever folder it lies in."""
    nobody = {"PatientID": None, "StudyInstanceUID": None, "SeriesInstanceUID": None}
    write(tmp_path / "a", np.zeros((4, 5), np.uint16), ImagePositionPatient=[0, 0, 0], **nobody)
    write(tmp_path / "b", np.zeros((4, 5), np.uint16), ImagePositionPatient=[0, 0, 3], **nobody)
    found, _ = find(tmp_path)
    assert len(found) == len({scan.patient for scan in found}) == 2
    assert "" not in {scan.patient for scan in found}


def test_a_slice_without_patient_id_is_of_the_patient_of_its_series(tmp_path: Path) -> None:
    files = slab(tmp_path / "a", [0, 3, 6])
    files += slab(tmp_path / "b", [9], PatientID="")
    (scan,), _ = find(tmp_path)
    assert (scan.files, scan.patient) == (tuple(files), PATIENT)
    slab(tmp_path / "c", [12], PatientID="Somebody else")  # now the series names two
    assert sorted(len(scan.files) for scan in find(tmp_path)[0]) == [1, 1, 3]


NEEDLESS = ["ImageType", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "InstanceNumber", "SliceThickness",
            "BodyPartExamined", "PatientID", "HighBit", "SOPClassUID", "FrameOfReferenceUID"]  # fmt: skip


@pytest.mark.parametrize("element", NEEDLESS)
def test_a_scan_can_do_without(tmp_path: Path, element: str) -> None:
    files = slab(tmp_path, [0, 3, 6])
    for file in files:
        dataset = pydicom.dcmread(file)
        if element in dataset:
            delattr(dataset, element)
        dataset.save_as(file, enforce_file_format=False)
    (scan,), rejects = find(tmp_path)
    assert not rejects
    assert (scan.files, scan.spacing_mm) == (tuple(files), (3.0, 2.0, 0.5))
    assert dicom.read(files[::-1]).voxels[:, 0, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ("ImagePositionPatient", "records no Image Position"),
        ("ImageOrientationPatient", "records no Image Position and Orientation"),
        ("PixelSpacing", "records no usable Pixel Spacing"),
        ("Rows", "Rows, Columns or Bits Allocated are absent"),
        ("BitsAllocated", "Rows, Columns or Bits Allocated are absent"),
        ("PhotometricInterpretation", "records no Photometric Interpretation"),
        ("SamplesPerPixel", "records no Samples per Pixel"),
        ("BitsStored", "records no Bits Stored"),
        ("PixelRepresentation", "records no Pixel Representation"),
        ("RescaleIntercept", "without Rescale Slope and Intercept"),
        ("PixelData", "holds no pixel data"),
    ],
)
def test_a_scan_cannot_do_without(tmp_path: Path, element: str, reason: str) -> None:
    files = slab(tmp_path, [0, 3, 6], **CT)
    dataset = pydicom.dcmread(files[1])
    delattr(dataset, element)
    dataset.save_as(files[1])
    found, ((path, words),) = find(tmp_path)
    assert path == files[1]
    assert reason in words
    assert [scan.irregular for scan in found] == [""]  # every other slice, which no position gives away
    with pytest.raises(ScanError, match=reason):
        dicom.read(files)


@pytest.mark.parametrize(
    ("charset", "patient"),
    [("ISO_IR 192", "Jürgen-7"), ("ISO_IR 100", "Jürgen-7"), (["", "ISO 2022 IR 87"], "山田-7")],
)
def test_patient_id_is_read_in_its_character_set(tmp_path: Path, charset: str | list[str], patient: str) -> None:
    slab(tmp_path, [0], SpecificCharacterSet=charset, PatientID=patient)
    assert find(tmp_path)[0][0].patient == patient


def test_body_part_is_a_defined_term_or_nothing(tmp_path: Path) -> None:
    words = {"CHEST": "chest", "WHOLE BODY": "whole body", "CSPINE": "cervical spine", "KNEE SMITH": "", "": ""}
    for i, word in enumerate(words):
        slab(tmp_path / str(i), [0], BodyPartExamined=word, SeriesInstanceUID=f"1.{i + 1}")
    assert [scan.body_part for scan in find(tmp_path)[0]] == list(words.values())


def test_radiographs_of_one_series_stay_single(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / str(i), np.zeros((4, 5), np.uint16), **XRAY | {"ImagePositionPatient": [0, 0, 3 * i],
              "ImageOrientationPatient": list(AXIAL)})  # fmt: skip
    found, rejects = find(tmp_path)
    assert not rejects
    assert [(scan.shape, scan.modality, scan.plane) for scan in found] == [((1, 4, 5), "XR", "")] * 3
    assert len({scan.series for scan in found}) == 3
