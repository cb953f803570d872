"""The reader contract: whatever the file was, a reader returns a Scan or raises ScanError with the reason.

Shape letters used in this package: D slices, H rows, W columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.modality import MODALITIES, Window


@dataclass(frozen=True)
class Scan:
    """One volume (or one image, D = 1) in physical units, as a stack of slices.

    A Scan is valid once constructed; ``__post_init__`` checks what every later stage relies on.
    """

    voxels: NDArray[np.float32]
    """[D,H,W], after the modality LUT (DICOM PS3.3 C.11.1): Hounsfield units for CT, arbitrary for the others; finite.
    Float32 holds every integer that a 16-bit scanner stores exactly. MONOCHROME1 is already inverted."""

    affine: NDArray[np.float64]
    """[4,4], maps the array index (d,h,w,1) to RAS+ millimetres (NIfTI's world). Column norms are the spacing.
    For images without geometry: identity with ``spacing_mm`` on the diagonal."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (d,h,w). (1,1,1) where the file records none."""

    modality: str
    """A key of ``medclr.scans.modality.MODALITIES``."""

    source_shape: tuple[int, ...]
    """Shape of the array in the source file's own index order, before any transposition or flip."""

    source_axes: tuple[int, int, int] = (0, 1, 2)
    """For each of (d,h,w): which source axis it came from."""

    source_flips: tuple[bool, bool, bool] = (False, False, False)
    """For each of (d,h,w): whether it runs against the source axis."""

    irregular: str = ""
    """In what it is not plain, as in ``Found``; '' if it is."""

    window: Window | None = None
    """The window in which the file asks to be shown (PS3.3 C.11.2.1.2), in physical units; for pictures alone."""

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise ScanError(f"expected voxels of shape [D,H,W], got {list(self.voxels.shape)}")
        if self.voxels.dtype != np.float32:
            raise ScanError(f"expected float32 voxels, got {self.voxels.dtype}")
        if not np.isfinite(self.voxels).all():
            raise ScanError("voxels hold NaN or infinity")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ScanError("the affine is not a finite 4x4 matrix")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ScanError(f"voxel spacing {self.spacing_mm} mm is not positive")
        if self.modality not in MODALITIES:
            raise ScanError(f"unknown modality {self.modality!r}; known are {', '.join(MODALITIES)}")


@dataclass(frozen=True)
class Found:
    """One scan that a reader found, from headers alone.

    The identity fields only feed keyed pseudonyms; none of them is ever written.
    """

    files: tuple[Path, ...]
    """The scan's files; the slices of a DICOM series in geometric order."""

    modality: str | None
    """A key of ``medclr.scans.modality.MODALITIES``; None: the file does not say."""

    patient: str
    """Identity as the file gives it; '' if unknown."""

    study: str
    """StudyInstanceUID (0020,000D), or ''."""

    series: str
    """What is unique to this scan inside its study: SeriesInstanceUID and which part of it; or ''."""

    body_part: str
    """BodyPartExamined (0018,0015) as a lower-case defined term (PS3.16 annex L); '' if it is none of them,
    because free text could carry identity."""

    plane: str
    """axial, coronal, sagittal, oblique, or '' where the file records no orientation."""

    shape: tuple[int, int, int]
    """(D,H,W)."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (d,h,w); (1,1,1) where the file records none."""

    volume: int = 0
    """Which volume of its file it is, counted from 0; of a file with one volume, and of a series of files: 0."""

    irregular: str = ""
    """In what it is not plain, such as "2 of 22 slices are missing": a sentence without identity; '' if it is plain.
    See ``medclr.scans.policy``."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file before the reason of a ScanError raised inside."""
    try:
        yield
    except ScanError as error:
        raise ScanError(f"{path}: {error}") from error
