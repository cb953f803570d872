"""Readers that nobody here wrote, brought to one shape, so that a Scan can be laid beside them voxel by voxel.

None of them does all that medclr promises. What they leave undone is done here, from the standard and not by medclr's
code: colour becomes luminance (BT.601), padding becomes air. MONOCHROME1 is turned round by ITK itself.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
BT601 = np.array([0.299, 0.587, 0.114])
AIR_HU = -1024


class CannotReadError(Exception):
    """The independent reader refuses the files."""


@dataclass(frozen=True)
class Reference:
    """What an independent reader makes of the files of a scan."""

    oracle: str
    voxels: NDArray[np.float64]
    """[A,B,C] in whichever order the reader has them; physical units, luminance."""
    affine: NDArray[np.float64] | None
    """[4,4], index (a,b,c,1) -> RAS mm; None: the reader keeps no geometry."""
    spacing_mm: tuple[float, ...] | None
    """Along (a,b,c)."""


def itk(files: Sequence[Path]) -> Reference:
    """SimpleITK, for DICOM with GDCM inside, which also sorts the slices. The rescale is applied."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        if len(files) == 1:
            image = sitk.ReadImage(str(files[0]))
        else:
            with tempfile.TemporaryDirectory() as folder:
                for i, file in enumerate(files):
                    (Path(folder) / str(i)).symlink_to(file)
                image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
    except RuntimeError as error:
        raise CannotReadError(str(error).splitlines()[-1][:200]) from error
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    voxels = sitk.GetArrayFromImage(image).astype(float)  # [D,H,W] or [D,H,W,3]
    if voxels.ndim == 4:
        voxels = voxels[..., :3] @ BT601
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing())[:, ::-1]  # x, y, z -> d, h, w
    affine[:3, 3] = image.GetOrigin()
    return Reference("SimpleITK", _without_padding(voxels, files[0]), LPS_TO_RAS @ affine, image.GetSpacing()[::-1])


def pydicom_pipeline(files: Sequence[Path]) -> Reference:
    """pydicom as its manual has it: pixel_array, then the palette or the modality LUT. Without geometry.

    A weaker oracle, because medclr decodes with pydicom too.
    """
    if len(files) > 1:
        raise CannotReadError("reads one file at a time")
    (file,) = files
    try:
        dataset = pydicom.dcmread(file, force=True)
        voxels = pixel_array(dataset)
        is_colour = dataset.get("SamplesPerPixel", 1) == 3
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            voxels, is_colour = apply_color_lut(voxels, dataset), True
        elif not is_colour:
            voxels = apply_modality_lut(voxels, dataset)
    except Exception as error:  # as each plugin has its own
        raise CannotReadError(f"{type(error).__name__}: {error}"[:200]) from error
    if is_colour:
        voxels = voxels[..., :3] @ BT601
    voxels = np.asarray(voxels, dtype=float).reshape(-1, *voxels.shape[-2:])
    return Reference("pydicom", _without_padding(voxels, file), None, None)


def _without_padding(voxels: NDArray[np.float64], file: Path) -> NDArray[np.float64]:
    """CT's Pixel Padding Value (PS3.3 C.7.5.1.1.2), which is outside of the field of view, as air."""
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    padding = header.get("PixelPaddingValue")
    if header.get("Modality") != "CT" or padding is None:
        return voxels
    if not header.PixelRepresentation:
        padding %= 2**header.BitsAllocated
    hounsfield = padding * header.RescaleSlope + header.RescaleIntercept
    is_tissue = -900 < hounsfield <= 3071  # a value that padding shares with tissue cannot be told from it
    return voxels if is_tissue else np.where(voxels == hounsfield, AIR_HU, voxels)


def nifti(path: Path, oracle: str = "nibabel") -> Reference:
    """nibabel on a NIfTI file, in float64."""
    image = nibabel.load(path)
    affine = np.asarray(image.affine, dtype=float)
    return Reference(oracle, image.get_fdata(), affine, tuple(map(float, np.linalg.norm(affine[:3, :3], axis=0))))


def dcm2niix(folder: Path) -> Reference:
    """The one volume that dcm2niix, which reads, decodes and sorts by itself, makes of a folder.

    Its ``-m y`` keeps a series together that was exposed with a changing tube current.
    """
    with tempfile.TemporaryDirectory() as out:
        command = ["dcm2niix", "-b", "n", "-z", "n", "-m", "y", "-f", "volume", "-o", out, str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        (path,) = Path(out).glob("*.nii")
        return nifti(path, "dcm2niix")
