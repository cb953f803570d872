"""The phantom cohort: same seed, same bytes; valid files; plausible numbers; a lesion where the table says."""

import csv
import dataclasses
import hashlib
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from medclr.data import phantom
from medclr.data.anatomy import LIVER, Canvas, draw_head, draw_torso, paint_torso
from medclr.data.phantom import CohortSummary, has_lesion, write_cohort
from medclr.errors import MedclrError

PATIENTS = 4
SIZE_PX = 80  # half of the default: the tests look at numbers, not at beauty


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> CohortSummary:
    return write_cohort(tmp_path_factory.mktemp("phantom") / "cohort", patients=PATIENTS, seed=3, size_px=SIZE_PX)


@pytest.fixture(scope="module")
def cohort(summary: CohortSummary) -> Path:
    return summary.folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def series(cohort: Path, number: int) -> list[pydicom.Dataset]:
    """A patient's slices in the order of their file names."""
    return [pydicom.dcmread(p) for p in sorted((cohort / "ct" / f"sub-{number:03d}").iterdir())]


def hounsfield(cohort: Path, number: int) -> NDArray[np.float64]:
    """A patient's CT [D,H,W] from feet to head."""
    slices = sorted(series(cohort, number), key=lambda ds: float(ds.ImagePositionPatient[2]))
    return np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])


def labels(cohort: Path) -> dict[str, str]:
    with (cohort / "labels.csv").open(newline="") as file:
        return {row["patient_id"]: row["label"] for row in csv.DictReader(file)}


def test_same_seed_same_bytes_whatever_the_cohort_size(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "smaller", patients=2, seed=3, size_px=SIZE_PX)
    everything = digests(cohort)
    smaller = digests(tmp_path / "smaller")
    table = smaller.pop("labels.csv")
    assert smaller == {name: digest for name, digest in everything.items() if "sub-001" in name or "sub-002" in name}
    assert table != everything["labels.csv"]


def test_another_seed_gives_other_patients(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "other", patients=1, seed=4, size_px=SIZE_PX)
    ours, theirs = digests(cohort), digests(tmp_path / "other")
    for name in ("mr/sub-001_T1w.nii.gz", "mr_masks/sub-001_T1w.nii.gz", "xr/sub-001_dx.png", "ct/sub-001/IM0001.dcm"):
        assert ours[name] != theirs[name]


def test_counts_in_the_summary_are_the_files_on_disk(cohort: Path, summary: CohortSummary) -> None:
    assert len(list((cohort / "ct").rglob("*.dcm"))) == summary.ct_slices
    assert len(list((cohort / "mr").iterdir())) == len(list((cohort / "mr_masks").iterdir())) == summary.mr_volumes
    assert len(list((cohort / "xr").iterdir())) == summary.xr_images
    assert (summary.patients, summary.mr_volumes, summary.xr_images) == (PATIENTS,) * 3
    assert summary.lesions == sum(label == "lesion" for label in labels(cohort).values())


def test_every_patient_is_labelled_and_half_carry_lesions(cohort: Path) -> None:
    table = labels(cohort)
    assert list(table) == [f"sub-{number:03d}" for number in range(1, PATIENTS + 1)]
    assert {path.name for path in (cohort / "ct").iterdir()} == set(table)
    assert {path.name.split("_")[0] for path in (cohort / "mr").iterdir()} == set(table)
    assert {path.name.split("_")[0] for path in (cohort / "xr").iterdir()} == set(table)
    carriers = [has_lesion(seed=0, number=number) for number in range(1, 201)]
    assert all(a != b for a, b in zip(carriers[::2], carriers[1::2], strict=True))
    assert 30 < sum(carriers[::2]) < 70  # which of a pair carries it is a toss


def test_series_are_valid_ct_storage_of_one_volume(cohort: Path) -> None:
    seen: set[str] = set()
    for number in range(1, PATIENTS + 1):
        slices = series(cohort, number)
        spacing_mm, _ = highdicom.spatial.get_series_volume_positions(slices)
        assert spacing_mm == pytest.approx(float(slices[0].SliceThickness))
        assert {ds.file_meta.TransferSyntaxUID for ds in slices} == {pydicom.uid.ExplicitVRLittleEndian}
        assert {ds.SOPClassUID for ds in slices} == {pydicom.uid.CTImageStorage}
        assert len({ds.SeriesInstanceUID for ds in slices}) == len({ds.FrameOfReferenceUID for ds in slices}) == 1
        assert {(ds.PatientID, str(ds.PatientName)) for ds in slices} == {
            (f"sub-{number:03d}", f"PHANTOM^{number:03d}")
        }
        uids = {uid for ds in slices for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID)}
        assert all(uid.is_valid for uid in uids)
        assert len(uids) == len(slices) + 2
        assert seen.isdisjoint(uids)
        seen |= uids
        first = slices[0]
        assert (first.BitsAllocated, first.BitsStored, first.HighBit, first.PixelRepresentation) == (16, 12, 11, 0)
        # The middle of the first and of the last pixel are as far from the middle of the field.
        last = float(first.ImagePositionPatient[0]) + (first.Columns - 1) * float(first.PixelSpacing[1])
        assert last == pytest.approx(-float(first.ImagePositionPatient[0]))


def test_only_geometry_tells_the_order_of_slices(cohort: Path) -> None:
    slices = series(cohort, 1)
    heights = np.array([float(ds.ImagePositionPatient[2]) for ds in slices])
    instances = np.array([int(ds.InstanceNumber) for ds in slices])
    assert sorted(instances) == list(range(1, len(slices) + 1))
    for order in (np.arange(len(slices)), instances):  # by file name, by InstanceNumber
        assert abs(np.corrcoef(order, heights)[0, 1]) < 0.7


def test_hounsfield_units_of_air_liver_and_bone(cohort: Path) -> None:
    for number in range(1, PATIENTS + 1):
        hu = hounsfield(cohort, number)
        assert hu.min() >= -1024
        assert np.median(hu[:, :4, :]) == pytest.approx(-1000, abs=15)  # above the patient
        lower = hu[: len(hu) // 3]
        assert np.percentile(lower, 99.9) > 300
        # The right upper abdomen: the left third of the image, where most soft tissue is liver.
        right = lower[-3:, SIZE_PX // 3 : 2 * SIZE_PX // 3, SIZE_PX // 4 : SIZE_PX // 2]
        soft = right[(right > 0) & (right < 150)]
        assert np.median(soft) == pytest.approx(LIVER, abs=12)
        upper = hu[-6]
        assert 0.03 < ((upper > -950) & (upper < -700)).mean() < 0.4  # lungs


def test_liver_lies_on_the_patients_right_and_spine_at_the_back() -> None:
    torso = draw_torso(np.random.default_rng(0), lesion=False)
    at = {
        "liver": (-90, 0, -45),
        "spine": (0, 62, -3),
        "heart": (30, -20, 20),
        "right lung": (-80, 0, 70),
        "air": (0, -190, 0),
    }
    found = {}
    for name, (x, y, z) in at.items():
        canvas = Canvas(np.array([z]), np.array([y]), np.array([x]), -1000.0, 1.0)
        paint_torso(canvas, torso)
        found[name] = float(canvas.values[0, 0, 0])
    assert found["liver"] == pytest.approx(LIVER, abs=50)
    assert found["spine"] > 80
    assert 30 < found["heart"] < 150
    assert found["right lung"] < -700 or found["right lung"] == pytest.approx(20, abs=5)  # or one of its vessels
    assert found["air"] == -1000


def test_masks_lie_on_the_grid_of_their_volume(cohort: Path) -> None:
    for number, label in enumerate(labels(cohort).values(), start=1):
        name = f"sub-{number:03d}_T1w.nii.gz"
        volume, mask = nibabel.load(cohort / "mr" / name), nibabel.load(cohort / "mr_masks" / name)
        assert volume.shape == mask.shape
        assert volume.get_data_dtype() == np.int16
        np.testing.assert_array_equal(volume.affine, mask.affine)
        assert 0 < np.linalg.norm(volume.affine[:3, :3] / volume.header.get_zooms() - np.eye(3)) < 0.5  # mildly oblique
        intensity, classes = np.asarray(volume.dataobj).astype(float), np.asarray(mask.dataobj)
        assert set(np.unique(classes)) == ({0, 1, 2} if label == "lesion" else {0, 1})
        core = tuple(slice(n // 3, 2 * n // 3) for n in volume.shape)
        white = np.percentile(intensity[core], 90)
        assert intensity[classes == 1].mean() < 0.6 * white  # fluid is dark on T1


def test_scanners_differ_in_scale_and_lesions_do_not_follow_them() -> None:
    numbers = range(1, 301)
    by_scanner: dict[str, list[bool]] = {}
    for number in numbers:
        by_scanner.setdefault(phantom._scanner(0, number).model, []).append(has_lesion(0, number))
    assert set(by_scanner) == {scanner.model for scanner in phantom.SCANNERS}
    assert all(0.35 < np.mean(lesions) < 0.65 for lesions in by_scanner.values())


def test_radiograph_shows_lungs_dark_and_spine_bright(cohort: Path) -> None:
    for number in range(1, PATIENTS + 1):
        image = np.asarray(Image.open(cohort / "xr" / f"sub-{number:03d}_dx.png"))
        assert image.dtype == np.uint16
        assert image.shape == (round(1.4 * SIZE_PX),) * 2
        size = len(image)
        row = image[round(0.42 * size) : round(0.46 * size)].mean(axis=0)  # above the heart
        spine, right, left = (row[round(f * size)] for f in (0.5, 0.3, 0.7))
        assert min(spine / right, spine / left) > 1.3


@pytest.mark.parametrize(("organ", "contrast_hu"), [("nodules", 850), ("metastases", 8 - LIVER)])
def test_lesions_are_painted_where_they_were_drawn(organ: str, contrast_hu: float) -> None:
    torso = draw_torso(np.random.default_rng(5), lesion=True)
    (x, y, z), radius = getattr(torso, organ)[0]
    step_mm = 2.0
    across = np.arange(-150, 150, step_mm)
    painted = {}
    for name, patient in {"with": torso, "without": dataclasses.replace(torso, **{organ: ()})}.items():
        canvas = Canvas(np.array([z]), across, across, -1000.0, step_mm)
        paint_torso(canvas, patient)
        painted[name] = canvas.values[0]
    disc = np.hypot(across[:, None] - y, across[None, :] - x) < radius - step_mm
    difference = painted["with"] - painted["without"]
    assert np.median(difference[disc]) == pytest.approx(contrast_hu, abs=80 if organ == "nodules" else 1)


def test_the_healthy_have_no_lesions() -> None:
    torso = draw_torso(np.random.default_rng(5), lesion=False)
    assert not torso.nodules
    assert not torso.metastases
    assert not draw_head(np.random.default_rng(5), lesion=False).metastases


def test_an_existing_cohort_is_left_alone(cohort: Path) -> None:
    before = digests(cohort)
    with pytest.raises(MedclrError, match="exists already"):
        write_cohort(cohort, patients=1)
    assert digests(cohort) == before


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantom, "_write_nifti", full)
    with pytest.raises(MedclrError, match="disk is full"):
        write_cohort(tmp_path / "cohort", patients=1, size_px=SIZE_PX)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"seed": -1}, {"size_px": 8}])
def test_counts_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(MedclrError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        write_cohort(tmp_path / "cohort", **wrong)
