"""The DICOM reader, against files written here with known contents and against independent readers on real ones."""

import io
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom.spatial
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import shared_data
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.dicom_header import Header
from medclr.scans.scan import Found, Scan

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
PATIENT = "Erika^Mustermann"


def write(path: Path, pixels: NDArray[Any], *, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Path:
    """A file with ``pixels`` [H,W], [H,W,3] or, if NumberOfFrames is given, [F,H,W]; MR unless ``elements`` differ.

    An element of None is left out.
    """
    implicit, big = syntax == ImplicitVRLittleEndian, syntax == ExplicitVRBigEndian
    dataset = FileDataset(str(path), {}, b"\0" * 128, FileMetaDataset(), implicit, not big)
    frames = "NumberOfFrames" in elements
    words: dict[str, Any] = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "Modality": "MR",
        "PatientID": PATIENT,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "PixelSpacing": [2.0, 0.5],
        "SliceThickness": 3.0,
        "Rows": pixels.shape[1 if frames else 0],
        "Columns": pixels.shape[2 if frames else 1],
        "SamplesPerPixel": 1 if frames or pixels.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if frames or pixels.ndim == 2 else "RGB",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    words |= elements
    if words["SamplesPerPixel"] == 3:
        words["PlanarConfiguration"] = 0
    words.setdefault("HighBit", words["BitsStored"] - 1 if words["BitsStored"] else None)
    for name, value in words.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, implicit_vr=implicit, little_endian=not big)
    return path


CT = {"SOPClassUID": CTImageStorage, "Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
NOWHERE = {"ImageOrientationPatient": None, "ImagePositionPatient": None}
XRAY = {"Modality": "DX", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", **NOWHERE}


def slab(folder: Path, z_mm: Sequence[float], **elements: Any) -> list[Path]:
    """One file a position; its pixels are ``100 + index``, InstanceNumber runs against z, and so do the file names."""
    return [
        write(folder / f"{len(z_mm) - i:03}.dcm", np.full((4, 5), 100 + i, np.uint16),
              **{"ImagePositionPatient": [1.0, 2.0, z], "InstanceNumber": len(z_mm) - i, **elements})
        for i, z in enumerate(z_mm)
    ]  # fmt: skip


def find(folder: Path) -> tuple[list[Found], list[tuple[Path, str]]]:
    """``dicom.find`` over a folder. No reason may repeat an identity, and every file ends in exactly one place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    headers: list[Header] = []
    rejects: list[tuple[Path, str]] = []
    for path in files:
        try:
            headers.append(dicom.read_header(path))
        except ScanError as error:
            rejects.append((path, str(error)))
    found, refused = dicom.find(headers)
    rejects += refused
    assert sorted([path for scan in found for path in scan.files] + [path for path, _ in rejects]) == files
    assert not any(PATIENT in reason for _, reason in rejects)
    return found, rejects


def only_reason(folder: Path) -> str:
    found, rejects = find(folder)
    assert not found
    (reason,) = {reason for _, reason in rejects}
    return reason


# Grouping and geometry


def test_order_comes_from_geometry_not_from_names_or_instance_numbers(tmp_path: Path) -> None:
    files = slab(tmp_path, [10, 13, 16, 19])
    (scan,), rejects = find(tmp_path)
    assert not rejects
    assert scan.files == tuple(files)
    assert (scan.shape, scan.spacing_mm, scan.plane) == ((4, 4, 5), (3.0, 2.0, 0.5), "axial")
    for order in (files, files[::-1], [files[i] for i in (2, 0, 3, 1)]):
        read = dicom.read(order)
        assert read.voxels[:, 0, 0].tolist() == [100, 101, 102, 103]
        # LPS (1,2,10) is RAS (-1,-2,10); d runs to the head, h to the back, w to the left.
        np.testing.assert_allclose(read.affine, [[0, 0, -0.5, -1], [0, -2, 0, -2], [3, 0, 0, 10], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("z_mm", "reason"),
    [
        ([0, 3, 6, 12, 15], "6 mm apart where 3 mm is usual; 1 of 6 slices seem to be missing"),
        ([0, 3, 6, 9, 18, 21], "2 of 8 slices seem to be missing"),
        ([0, 3, 6, 8.2, 11.2], "2.2 mm apart where 3 mm"),
        ([0, 5, 10, 20, 30, 40], "mm apart where"),
        ([0, 3, 6, 6, 9], "1 of 5 slices lie where another does"),
    ],
)
def test_slices_that_form_no_regular_grid_are_refused(tmp_path: Path, z_mm: list[float], reason: str) -> None:
    files = slab(tmp_path, z_mm)
    assert reason in only_reason(tmp_path)
    with pytest.raises(ScanError, match="slices"):
        dicom.read(files)


def test_gantry_tilt_and_sideways_shifts_are_refused(tmp_path: Path) -> None:
    for i in range(5):
        pixels = np.zeros((4, 5), np.uint16)
        write(tmp_path / "tilt" / str(i), pixels, ImagePositionPatient=[0, 3 * i * np.tan(np.radians(12)), 3.0 * i])
        write(tmp_path / "shift" / str(i), pixels, ImagePositionPatient=[2.0 * (i == 2), 0, 3.0 * i])
    assert "12.0 degrees off their normal (gantry tilt)" in only_reason(tmp_path / "tilt")
    assert "shifted sideways" in only_reason(tmp_path / "shift")


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_accepted(tmp_path: Path) -> None:
    slab(tmp_path, [round(0.625 * i, 1) for i in range(12)])
    (scan,), _ = find(tmp_path)
    assert scan.spacing_mm[0] == pytest.approx(0.625, abs=0.01)


def test_grid_agrees_with_highdicom(tmp_path: Path) -> None:
    """Same order for every regular stack; whatever is refused here, highdicom refuses too."""
    template = dicom.read_header(slab(tmp_path, [0])[0])
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(60):
        axes, _ = np.linalg.qr(random.normal(size=(3, 3)))
        orientation = (*axes[0], *axes[1])
        k = random.permutation(8)
        k = k[: len(k) - random.randint(2)]  # now and then one is missing, mostly inside
        positions = random.normal(size=3) * 50 + 2.5 * k[:, None] * np.cross(axes[0], axes[1])
        headers = [
            replace(template, orientation=orientation, positions=(tuple(at),), instance=str(i), path=Path(str(i)))
            for i, at in enumerate(positions)
        ]
        spacing, index = highdicom.spatial.get_volume_positions(positions, orientation)
        found, rejects = dicom.find(headers)
        if rejects:
            refused += 1
            assert index is None
        else:
            assert index is not None
            order = [int(path.name) for path in found[0].files]
            assert order in (np.argsort(index).tolist(), np.argsort(index).tolist()[::-1])
            assert found[0].spacing_mm[0] == pytest.approx(spacing)
            assert (np.diff(positions[order] @ np.cross(axes[0], axes[1])) > 0).all()
    assert 5 < refused < 40


def test_a_series_is_divided_by_orientation_and_localizers_stand_apart(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3, 6])
    slab(tmp_path / "b", [0], ImageOrientationPatient=list(SAGITTAL))
    slab(tmp_path / "c", [100.0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    found, rejects = find(tmp_path)
    assert not rejects
    assert sorted((len(scan.files), scan.plane) for scan in found) == [(1, "axial"), (1, "sagittal"), (3, "axial")]
    assert len({scan.series for scan in found}) == 3
    assert {(scan.patient, scan.study) for scan in found} == {(PATIENT, "1.2.3")}


@pytest.mark.parametrize("element", ["EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "AcquisitionNumber"])
def test_volumes_that_share_positions_are_told_apart(tmp_path: Path, element: str) -> None:
    for value in (1, 2, 3):
        slab(tmp_path / str(value), [0, 3, 6, 9], **{element: value})
    found, rejects = find(tmp_path)
    assert not rejects
    assert [{path.parent.name for path in scan.files} for scan in found] == [{"1"}, {"2"}, {"3"}]
    assert len({scan.series for scan in found}) == 3


def test_two_elements_together_tell_volumes_apart_and_a_clock_does_not(tmp_path: Path) -> None:
    for b_value in (0, 1000):
        for time in (1, 2):
            slab(
                tmp_path / f"two/{b_value}-{time}", [0, 3, 6], DiffusionBValue=b_value, TemporalPositionIdentifier=time
            )
    found, _ = find(tmp_path / "two")
    assert [len(scan.files) for scan in found] == [3] * 4
    assert all(len({path.parent for path in scan.files}) == 1 for scan in found)

    for i, z in enumerate([0, 3, 6, 0, 3, 6]):  # every slice its own time: no way to tell which belong together
        write(tmp_path / "clock" / str(i), np.zeros((4, 5), np.uint16), ImagePositionPatient=[0, 0, z],
              AcquisitionTime=f"10000{i}")  # fmt: skip
    assert "nothing tells volumes apart" in only_reason(tmp_path / "clock")


def test_an_incomplete_time_point_does_not_cost_the_others(tmp_path: Path) -> None:
    slab(tmp_path / "1", [0, 3, 6, 9], TemporalPositionIdentifier=1)
    slab(tmp_path / "2", [0, 3, 9], TemporalPositionIdentifier=2)
    found, rejects = find(tmp_path)
    assert [len(scan.files) for scan in found] == [4]
    assert {path.parent.name for path, _ in rejects} == {"2"}


def test_patients_without_id_are_kept_apart_by_their_study(tmp_path: Path) -> None:
    slab(tmp_path / "a", [0, 3], PatientID="", StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    slab(tmp_path / "b", [0, 3], PatientID=None, StudyInstanceUID="1.2", SeriesInstanceUID="1.2.1")
    slab(tmp_path / "c", [0, 3], PatientID=" ", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.2")
    slab(tmp_path / "d", [0, 3], PatientID="", StudyInstanceUID=None, SeriesInstanceUID="1.3.1")
    found, rejects = find(tmp_path)
    assert not rejects
    patients = [scan.patient for scan in found]
    assert patients[1] == patients[2] != patients[0]
    assert "1.1" in patients[0]
    assert patients[3] == ""


@pytest.mark.parametrize(
    ("charset", "patient"),
    [("ISO_IR 192", "Jürgen-7"), ("ISO_IR 100", "Jürgen-7"), (["", "ISO 2022 IR 87"], "山田-7")],
)
def test_patient_id_is_read_in_its_character_set(tmp_path: Path, charset: str | list[str], patient: str) -> None:
    slab(tmp_path, [0], SpecificCharacterSet=charset, PatientID=patient)
    assert find(tmp_path)[0][0].patient == patient


def test_a_second_copy_is_refused_and_a_reused_uid_is_not_a_copy(tmp_path: Path) -> None:
    files = slab(tmp_path, [0, 3, 6])
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "copy.dcm").write_bytes(files[1].read_bytes())
    found, rejects = find(tmp_path)
    assert [len(scan.files) for scan in found] == [3]
    assert [(path.name, "copy of 002.dcm" in reason) for path, reason in rejects] == [("copy.dcm", True)]

    slab(tmp_path / "other", [0, 3, 6], SOPInstanceUID="1.2.3.5", SeriesInstanceUID="1.9")
    assert [len(scan.files) for scan in find(tmp_path / "other")[0]] == [3]


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


# What is no scan


def report(path: Path, **elements: Any) -> None:
    write(path, np.zeros((2, 2), np.uint8), **elements)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.Rows, dataset.Columns
    dataset.save_as(path)


def test_files_that_are_no_scan_are_refused_with_the_reason(tmp_path: Path) -> None:
    pixels = np.zeros((4, 5), np.uint16)
    report(tmp_path / "sr", Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    report(tmp_path / "dir", SOPClassUID="1.2.840.10008.1.3.10")
    write(tmp_path / "seg", pixels, Modality="SEG", SOPClassUID=SegmentationStorage)
    write(tmp_path / "dose", pixels, Modality="RTDOSE", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2")
    write(tmp_path / "scout", pixels, **CT | {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write(tmp_path / "no_hu", pixels, **CT | {"RescaleIntercept": None})
    write(tmp_path / "not_hu", pixels, **CT | {"RescaleType": "Z_EFF"})
    write(tmp_path / "nowhere", pixels, **CT | NOWHERE)
    write(tmp_path / "zoom", pixels, PixelSpacing=[0.0, 0.0])
    write(tmp_path / "mosaic", pixels, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    whole = write(tmp_path / "cut", pixels)
    whole.write_bytes(whole.read_bytes()[:-7])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)))
    found, rejects = find(tmp_path)
    assert not found
    reasons = {path.name: reason for path, reason in rejects}
    for name, words in {
        "sr": "holds no image (it is a Basic Text SR Storage",
        "dir": "DICOMDIR",
        "seg": "segmentation",
        "dose": "Modality RTDOSE",
        "scout": "localizer",
        "no_hu": "without Rescale",
        "not_hu": "not Hounsfield",
        "nowhere": "cannot be put in space",
        "zoom": "Pixel Spacing",
        "mosaic": "Siemens mosaic without the private header",
        "cut": "cut short: 33 of 40 bytes",
        "empty": "no image",
    }.items():
        assert words in reasons[name]
    for path, _ in rejects:
        with pytest.raises(ScanError, match=path.name):
            dicom.read([path])
    with pytest.raises(ScanError, match="cannot be read"):
        dicom.read_header(tmp_path / "absent")


def test_read_takes_exactly_one_scan_of_the_announced_modality(tmp_path: Path) -> None:
    files = slab(tmp_path / "a", [0, 3]) + slab(tmp_path / "b", [0, 3], SeriesInstanceUID="1.5")
    with pytest.raises(ScanError, match="the 4 files hold 2 scans"):
        dicom.read(files)
    with pytest.raises(ScanError, match="no DICOM files"):
        dicom.read([])
    with pytest.raises(ScanError, match="announced as CT and says that it is MR"):
        dicom.read(files[:2], modality="CT")
    nameless = write(tmp_path / "c", np.zeros((4, 5), np.uint8), **XRAY | {"Modality": None})
    with pytest.raises(ScanError, match="does not say its modality"):
        dicom.read([nameless])
    assert dicom.read([nameless], modality="XR").modality == "XR"


def test_a_screenshot_in_a_ct_study_is_no_ct(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a", np.zeros((4, 5), np.uint8), SOPClassUID=SecondaryCaptureImageStorage, Modality="CT", **NOWHERE
    )
    assert dicom.read([path]).modality == "OT"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0" * 128 + b"DICM", True),
        (b"\x08\0\x05\0CS\x0a\0" + b"x" * 130, True),  # explicit, no preamble
        (b"\x08\0\x08\0\x16\0\0\0" + b"x" * 130, True),  # implicit, no preamble
        (b"\0\x08\0\x05CS\0\x0a" + b"x" * 130, True),  # big endian, no preamble
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 130, False),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + b"\0" * 130, False),
        (b"\x5c\x01\0\0" + b"\0" * 130, False),  # NIfTI
        (b"\x1f\x8b\x08\0" + b"\0" * 130, False),
        (b"II*\0\x08\0\0\0" + b"\0" * 130, False),
        (b"", False),
    ],
)
def test_is_dicom(head: bytes, expected: bool) -> None:
    assert dicom.is_dicom(head) is expected


# Pixels


def ramp(dtype: str, low: int, high: int) -> NDArray[Any]:
    return np.linspace(low, high, 12).astype(dtype).reshape(3, 4)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_hounsfield_units_are_exact_in_every_uncompressed_syntax(tmp_path: Path, syntax: str) -> None:
    stored = ramp("uint16", 0, 4095)
    native = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    path = write(tmp_path / "a", stored, syntax=native, BitsStored=12, **CT)
    if syntax == RLELossless:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    scan = dicom.read([path])
    assert scan.voxels.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels[0], stored.astype(int) - 1024)
    assert dicom.read_header(path, path.read_bytes()) == dicom.read_header(path)
    with path.open("rb") as file:
        assert dicom.read_header(path, file) == dicom.read_header(path)


def test_a_file_without_preamble_and_meta_group_is_read(tmp_path: Path) -> None:
    stored = ramp("uint16", 0, 4095)
    path = write(tmp_path / "a", stored)
    dataset = pydicom.dcmread(path)
    raw = io.BytesIO()
    pydicom.dcmwrite(raw, Dataset(dataset), implicit_vr=True, little_endian=True, enforce_file_format=False)
    path.write_bytes(raw.getvalue())
    assert dicom.is_dicom(path.read_bytes()[:132])
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], stored)


def test_sign_is_extended_from_bits_stored(tmp_path: Path) -> None:
    expected = ramp("int16", -2048, 2047)
    path = write(tmp_path / "a", expected & 0x0FFF, BitsStored=12, PixelRepresentation=1)
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], expected)


def test_overlay_bits_are_masked_and_unexplained_ones_refused(tmp_path: Path) -> None:
    expected = ramp("uint16", 0, 4095)
    dirty = expected | (np.arange(12, dtype=np.uint16).reshape(3, 4) % 2 << 15)
    path = write(tmp_path / "a", dirty, BitsStored=12)
    with pytest.raises(ScanError, match="more than the 12 Bits Stored"):
        dicom.read([path])
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", 15)
    dataset.save_as(path)
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], expected)


def test_monochrome1_is_turned_round_after_the_rescale(tmp_path: Path) -> None:
    stored = ramp("uint16", 5, 1000)
    elements = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 10, "RescaleSlope": 2, "RescaleIntercept": 50}
    scan = dicom.read([write(tmp_path / "a", stored, **XRAY | elements)])
    lowest, highest = 50, 2 * 1023 + 50
    np.testing.assert_array_equal(scan.voxels[0], lowest + highest - (2.0 * stored + 50))

    measured = write(tmp_path / "b", stored, **CT | {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 10})
    np.testing.assert_array_equal(dicom.read([measured]).voxels[0], stored - 1024.0)  # white bone or black, same tissue


def test_modality_lut_sequence(tmp_path: Path) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 10, 16])
    item.add_new("LUTData", "US", [7, 70, 700, 7000])
    stored = np.array([[0, 10, 11, 12, 13, 99]], np.uint16)
    scan = dicom.read([write(tmp_path / "a", stored, **XRAY, ModalityLUTSequence=Items([item]))])
    assert scan.voxels[0, 0].tolist() == [7, 7, 70, 700, 7000, 7000]


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    rgb = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    expected = rgb @ [0.299, 0.587, 0.114]
    elements = {"Modality": "US", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", **NOWHERE}
    scan = dicom.read([write(tmp_path / "a", rgb, **elements)])
    np.testing.assert_allclose(scan.voxels[0], expected, rtol=1e-6)
    luma = rgb.copy()
    luma[..., 1:] = 128  # grey in YBR_FULL: the luminance is Y
    scan = dicom.read([write(tmp_path / "b", luma, PhotometricInterpretation="YBR_FULL", **elements)])
    np.testing.assert_allclose(scan.voxels[0], luma[..., 0], atol=1)


@pytest.mark.parametrize(
    ("stored", "elements", "expected"),
    [
        ([-2000, -1000, 0, 40], {"PixelPaddingValue": -2000, "RescaleIntercept": 0}, [-1024, -1000, 0, 40]),
        ([-3000, -2500, -2000, 40], {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -3000,
                                     "RescaleIntercept": 0}, [-1024, -1024, -1024, 40]),
        ([-2000, 0, 1024, 1064], {"PixelPaddingValue": -2000, "BitsStored": 12}, [-1024, -1024, 0, 40]),
        ([0, 40, -5, 7], {"PixelPaddingValue": 0, "RescaleIntercept": 0}, [0, 40, -5, 7]),  # 0 is water: left alone
    ],
)  # fmt: skip
def test_padding_becomes_air(tmp_path: Path, stored: list[int], elements: dict[str, Any], expected: list[int]) -> None:
    path = write(tmp_path / "a", np.array([stored], np.int16), **CT | elements)
    assert dicom.read([path]).voxels[0, 0].tolist() == expected


def test_padding_beyond_bits_stored_is_not_mistaken_for_an_overlay(tmp_path: Path) -> None:
    """63536 is -2000 written without a sign into 12 Bits Stored; masked, it would be 2096, a plausible bone."""
    path = write(
        tmp_path / "a", np.array([[63536, 2096, 1024]], np.uint16), BitsStored=12, PixelPaddingValue=63536, **CT
    )
    assert dicom.read([path]).voxels[0, 0].tolist() == [-1024, 1072, 0]


def enhanced(
    path: Path, z_mm: Sequence[float], intercepts: Sequence[float], orientation: Sequence[float] = AXIAL
) -> Path:
    """An Enhanced CT image whose frames all hold 1000, with functional groups for each."""

    def macro(**elements: Any) -> Items:
        item = Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        return Items([item])

    shared, groups = Dataset(), []
    shared.PlaneOrientationSequence = macro(ImageOrientationPatient=list(AXIAL))
    shared.PixelMeasuresSequence = macro(PixelSpacing=[2.0, 0.5], SliceThickness=1)
    for z, intercept in zip(z_mm, intercepts, strict=True):
        group = Dataset()
        group.PlanePositionSequence = macro(ImagePositionPatient=[0, 0, z])
        group.PixelValueTransformationSequence = macro(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")
        groups.append(group)
    return write(
        path, np.full((len(z_mm), 3, 4), 1000, np.uint16), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", Modality="CT",
        NumberOfFrames=len(z_mm), SharedFunctionalGroupsSequence=Items([shared]),
        PerFrameFunctionalGroupsSequence=Items(groups), PixelSpacing=None, SliceThickness=None, **NOWHERE,
    )  # fmt: skip


def test_enhanced_multiframe(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a", [8, 4, 0, 12], [-1, -2, -3, -4])
    (found,), rejects = find(tmp_path)
    assert not rejects
    assert (found.files, found.shape, found.spacing_mm, found.plane) == ((path,), (4, 3, 4), (4.0, 2.0, 0.5), "axial")
    scan = dicom.read([path])
    assert scan.voxels[:, 0, 0].tolist() == [997, 998, 999, 996]
    np.testing.assert_allclose(scan.affine, [[0, 0, -0.5, 0], [0, -2, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1]])
    enhanced(tmp_path / "b" / "gap", [0, 4, 8, 16], [0] * 4)
    assert "missing" in only_reason(tmp_path / "b")
    enhanced(tmp_path / "c" / "two_volumes", [0, 4, 0, 4], [0] * 4)
    assert "lie where another does" in only_reason(tmp_path / "c")


def test_a_cine_loop_is_one_scan_without_geometry(tmp_path: Path) -> None:
    frames = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    path = write(tmp_path / "a", frames, NumberOfFrames=3, **XRAY | {"Modality": "XA", "PixelSpacing": None})
    scan = dicom.read([path])
    np.testing.assert_array_equal(scan.voxels, frames)
    assert scan.spacing_mm == (1, 1, 1)


# Real scans


def map_to(scan: Scan, affine: NDArray[np.float64]) -> NDArray[np.int64]:
    """The integer [4,4] that takes our indices to another reader's; both must agree to 1e-3 mm at every corner."""
    mapping = np.rint(np.linalg.inv(affine) @ scan.affine)
    corners = np.array([(*at, 1) for at in np.ndindex(2, 2, 2)]) * (*np.subtract(scan.voxels.shape, 1), 1)  # [8,4]
    np.testing.assert_allclose(corners @ scan.affine.T, corners @ (affine @ mapping).T, atol=1e-3)
    return mapping.astype(np.int64)


def look_up(values: NDArray[Any], mapping: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[Any]:
    index = mapping[:3, :3] @ np.indices(shape).reshape(3, -1) + mapping[:3, 3:]
    return values[tuple(index)].reshape(shape)


def test_nine_encodings_of_one_series_agree_with_an_independent_converter() -> None:
    folder = shared_data("dicom_zoo")
    for i in range(1, 10):  # a Siemens mosaic of 35 slices in seven transfer syntaxes
        scan = dicom.read([folder / "one_series_seven_transfer_syntaxes" / f"{i}.dcm"])
        image = nibabel.load(folder / "one_series_reference_nifti" / f"{i}.nii")
        mapping = map_to(scan, image.affine)
        np.testing.assert_array_equal(scan.voxels, look_up(np.asarray(image.dataobj), mapping, scan.voxels.shape))


def test_ct_lies_on_the_grid_of_its_labels_and_holds_plausible_hounsfield_units() -> None:
    files = sorted(shared_data("ct_abdomen_dicom").iterdir())
    image = nibabel.load(shared_data("ct_abdomen_labels_117.nii.gz"))
    scan = dicom.read(files)
    assert scan.modality == "CT"
    np.testing.assert_array_equal(scan.voxels, np.rint(scan.voxels))
    mapping = map_to(scan, image.affine)
    labels = look_up(np.asarray(image.dataobj), mapping, scan.voxels.shape)
    bounds = {"spleen": (1, 40, 150), "liver": (5, 40, 150), "aorta": (52, 100, 400), "muscle": (86, 0, 80),
              "vertebra": (33, 150, 400), "humerus": (69, 300, 1200), "outside": (0, -1024, -900)}  # fmt: skip
    for name, (label, low, high) in bounds.items():
        assert low < np.median(scan.voxels[labels == label]) < high, name
    place = {i: (scan.affine @ (*np.argwhere(labels == i).mean(axis=0), 1))[:3] for i in (1, 5, 33, 52)}  # RAS mm
    assert place[5][0] > place[1][0]  # the liver is to the right of the spleen
    assert place[52][1] > place[33][1]  # the aorta in front of the spine


def test_mr_series_agree_with_highdicom() -> None:
    folders = sorted(shared_data("mr_brain_dicom").glob("*/*"))
    found, rejects = find(shared_data("mr_brain_dicom"))
    assert not rejects
    assert sorted({scan.files[0].parent for scan in found}) == folders
    assert sorted({scan.patient for scan in found}) == ["PGBM-002", "PGBM-006"]
    for scan_found in found[:3]:
        numbers = [
            int(pydicom.dcmread(file, specific_tags=["InstanceNumber"]).InstanceNumber) for file in scan_found.files
        ]
        assert numbers in (sorted(numbers), sorted(numbers)[::-1])
        assert [file.name for file in scan_found.files] != sorted(file.name for file in scan_found.files)
        datasets = [pydicom.dcmread(file) for file in sorted(scan_found.files)]
        volume = highdicom.get_volume_from_series(datasets)
        scan = dicom.read(scan_found.files)
        mapping = map_to(scan, np.diag([-1, -1, 1, 1]) @ volume.affine)  # LPS to RAS
        np.testing.assert_array_equal(scan.voxels, look_up(volume.array, mapping, scan.voxels.shape))


def test_every_odd_file_is_a_scan_or_a_clear_refusal() -> None:
    read, refused = 0, {}
    for path in sorted(shared_data("dicom_zoo").glob("pydicom_files/*.dcm")):
        assert dicom.is_dicom(path.read_bytes()[:200]), path.name
        try:
            header = dicom.read_header(path)
            scan = dicom.read([path], modality=header.modality or "OT")
        except ScanError as error:
            refused[path.name] = str(error)
        else:
            assert scan.voxels.shape == (header.frames, header.rows, header.columns)
            assert scan.voxels.max() > scan.voxels.min()
            read += 1
    assert read == 63
    for name, reason in refused.items():
        if name.startswith("liver"):
            assert "segmentation" in reason
        elif name.startswith("emri"):  # Enhanced MR without functional groups
            assert "cannot be put in space" in reason
        else:
            assert (name, "not Hounsfield units" in reason) == ("eCT_Supplemental.dcm", True)


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        ("693_J2KR", "693_UNCR", 0),
        ("US1_J2KR", "US1_UNCR", 0),
        ("MR2_J2KR", "MR2_UNCR", 0),
        ("RG3_J2KR", "RG3_J2KI", 120),
        ("SC_rgb", "SC_rgb_expb", 0),
        ("SC_rgb", "SC_ybr_full_uncompressed", 2),
        ("gdcm-US-ALOKA-16", "gdcm-US-ALOKA-16_big", 0),
        ("OBXXXX1A", "OBXXXX1A_rle", 0),
        ("color-pl", "color-px", 0),
    ],
)
def test_the_same_image_in_two_encodings(one: str, other: str, tolerance: float) -> None:
    folder = shared_data("dicom_zoo") / "pydicom_files"
    a, b = (dicom.read([folder / f"{name}.dcm"]).voxels for name in (one, other))
    np.testing.assert_allclose(a, b, atol=tolerance)


def test_broken_bytes_give_a_refusal_and_nothing_else(tmp_path: Path) -> None:
    whole = write(tmp_path / "a", ramp("uint16", 0, 4095), **CT).read_bytes()
    random = np.random.RandomState(0)
    path = tmp_path / "b"
    for _ in range(150):
        data = bytearray(whole[: random.randint(132, len(whole) + 1)])
        for at in random.randint(132, len(data) + 1, size=random.randint(0, 4)):
            data[min(at, len(data) - 1)] = random.randint(256)
        path.write_bytes(bytes(data))
        try:
            scan = dicom.read([path], modality=dicom.read_header(path).modality or "OT")
        except ScanError:
            continue
        assert np.isfinite(scan.voxels).all()
    path.write_bytes(whole[:400] + zlib.compress(whole[400:]))
    with pytest.raises(ScanError):
        dicom.read([path])
