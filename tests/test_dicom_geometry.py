"""Grids of slices: order, gaps, tilt and shifts under every policy, against the positions that were written."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints

import highdicom.spatial
import numpy as np
import pytest
from dicom_files import AXIAL, SAGITTAL, find, only_reason, slab, write
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.policy import ACCEPTED, DEFAULT, Policy
from medclr.scans.scan import Found, Scan

REFUSE, ALLOW = Policy(missing="refuse", spacing="refuse", tilt="refuse"), Policy(missing="allow", spacing="allow")
POLICIES = [Policy(missing=a, spacing=b, tilt=c) for a, b, c in product(*(
    get_args(get_type_hints(Policy)[name]) for name in ("missing", "spacing", "tilt")))]  # fmt: skip


def heights(found: Sequence[Found], z_mm: Sequence[float]) -> list[list[float]]:
    """The z of the slices of each scan, for files that ``slab`` wrote."""
    return [[z_mm[len(z_mm) - int(path.stem)] for path in scan.files] for scan in found]


def in_space(scan: Scan) -> NDArray[np.float64]:
    """[D,3] LPS mm of the first voxel of each slice."""
    corners = np.zeros((len(scan.voxels), 4))
    corners[:, 0], corners[:, 3] = np.arange(len(corners)), 1
    return (corners @ scan.affine.T)[:, :3] * (-1, -1, 1)


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


UNEVEN = [
    ([0, 3, 6, 12, 15], "1 of 6 slices is missing", [[0, 3, 6], [12, 15]], "missing"),
    ([0, 3, 6, 9, 18, 21], "2 of 8 slices are missing", [[0, 3, 6, 9], [18, 21]], "missing"),
    ([0, 3, 9], "1 of 4 slices is missing", [[0, 3], [9]], "missing"),
    ([0, 3, 6, 8.2, 11.2], "slices are 2.2 mm apart where 3 mm is usual", [[0, 3, 6], [8.2, 11.2]], "spacing"),
    ([0, 5, 10, 20, 30, 40], "slices are 5 mm apart where 10 mm is usual", [[0, 5], [10, 20, 30, 40]], "spacing"),
]


@pytest.mark.parametrize(("z_mm", "words", "pieces", "name"), UNEVEN)
def test_a_stack_that_is_no_regular_grid_is_split_refused_or_allowed(
    tmp_path: Path, z_mm: list[float], words: str, pieces: list[list[float]], name: str
) -> None:
    files = slab(tmp_path, z_mm)
    assert only_reason(tmp_path, replace(DEFAULT, **{name: "refuse"})) == (
        f"{words}, which --policy.{name} refuse keeps out"
    )
    with pytest.raises(ScanError, match=words):
        dicom.read(files, policy=REFUSE)

    found, rejects = find(tmp_path)  # split
    assert not rejects
    assert sorted(heights(found, z_mm)) == pieces
    assert {scan.irregular for scan in found} == {f"split from a stack in which {words}"}
    assert len({scan.series for scan in found}) == len(pieces)
    with pytest.raises(ScanError, match=f"the {len(z_mm)} files hold {len(pieces)} scans"):
        dicom.read(files)

    (scan,), rejects = find(tmp_path, ALLOW)
    assert not rejects
    assert heights([scan], z_mm) == [z_mm]
    assert scan.irregular == words
    read = dicom.read(files[::-1], policy=ALLOW)
    usual = 10 if 40 in z_mm else 3
    assert scan.spacing_mm == read.spacing_mm == (usual, 2.0, 0.5)
    assert read.irregular == words
    assert read.voxels[:, 0, 0].tolist() == [100 + i for i in range(len(z_mm))]
    np.testing.assert_allclose(read.affine[:, 0], [0, 0, usual, 0])


def test_a_stack_with_both_a_gap_and_an_odd_step(tmp_path: Path) -> None:
    z_mm = [0, 3, 6, 12, 15, 17, 20]
    slab(tmp_path, z_mm)
    assert sorted(heights(find(tmp_path)[0], z_mm)) == [[0, 3, 6], [12, 15], [17, 20]]
    only_gap = find(tmp_path, replace(DEFAULT, missing="allow"))[0]
    assert sorted(heights(only_gap, z_mm)) == [[0, 3, 6, 12, 15], [17, 20]]
    assert sorted(scan.irregular for scan in only_gap) == [
        "1 of 6 slices is missing; split from a stack in which 1 of 8 slices is missing",
        "split from a stack in which 1 of 8 slices is missing",
    ]
    only_step = find(tmp_path, replace(DEFAULT, spacing="allow"))[0]
    assert sorted(heights(only_step, z_mm)) == [[0, 3, 6], [12, 15, 17, 20]]
    assert "1 of 8 slices is missing" in only_reason(tmp_path, replace(ALLOW, missing="refuse"))
    assert "slices are 2 mm apart" in only_reason(tmp_path, replace(ALLOW, spacing="refuse"))


def test_gantry_tilt_is_allowed_with_a_sheared_affine_and_refused_on_demand(tmp_path: Path) -> None:
    down = 3 * np.tan(np.radians(12))
    files = [
        write(tmp_path / str(i), np.full((4, 5), i, np.uint16), ImagePositionPatient=[0, down * i, 3.0 * i])
        for i in range(5)
    ]
    (found,), _ = find(tmp_path)
    assert found.irregular == "gantry tilt of 12.0 degrees"
    scan = dicom.read(files[::-1])
    assert scan.irregular == found.irregular
    assert scan.voxels[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scan.affine, [[0, 0, -0.5, 0], [-down, -2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]], atol=1e-9)
    assert scan.spacing_mm == pytest.approx((np.hypot(3, down), 2, 0.5))
    reason = only_reason(tmp_path, replace(DEFAULT, tilt="refuse"))
    assert reason == "gantry tilt of 12.0 degrees, which --policy.tilt refuse keeps out"
    with pytest.raises(ScanError, match="gantry tilt"):
        dicom.read(files, policy=replace(DEFAULT, tilt="refuse"))


def test_slices_shifted_sideways_are_refused_whatever_the_policy(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / str(i), np.zeros((4, 5), np.uint16), ImagePositionPatient=[2.0 * (i == 2), 0, 3.0 * i])
    assert only_reason(tmp_path) == "slices are shifted sideways against each other by up to 2 mm"
    assert only_reason(tmp_path, ACCEPTED) == only_reason(tmp_path)


def test_a_slow_drift_is_refused_or_allowed_and_never_divided(tmp_path: Path) -> None:
    z_mm = [3 * i + 0.002 * i**2 for i in range(40)]
    slab(tmp_path, z_mm)
    assert "slices drift by up to" in only_reason(tmp_path)
    (scan,), _ = find(tmp_path, ALLOW)
    assert "slices drift by up to" in scan.irregular


def test_one_slice_at_the_place_of_another_is_refused(tmp_path: Path) -> None:
    slab(tmp_path, [0, 3, 6, 6, 9])
    assert only_reason(tmp_path) == "1 of 5 slices lie where another does; nothing tells volumes apart"
    assert only_reason(tmp_path, ACCEPTED) == only_reason(tmp_path)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_accepted(tmp_path: Path) -> None:
    slab(tmp_path, [round(0.625 * i, 1) for i in range(12)])
    (scan,), _ = find(tmp_path)
    assert scan.spacing_mm[0] == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, (1, 0, 0, 0, 0, -1), (0.8, 0.6, 0, -0.48, 0.64, 0.6)])
def test_every_voxel_lies_where_its_file_says(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    across, down = np.array(orientation).reshape(2, 3)
    normal = np.cross(across, down)
    values = np.random.RandomState(0).randint(0, 4096, (5, 4, 6)).astype(np.uint16)
    files = [
        write(tmp_path / f"{(7 * i) % 5}", values[i], ImageOrientationPatient=list(orientation),
              ImagePositionPatient=list(np.round([10, -20, 30] + 2.5 * i * normal, 6)), InstanceNumber=9 - i)
        for i in range(5)
    ]  # fmt: skip
    scan = dicom.read(files[2:] + files[:2])
    np.testing.assert_array_equal(scan.voxels, values)
    for d, h, w in ((0, 0, 0), (4, 3, 5), (2, 1, 4)):
        lps = [10, -20, 30] + 2.5 * d * normal + 2.0 * h * down + 0.5 * w * across
        np.testing.assert_allclose((scan.affine @ (d, h, w, 1))[:3] * (-1, -1, 1), lps, atol=1e-5)
    (found,), _ = find(tmp_path)
    planes = {AXIAL: "axial", SAGITTAL: "sagittal", (1, 0, 0, 0, 0, -1): "coronal"}
    assert found.plane == planes.get(orientation, "oblique")


def placed(template: dicom.Header, orientation: Sequence[float], positions: NDArray[np.float64]) -> list[dicom.Header]:
    """Headers like ``template`` at other places, named by their number."""
    (like,) = template.slices
    return [
        replace(template, instance=str(i), path=Path(str(i)),
                slices=(replace(like, orientation=tuple(orientation), position=tuple(at)),))
        for i, at in enumerate(positions)
    ]  # fmt: skip


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
        spacing, index = highdicom.spatial.get_volume_positions(positions, orientation)
        found, rejects = dicom.find(placed(template, orientation, positions), REFUSE)
        if rejects:
            refused += 1
            assert index is None
            found, _ = dicom.find(placed(template, orientation, positions), ALLOW)
            spacing, index = highdicom.spatial.get_volume_positions(
                positions, orientation, allow_missing_positions=True
            )
        assert index is not None
        order = [int(path.name) for path in found[0].files]
        assert order in (np.argsort(index).tolist(), np.argsort(index).tolist()[::-1])
        assert found[0].spacing_mm[0] == pytest.approx(spacing)
        assert (np.diff(positions[order] @ np.cross(axes[0], axes[1])) > 0).all()
    assert 5 < refused < 40


def odd_stack(random: np.random.RandomState) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """Orientation and positions [n,3] of slices with gaps, odd steps and tilt now and then, in no order."""
    axes, _ = np.linalg.qr(random.normal(size=(3, 3)))
    steps = random.choice([2.0, 2.0, 2.0, 2.0, 4.0, 6.0, 1.3, 2.7], size=random.randint(1, 14))
    direction = np.cross(axes[0], axes[1]) + random.choice([0, 0, 0.25]) * axes[1]
    along = np.concatenate([[0.0], np.cumsum(steps)])
    positions = random.normal(size=3) * 50 + random.permutation(along)[:, None] * direction
    return (*axes[0], *axes[1]), positions


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.missing}-{policy.spacing}-{policy.tilt}")
def test_what_one_policy_finds_is_read_the_same_without_deciding_again(tmp_path: Path, policy: Policy) -> None:
    """Each scan that ``find`` gives is, under ACCEPTED, that one scan: shape, spacing, order, and evenness as said."""
    template = dicom.read_header(slab(tmp_path, [0])[0])
    random = np.random.RandomState(1)
    for _ in range(40):
        orientation, positions = odd_stack(random)
        headers = placed(template, orientation, positions)
        found, rejects = dicom.find(headers, policy)
        files = sorted([path for scan in found for path in scan.files] + [path for path, _ in rejects])
        assert files == sorted(header.path for header in headers)
        for scan in found:
            mine = [headers[int(path.name)] for path in scan.files]
            (again,), refused = dicom.find(mine[::-1], ACCEPTED)
            assert not refused
            assert (again.files, again.shape, again.spacing_mm) == (scan.files, scan.shape, scan.spacing_mm)
            along = np.array([header.slices[0].position for header in mine]) @ np.cross(
                *np.reshape(orientation, (2, 3))
            )
            gaps = np.diff(along)
            assert (gaps > 0).all()
            if policy.missing != "allow" and policy.spacing != "allow" and len(gaps):
                np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)  # each piece is a regular grid
            if policy.missing == "refuse" or policy.spacing == "refuse":
                assert "which --policy" in "".join(reason for _, reason in rejects) or not rejects


def test_scans_of_every_policy_are_read_from_their_files_as_found(tmp_path: Path) -> None:
    """The same on disk: voxel by voxel, and the place of every slice that has the usual distance."""
    random = np.random.RandomState(3)
    for case in range(6):
        orientation, positions = odd_stack(random)
        folder = tmp_path / str(case)
        for i, point in enumerate(np.round(positions, 5)):
            write(folder / str(i), np.full((2, 3), i, np.uint16), ImagePositionPatient=list(point),
                  ImageOrientationPatient=[f"{c:.10f}" for c in orientation])  # fmt: skip
        for policy in (DEFAULT, ALLOW):
            for scan in find(folder, policy)[0]:
                read = dicom.read(scan.files[::-1], policy=ACCEPTED)
                assert (read.voxels.shape, read.spacing_mm) == (scan.shape, scan.spacing_mm)
                order = [int(path.name) for path in scan.files]
                assert read.voxels[:, 0, 0].tolist() == order
                if policy is DEFAULT:
                    np.testing.assert_allclose(in_space(read), positions[order], atol=1e-3)
