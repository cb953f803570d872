"""NIfTI: orientation, slices, scaling, masks on the scan's grid, and what is refused."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from medclr import scans
from medclr.errors import ScanError
from medclr.scans import nifti
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


def test_scaling_and_types(tmp_path: Path) -> None:
    header = nib.Nifti1Image(VOLUME, RAS).header
    header["scl_slope"], header["scl_inter"] = 0.25, -100
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + VOLUME.tobytes(order="F"))
    scan = nifti.read([tmp_path / "a.nii"], "MR")
    np.testing.assert_allclose(scan.voxels, (VOLUME * 0.25 - 100).transpose(2, 1, 0)[:, ::-1, ::-1], rtol=1e-6)
    for dtype in (np.uint8, np.int32, np.float32, np.float64):
        values = np.abs(VOLUME % 200).astype(dtype)
        scan = nifti.read([save(tmp_path / "b.nii.gz", values)], "MR")
        assert np.array_equal(scan.voxels, values.transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.float32))


def test_nifti2_big_endian_and_other_units(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(VOLUME, RAS), tmp_path / "two.nii.gz")
    big = nib.Nifti1Image(VOLUME, RAS, nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    metres = nib.Nifti1Image(VOLUME, np.diag([0.001, 0.0015, 0.002, 1]))
    metres.header.set_xyzt_units("meter")
    nib.save(metres, tmp_path / "metres.nii")
    expected = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    for name in ("two.nii.gz", "big.nii", "metres.nii"):
        scan = scans.read([tmp_path / name], "CT")
        assert np.array_equal(scan.voxels, expected.voxels), name
        np.testing.assert_allclose(scan.affine, expected.affine, rtol=1e-6, err_msg=name)


def test_trailing_dimensions_of_one_and_single_slices(tmp_path: Path) -> None:
    assert nifti.read([save(tmp_path / "a.nii", VOLUME[..., None])], "CT").voxels.shape == (6, 5, 4)
    assert nifti.read([save(tmp_path / "b.nii", VOLUME[:, :, 0])], "CT").voxels.shape == (1, 5, 4)
    thin = np.diag([1, 1, 0.1, 1])
    assert nifti.read([save(tmp_path / "c.nii", VOLUME[:, :, :1], thin)], "CT").voxels.shape == (1, 5, 4)


def test_the_header_alone_needs_only_its_first_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOLUME)
    whole, start = nifti.read_header(path), nifti.read_header(path, path.read_bytes()[:4096])
    assert (whole.shape, whole.n_bytes) == (start.shape, start.n_bytes) == ((4, 5, 6), 352 + 2 * VOLUME.size)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ScanError, match=message):
        nifti.read([path], "CT")


def test_time_series_channels_and_colours_are_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii", np.stack([VOLUME] * 3, -1)), r"a\.nii: has shape .*time or channels")
    refused(save(tmp_path / "b.nii", VOLUME.astype(np.complex64)), "complex64")
    rgb = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save(tmp_path / "c.nii", rgb), "whole or real numbers")


def test_nan_and_infinity_are_counted(tmp_path: Path) -> None:
    bad = VOLUME.astype(np.float32)
    bad[0, 0, :2] = np.nan, np.inf
    refused(save(tmp_path / "a.nii", bad), "2 of its 120 voxels are NaN or infinite")
    refused(save(tmp_path / "b.nii", VOLUME.astype(np.float64) * 1e300), "NaN or infinite")


def test_damage_is_refused(tmp_path: Path) -> None:
    volume = RNG.randint(0, 30000, (20, 20, 20)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz"):
        whole = save(tmp_path / name, volume).read_bytes()
        for share in (0.001, 0.01, 0.5, 0.999):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            refused(tmp_path / name, rf"{name}: ")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(flipped)
    refused(tmp_path / "a.nii.gz", "damaged")
    flipped = bytearray(whole)
    flipped[-6] ^= 0xFF  # in the checksum
    (tmp_path / "a.nii.gz").write_bytes(flipped)
    refused(tmp_path / "a.nii.gz", "damaged")


def test_a_forged_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOLUME, RAS)
    header = image.header.copy()
    header["dim"][1:4] = 32767
    data = header.binaryblock + bytes(4) + VOLUME.tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data))
    for name in ("a.nii", "b.nii.gz"):
        with pytest.raises(ScanError, match="too short for the"):
            nifti.read_header(tmp_path / name)


def test_every_damaged_header_is_refused_or_read(tmp_path: Path) -> None:
    """Whatever the bytes, nothing but a ScanError comes out."""
    whole = save(tmp_path / "a.nii", VOLUME).read_bytes()
    path = tmp_path / "b.nii"
    outcomes = set()
    for _ in range(300):
        broken = bytearray(whole)
        for position in RNG.randint(0, 344, 4):
            broken[position] = RNG.randint(256)
        path.write_bytes(broken)
        try:
            nifti.read([path], "CT")
            outcomes.add("read")
        except ScanError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_pairs_and_lost_orientation(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(VOLUME, RAS), tmp_path / "pair.img")
    refused(tmp_path / "pair.hdr", "pair")
    header = nib.Nifti1Image(VOLUME, RAS).header
    header["srow_x"] = 0
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + VOLUME.tobytes(order="F"))
    refused(tmp_path / "a.nii", "affine")
    path = save(tmp_path / "b.nii", VOLUME, affine=None)
    assert nifti.find([nifti.read_header(path)])[0][0].plane == ""


def test_bids_names(tmp_path: Path) -> None:
    headers = [
        nifti.read_header(save(tmp_path / name, VOLUME))
        for name in ("sub-01_ses-a_T1w.nii.gz", "sub-01_ct.nii", "sub-02_space-x_dseg.nii.gz", "T1w.nii")
    ]
    found, rejected = nifti.find(headers)
    assert [scan.modality for scan in found] == ["MR", "CT", None]
    assert rejected[0][0].name == "sub-02_space-x_dseg.nii.gz"
    assert nifti.read([headers[0].path]).modality == "MR"
    with pytest.raises(ScanError, match="--modality"):
        nifti.read([headers[3].path])


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
