"""The DICOM reader: what is a scan, what ``read`` promises, and real scans against independent readers."""

import io
import zlib
from pathlib import Path
from typing import Any

import highdicom.spatial
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import shared_data
from dicom_files import CT, NOWHERE, XRAY, find, ramp, report, slab, write
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.scan import Scan

# What is no scan


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


def test_a_file_without_preamble_and_meta_group_is_read(tmp_path: Path) -> None:
    stored = ramp("uint16", 0, 4095)
    path = write(tmp_path / "a", stored)
    dataset = pydicom.dcmread(path)
    raw = io.BytesIO()
    pydicom.dcmwrite(raw, Dataset(dataset), implicit_vr=True, little_endian=True, enforce_file_format=False)
    path.write_bytes(raw.getvalue())
    assert dicom.is_dicom(path.read_bytes()[:132])
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], stored)


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
