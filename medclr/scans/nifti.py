"""NIfTI-1 and NIfTI-2 volumes -> Scan, and segmentations brought to a scan's grid.

Slices lie across the axis of the coarsest spacing, the acquisition's own; isotropic volumes are read as axial. They
are turned the way radiologists view them, which for an axial slice means: the patient's front at the top, his right
side at the left of the picture. DICOM's standard planes have the same order of rows, columns and slices.

Shape letters: D slices, H rows, W columns.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.orientations import axcodes2ornt, io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans import bids
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found, Scan, naming

# Where (d,h,w) run in each plane: letters are the patient's Right, Left, Anterior, Posterior, Superior, Inferior.
_VIEWS = {"axial": "SPL", "coronal": "PIL", "sagittal": "RIP"}
_PLANES = ("sagittal", "coronal", "axial")  # of slices stacked along the world axes R, A, S
_ISOTROPIC = 0.9  # spacings within 10 % count as equal
_TO_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_MOST_COMPRESSED = 1032  # zlib never expands a byte to more than this (zlib, technical details)

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says, checked."""

    path: Path
    shape: tuple[int, int, int]
    """Of the array in the file."""
    affine: NDArray[np.float64]
    """[4,4], array index -> RAS+ millimetres."""
    oriented: bool
    """Whether the file records an orientation (qform or sform code above 0)."""
    dtype: np.dtype[Any]
    offset: int
    """Where the voxels begin in the uncompressed file."""
    n_bytes: int
    """Length of the uncompressed file up to its last voxel."""
    slope: float
    intercept: float
    """Physical value = slope * stored + intercept (scl_slope, scl_inter)."""
    compressed: bool
    modality: str | None
    """From a BIDS suffix such as ``_T1w``."""
    series: None = None
    """Each file is a scan of its own."""


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

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """[X,Y,Z] -> [D,H,W], contiguous."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return np.ascontiguousarray(array.transpose(self.axes)[steps])

    def matrix(self, shape: tuple[int, int, int]) -> NDArray[np.float64]:
        """[4,4], (d,h,w,1) -> source index, for a source of that shape."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for column, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            matrix[axis, column] = -1 if flip else 1
            matrix[axis, 3] = shape[axis] - 1 if flip else 0
        return matrix


def is_nifti(head: bytes) -> bool:
    """Whether a file that starts like this is NIfTI, gzipped or not."""
    return _magic(_unzipped(head, 352)) is not None


def read_header(path: Path, data: bytes | None = None) -> Header:
    """Read and check a header, without the voxels.

    Args:
        path: the file.
        data: its bytes, or at least the first 4096 of them, if the caller has them already.

    Raises:
        ScanError: the header is damaged, or describes something that is not one grey volume.
    """
    if data is None:
        with path.open("rb") as file:
            data = file.read(4096)
    compressed = data[:2] == b"\x1f\x8b"
    start = _unzipped(data, 540)
    magic = _magic(start)
    if magic is None:
        raise ScanError("is not NIfTI, or ends inside its header")
    if magic == "ni":
        raise ScanError("is one half of a NIfTI pair (.hdr and .img); save it as a single .nii.gz")
    header_type = nib.Nifti2Header if magic == "n2" else nib.Nifti1Header
    try:
        with LoggingOutputSuppressor():  # nibabel prints what it mends, without the name of the file
            header = header_type(start[: header_type.sizeof_hdr])  # extensions are of no interest
        shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
        unit = header.get_xyzt_units()[0]
        offset = header.get_data_offset() or header_type.single_vox_offset  # 0: right behind the header
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise ScanError(f"its header is damaged ({error})") from error

    if dtype.kind not in "iuf":
        raise ScanError(f"holds {dtype} voxels; only whole or real numbers can be read, save it as int16 or float32")
    if len(shape) < 2 or min(shape) < 1:
        raise ScanError(f"has shape {shape}, which is not a volume")
    if any(n > 1 for n in shape[3:]):
        raise ScanError(f"has shape {shape}, a series in time or channels; save each volume to a file of its own")
    n_bytes = offset + math.prod(shape) * dtype.itemsize
    if n_bytes > path.stat().st_size * (_MOST_COMPRESSED if compressed else 1):
        raise ScanError(f"is too short for the {n_bytes:,} bytes that its header promises; copy it again")
    affine = np.asarray(affine, dtype=np.float64)
    affine[:3] *= _TO_MM[unit]
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not spacing_mm.all() or abs(np.linalg.det(affine[:3, :3] / spacing_mm)) < 1e-3:
        raise ScanError("its affine is not finite or has no inverse; the orientation of its voxels is lost")

    volume_shape = (int(shape[0]), int(shape[1]), int(shape[2]) if len(shape) > 2 else 1)
    oriented = bool(header["qform_code"] > 0 or header["sform_code"] > 0)
    return Header(
        path=path,
        shape=volume_shape,
        affine=affine,
        oriented=oriented,
        dtype=dtype,
        offset=offset,
        n_bytes=n_bytes,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        compressed=compressed,
        modality=bids.modality(path.name),
    )


def find(
    headers: Sequence[Header], policy: Policy = DEFAULT, plane: Plane | None = None
) -> tuple[list[Found], list[tuple[Path, str]]]:
    """Each file is one scan; also returns the files that are none, with the reason."""
    found, rejected = [], []
    for header in headers:
        if (suffix := bids.suffix(header.path.name)) in bids.SEGMENTATIONS:
            rejected.append((header.path, f"is a segmentation (BIDS suffix _{suffix}), not a scan; see --masks"))
            continue
        view = _view(header)
        found.append(
            Found(
                files=(header.path,),
                modality=header.modality,
                patient="",
                study="",
                series="",
                body_part="",
                plane=view.plane if header.oriented else "",
                shape=view.permute(header.shape),
                spacing_mm=view.permute(_spacing_mm(header.affine)),
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

    Args:
        files: exactly one file.
        modality: a key of ``MODALITIES``; needed unless a BIDS suffix tells it.

    Raises:
        ScanError: the file is damaged, is not one grey volume, or holds NaN or infinity.
    """
    (path,) = files
    with naming(path):
        header = read_header(path)
        modality = modality or header.modality
        if modality is None:
            raise ScanError("does not record its modality; give it with --modality")
        voxels = _voxels(header)  # [X,Y,Z]
        if n_bad := int(voxels.size - np.isfinite(voxels).sum()):
            raise ScanError(f"{n_bad:,} of its {voxels.size:,} voxels are NaN or infinite; put in what they stand for")
        view = _view(header)
        affine = header.affine @ view.matrix(header.shape)
        return Scan(view.apply(voxels), affine, _spacing_mm(affine), modality, header.shape, view.axes, view.flips)


def read_mask(path: Path, like: Scan) -> NDArray[np.uint16]:
    """Read a segmentation and bring it to the array order of the scan that it belongs to.

    Args:
        path: NIfTI of whole numbers from 0 (background) to 65535, on the scan's grid; its axes may be permuted or
            flipped, as tools that convert DICOM do.
        like: the scan.

    Returns:
        [D,H,W] class of each voxel of ``like``.

    Raises:
        ScanError: it is damaged, has another grid, or holds anything but such numbers.
    """
    with naming(path):
        header = read_header(path)
        view = _view_as(header, like)
        values = view.apply(_voxels(header))  # [D,H,W]
        mask = _whole_numbers(values)
        if not np.array_equal(mask, values):
            raise ScanError("holds values that are not whole numbers from 0 to 65535, so it is no segmentation")
        return mask


def _whole_numbers(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """[D,H,W] rounded and cut to what uint16 holds."""
    return np.clip(np.rint(np.nan_to_num(values)), 0, 65535).astype(np.uint16)


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


def _unzipped(data: bytes, length: int) -> bytes:
    """The first bytes of a file that may be gzipped; fewer if it ends or breaks there."""
    if data[:2] != b"\x1f\x8b":
        return data[:length]
    try:
        return zlib.decompressobj(wbits=31).decompress(data, length)
    except zlib.error:
        return b""


def _magic(start: bytes) -> str | None:
    """'n1' NIfTI-1, 'n2' NIfTI-2, 'ni' a header whose voxels are in another file, None: not NIfTI."""
    if start[344:348] == b"n+1\0":
        return "n1"
    if start[4:12] == b"n+2\0\r\n\x1a\n":
        return "n2"
    if start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0":
        return "ni"
    return None


def _voxels(header: Header) -> NDArray[np.float32]:
    """[X,Y,Z] in the file's order, scaled by scl_slope and scl_inter."""
    opener: Any = gzip.open if header.compressed else open
    try:
        with opener(header.path, "rb") as file:
            # One byte more than needed reaches the end of a sound gzip stream, where its checksum is compared.
            data = file.read(header.n_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanError("its compressed data are damaged or end early; copy it again") from error
    if len(data) < header.n_bytes:
        raise ScanError("ends before its last voxel; copy it again")
    stored = np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is counted as such
        if (header.slope, header.intercept) == (1, 0):
            voxels = stored.astype(np.float32)
        else:
            voxels = (stored * header.slope + header.intercept).astype(np.float32)  # in float64 before
    return voxels.reshape(header.shape, order="F")


def _spacing_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def _view(header: Header) -> View:
    """Which axis the slices lie across, and how they are turned."""
    spacing = np.array(_spacing_mm(header.affine))
    orientation = io_orientation(header.affine)  # [3,2]: nearest world axis (0 R, 1 A, 2 S) of each axis, and direction
    world = [int(axis) for axis in orientation[:, 0]]
    if 1 in header.shape:
        across = header.shape.index(1)  # a single slice, whatever its thickness
    else:
        coarse = [axis for axis in range(3) if spacing[axis] >= _ISOTROPIC * spacing.max()]
        across = max(coarse, key=lambda axis: world[axis])
    plane = _PLANES[world[across]]
    wanted = axcodes2ornt(_VIEWS[plane])  # [3,2]: the same of d, h and w
    d, h, w = (world.index(int(axis)) for axis in wanted[:, 0])
    turned = orientation[[d, h, w], 1] != wanted[:, 1]
    return View(plane, (d, h, w), (bool(turned[0]), bool(turned[1]), bool(turned[2])))
