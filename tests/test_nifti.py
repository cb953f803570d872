"""NIfTI: orientation, slices, volumes, and masks on the scan's grid. Formats and damage: test_nifti_files.py."""

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from medclr import scans
from medclr.errors import MedclrError, ScanError
from medclr.scans import nifti
from medclr.scans.policy import ACCEPTED, Plane, Policy
from medclr.scans.scan import Scan
from tests.conftest import shared_data

RNG = np.random.RandomState(0)
VOLUME = RNG.randint(-1000, 3000, (4, 5, 6)).astype(np.int16)  # R, A, S
RAS = np.diag([1.0, 1.5, 2.0, 1.0])


def save(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = RAS) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def reorient(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same voxels at the same places, stored in another order."""
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(codes)))


def all_orders() -> list[str]:
    return ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)]


def test_axial_slices_are_seen_as_radiologists_do(tmp_path: Path) -> None:
    scan = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    # slices upwards, rows from front to back, columns from the patient's right to his left
    assert np.array_equal(scan.voxels, VOLUME.transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.float32))
    assert (scan.spacing_mm, scan.source_shape) == ((2.0, 1.5, 1.0), (4, 5, 6))
    assert (scan.source_axes, scan.source_flips) == ((2, 1, 0), (False, True, True))


@pytest.mark.parametrize("codes", all_orders())
def test_storage_order_does_not_matter(tmp_path: Path, codes: str) -> None:
    tilt = np.eye(4)
    tilt[:3, :3] = nib.eulerangles.euler2mat(0.1, -0.2, 0.15)
    tilt[:3, 3] = 7, -30, 12
    image = nib.Nifti1Image(VOLUME, tilt @ RAS)
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(reorient(image, codes), tmp_path / "b.nii.gz")
    a, b = (scans.read([tmp_path / name], "CT") for name in ("a.nii.gz", "b.nii.gz"))
    assert np.array_equal(a.voxels, b.voxels)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    np.testing.assert_allclose(a.spacing_mm, (2.0, 1.5, 1.0), rtol=1e-6)


@pytest.mark.parametrize("codes", all_orders()[::5])
def test_source_axes_and_flips_lead_back_to_the_file(tmp_path: Path, codes: str) -> None:
    image = reorient(nib.Nifti1Image(VOLUME, RAS), codes)
    nib.save(image, tmp_path / "a.nii")
    scan = nifti.read([tmp_path / "a.nii"], "CT")
    steps = tuple(slice(None, None, -1 if flip else 1) for flip in scan.source_flips)
    back = scan.voxels[steps].transpose(np.argsort(scan.source_axes))
    assert np.array_equal(back, np.asanyarray(image.dataobj))
    assert scan.source_shape == image.shape
    ornt = np.array([(axis, -1 if flip else 1) for axis, flip in zip(scan.source_axes, scan.source_flips, strict=True)])
    inverse = np.array([(list(scan.source_axes).index(i), ornt[list(scan.source_axes).index(i), 1]) for i in range(3)])
    np.testing.assert_allclose(scan.affine, image.affine @ inv_ornt_aff(inverse, image.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "plane"),
    [
        ((1, 1, 1), "axial"),
        ((1, 1, 5), "axial"),
        ((1, 5, 1), "coronal"),
        ((5, 1, 1), "sagittal"),
        ((1.05, 1, 1), "axial"),
        ((3, 3, 1), "coronal"),
    ],
)
def test_slices_lie_across_the_coarsest_axis(tmp_path: Path, spacing: tuple[float, ...], plane: str) -> None:
    path = save(tmp_path / "a.nii", VOLUME, np.diag([*spacing, 1.0]))
    (found,), rejected = nifti.find([nifti.read_header(path)])
    scan = nifti.read([path], "MR")
    assert (found.plane, rejected) == (plane, [])
    assert found.shape == scan.voxels.shape
    np.testing.assert_allclose(found.spacing_mm, scan.spacing_mm)
    world = {"axial": "SPL", "coronal": "PIL", "sagittal": "RIP"}[plane]
    assert "".join(nib.aff2axcodes(scan.affine)) == world


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", all_orders())
def test_each_plane_of_each_order_shows_what_nibabel_shows(tmp_path: Path, codes: str, plane: Plane) -> None:
    """The same value at the same place; slices lie across the axis that was asked for."""
    tilt = np.eye(4)
    tilt[:3, :3] = nib.eulerangles.euler2mat(0.2, -0.1, 0.15)
    tilt[:3, 3] = 7, -30, 12
    image = reorient(nib.Nifti1Image(VOLUME, tilt @ RAS), codes)
    nib.save(image, tmp_path / "a.nii")
    (found,), _ = nifti.find([nifti.read_header(tmp_path / "a.nii")], plane=plane)
    scan = scans.read(found.files, "CT", plane=plane)
    assert (found.plane, found.shape) == (plane, scan.voxels.shape)
    assert found.spacing_mm == pytest.approx(scan.spacing_mm)
    across, _, _ = io_orientation(scan.affine)[:, 0]
    assert ("sagittal", "coronal", "axial")[int(across)] == plane

    canonical = nib.as_closest_canonical(nib.load(tmp_path / "a.nii"))
    places = scan.affine @ np.vstack([np.indices(scan.voxels.shape).reshape(3, -1), np.ones(scan.voxels.size)])
    index = np.linalg.inv(canonical.affine) @ places  # [4,DHW]
    np.testing.assert_allclose(index, np.rint(index), atol=1e-4)
    x, y, z = np.rint(index[:3]).astype(int)
    assert np.array_equal(scan.voxels.ravel(), np.asanyarray(canonical.dataobj)[x, y, z])


def test_a_misspelt_plane_or_policy_is_named_with_the_known_ones(tmp_path: Path) -> None:
    misspelt: Any = "saggital"
    with pytest.raises(ScanError, match="plane 'saggital': is none of axial, coronal, sagittal"):
        scans.read([save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16))], "CT", plane=misspelt)
    with pytest.raises(MedclrError, match=r"policy\.tilt 'saggital': is none of refuse, allow"):
        Policy(tilt=misspelt)


def test_the_plane_of_a_row_leads_to_the_same_slices(tmp_path: Path) -> None:
    """What prepare passes back is what find chose, also where the file records no orientation."""
    unoriented = save(tmp_path / "a.nii", VOLUME, affine=None)
    (bare,), _ = nifti.find([nifti.read_header(unoriented)])
    (chosen,), _ = nifti.find([nifti.read_header(unoriented)], plane="sagittal")
    assert (bare.plane, bare.shape) == ("", (6, 5, 4))
    assert (chosen.plane, chosen.shape) == ("sagittal", (4, 6, 5))
    assert nifti.read([unoriented], "CT", plane="sagittal", policy=ACCEPTED).voxels.shape == chosen.shape
    slice_ = save(tmp_path / "b.nii", VOLUME[:, :1])
    (single,), _ = nifti.find([nifti.read_header(slice_)], plane="axial")
    assert (single.plane, single.shape) == ("coronal", (1, 6, 4))  # a single slice is not cut into lines
    assert nifti.read([slice_], "CT", plane="axial").voxels.shape == single.shape


SERIES = RNG.randint(-1000, 3000, (4, 5, 6, 2, 3)).astype(np.int16)  # 2 times of 3 channels


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_each_volume_of_a_series_is_a_scan(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, SERIES)
    found, rejected = nifti.find([nifti.read_header(path)])
    assert ([scan.volume for scan in found], rejected) == ([0, 1, 2, 3, 4, 5], [])
    assert {scan.irregular for scan in found} == {"one of 6 volumes of its file"}
    reader = np.asanyarray(nib.load(path).dataobj).reshape(4, 5, 6, 6, order="F")
    for scan in found:
        read = scans.read(scan.files, "CT", volume=scan.volume)
        assert np.array_equal(read.voxels, reader[..., scan.volume].transpose(2, 1, 0)[:, ::-1, ::-1])
        assert (read.irregular, read.source_shape) == (scan.irregular, (4, 5, 6))
    for absent in (-1, 6):
        with pytest.raises(ScanError, match="6 volumes"):
            nifti.read([path], "CT", volume=absent)


def test_the_policy_decides_about_volumes(tmp_path: Path) -> None:
    header = nifti.read_header(save(tmp_path / "a.nii", SERIES))
    (first,), _ = nifti.find([header], Policy(volumes="first"))
    assert (first.volume, first.irregular) == (0, "one of 6 volumes of its file")
    found, ((path, reason),) = nifti.find([header], Policy(volumes="refuse"))
    assert (found, path) == ([], header.path)
    assert "6 volumes" in reason
    with pytest.raises(ScanError, match="6 volumes"):
        nifti.read([path], "CT", policy=Policy(volumes="refuse"))
    one = nifti.read_header(save(tmp_path / "b.nii", SERIES[..., :1, :1]))
    (plain,), _ = nifti.find([one], Policy(volumes="refuse"))
    assert (plain.volume, plain.irregular) == (0, "")


def test_only_the_volume_that_is_asked_for_is_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", SERIES)
    whole = bytearray(path.read_bytes())
    whole[-SERIES[..., 0, 0].nbytes :] = bytes(SERIES[..., 0, 0].nbytes)
    path.write_bytes(whole)
    assert np.array_equal(nifti.read([path], "CT", volume=5).voxels, np.zeros((6, 5, 4)))
    path.write_bytes(whole[:-10])
    with pytest.raises(ScanError, match="too short"):
        nifti.read([path], "CT")


def two_orientations(path: Path, moved_mm: float) -> Path:
    image = nib.Nifti1Image(VOLUME, RAS)
    image.set_sform(RAS, code=2)
    moved = RAS.copy()
    moved[1, 3] = moved_mm
    image.set_qform(moved, code=1)
    nib.save(image, path)
    return path


def test_sform_goes_before_qform_and_disagreement_is_told(tmp_path: Path) -> None:
    for moved_mm, told in ((3.2, "its qform and sform disagree by 3.2 mm, its sform is used"), (0.4, "")):
        path = two_orientations(tmp_path / "a.nii", moved_mm)
        (found,), _ = nifti.find([nifti.read_header(path)])
        scan = nifti.read([path], "CT")
        assert (found.irregular, scan.irregular) == (told, told)
        world = np.linalg.inv(nib.load(path).affine) @ scan.affine  # back to the index that nibabel gives
        assert np.array_equal(world @ [0, 4, 3, 1], [0, 0, 0, 1])
    image = nib.Nifti1Image(SERIES, RAS)
    image.set_qform(np.diag([3.0, 1.5, 2.0, 1.0]), code=1)
    nib.save(image, tmp_path / "b.nii")
    scan = nifti.read([tmp_path / "b.nii"], "CT", volume=2)
    assert scan.irregular == "one of 6 volumes of its file; its qform and sform disagree by 6.0 mm, its sform is used"


def test_qform_alone_is_enough(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOLUME, None)
    image.set_qform(nib.affines.from_matvec(nib.eulerangles.euler2mat(0, 0.1, 0) @ RAS[:3, :3], [1, 2, 3]), code=1)
    nib.save(image, tmp_path / "a.nii")
    scan = nifti.read([tmp_path / "a.nii"], "CT")
    assert scan.irregular == ""
    np.testing.assert_allclose(scan.affine @ [0, 4, 3, 1], nib.load(tmp_path / "a.nii").affine @ [0, 0, 0, 1])


def test_trailing_dimensions_of_one_and_single_slices(tmp_path: Path) -> None:
    assert nifti.read([save(tmp_path / "a.nii", VOLUME[..., None])], "CT").voxels.shape == (6, 5, 4)
    assert nifti.read([save(tmp_path / "b.nii", VOLUME[:, :, 0])], "CT").voxels.shape == (1, 5, 4)
    thin = np.diag([1, 1, 0.1, 1])
    assert nifti.read([save(tmp_path / "c.nii", VOLUME[:, :, :1], thin)], "CT").voxels.shape == (1, 5, 4)


@pytest.mark.parametrize("codes", all_orders()[::3])
def test_masks_come_to_the_order_of_the_scan(tmp_path: Path, codes: str) -> None:
    classes = RNG.randint(0, 65536, VOLUME.shape).astype(np.uint16)
    scan = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    nib.save(reorient(nib.Nifti1Image(classes, RAS), codes), tmp_path / "m.nii.gz")
    mask = nifti.read_mask(tmp_path / "m.nii.gz", scan)
    assert mask.dtype == np.uint16
    assert np.array_equal(mask, classes.transpose(2, 1, 0)[:, ::-1, ::-1])


def test_masks_for_a_scan_in_any_order(tmp_path: Path) -> None:
    """As for DICOM, whose order of slices, rows and columns is not that of the NIfTI reader."""
    classes = RNG.randint(0, 9, VOLUME.shape).astype(np.uint8)
    affine = RAS @ np.array(
        [[0, 0, -1, 3], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]
    )  # (d,h,w) -> (x,y,z) = (3-w,h,d)
    like = Scan(np.zeros((6, 5, 4), np.float32), affine, (2.0, 1.5, 1.0), "CT", (6, 5, 4))
    mask = nifti.read_mask(save(tmp_path / "m.nii", classes), like)
    assert np.array_equal(mask, classes[::-1].transpose(2, 1, 0))


def test_a_mask_belongs_to_each_volume_of_a_series(tmp_path: Path) -> None:
    path, classes = save(tmp_path / "a.nii.gz", SERIES), RNG.randint(0, 9, VOLUME.shape).astype(np.uint8)
    mask = save(tmp_path / "m.nii.gz", classes)
    for volume, plane in ((0, None), (4, "sagittal")):
        scan = nifti.read([path], "CT", volume=volume, plane=plane)
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in scan.source_flips)
        assert np.array_equal(nifti.read_mask(mask, scan), classes.transpose(scan.source_axes)[steps])
    one_hot = save(tmp_path / "n.nii.gz", np.stack([classes == n for n in range(3)], -1).astype(np.uint8))
    with pytest.raises(ScanError, match=r"n\.nii\.gz: holds 3 volumes, perhaps one a class"):
        nifti.read_mask(one_hot, scan)


def test_masks_on_other_grids_are_refused(tmp_path: Path) -> None:
    scan = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    classes = np.zeros(VOLUME.shape, np.uint8)
    moved, half, turned = RAS.copy(), RAS.copy(), RAS.copy()
    moved[0, 3] = 1.0  # by one voxel
    half[1, 3] = 0.5  # by a third of one
    turned[:3, :3] = nib.eulerangles.euler2mat(0.05, 0, 0) @ RAS[:3, :3]
    for name, array, affine, message in (
        ("moved", classes, moved, "covers"),
        ("half", classes, half, "do not lie on those of the scan"),
        ("turned", classes, turned, "do not lie on those of the scan"),
        ("scaled", classes, RAS * 2, "do not lie on those of the scan"),
        ("smaller", classes[:3], RAS, "covers"),
        ("larger", np.zeros((5, 5, 6), np.uint8), RAS, "covers"),
    ):
        with pytest.raises(ScanError, match=rf"{name}\.nii: .*{message}"):
            nifti.read_mask(save(tmp_path / f"{name}.nii", array, affine), scan)


def test_masks_hold_whole_numbers(tmp_path: Path) -> None:
    scan = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    fine = nifti.read_mask(save(tmp_path / "b.nii", (VOLUME > 0).astype(np.float32)), scan)
    assert np.array_equal(fine, scan.voxels > 0)
    for value in (0.5, -1, 65536, np.nan):
        with pytest.raises(ScanError, match="no segmentation"):
            nifti.read_mask(save(tmp_path / "c.nii", np.full(VOLUME.shape, value, np.float64)), scan)


def test_real_masks_lie_on_real_anatomy() -> None:
    folder = shared_data("ct_abdomen_dicom")
    scan = scans.read(sorted(folder.iterdir()))
    mask = nifti.read_mask(folder.parent / "ct_abdomen_labels_117.nii.gz", scan)
    spleen, liver, aorta, vertebra, colon = (scan.voxels[mask == number].mean() for number in (1, 5, 52, 32, 20))
    assert 70 < spleen < 100  # Hounsfield units, with contrast
    assert 80 < liver < 100
    assert aorta > 150
    assert vertebra > 200
    assert colon < -400
