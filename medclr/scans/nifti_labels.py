"""Label maps as NIfTI, on the grid of the scan that they belong to.

Nothing of the source but its geometry is taken over: texts and extensions of a NIfTI header may name a patient.
"""

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medclr.files import writing
from medclr.scans.nifti_header import nibabel_header

_GEOMETRY = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x",
    "srow_y", "srow_z",
)  # fmt: skip


def write_like(path: Path, labels: NDArray[np.unsignedinteger[Any]], source: Path) -> None:
    """Write labels on the grid of a NIfTI file: the affine, and what it is made from, are the file's own to the bit.

    Args:
        path: NAME.nii.gz to write.
        labels: [X,Y,Z], whole numbers up to 65535, in the index order of the file.
        source: the file; of a pair, its header. It may hold several volumes: then the labels are of one of them.
    """
    there = nibabel_header(source)
    n_axes = min(int(there["dim"][0]), 3)
    shape = tuple(int(n) for n in there["dim"][1 : n_axes + 1])  # an image of two axes keeps two
    if math.prod(shape) != labels.size:
        raise ValueError(f"labels of shape {labels.shape} for a file of shape {shape}")
    is_second = there.sizeof_hdr == nib.Nifti2Header.sizeof_hdr
    header = (nib.Nifti2Header if is_second else nib.Nifti1Header)()
    header.set_data_shape(shape)
    for name in _GEOMETRY:
        header[name] = there[name]
    header["pixdim"][:4] = there["pixdim"][:4]
    header.set_xyzt_units(xyz=there.get_xyzt_units()[0])
    _write(path, labels.reshape(shape), None, header)


def write_stack(path: Path, labels: NDArray[np.unsignedinteger[Any]], affine: NDArray[np.float64]) -> None:
    """Write labels of a scan that was no NIfTI: columns first, then rows, then slices, as ITK writes a DICOM series.

    Args:
        path: NAME.nii.gz to write.
        labels: [D,H,W], whole numbers up to 65535.
        affine: [4,4], index (d,h,w,1) to RAS+ millimetres (``Scan.affine``).
    """
    header = nib.Nifti1Header()
    header.set_data_shape(labels.shape[::-1])
    header.set_xyzt_units(xyz="mm")
    turned = affine[:, [2, 1, 0, 3]]  # index (w,h,d,1)
    header.set_qform(turned, code="scanner")  # holds no shear; programs that can use the sform, which does
    header.set_sform(turned, code="scanner")
    _write(path, labels.transpose(2, 1, 0), turned, header)


def _write(path: Path, labels: NDArray[Any], affine: NDArray[np.float64] | None, header: Any) -> None:
    dtype = np.uint8 if labels.max(initial=0) <= 255 else np.uint16
    header.set_data_dtype(dtype)
    header.set_intent("label")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(labels.astype(dtype), affine, header)
    with writing(path) as temporary:  # gzip itself would write the time and the temporary name into the file
        temporary.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
