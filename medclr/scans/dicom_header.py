"""A DICOM file -> Header: is it an image, whose is it, and where do its slices lie?

Read without the pixels and, for speed, without pydicom's conversions: values come straight from their bytes.
"""

import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, SecondaryCaptureImageStorage, SegmentationStorage

from medclr.errors import ScanError
from medclr.scans.modality import MODALITIES

Vector = tuple[float, float, float]

_MODALITY_OF = {code: row.name for row in MODALITIES.values() for code in row.dicom}

# One exposure or one sweep a file: never stacked into a volume, whatever positions they record.
_PROJECTIONS = {"XR", "US"}

# Without a place in space the slices of these cannot be put in order.
_VOLUMES = {"CT", "MR", "PT"}

_DICOMDIR = "1.2.840.10008.1.3.10"
_SURFACE_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.5"
_CSA_IMAGE_HEADER = 0x00291010

# What tells volumes apart whose slices share positions, the most telling first. The values are compared, never
# interpreted, so they stay as raw bytes and private elements need no dictionary.
TELLING = (
    "EchoTime",
    "InversionTime",
    "DiffusionBValue",
    0x0019100C,  # Siemens b-value
    0x00431039,  # GE b-value
    0x20011003,  # Philips b-value
    "DiffusionGradientOrientation",
    0x0019100E,  # Siemens gradient direction
    "TemporalPositionIdentifier",
    "TriggerTime",
    "FrameReferenceTime",
    "ConvolutionKernel",
    "ReconstructionDiameter",
    "AcquisitionNumber",
    "AcquisitionTime",
    "SeriesTime",
)
_KEYWORDS = (
    "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "BodyPartExamined", "SliceThickness",
    "SpacingBetweenSlices", "EchoNumbers", "StudyInstanceUID", "SeriesInstanceUID", "ImagePositionPatient",
    "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "BitsAllocated", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "TotalPixelMatrixRows", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip


_TAGS = {name: Tag(name) for name in (*_KEYWORDS, *TELLING, _CSA_IMAGE_HEADER)}

# Defined terms of Body Part Examined (PS3.16 annex L), spaces and punctuation taken out. Whatever is not among them
# could be free text that names somebody, and is dropped.
_BODY_PART_WORDS = """
abdomen adrenal ankle aorta arm axilla back bladder brain breast bronchus buttock calcaneus calf carotid cerebellum
cervix cheek chest clavicle coccyx colon cornea duodenum ear elbow esophagus extremity eye eyelid face femur finger
foot gallbladder hand head heart hip humerus ileum ilium jaw jejunum kidney knee larynx leg liver lung mandible maxilla
mediastinum mouth neck nose orbit ovary pancreas parotid patella pelvis penis pharynx prostate rectum rib scalp scapula
sclera scrotum shoulder skull spine spleen sternum stomach submandibular testis thigh thumb thymus thyroid toe tongue
trachea ureter urethra uterus vagina vulva wrist zygoma
"""
_BODY_PARTS = {word.upper(): word for word in _BODY_PART_WORDS.split()} | {
    "ABDOMENPELVIS": "abdomen and pelvis",
    "CHESTABDOMEN": "chest and abdomen",
    "CHESTABDPELVIS": "chest abdomen and pelvis",
    "CIRCLEOFWILLIS": "circle of willis",
    "CORONARYARTERY": "coronary artery",
    "CSPINE": "cervical spine",
    "CTSPINE": "cervicothoracic spine",
    "HEADNECK": "head and neck",
    "IAC": "internal auditory canal",
    "LSPINE": "lumbar spine",
    "LSSPINE": "lumbosacral spine",
    "NECKCHEST": "neck and chest",
    "NECKCHESTABDOMEN": "neck chest and abdomen",
    "NECKCHESTABDPELV": "neck chest abdomen and pelvis",
    "SSPINE": "sacral spine",
    "THORAX": "chest",
    "TLSPINE": "thoracolumbar spine",
    "TMJ": "temporomandibular joint",
    "TSPINE": "thoracic spine",
    "WHOLEBODY": "whole body",
}


@dataclass(frozen=True, slots=True)
class Header:
    """What grouping needs to know of one file."""

    path: Path
    modality: str | None
    patient: str
    """PatientID; where empty, the study, so that two unnamed patients are not taken for one; '' if neither."""
    study: str
    series: str
    instance: str
    """SOPInstanceUID."""
    image_type: str
    body_part: str
    echo: str
    telling: tuple[bytes, ...]
    """Raw values of what tells volumes at the same positions apart, in the order of ``TELLING``."""
    frames: int
    """Slices in the file: NumberOfFrames, or the tiles of a Siemens mosaic."""
    rows: int
    columns: int
    """Of one slice, also in a mosaic."""
    samples: int
    tiles: int
    """Slices a side of a Siemens mosaic; 0: not a mosaic."""
    orientation: tuple[float, ...]
    """ImageOrientationPatient (six direction cosines), or ()."""
    positions: tuple[Vector, ...]
    """ImagePositionPatient of every frame, LPS mm, or ()."""
    pixel_spacing_mm: tuple[float, float] | None
    """Between rows, between columns."""
    thickness_mm: float
    """Extent of a single slice along its normal; 1 if unknown."""


def read_header(path: Path, data: bytes | BinaryIO | None = None) -> Header:
    """Read what grouping needs, and nothing behind it: pixels stay on disk.

    Args:
        path: the file; not opened if ``data`` is given.
        data: its contents, or an open binary file.

    Raises:
        ScanError: not an image, or not one that can become a scan. The text is the reason, without the path.
    """
    try:
        if data is None:
            with path.open("rb") as file:
                return _read_header(path, file)
        return _read_header(path, BytesIO(data) if isinstance(data, bytes) else data)
    except OSError as error:
        raise ScanError(f"cannot be read ({error.strerror or error})") from error


def _read_header(path: Path, file: BinaryIO) -> Header:
    try:
        with warnings.catch_warnings():  # pydicom warns of deviations that do not matter here
            warnings.simplefilter("ignore")
            dataset = dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_TAGS.values()))
            header = header_of(path, dataset)
            _check_length(dataset, header, file)
    except (ScanError, OSError):
        raise
    except Exception as error:  # whatever pydicom makes of broken bytes
        raise ScanError(f"cannot be read as DICOM ({type(error).__name__})") from error
    return header


def header_of(path: Path, dataset: Dataset) -> Header:
    """The Header of a dataset that pydicom has read and nobody has touched; raises as ``read_header``."""
    kind = UID(_text(dataset, "SOPClassUID"))
    code = _text(dataset, "Modality").upper()
    if dataset.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
        raise ScanError("is a DICOMDIR, a list of other files")
    if code == "SEG" or kind in (SegmentationStorage, _SURFACE_SEGMENTATION):
        raise ScanError("is a segmentation object, not a scan")
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    if not rows or not columns or not _integer(dataset, "BitsAllocated"):
        named = f"a {kind.name}" if kind.name != kind else "of an unknown kind"
        raise ScanError(f"holds no image (it is {named}; Rows, Columns or Bits Allocated are absent)")
    if code and code not in _MODALITY_OF:
        code = re.sub("[^A-Z0-9]", "?", code)[:16]
        raise ScanError(f"has Modality {code}, which is none of {', '.join(_MODALITY_OF)}")

    modality = _MODALITY_OF.get(code)
    image_type = "\\".join(part.strip() for part in _text(dataset, "ImageType").upper().split("\\"))
    frames = max(_integer(dataset, "NumberOfFrames"), 1)
    if _integer(dataset, "TotalPixelMatrixRows") and frames > 1:
        raise ScanError("is a tiled whole-slide image; its frames are tiles, not slices")
    if modality == "CT" and "LOCALIZER" in image_type:
        raise ScanError("is a CT localizer, a projection and not a slice")

    tiles = 0
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups:
        orientation, positions, spacing, thickness = _enhanced(dataset, groups, frames)
    else:
        orientation = _numbers(dataset, "ImageOrientationPatient", 6)
        positions = (cast(Vector, at),) if (at := _numbers(dataset, "ImagePositionPatient", 3)) and frames == 1 else ()
        spacing = _pixel_spacing(dataset)
        thickness = (_numbers(dataset, "SliceThickness", 1) or (0.0,))[0]
        if "MOSAIC" in image_type.split("\\") and spacing:
            frames, tiles, positions = _mosaic(dataset, rows, columns, orientation, positions, spacing)
            rows, columns = rows // tiles, columns // tiles
    if not orientation or not positions or (modality in _PROJECTIONS and frames == 1):
        orientation, positions = (), ()

    samples = _integer(dataset, "SamplesPerPixel") or 1
    if modality in _VOLUMES and (samples > 1 or (not positions and kind.startswith(SecondaryCaptureImageStorage))):
        modality = "OT"  # a rendering, a screenshot or a report page: not the scanner's values
    if modality in _VOLUMES and not positions:
        raise ScanError("records no Image Position and Orientation (Patient), so its slices cannot be put in space")
    if positions and not spacing:
        raise ScanError("records no usable Pixel Spacing")
    if modality == "CT":
        _check_hounsfield(dataset)

    study = _text(dataset, "StudyInstanceUID")
    patient = _patient(dataset)
    return Header(
        path=path,
        modality=modality,
        patient=sys.intern(patient or (f"study {study}" if study else "")),
        study=sys.intern(study),
        series=sys.intern(_text(dataset, "SeriesInstanceUID")),
        instance=_text(dataset, "SOPInstanceUID"),
        image_type=sys.intern(image_type),
        body_part=_BODY_PARTS.get(re.sub("[^A-Z]", "", _text(dataset, "BodyPartExamined").upper()), ""),
        echo=_text(dataset, "EchoNumbers"),
        telling=tuple(_raw(dataset, name).strip() for name in TELLING),
        frames=frames,
        rows=rows,
        columns=columns,
        samples=samples,
        tiles=tiles,
        orientation=orientation,
        positions=positions,
        pixel_spacing_mm=spacing,
        thickness_mm=thickness if thickness > 0 else 1.0,
    )


def _raw(dataset: Dataset, name: str | int) -> bytes:
    element = dataset.get_item(_TAGS[name], keep_deferred=True)
    value = None if element is None else element.value
    if value is None or isinstance(value, bytes):
        return value or b""
    return str(value).encode()


def _text(dataset: Dataset, name: str) -> str:
    return _raw(dataset, name).decode("latin-1").strip(" \0\t\r\n")


def _patient(dataset: Dataset) -> str:
    text = _text(dataset, "PatientID")
    if text.isascii() and "\x1b" not in text:
        return text
    return str(dataset.PatientID).strip()  # the slow road knows the character set, and its escapes


def _integer(dataset: Dataset, name: str) -> int:
    """An integer of VR US, UL or IS; 0 if absent."""
    raw = _raw(dataset, name)
    if name != "NumberOfFrames" and len(raw) in (2, 4):
        return int.from_bytes(raw, "little" if dataset.get_item(_TAGS[name]).is_little_endian else "big")
    try:
        return int(raw.strip(b" \0") or 0)
    except ValueError:
        raise ScanError(f"has a {name} that is no number") from None


def _numbers(dataset: Dataset, name: str, count: int) -> tuple[float, ...]:
    """``count`` finite decimal strings, or () where the element is absent or holds another number of them."""
    text = _text(dataset, name)
    if not text:
        return ()
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        raise ScanError(f"has a {name} that is no number") from None
    return values if len(values) == count and all(map(math.isfinite, values)) else ()


def _pixel_spacing(dataset: Dataset) -> tuple[float, float] | None:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = _numbers(dataset, name, 2)
        if spacing and min(spacing) > 0:
            return cast(tuple[float, float], spacing)
    return None


def functional(dataset: Dataset, frame: int, sequence: str) -> Dataset:
    """The item of a functional group macro (PS3.3 C.7.6.16) that holds for ``frame``; empty if there is none."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(groups) or []
        if index < len(items) and items[index].get(sequence):
            return items[index][sequence].value[0]
    return Dataset()


def _enhanced(
    dataset: Dataset, groups: Sequence[Dataset], frames: int
) -> tuple[tuple[float, ...], tuple[Vector, ...], tuple[float, float] | None, float]:
    """Orientation, positions, pixel spacing and slice thickness of a multi-frame image with functional groups."""
    if len(groups) != frames:
        raise ScanError(f"describes {len(groups)} frames and announces {frames}")
    planes, positions = set(), []
    for frame in range(frames):
        position = _numbers(functional(dataset, frame, "PlanePositionSequence"), "ImagePositionPatient", 3)
        orientation = _numbers(functional(dataset, frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        measures = functional(dataset, frame, "PixelMeasuresSequence")
        thickness = (_numbers(measures, "SliceThickness", 1) or (0.0,))[0]
        planes.add((orientation, _pixel_spacing(measures), thickness))
        if position:
            positions.append(cast(Vector, position))
    if positions and (len(positions) != frames or len(planes) != 1):
        raise ScanError("holds frames of several orientations or sizes, or frames without a position")
    orientation, spacing, thickness = next(iter(planes))
    return orientation, tuple(positions), spacing, thickness


def _mosaic(
    dataset: Dataset,
    rows: int,
    columns: int,
    orientation: tuple[float, ...],
    positions: tuple[Vector, ...],
    spacing_mm: tuple[float, float],
) -> tuple[int, int, tuple[Vector, ...]]:
    """Slices, tiles a side, and slice positions of a Siemens mosaic: one volume as tiles of one image.

    ImagePositionPatient is that of an image as large as the mosaic around the slice's centre; which way the tiles
    follow each other only the CSA header tells (https://nipy.org/nibabel/dicom/dicom_mosaic.html).
    """
    from nibabel.nicom.csareader import read

    apart = _numbers(dataset, "SpacingBetweenSlices", 1)
    try:
        tags = read(_raw(dataset, _CSA_IMAGE_HEADER))["tags"]
        frames = int(tags["NumberOfImagesInMosaic"]["items"][0])
        normal = np.array(tags["SliceNormalVector"]["items"], dtype=float)
    except Exception:  # nibabel has no error of its own for what an anonymiser leaves of it
        frames, normal = 0, np.zeros(0)
    tiles = int(np.ceil(np.sqrt(frames)))
    if not (frames and normal.shape == (3,) and apart and positions and orientation) or rows % tiles or columns % tiles:
        raise ScanError("is a Siemens mosaic without the private header (0029,1010) that says how to take it apart")
    across, down = np.array(orientation).reshape(2, 3)
    corner = np.array(positions[0])
    corner += (columns - columns // tiles) / 2 * spacing_mm[1] * across
    corner += (rows - rows // tiles) / 2 * spacing_mm[0] * down
    return frames, tiles, tuple(cast(Vector, tuple(corner + k * apart[0] * normal)) for k in range(frames))


def _check_hounsfield(dataset: Dataset) -> None:
    """CT numbers are only comparable if they are Hounsfield units (PS3.3 C.8.2.1.1.2, C.11.1.1.2)."""
    holder = functional(dataset, 0, "PixelValueTransformationSequence") or dataset
    if not _numbers(holder, "RescaleSlope", 1) or not _numbers(holder, "RescaleIntercept", 1):
        raise ScanError("is a CT image without Rescale Slope and Intercept, so its Hounsfield units are unknown")
    if _text(holder, "RescaleType").upper() not in ("", "HU", "HU_MOD"):
        raise ScanError("is a CT image whose Rescale Type says that its values are not Hounsfield units")


def _check_length(dataset: Dataset, header: Header, file: BinaryIO) -> None:
    """Refuse files that end before their pixels do; ``file`` stands at the pixel element, where reading stopped."""
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", ""))
    if syntax == DeflatedExplicitVRLittleEndian:
        return
    implicit, _ = dataset.original_encoding
    start = file.tell() + (8 if implicit else 12)  # tag, VR and length
    held = file.seek(0, 2) - start
    if held < 0:
        raise ScanError("holds no pixel data")
    if syntax and syntax.is_encapsulated:
        return
    side = header.tiles or 1
    pixels = header.rows * header.columns * side**2 if side > 1 else header.rows * header.columns * header.frames
    bits = pixels * header.samples * _integer(dataset, "BitsAllocated")
    if _text(dataset, "PhotometricInterpretation") == "YBR_FULL_422":
        bits = bits * 2 // 3
    if held < bits // 8:
        raise ScanError(f"is cut short: {held} of {bits // 8} bytes of pixels")
