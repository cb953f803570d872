"""Where the frames of a DICOM file lie, and what tells their volumes apart.

One frame a file is the rule (PS3.3 C.7.6.2). Enhanced images describe each frame in functional groups (C.7.6.16), a
Siemens mosaic holds a volume as tiles of one frame, and nuclear medicine counts its frames with vectors (C.8.4.8).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from medclr.errors import ScanError
from medclr.scans.dicom_values import functional, items, numbers, raw, text

Vector = tuple[float, float, float]

# What tells volumes apart whose slices share positions, the most telling first: the element of a file with one frame,
# and that of a functional group. The values are compared, never interpreted, so they stay as they are written, and
# private elements need no dictionary.
PARAMETERS: dict[str | int, str] = {
    "EchoTime": "MREchoSequence.EffectiveEchoTime",
    "InversionTime": "MRModifierSequence.InversionTimes",
    "DiffusionBValue": "MRDiffusionSequence.DiffusionBValue",
    0x0019100C: "",  # Siemens b-value
    0x00431039: "",  # GE b-value
    0x20011003: "",  # Philips b-value
    "DiffusionGradientOrientation":
        "MRDiffusionSequence.DiffusionGradientDirectionSequence.DiffusionGradientOrientation",
    0x0019100E: "",  # Siemens gradient direction
    "TemporalPositionIdentifier": "FrameContentSequence.TemporalPositionIndex",
    "ConvolutionKernel": "CTReconstructionSequence.ConvolutionKernel",
    "ReconstructionDiameter": "CTReconstructionSequence.ReconstructionDiameter",
}  # fmt: skip
"""Settings of the scanner, one value a volume."""
CLOCKS: dict[str | int, str] = {
    "TriggerTime": "CardiacSynchronizationSequence.NominalCardiacTriggerDelayTime",
    "FrameReferenceTime": "FrameContentSequence.FrameReferenceDateTime",
    "AcquisitionNumber": "FrameContentSequence.FrameAcquisitionNumber",
    "AcquisitionTime": "FrameContentSequence.FrameAcquisitionDateTime",
    "SeriesTime": "FrameContentSequence.DimensionIndexValues",
}
"""Times and counters, which may differ from slice to slice of one volume."""
TELLING = PARAMETERS | CLOCKS

_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
_PLACES = {Tag(name) for name in ("StackID", "InStackPositionNumber", "ImagePositionPatient", "PlanePositionSequence")}
_VECTORS = ("EnergyWindowVector", "DetectorVector", "PhaseVector", "RRIntervalVector", "TimeSlotVector")
_CSA_IMAGE_HEADER = 0x00291010
_FARTHEST_MM = 1e6
_CENTIMETRES = 3  # Physical Units X Direction (PS3.3 C.8.5.5.1.2)

ELEMENTS: tuple[str | int, ...] = (
    *TELLING, "EchoNumbers", "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness",
    "SpacingBetweenSlices", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SliceVector",
    *_VECTORS, "SequenceOfUltrasoundRegions", "DimensionIndexSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", _CSA_IMAGE_HEADER,
)  # fmt: skip
"""All that is read here, of a file's top level."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame and its place in space."""

    position: Vector
    """ImagePositionPatient, LPS mm."""
    orientation: tuple[float, ...]
    """ImageOrientationPatient, six direction cosines."""
    spacing_mm: tuple[float, float]
    """Between rows, between columns."""
    thickness_mm: float
    """Extent of the slice along its normal; 1 if unknown."""
    kind: str
    """Image type, echo and stack: slices that differ in it never make one scan."""
    telling: tuple[bytes, ...]
    """Values in the order of ``TELLING``."""


def slices_of(dataset: Dataset, image_type: str, frames: int) -> tuple[Slice, ...]:
    """Its frames in space, in the order of the file; () if it does not put them there.

    Raises:
        ScanError: it puts some of its frames into space and not others, or leaves their pixel spacing out.
    """
    if described := len(items(dataset, "PerFrameFunctionalGroupsSequence")):
        return _enhanced(dataset, described, image_type, frames)
    orientation = numbers(dataset, "ImageOrientationPatient", 6)
    position = numbers(dataset, "ImagePositionPatient", 3)
    if frames > 1 or not orientation or not position:
        return ()
    telling = tuple(raw(dataset, name).strip() for name in TELLING)
    kind = f"{image_type}|{text(dataset, 'EchoNumbers')}"
    return (_slice(dataset, position, orientation, kind, telling),)


def _slice(
    measures: Dataset,
    position: tuple[float, ...],
    orientation: tuple[float, ...],
    kind: str,
    telling: tuple[bytes, ...],
) -> Slice:
    spacing = pixel_spacing(measures)
    if spacing is None:
        raise ScanError("records no usable Pixel Spacing")
    thickness = (numbers(measures, "SliceThickness", 1) or (0.0,))[0]
    if max(map(abs, (*position, *orientation, *spacing, thickness))) > _FARTHEST_MM:
        raise ScanError("records a place or a size in space that is beyond any scanner")
    return Slice(cast(Vector, position), orientation, spacing, thickness if thickness > 0 else 1.0, kind, telling)


def pixel_spacing(dataset: Dataset) -> tuple[float, float] | None:
    """Between rows and between columns, in mm: calibrated before at the detector (PS3.3 10.7.1.3)."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = numbers(dataset, name, 2)
        if spacing and min(spacing) > 0:
            return cast(tuple[float, float], spacing)
    return None


def region_spacing(dataset: Dataset) -> tuple[float, float] | None:
    """Pixel spacing of ultrasound, if all its regions are measured in cm and alike (PS3.3 C.8.5.5)."""
    deltas = set()
    for region in items(dataset, "SequenceOfUltrasoundRegions"):
        units = {region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")}
        down, across = (abs(float(region.get(name) or 0)) for name in ("PhysicalDeltaY", "PhysicalDeltaX"))
        deltas.add((10 * down, 10 * across) if units == {_CENTIMETRES} else (0.0, 0.0))
    return deltas.pop() if len(deltas) == 1 and min(min(deltas)) > 0 else None


def _enhanced(dataset: Dataset, described: int, image_type: str, frames: int) -> tuple[Slice, ...]:
    if described != frames:
        raise ScanError(f"describes {described} frames and announces {frames}")
    pointers = [Tag(item.get("DimensionIndexPointer") or 0) for item in items(dataset, "DimensionIndexSequence")]
    slices = []
    for frame in range(frames):
        position = numbers(functional(dataset, frame, "PlanePositionSequence"), "ImagePositionPatient", 3)
        orientation = numbers(functional(dataset, frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        if position and orientation:
            frame_types = [text(functional(dataset, frame, name), "FrameType") for name in _FRAME_TYPES]
            stack = text(functional(dataset, frame, "FrameContentSequence"), "StackID")
            kind = "|".join((image_type, *(part.upper() for part in frame_types if part), stack))
            telling = tuple(_nested(dataset, frame, path, pointers) for path in TELLING.values())
            measures = functional(dataset, frame, "PixelMeasuresSequence")
            slices.append(_slice(measures, position, orientation, kind, telling))
    if slices and len(slices) != frames:
        raise ScanError(f"puts {len(slices)} of its {frames} frames into space, and not the others")
    return tuple(slices)


def _nested(dataset: Dataset, frame: int, path: str, pointers: Sequence[BaseTag]) -> bytes:
    """A value of a frame's functional groups, as text."""
    if not path:
        return b""
    sequence, *inner, element = path.split(".")
    item = functional(dataset, frame, sequence)
    for name in inner:
        item = next(iter(items(item, name)), Dataset())
    value = item.get(element)
    if element == "DimensionIndexValues" and value is not None:
        values = [value] if isinstance(value, int) else list(value)
        value = [v for v, pointer in zip(values, pointers, strict=False) if pointer not in _PLACES]
    return b"" if value is None else str(value).encode()


def mosaic(dataset: Dataset, image_type: str, rows: int, columns: int) -> tuple[int, tuple[Slice, ...]]:
    """Tiles a side and slices of a Siemens mosaic: one volume as tiles of one image; 0 and () of any other file.

    ImagePositionPatient is that of an image as large as the mosaic around the slice's centre; which way the tiles
    follow each other only the CSA header tells (https://nipy.org/nibabel/dicom/dicom_mosaic.html).

    Raises:
        ScanError: the file does not say how to take the mosaic apart.
    """
    if "MOSAIC" not in image_type.split("\\"):
        return 0, ()
    from nibabel.nicom.csareader import read

    whole = slices_of(dataset, image_type, 1)
    apart = numbers(dataset, "SpacingBetweenSlices", 1)
    try:
        tags = read(raw(dataset, _CSA_IMAGE_HEADER))["tags"]
        count = int(tags["NumberOfImagesInMosaic"]["items"][0])
        normal = np.array(tags["SliceNormalVector"]["items"], dtype=float)
    except Exception:  # nibabel has no error of its own for what an anonymiser leaves of it
        count, normal = 0, np.zeros(0)
    tiles = int(np.ceil(np.sqrt(max(count, 0))))
    if not (count > 0 and normal.shape == (3,) and apart and whole) or rows % tiles or columns % tiles:
        raise ScanError("is a Siemens mosaic without the private header (0029,1010) that says how to take it apart")
    first = whole[0]
    across, down = np.array(first.orientation).reshape(2, 3)
    corner = np.array(first.position)
    corner += (columns - columns // tiles) / 2 * first.spacing_mm[1] * across
    corner += (rows - rows // tiles) / 2 * first.spacing_mm[0] * down
    places = [cast(Vector, tuple(map(float, corner + k * apart[0] * normal))) for k in range(count)]
    return tiles, tuple(
        Slice(at, first.orientation, first.spacing_mm, first.thickness_mm, first.kind, first.telling) for at in places
    )


def nuclear(dataset: Dataset, frames: int) -> tuple[tuple[Sequence[int], ...], float] | None:
    """Volumes of a nuclear medicine reconstruction: the frames of each in the order of its slices, and mm between them.

    Slices are counted by Slice Vector, volumes by the other vectors (PS3.3 C.8.4.8). Which way they are stacked is the
    sign of Spacing Between Slices (C.8.4.15), which writers are known to leave out, so they are not put into space.
    None: the frames are no reconstructed slices.
    """
    vectors = {name: np.atleast_1d(dataset.get(name) or []) for name in ("SliceVector", *_VECTORS)}
    place = vectors.pop("SliceVector")
    if len(place) != frames:
        return None
    volumes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for frame in np.argsort(place, kind="stable"):
        volumes[tuple(int(v[frame]) for v in vectors.values() if len(v) == frames)].append(int(frame))
    if any(len(set(place[members])) != len(members) for members in volumes.values()):
        return None
    apart = (numbers(dataset, "SpacingBetweenSlices", 1) or (0.0,))[0]
    return tuple(volumes[key] for key in sorted(volumes)), abs(apart) or 1.0
