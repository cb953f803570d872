"""DICOM SEG, read back from its bytes alone: every voxel on the image that it belongs to, and accepted by dciodvfy."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import shared_data
from dicom_files import AXIAL, CT, SAGITTAL, XRAY, at, enhanced, write
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from medclr.errors import ScanError
from medclr.scans.dicom import find, read, read_header
from medclr.scans.dicom_seg import write_seg
from medclr.scans.policy import ACCEPTED

IDENTITY: dict[str, Any] = {
    "PatientName": "Mustermann^Erika", "PatientBirthDate": "19640812", "PatientSex": "F", "StudyDate": "20260102",
    "StudyTime": "101112", "StudyID": "7", "AccessionNumber": "A7", "ReferringPhysicianName": "Doe^J",
    "FrameOfReferenceUID": "1.2.3.9", "PositionReferenceIndicator": None, "Manufacturer": "maker",
}  # fmt: skip
CLASSES = ("left part", "right part")


def series(folder: Path, depth: int = 5, **elements: Any) -> list[Path]:
    """Slices of 6 x 7 pixels, their names in another order than their places; pixels are random."""
    rng = np.random.default_rng(0)
    order = rng.permutation(depth)
    return [
        write(folder / f"{order[d]}.dcm", rng.integers(0, 900, (6, 7)).astype(np.uint16),
              **IDENTITY | {"ImagePositionPatient": [1.5, -20.25, 3.0 * d], "InstanceNumber": int(order[d])} | elements)
        for d in range(depth)
    ]  # fmt: skip


def some_labels(shape: tuple[int, int, int], seed: int = 1) -> NDArray[np.uint8]:
    """Classes 0, 1 and 2 at random, with one slice of no class and one of class 2 alone."""
    labels = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)
    labels[0] = 0
    labels[-1] = 2 * (labels[-1] == 2)
    return labels


def reread(path: Path) -> dict[tuple[str, int], NDArray[np.uint8]]:
    """(SOP instance, frame from 1) of the source -> its labels [H,W], from the bits as PS3.5 8.1.1 packs them."""
    seg = pydicom.dcmread(path)
    assert (seg.SegmentationType, seg.BitsAllocated, seg.Modality) == ("BINARY", 1, "SEG")
    n, height, width = int(seg.NumberOfFrames), seg.Rows, seg.Columns
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")[: n * height * width]
    found: dict[tuple[str, int], NDArray[np.uint8]] = {}
    for item, frame in zip(seg.PerFrameFunctionalGroupsSequence, bits.reshape(n, height, width), strict=True):
        (derivation,) = item.DerivationImageSequence
        (source,) = derivation.SourceImageSequence
        place = source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 1))
        number = shared_or_own(seg, item, "SegmentIdentificationSequence").ReferencedSegmentNumber
        labels = found.setdefault(place, np.zeros((height, width), np.uint8))
        assert not labels[frame == 1].any()
        labels[frame == 1] = number
    return found


def shared_or_own(seg: pydicom.Dataset, item: pydicom.Dataset, name: str) -> pydicom.Dataset:
    return (item if name in item else seg.SharedFunctionalGroupsSequence[0])[name].value[0]


def complaints(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed; it is in Debian's dicom3tools")
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert "Segmentation" in lines, "it did not look at the file"
    return [line for line in lines if line.startswith(("Error", "Abort"))]


def ordered(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files of the one scan, in the order of its slices."""
    (scan,), _ = find([read_header(path) for path in paths], ACCEPTED)
    return scan.files


def test_every_voxel_lies_on_the_image_that_it_was_found_on(tmp_path: Path) -> None:
    paths = series(tmp_path / "scan")
    labels = some_labels((5, 6, 7))
    write_seg(tmp_path / "seg.dcm", labels, CLASSES, paths[::-1])
    found = reread(tmp_path / "seg.dcm")
    for labels_here, path in zip(labels, ordered(paths), strict=True):
        image = pydicom.dcmread(path)
        assert np.array_equal(found.pop((image.SOPInstanceUID, 1), np.zeros((6, 7))), labels_here)
    assert not found


def test_frames_lie_where_their_images_do(tmp_path: Path) -> None:
    paths = series(tmp_path / "scan", ImageOrientationPatient=list(SAGITTAL), PixelSpacing=[0.8, 1.25])
    images = {}
    for x, path in enumerate(paths):
        image = pydicom.dcmread(path)
        image.ImagePositionPatient = [2.5 * x, 7.125, -3]
        image.save_as(path)
        images[image.SOPInstanceUID] = image
    write_seg(tmp_path / "seg.dcm", some_labels((5, 6, 7)), CLASSES, paths)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == list(SAGITTAL)
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [0.8, 1.25]
    for item in seg.PerFrameFunctionalGroupsSequence:
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert item.PlanePositionSequence[0].ImagePositionPatient == images[source].ImagePositionPatient


def test_it_belongs_to_the_patient_the_study_and_the_series(tmp_path: Path) -> None:
    paths = series(tmp_path / "scan")
    write_seg(tmp_path / "seg.dcm", some_labels((5, 6, 7)), CLASSES, paths)
    seg, image = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(paths[0])
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
                 "AccessionNumber", "FrameOfReferenceUID"):  # fmt: skip
        assert seg[name].value == image[name].value, name
    assert seg.SeriesInstanceUID != image.SeriesInstanceUID
    (referred,) = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == image.SeriesInstanceUID
    there = {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence}
    assert there == {pydicom.dcmread(path).SOPInstanceUID for path in paths}
    assert [(s.SegmentNumber, s.SegmentLabel) for s in seg.SegmentSequence] == [(1, "left part"), (2, "right part")]
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"AUTOMATIC"}


@pytest.mark.parametrize(
    "kind",
    ["series", "one class", "no voxel", "tilted", "enhanced", "radiograph", "odd radiograph", "no names", "odd values"],
)
def test_dciodvfy_finds_no_error(kind: str, tmp_path: Path) -> None:
    classes, shape = CLASSES, (5, 6, 7)
    if kind == "enhanced":
        paths, shape = [twice_seen(tmp_path / "scan.dcm")], (3, 3, 4)
    elif "radiograph" in kind:
        odd = (
            {"FrameOfReferenceUID": "1.2.3.9", "PixelSpacing": [0, 0]}
            if "odd" in kind
            else {"FrameOfReferenceUID": None}
        )
        paths = [write(tmp_path / "x.dcm", np.zeros((8, 9), np.uint16), **IDENTITY | XRAY | odd)]
        shape = (1, 8, 9)
    elif kind == "odd values":  # as ACR-NEMA and careless programs wrote them
        paths = series(tmp_path / "scan", SliceThickness=None)
        for path in paths:
            text = path.read_bytes()
            for before, after in ((b"20260102", b"1996.1.2"), (b"101112", b"10:112"), (b"19640812", b"19640832")):
                text = text.replace(before, after)
            path.write_bytes(text.replace(b"\x10\x00\x40\x00CS\x02\x00F ", b"\x10\x00\x40\x00CS\x02\x00W "))
            assert pydicom.dcmread(path).PatientSex == "W"
    elif kind == "no names":
        paths = series(tmp_path / "scan", **dict.fromkeys(["PatientID", *list(IDENTITY)[:8]]))
    elif kind == "tilted":
        paths = [
            path for d in range(5) for path in series(tmp_path / str(d), 1, **CT, ImagePositionPatient=[0, d, 3 * d])
        ]
    else:
        paths = series(tmp_path / "scan")
    labels = some_labels(shape) if kind != "no voxel" else np.zeros(shape, np.uint8)
    if kind == "one class":
        classes, labels = ("organ",), (labels > 0).astype(np.uint8)
    if shape[0] == 1:
        labels[0, 2:4] = 1
    write_seg(tmp_path / "seg.dcm", labels, classes, paths)
    assert complaints(tmp_path / "seg.dcm") == []
    written = np.stack(list(reread(tmp_path / "seg.dcm").values()))
    assert np.array_equal(np.bincount(written.ravel(), minlength=3)[1:], np.bincount(labels.ravel(), minlength=3)[1:])


@pytest.mark.slow
def test_dciodvfy_finds_no_error_in_what_is_written_of_odd_files(tmp_path: Path) -> None:
    written = 0
    for path in sorted((shared_data("dicom_zoo") / "pydicom_files").iterdir()):
        try:
            modality = read_header(path).modality or "OT"
            voxels = read([path], modality, policy=ACCEPTED).voxels
            write_seg(tmp_path / path.name, np.ones(voxels.shape, np.uint8), ("all",), [path])
        except ScanError:
            continue
        assert complaints(tmp_path / path.name) == [], path.name
        assert sum(labels.sum() for labels in reread(tmp_path / path.name).values()) == voxels.size
        written += 1
    assert written >= 35


def twice_seen(path: Path) -> Path:
    """An enhanced image of two echoes at the same three places, interleaved; the orientation is each frame's own."""
    frames = [
        {"MREchoSequence": {"EffectiveEchoTime": echo}, "FrameContentSequence": {"StackID": "1"},
         "PlaneOrientationSequence": {"ImageOrientationPatient": list(AXIAL)}, **at(1.5, 2.25, z)}
        for z in (6.0, 0.0, 3.0) for echo in (10.0, 80.0)
    ]  # fmt: skip
    enhanced(path, frames, **IDENTITY)
    dataset = pydicom.dcmread(path)
    del dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("volume", [0, 1])
def test_frames_of_a_multi_frame_image_keep_their_numbers(volume: int, tmp_path: Path) -> None:
    path = twice_seen(tmp_path / "scan.dcm")
    scan = read([path], volume=volume)  # the pixels of frame k are all k, counted from 0
    frames = scan.voxels[:, 0, 0].astype(int)  # [D]
    assert sorted(frames) == [volume, volume + 2, volume + 4]
    labels = some_labels((3, 3, 4))
    labels[0, 1, 2] = 1
    write_seg(tmp_path / "seg.dcm", labels, CLASSES, [path], volume=volume)
    found = reread(tmp_path / "seg.dcm")
    uid = pydicom.dcmread(path).SOPInstanceUID
    assert sorted(found) == sorted((uid, int(frame) + 1) for frame in frames)
    for frame, labels_here in zip(frames, labels, strict=True):
        assert np.array_equal(found[uid, int(frame) + 1], labels_here)


def test_highdicom_reads_the_same(tmp_path: Path) -> None:
    from highdicom.seg import segread

    paths = ordered(series(tmp_path / "scan"))
    labels = some_labels((5, 6, 7))
    write_seg(tmp_path / "seg.dcm", labels, CLASSES, paths)
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    pixels = segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert np.array_equal(pixels, labels)


def test_orientations_that_differ_in_the_last_digit_are_one(tmp_path: Path) -> None:
    paths = series(tmp_path / "scan", 2)
    image = pydicom.dcmread(paths[1])
    image.ImageOrientationPatient = [1, 0, 0, 0, 0.99999, 0.00001]
    image.save_as(paths[1])
    write_seg(tmp_path / "seg.dcm", np.ones((2, 6, 7), np.uint8), CLASSES, paths)
    assert len(reread(tmp_path / "seg.dcm")) == 2


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"StudyInstanceUID": None}, "no StudyInstanceUID"),
        ({"SOPInstanceUID": ""}, "no SOPInstanceUID"),
        ({"FrameOfReferenceUID": None}, "no Frame of Reference UID"),
    ],
)
def test_images_without_what_it_must_refer_to_are_refused(
    elements: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    paths = series(tmp_path / "scan", 3)
    for path in paths:
        dataset = pydicom.dcmread(path)
        for name, value in elements.items():
            dataset.pop(name)
            if value is not None:
                setattr(dataset, name, value)
        dataset.save_as(path)
    with pytest.raises(ScanError, match=reason) as refused:
        write_seg(tmp_path / "seg.dcm", np.ones((3, 6, 7), np.uint8), CLASSES, paths)
    assert "Mustermann" not in str(refused.value)
    assert not (tmp_path / "seg.dcm").exists()


def test_a_cine_loop_without_a_place_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", np.zeros((4, 6, 7), np.uint8), NumberOfFrames=4, **IDENTITY | XRAY)
    with pytest.raises(ScanError, match="Frame of Reference"):
        write_seg(tmp_path / "seg.dcm", np.ones((4, 6, 7), np.uint8), CLASSES, [path])


def test_each_is_a_new_instance(tmp_path: Path) -> None:
    paths = series(tmp_path / "scan", 2, SeriesInstanceUID=generate_uid())
    for name in ("a", "b"):
        write_seg(tmp_path / name, np.ones((2, 6, 7), np.uint8), CLASSES, paths)
    a, b = (pydicom.dcmread(tmp_path / name) for name in ("a", "b"))
    assert a.SOPInstanceUID != b.SOPInstanceUID
    assert a.SeriesInstanceUID != b.SeriesInstanceUID
