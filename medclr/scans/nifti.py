"""NIfTI-1 and NIfTI-2 volumes -> Scan, and segmentations brought to a scan's grid.

Slices lie across the axis of the coarsest spacing, the acquisition's own; isotropic volumes are read as axial. They
are turned the way radiologists view them, which for an axial slice means: the patient's front at the top, his right
side at the left of the picture. DICOM's standard planes have the same order of rows, columns and slices.

Shape letters: D slices, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.nifti_header import Header, goes_on, is_nifti, read_header, refusal
from medclr.scans.nifti_voxels import Voxels
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found, Scan, naming
from medclr.scans.values import fill_nan

__all__ = ["Header", "find", "is_nifti", "read", "read_header", "read_mask"]

# Where (d,h,w) run in each plane: letters are the patient's Right, Left, Anterior, Posterior, Superior, Inferior.
_VIEWS = {"axial": "SPL", "coronal": "PIL", "sagittal": "RIP"}
_PLANES = ("sagittal", "coronal", "axial")  # of slices stacked along the world axes R, A, S
_ISOTROPIC = 0.9  # spacings within 10 % count as equal

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """How a source array becomes [D,H,W]."""

    plane: str
    axes: tuple[int, int, int]
    """The source axis of each of (d,h,w)."""
    flips: tuple[bool, bool, bool]
    """Whether each of (d,h,w) runs against its source axis."""

    def permute(self, xyz: tuple[T, T, T]) -> tuple[T, T, T]:
        """One value a source axis -> one value each for (d,h,w)."""
        d, h, w = self.axes
        return xyz[d], xyz[h], xyz[w]

    def invert(self, array: NDArray[Any]) -> NDArray[Any]:
        """[D,H,W] -> [X,Y,Z], the same memory seen in the order of the source."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return array[steps].transpose(np.argsort(self.axes))

    def matrix(self, shape: tuple[int, int, int]) -> NDArray[np.float64]:
        """[4,4], (d,h,w,1) -> source index, for a source of that shape."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for column, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            matrix[axis, column] = -1 if flip else 1
            matrix[axis, 3] = shape[axis] - 1 if flip else 0
        return matrix


def find(
    headers: Sequence[Header], policy: Policy = DEFAULT, plane: Plane | None = None
) -> tuple[list[Found], list[tuple[Path, str]]]:
    """Each volume is one scan; also returns the files that are none, with the reason.

    The axes after the third are volumes, numbered in the file's order.
    """
    found, rejected = [], []
    for header in headers:
        if reason := refusal(header, policy):
            rejected.append((header.path, reason))
            continue
        view = _view(header, plane)
        for volume in range(header.n_volumes if policy.volumes == "all" else 1):
            found.append(
                Found(
                    files=header.files,
                    modality=header.modality,
                    patient="",
                    study="",
                    series="",
                    body_part="",
                    plane=view.plane if header.oriented or plane else "",
                    shape=view.permute(header.shape),
                    spacing_mm=view.permute(_spacing_mm(header.affine)),
                    volume=volume,
                    irregular=_irregular(header),
                )
            )
    return found, rejected


def read(
    files: Sequence[Path],
    modality: str | None = None,
    *,
    volume: int = 0,
    plane: Plane | None = None,
    policy: Policy = DEFAULT,
) -> Scan:
    """Read one volume.

    Voxels that are NaN are taken for air, as in SPM, which puts NaN where nothing was measured. Infinite ones are
    refused: nobody knows what they stand for. Colour becomes luminance.

    Args:
        files: one file, or the ``.hdr`` and the ``.img`` of a pair, of which the former is enough.
        modality: a key of ``MODALITIES``; needed unless a BIDS suffix tells it.
        volume: which one of its file, counted from 0.
        plane: across which axis it is cut into slices; if not given, across the one of the coarsest spacing. A file
            that records no orientation is taken as nibabel takes it, with its axes along R, A and S.
        policy: whether a file with several volumes is read.

    Raises:
        ScanError: the file is damaged, has no such volume, is a mask or no grey picture, or its values are infinite
            or cannot be told apart in float32.
    """
    path, *others = (Path(file) for file in files)
    with naming(path):
        header = read_header(path)
        if others and (path, *others) != header.files:
            raise ScanError(f"is a scan without the {len(others)} other files; only a .hdr has one, its .img")
        modality = modality or header.modality
        if modality is None:
            raise ScanError("does not record its modality; give it with --modality")
        if reason := refusal(header, policy):
            raise ScanError(reason)
        if not 0 <= volume < header.n_volumes:
            raise ScanError(f"has {header.n_volumes} volumes, counted from 0, and none is number {volume}")
        view = _view(header, plane)
        voxels = np.empty(view.permute(header.shape), dtype=np.float32)  # [D,H,W]
        source = view.invert(voxels)  # [X,Y,Z]
        pieces = Voxels(header, volume)
        for box, values in pieces:
            source[box] = values
        surplus = goes_on(pieces.n_surplus) if pieces.n_surplus else ""
        notes = filter(None, [_irregular(header), surplus, fill_nan(voxels, modality)])
        affine = header.affine @ view.matrix(header.shape)
        spacing_mm = _spacing_mm(affine)
        return Scan(
            voxels, affine, spacing_mm, modality, header.shape, view.axes, view.flips, irregular="; ".join(notes)
        )


def read_mask(path: Path, like: Scan) -> NDArray[np.uint16]:
    """Read a segmentation and bring it to the array order of the scan that it belongs to.

    Args:
        path: NIfTI of whole numbers from 0 (background) to 65535, on the scan's grid; its axes may be permuted or
            flipped, as tools that convert DICOM do.
        like: the scan.

    Returns:
        [D,H,W] class of each voxel of ``like``.

    Raises:
        ScanError: it is damaged, has several volumes or another grid, or holds anything but such numbers.
    """
    with naming(path):
        header = read_header(path)
        if header.n_volumes > 1:
            raise ScanError(f"holds {header.n_volumes} volumes, perhaps one a class; save it as one volume of numbers")
        view = _view_as(header, like)
        mask = np.empty(like.voxels.shape, dtype=np.uint16)  # [D,H,W]
        source = view.invert(mask)  # [X,Y,Z]
        for box, values in Voxels(header, 0):
            with np.errstate(invalid="ignore"):
                fits = (values >= 0) & (values <= 65535) & (values == np.rint(values))
            if not fits.all():
                raise ScanError("holds values that are not whole numbers from 0 to 65535, so it is no segmentation")
            source[box] = values
        return mask


def _irregular(header: Header) -> str:
    """As in ``Found``."""
    several = f"one of {header.n_volumes} volumes of its file" if header.n_volumes > 1 else ""
    return "; ".join(filter(None, [several, header.irregular]))


def _view_as(header: Header, like: Scan) -> View:
    """How a file on the grid of ``like`` becomes its [D,H,W]; ScanError if it lies on another grid."""
    # like's index -> the mask's index: on one grid this is a signed permutation and a whole offset.
    change = np.linalg.inv(header.affine) @ like.affine  # [4,4]
    rounded = np.rint(change)
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in like.voxels.shape), indexing="ij"), -1).reshape(-1, 3)  # [8,3]
    error = np.abs(corners @ (change - rounded)[:3, :3].T + (change - rounded)[:3, 3]).max()  # voxels
    one_each = np.abs(rounded[:3, :3])
    if error > 0.1 or not ((one_each.sum(0) == 1).all() and (one_each.sum(1) == 1).all()):
        raise ScanError("its voxels do not lie on those of the scan; resample it to the scan with nearest neighbour")
    d, h, w = (int(axis) for axis in one_each.argmax(0))
    view = View("", (d, h, w), (rounded[d, 0] < 0, rounded[h, 1] < 0, rounded[w, 2] < 0))
    shape = view.permute(header.shape)
    if shape != like.voxels.shape or not np.array_equal(rounded, view.matrix(header.shape)):
        raise ScanError(f"covers {shape} voxels where the scan has {like.voxels.shape}; resample it to the scan")
    return view


def _spacing_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def _view(header: Header, plane: Plane | None) -> View:
    """Which axis the slices lie across, and how they are turned; a single slice stays one, whatever is asked for."""
    spacing = np.array(_spacing_mm(header.affine))
    orientation = io_orientation(header.affine)  # [3,2]: nearest world axis (0 R, 1 A, 2 S) of each axis, and direction
    world = [int(axis) for axis in orientation[:, 0]]
    if 1 in header.shape:
        across = header.shape.index(1)  # whatever its thickness
    elif plane:
        if plane not in _PLANES:
            raise ScanError(f"plane {plane!r}: is none of axial, coronal, sagittal")
        across = world.index(_PLANES.index(plane))
    else:
        coarse = [axis for axis in range(3) if spacing[axis] >= _ISOTROPIC * spacing.max()]
        across = max(coarse, key=lambda axis: world[axis])
    name = _PLANES[world[across]]
    wanted = axcodes2ornt(_VIEWS[name])  # [3,2]: the same of d, h and w
    d, h, w = (world.index(int(axis)) for axis in wanted[:, 0])
    turned = orientation[[d, h, w], 1] != wanted[:, 1]
    return View(name, (d, h, w), (bool(turned[0]), bool(turned[1]), bool(turned[2])))
