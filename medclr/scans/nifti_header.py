"""What a NIfTI-1 or NIfTI-2 header says, checked before anything is taken on its word.

A pair (``.hdr`` and ``.img``, either gzipped or not) is known by its header; the ``.img`` has no mark of its own.
"""

import itertools
import logging
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import nifti1, nifti2
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans import bids
from medclr.scans.policy import Policy

GZIP_MAGIC = b"\x1f\x8b"

_HEAD_BYTES = 4096
_HEADERS = {
    "n+1": nifti1.Nifti1Header,
    "ni1": nifti1.Nifti1PairHeader,
    "n+2": nifti2.Nifti2Header,
    "ni2": nifti2.Nifti2PairHeader,
}
_SIZEOF_HDR = tuple((348).to_bytes(4, order) for order in ("little", "big"))  # of NIfTI-1 and of Analyze 7.5
_NIFTI2_MAGIC = {b"n+2\0\r\n\x1a\n": "n+2", b"ni2\0\r\n\x1a\n": "ni2"}
_TO_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_LABELS = (1002, 1003)  # NIFTI_INTENT_LABEL, _NEURONAME
_NO_PICTURE = range(1004, 1011)  # _GENMATRIX, _SYMMATRIX, _DISPVECT, _VECTOR, _POINTSET, _TRIANGLE, _QUATERNION
_CIFTI = range(3000, 3100)

_SILENT = logging.Logger("nibabel")  # it would print what it mends
_SILENT.addHandler(logging.NullHandler())

_LONGEST = 2**15 - 1  # voxels along an axis: NIfTI-1 has no room for more
_MOST_VOXELS = 2**30  # of one volume: 4 GiB as float32
_MOST_VOLUMES = 10_000
_MOST_COMPRESSED = 1032  # zlib never expands a byte to more than this (zlib, technical details)
_BOMB_BYTES, _BOMB_RATIO = 2**26, 100  # real scans shrink by 2 to 20; what is larger and shrinks by more holds nothing


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says, checked."""

    path: Path
    voxels_path: Path
    """The file with the voxels: ``path``, or the ``.img`` of a pair."""
    shape: tuple[int, int, int]
    """(X,Y,Z) of a volume in the file."""
    n_volumes: int
    """Product of the axes after the third."""
    affine: NDArray[np.float64]
    """[4,4], array index -> RAS+ millimetres, from sform, else qform, else spacing alone, as nibabel chooses."""
    oriented: bool
    """Whether the file records an orientation (qform or sform code above 0)."""
    dtype: np.dtype[Any]
    """Whole or real numbers, or the structure of RGB24 or RGBA32."""
    offset: int
    """Where the voxels begin in the uncompressed file."""
    n_bytes: int
    """Length of the uncompressed file up to its last voxel."""
    size: int
    """Of the file with the voxels, as it is on the disk."""
    slope: float
    intercept: float
    """Physical value = slope * stored + intercept (scl_slope, scl_inter)."""
    compressed: bool
    labels: bool
    """Whether its intent code says that it is a segmentation."""
    modality: str | None
    """From a BIDS suffix such as ``_T1w``."""
    irregular: str
    """As in ``Found``, apart from the number of volumes."""
    series: None = None
    """Each file is a scan of its own."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or both files of a pair."""
        return (self.path,) if self.path == self.voxels_path else (self.path, self.voxels_path)

    @property
    def volume_bytes(self) -> int:
        """Of one volume in the uncompressed file."""
        return math.prod(self.shape) * self.dtype.itemsize


def nibabel_header(path: Path) -> Any:
    """The header of a file that ``read_header`` accepts, mended alike, as nibabel holds it."""
    with path.open("rb") as file:
        start = _unzipped(file.read(_HEAD_BYTES), 540)
    header_type = _HEADERS[_magic(start) or ""]
    header = header_type(start[: header_type.sizeof_hdr], check=False)
    header.check_fix(_SILENT)
    return header


def is_nifti(head: bytes) -> bool:
    """Whether a file that starts like this is NIfTI, or its forerunner Analyze 7.5, gzipped or not."""
    start = _unzipped(head, 352)
    return _magic(start) is not None or start[:4] in _SIZEOF_HDR


def read_header(path: Path, data: bytes | None = None) -> Header:
    """Read and check a header, without the voxels.

    Args:
        path: the file; of a pair, the ``.hdr``, which has the ``.img`` beside it.
        data: its bytes, or at least the first 4096 of them, if the caller has them already.

    Raises:
        ScanError: the header is damaged, or describes something that has no grey volumes.
    """
    if data is None:
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES)
    start = _unzipped(data, 540)
    magic = _magic(start)
    if magic is None:
        if start[:4] in _SIZEOF_HDR and len(start) >= 348:
            raise ScanError("is Analyze 7.5, which does not say which side is left; save it as NIfTI")
        raise ScanError("is not NIfTI, or ends inside its header")
    header_type = _HEADERS[magic]
    try:
        with np.errstate(all="ignore"):
            header = header_type(start[: header_type.sizeof_hdr], check=False)  # extensions are of no interest
            header.check_fix(_SILENT)
            dtype, affine = header.get_data_dtype(), np.asarray(header.get_best_affine(), dtype=np.float64)
            to_mm = _TO_MM[header.get_xyzt_units()[0]]
            offset = header.get_data_offset()
            slope, intercept = header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise ScanError("its header is damaged; copy it again, or save it anew") from error

    intent = int(header["intent_code"])
    if intent in _NO_PICTURE or intent in _CIFTI:
        raise ScanError(f"holds {'a surface (CIFTI)' if intent in _CIFTI else 'vectors or matrices'}, not a picture")
    _check_type(dtype)
    shape, n_volumes = _shape(header)

    paired = magic in ("ni1", "ni2")
    if paired:
        voxels = _beside(path)
        with voxels.open("rb") as file:
            compressed = file.read(2) == GZIP_MAGIC
    else:
        voxels = path
        offset = offset or header_type.single_vox_offset  # 0: right behind the header
        compressed = data[:2] == GZIP_MAGIC
    size = voxels.stat().st_size
    n_bytes = offset + math.prod(shape) * n_volumes * dtype.itemsize
    if offset < 0 or n_bytes > size * (_MOST_COMPRESSED if compressed else 1):
        raise ScanError(f"is too short for the {n_bytes:,} bytes that its header promises; copy it again")

    affine[:3] *= to_mm
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0) if (np.abs(affine) < 1e9).all() else np.zeros(3)
    if not (spacing_mm > 1e-6).all() or abs(np.linalg.det(affine[:3, :3] / spacing_mm)) < 1e-3:
        raise ScanError("its affine is not finite or has no inverse; the orientation of its voxels is lost")
    irregular = [_disagreement(header, affine, shape, to_mm)]
    if not compressed and size > n_bytes:
        irregular.append(goes_on(size - n_bytes))
    return Header(
        path=path,
        voxels_path=voxels,
        shape=shape,
        n_volumes=n_volumes,
        affine=affine,
        oriented=bool(header["qform_code"] > 0 or header["sform_code"] > 0),
        dtype=dtype,
        offset=offset,
        n_bytes=n_bytes,
        size=size,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        compressed=compressed,
        labels=intent in _LABELS,
        modality=bids.modality(path.name),
        irregular="; ".join(filter(None, irregular)),
    )


def refusal(header: Header, policy: Policy) -> str:
    """Why a file is no scan, although it may be a sound mask; '' if it is one."""
    if (suffix := bids.suffix(header.path.name)) in bids.SEGMENTATIONS:
        return f"is a segmentation (BIDS suffix _{suffix}), not a scan; see --masks"
    if header.labels:
        return "is a segmentation (its intent is labels), not a scan; see --masks"
    if header.n_volumes > 1 and policy.volumes == "refuse":
        return f"holds {header.n_volumes} volumes; --policy.volumes first or all reads them"
    if header.compressed and header.n_bytes > max(_BOMB_BYTES, _BOMB_RATIO * header.size):
        ratio = header.n_bytes // header.size
        return f"is compressed {ratio}-fold, as no scan of {header.n_bytes:,} bytes can be: it holds next to nothing"
    return ""


def goes_on(n_bytes: int) -> str:
    """How ``irregular`` says that a file is longer than its header."""
    return f"its file goes on for {n_bytes:,} bytes after its last voxel"


def _unzipped(data: bytes, length: int) -> bytes:
    """The first bytes of a file that may be gzipped; fewer if it ends or breaks there."""
    if data[:2] != GZIP_MAGIC:
        return data[:length]
    try:
        return zlib.decompressobj(wbits=31).decompress(data, length)
    except zlib.error:
        return b""


def _magic(start: bytes) -> str | None:
    """A key of ``_HEADERS``; None: not NIfTI."""
    if start[344:348] in (b"n+1\0", b"ni1\0"):
        return start[344:347].decode()
    return _NIFTI2_MAGIC.get(start[4:12])


def _check_type(dtype: np.dtype[Any]) -> None:
    if dtype.kind == "c":
        raise ScanError("holds complex voxels; save their magnitude")
    if dtype.kind == "V" and dtype.names is None:
        raise ScanError("holds voxels of one bit or 128, which medclr does not read; save it as int16 or float32")


def _shape(header: Any) -> tuple[tuple[int, int, int], int]:
    """(X,Y,Z), and the number of volumes."""
    n_axes = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : n_axes + 1]]
    if not 2 <= n_axes <= 7 or min(dims) < 1:
        raise ScanError(f"has shape {dims}, which is not a volume")
    x, y, z = [*dims, 1][:3]
    if max(x, y, z) > _LONGEST or x * y * z > _MOST_VOXELS:
        raise ScanError(f"has shape {dims}, larger than any scan; a volume may have {_MOST_VOXELS:,} voxels")
    if (n_volumes := math.prod(dims[3:])) > _MOST_VOLUMES:
        raise ScanError(f"has shape {dims}: {n_volumes:,} volumes, more than {_MOST_VOLUMES:,}; divide it")
    return (x, y, z), n_volumes


def _beside(path: Path) -> Path:
    """The ``.img`` of a ``.hdr``; either may be gzipped."""
    match = re.search(r"\.(hdr|HDR)(\.gz|\.GZ|)$", path.name)
    if match is None:
        raise ScanError("is the header of a NIfTI pair; call it NAME.hdr, and its voxels NAME.img")
    stem, image = path.name[: match.start()], ".img" if match[1] == "hdr" else ".IMG"
    endings = sorted((".gz", ".GZ", ""), key=lambda ending: ending != match[2])  # first, compressed alike
    for ending in endings:
        if (voxels := path.with_name(stem + image + ending)).is_file():
            return voxels
    raise ScanError(f"is half of a NIfTI pair, and the file of the same name that ends in {image} is not there")


def _disagreement(header: Any, affine: NDArray[np.float64], shape: tuple[int, int, int], to_mm: float) -> str:
    """How far the places of the qform and of the sform, which is used, lie apart; '' if within half a voxel."""
    if not (header["qform_code"] > 0 and header["sform_code"] > 0):
        return ""
    try:
        qform = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return "its qform is damaged, its sform is used"
    qform[:3] *= to_mm
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape), (1,))))  # [8,4]
    apart_mm = np.linalg.norm(corners @ (qform - affine).T, axis=1).max()
    if apart_mm <= 0.5 * np.linalg.norm(affine[:3, :3], axis=0).min():
        return ""
    return f"its qform and sform disagree by {apart_mm:.1f} mm, its sform is used"
