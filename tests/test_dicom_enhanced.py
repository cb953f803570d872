"""Multi-frame DICOM: volumes by functional groups, nuclear medicine by its vectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import ENHANCED_CT, NOWHERE, SAGITTAL, at, enhanced, find, only_reason, sequence, write

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.policy import ACCEPTED, DEFAULT, Policy


def hounsfield(intercept: float) -> dict[str, Any]:
    """The macro of a frame's rescale."""
    values = {"RescaleSlope": 1, "RescaleIntercept": intercept, "RescaleType": "HU"}
    return {"PixelValueTransformationSequence": values}


def test_frames_are_ordered_by_geometry_and_rescaled_one_by_one(tmp_path: Path) -> None:
    frames = [at(0, 0, z) | hounsfield(i) for z, i in zip([8, 4, 0, 12], [-1, -2, -3, -4], strict=True)]
    window = {"FrameVOILUTSequence": {"WindowCenter": 40, "WindowWidth": 400}}
    frames[0] |= window  # the slice at 8 mm, in the middle
    path = enhanced(tmp_path / "a", frames, np.full((4, 3, 4), 1000, np.uint16), **ENHANCED_CT)
    (found,), rejects = find(tmp_path)
    assert not rejects
    assert (found.files, found.shape, found.spacing_mm, found.plane) == ((path,), (4, 3, 4), (4.0, 2.0, 0.5), "axial")
    assert (found.volume, found.irregular) == (0, "")
    scan = dicom.read([path])
    assert scan.voxels[:, 0, 0].tolist() == [997, 998, 999, 996]
    np.testing.assert_allclose(scan.affine, [[0, 0, -0.5, 0], [0, -2, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1]])
    assert scan.window is not None
    assert (scan.window.center, scan.window.width) == (40, 400)


def test_every_frame_must_be_in_hounsfield_units(tmp_path: Path) -> None:
    enhanced(tmp_path / "a", [at(0, 0, 0) | hounsfield(-1024), at(0, 0, 4)], **ENHANCED_CT)
    assert "without Rescale Slope" in only_reason(tmp_path)


VOLUMES: dict[str, Callable[[int], dict[str, Any]]] = {
    "stack": lambda k: {"FrameContentSequence": {"StackID": str(k)}},
    "orientation": lambda k: {"PlaneOrientationSequence": {"ImageOrientationPatient": list(SAGITTAL)}} if k else {},
    "time": lambda k: {"FrameContentSequence": {"TemporalPositionIndex": k + 1}},
    "b-value": lambda k: {"MRDiffusionSequence": {"DiffusionBValue": 500.0 * k}},
    "echo": lambda k: {"MREchoSequence": {"EffectiveEchoTime": 4.6 + 2.3 * k}},
    "frame type": lambda k: {"MRImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "M" if k else "P"]}},
    "trigger": lambda k: {"CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 30.0 * k}},
}


@pytest.mark.parametrize("name", VOLUMES)
def test_several_volumes_of_one_file(tmp_path: Path, name: str) -> None:
    """Frames 0, 2, 4, ... are of one volume, 1, 3, 5, ... of the other, and both run against their normal."""
    frames = []
    for i in range(8):
        along = 3.0 * (4 - i // 2)
        place = at(-along, 0, 0) if name == "orientation" and i % 2 else at(0, 0, along)
        frames.append(place | VOLUMES[name](i % 2))
    path = enhanced(tmp_path / "a", frames)
    found, rejects = find(tmp_path)
    assert not rejects
    assert [(scan.files, scan.shape, scan.volume, scan.irregular) for scan in found] == [
        ((path,), (4, 3, 4), 0, ""), ((path,), (4, 3, 4), 1, ""),
    ]  # fmt: skip
    assert len({scan.series for scan in found}) == 2
    for scan, expected in zip(found, ([6, 4, 2, 0], [7, 5, 3, 1]), strict=True):
        read = dicom.read([path], volume=scan.volume, policy=ACCEPTED)
        assert read.voxels[:, 0, 0].tolist() == expected
        assert read.spacing_mm == scan.spacing_mm
    with pytest.raises(ScanError, match="has no volume 5; there are 0, 1"):
        dicom.read([path], volume=5)
    assert "holds 2 volumes, which --policy.volumes refuse keeps out" in only_reason(tmp_path, Policy(volumes="refuse"))
    (first,), _ = find(tmp_path, Policy(volumes="first"))
    assert (first.volume, first.irregular) == (0, "the first of 2 volumes")


def test_dimension_indices_tell_what_no_macro_tells(tmp_path: Path) -> None:
    frames = [
        at(0, 0, 3 * (i // 2)) | {"FrameContentSequence": {"DimensionIndexValues": [1, i // 2 + 1, i % 2 + 1]}}
        for i in range(6)
    ]
    pointers = [0x00209056, 0x00209057, 0x00209128]  # stack, place in it, temporal position
    path = enhanced(tmp_path / "a", frames, DimensionIndexSequence=sequence(
        *({"DimensionIndexPointer": pointer} for pointer in pointers)))  # fmt: skip
    assert [scan.shape[0] for scan in find(tmp_path)[0]] == [3, 3]
    assert dicom.read([path], volume=1).voxels[:, 0, 0].tolist() == [1, 3, 5]


def test_frames_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    enhanced(tmp_path / "a", [at(0, 0, z) for z in (0, 4, 0, 4)])
    assert "lie where another does" in only_reason(tmp_path)


def test_a_volume_number_means_the_same_frames_under_every_policy(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a", [at(0, 0, z) for z in (0, 4, 8, 16, 20)])
    pieces, _ = find(tmp_path)
    assert [(scan.volume, scan.shape[0]) for scan in pieces] == [(0, 3), (1, 2)]
    assert {scan.irregular for scan in pieces} == {"split from a stack in which 1 of 6 slices is missing"}
    (whole,), _ = find(tmp_path, Policy(missing="allow"))
    assert (whole.volume, whole.shape[0], whole.irregular) == (2, 5, "1 of 6 slices is missing")
    assert "1 of 6 slices is missing" in only_reason(tmp_path, Policy(missing="refuse"))
    for policy in (DEFAULT, ACCEPTED):
        scans = [dicom.read([path], volume=k, policy=policy) for k in (0, 1)]
        assert [scan.voxels[:, 0, 0].tolist() for scan in scans] == [[0, 1, 2], [3, 4]]
        assert {scan.irregular for scan in scans} == {scan.irregular for scan in pieces}
    with pytest.raises(ScanError, match="has no volume 2; there are 0, 1"):
        dicom.read([path], volume=2)
    scan = dicom.read([path], volume=2, policy=ACCEPTED)
    assert scan.voxels[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert scan.spacing_mm[0] == 4


def test_one_bad_volume_does_not_cost_the_others(tmp_path: Path) -> None:
    good = [at(0, 0, z) | {"FrameContentSequence": {"StackID": "1"}} for z in (0, 4, 8)]
    bad = [at(0, 0, z) | {"FrameContentSequence": {"StackID": "2"}} for z in (0, 0, 4)]
    enhanced(tmp_path / "a", good + bad)
    (scan,), rejects = find(tmp_path)
    assert not rejects
    assert scan.shape[0] == 3
    assert scan.irregular.startswith("1 of its 2 volumes cannot be used: 1 of 3 slices lie where another does")


def test_frames_half_in_space_are_refused(tmp_path: Path) -> None:
    enhanced(tmp_path / "a", [at(0, 0, 0), at(0, 0, 4), {}])
    assert only_reason(tmp_path) == "puts 2 of its 3 frames into space, and not the others"


def test_only_the_frames_of_a_volume_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [at(0, 0, 3 * (i // 4)) | VOLUMES["time"](i % 4) for i in range(12)]
    path = enhanced(tmp_path / "a", frames)
    asked = []
    decoded = dicom.physical

    def spy(dataset: Any, header: Any, row: Any, frames: Any) -> Any:
        asked.append(list(frames))
        return decoded(dataset, header, row, frames)

    monkeypatch.setattr(dicom, "physical", spy)
    dicom.read([path], volume=2)
    assert asked == [[2, 6, 10]]


def test_part_of_a_concatenation_says_so(tmp_path: Path) -> None:
    enhanced(tmp_path / "a", [at(0, 0, 0), at(0, 0, 4)], InConcatenationNumber=2, InConcatenationTotalNumber=3)
    assert find(tmp_path)[0][0].irregular == "part 2 of a concatenation of 3"


NM = {"Modality": "NM", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.20", **NOWHERE}


def test_nuclear_medicine_is_ordered_by_its_vectors(tmp_path: Path) -> None:
    """A gated reconstruction: three slices at two times, in no order. Its place in space is not certain."""
    place, time = [3, 1, 2, 1, 3, 2], [1, 2, 1, 1, 2, 2]
    pixels = np.broadcast_to(np.arange(6, dtype=np.uint16)[:, None, None], (6, 3, 4))
    path = write(tmp_path / "a", pixels, NumberOfFrames=6, SliceVector=place, TimeSlotVector=time,
                 SpacingBetweenSlices=-4.5, **NM)  # fmt: skip
    found, _ = find(tmp_path)
    assert [(scan.volume, scan.shape, scan.spacing_mm, scan.plane) for scan in found] == [
        (0, (3, 3, 4), (4.5, 2.0, 0.5), ""), (1, (3, 3, 4), (4.5, 2.0, 0.5), ""),
    ]  # fmt: skip
    assert [dicom.read([path], volume=k).voxels[:, 0, 0].tolist() for k in (0, 1)] == [[3, 2, 0], [1, 5, 4]]
    np.testing.assert_array_equal(dicom.read([path]).affine, np.diag([4.5, 2.0, 0.5, 1]))


def test_nuclear_medicine_without_slices_is_no_volume(tmp_path: Path) -> None:
    write(tmp_path / "a", np.zeros((4, 3, 4), np.uint16), NumberOfFrames=4, DetectorVector=[1, 1, 2, 2], **NM)
    (scan,), _ = find(tmp_path)
    assert scan.irregular == "4 frames in the order of the file, not a volume"
