"""A DICOM file -> Header: is it an image, whose is it, and where do its slices lie?

Read without the pixels and, for speed, without pydicom's conversions. What is no scan is refused with the reason.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydicom.datadict import dictionary_description
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import UID, SecondaryCaptureImageStorage, SegmentationStorage

from medclr.errors import ScanError
from medclr.scans import dicom_frames
from medclr.scans.dicom_body_part import body_part
from medclr.scans.dicom_frames import Slice
from medclr.scans.dicom_syntax import bounded, check_held, inflated
from medclr.scans.dicom_values import functional, integer, numbers, raw, text, unheard
from medclr.scans.modality import MODALITIES

_MODALITY_OF = {code: row.name for row in MODALITIES.values() for code in row.dicom}

# Defined terms of Modality (PS3.3 C.7.3.1.1.1) that are no scan. Any other word could be free text and is not repeated.
_OTHER_CODES = {
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "DOC", "ECG", "EEG", "EPS", "FID", "HC", "HD", "IOL", "KER", "KO", "M3D",
    "OAM", "OCT", "OPT", "OPV", "PLAN", "PR", "REG", "RESP", "RTDOSE", "RTIMAGE", "RTPLAN", "RTRECORD", "RTSEGANN",
    "RTSTRUCT", "RWV", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "VA",
}  # fmt: skip

# One exposure or one sweep a file: never stacked into a volume, whatever positions they record.
_PROJECTIONS = {"XR", "US"}

# Values are measured in space: without a place the slices cannot be put in order, and a picture of them is no scan.
_VOLUMES = {"CT", "MR", "PT"}

_DICOMDIR = "1.2.840.10008.1.3.10"
_SURFACE_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.5"
_SCREENS = {"SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "DOSE_INFO", "CT_SOM5 PROT"}  # values of ImageType

_ELEMENTS = [
    Tag(name)
    for name in (
        *dicom_frames.ELEMENTS, "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID",
        "BodyPartExamined", "StudyInstanceUID", "SeriesInstanceUID", "SamplesPerPixel", "PhotometricInterpretation",
        "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "BurnedInAnnotation",
        "RescaleSlope", "RescaleIntercept", "RescaleType", "TotalPixelMatrixRows", "InConcatenationNumber",
        "InConcatenationTotalNumber",
    )
]  # fmt: skip
_PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}


@dataclass(frozen=True, slots=True)
class Header:
    """What grouping needs to know of one file."""

    path: Path
    modality: str | None
    patient: str
    """PatientID; where empty the study, else the series, else the instance, so that two unnamed patients are not taken
    for one; '' if there is none of them."""
    named: bool
    """Whether ``patient`` is a PatientID."""
    study: str
    series: str
    instance: str
    """SOPInstanceUID."""
    body_part: str
    frames: int
    """Slices in the file: NumberOfFrames, or the tiles of a Siemens mosaic."""
    rows: int
    columns: int
    """Of one slice, also in a mosaic."""
    samples: int
    tiles: int
    """Slices a side of a Siemens mosaic; 0: not a mosaic."""
    slices: tuple[Slice, ...]
    """Each frame in space; () if the file does not put them there."""
    volumes: tuple[Sequence[int], ...]
    """Frames not in space: those of each volume, in order."""
    spacing_mm: tuple[float, float, float]
    """Of frames not in space, along (d,h,w); 1 where unknown."""
    burned_in: bool
    """Burned In Annotation (0028,0301) is YES."""
    irregular: str
    """In what the file is not plain; '' if it is."""


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
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> ScanError:
    """The disk's trouble, or the file's: in a sequence, pydicom makes an OSError of whatever reading raises."""
    if isinstance(error.__context__, ScanError):
        return error.__context__
    if error.errno is None:
        return ScanError("cannot be read as DICOM (it breaks off inside a sequence)")
    return ScanError(f"cannot be read ({error.strerror})")


def _read_header(path: Path, file: BinaryIO) -> Header:
    try:
        with unheard():
            plain = bounded(inflated(file))
            dataset = read_partial(plain, lambda tag, vr, length: tag in _PIXELS, force=True, specific_tags=_ELEMENTS)
            _refuse_what_is_no_image(dataset)
            start = plain.tell() + (8 if dataset.original_encoding[0] else 12)  # tag, VR and length
            held = plain.seek(0, 2) - start
            if held < 0:
                raise ScanError("holds no pixel data")
            check_held(dataset, held)
            return _header(path, dataset)
    except (ScanError, OSError):
        raise
    except Exception as error:  # whatever pydicom makes of broken bytes
        raise ScanError(f"cannot be read as DICOM ({type(error).__name__})") from error


def read_whole(path: Path) -> tuple[Dataset, Header]:
    """A file with its pixels, as they are stored, and its header; raises as ``read_header``."""
    try:
        with unheard(), path.open("rb") as file:
            dataset = read_partial(bounded(inflated(file)), _behind_pixels(), force=True)
            if not dataset:  # pydicom keeps the end of the file inside the pixels to itself
                raise EOFError
            _refuse_what_is_no_image(dataset)
            held = [raw(dataset, tag) for tag in sorted(_PIXELS) if tag in dataset]
            if not held:
                raise ScanError("holds no pixel data")
            check_held(dataset, len(held[0]))
            return dataset, _header(path, dataset)
    except ScanError:
        raise
    except OSError as error:
        raise _unreadable(error) from error
    except Exception as error:
        read_header(path)  # has the better reason, unless the break lies in or behind the pixels
        raise ScanError("is cut short or broken after its header") from error


def _behind_pixels() -> Callable[[int, str | None, int], bool]:
    """Where to stop reading: nothing behind the pixels is of use, whatever its tag."""
    met = False

    def stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal met
        behind, met = met, met or tag in _PIXELS
        return behind

    return stop


def _refuse_what_is_no_image(dataset: Dataset) -> None:
    kind = UID(text(dataset, "SOPClassUID"))
    code = text(dataset, "Modality").upper()
    if dataset.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
        raise ScanError("is a DICOMDIR, a list of other files")
    if code == "SEG" or kind in (SegmentationStorage, _SURFACE_SEGMENTATION):
        raise ScanError("is a segmentation object, not a scan")
    if not (integer(dataset, "Rows") and integer(dataset, "Columns") and integer(dataset, "BitsAllocated")):
        named = f"a {kind.name}" if kind.name != kind else "of an unknown kind"
        raise ScanError(f"holds no image (it is {named}; Rows, Columns or Bits Allocated are absent)")
    if code and code not in _MODALITY_OF:
        shown = f"has Modality {code}, which" if code in _OTHER_CODES else "has a Modality that"
        raise ScanError(f"{shown} is none of {', '.join(_MODALITY_OF)}")
    needed = ["PhotometricInterpretation", "SamplesPerPixel"]
    if integer(dataset, "BitsAllocated") <= 16:  # wider ones may be real numbers, with neither sign nor unused bits
        needed += ["BitsStored", "PixelRepresentation"]
    for name in needed:
        if not raw(dataset, name):
            raise ScanError(f"records no {dictionary_description(name)}")
    if text(dataset, "BitsStored") and not 0 < integer(dataset, "BitsStored") <= integer(dataset, "BitsAllocated"):
        raise ScanError(f"stores {integer(dataset, 'BitsStored')} bits in {integer(dataset, 'BitsAllocated')}")


def _header(path: Path, dataset: Dataset) -> Header:
    modality = _MODALITY_OF.get(text(dataset, "Modality").upper())
    image_type = "\\".join(part.strip() for part in text(dataset, "ImageType").upper().split("\\"))
    frames = max(integer(dataset, "NumberOfFrames"), 1)
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    samples = integer(dataset, "SamplesPerPixel") or 1
    if integer(dataset, "TotalPixelMatrixRows") and frames > 1:
        raise ScanError("is a tiled whole-slide image; its frames are tiles, not slices")
    if modality in _VOLUMES:
        _refuse_pictures(dataset, modality, image_type, samples)

    tiles, slices = dicom_frames.mosaic(dataset, image_type, rows, columns)
    if tiles:
        frames, rows, columns = len(slices), rows // tiles, columns // tiles
    elif modality not in _PROJECTIONS or frames > 1:
        slices = dicom_frames.slices_of(dataset, image_type, frames)
    if slices and all("LOCALIZER" in slice_.kind for slice_ in slices) and modality in _VOLUMES:
        raise ScanError(f"is a localizer, made to plan the {modality} scan")
    if modality in _VOLUMES and not slices:
        raise ScanError("records no Image Position and Orientation (Patient), so its slices cannot be put in space")
    if modality == "CT":
        _check_hounsfield(dataset, frames if len(slices) > 1 and not tiles else 1)

    irregular = [_concatenation(dataset)]
    volumes: tuple[Sequence[int], ...] = ()
    spacing = 1.0, 1.0, 1.0
    if not slices:
        between = dicom_frames.region_spacing(dataset) if modality == "US" else None
        spacing = (1.0, *(between or dicom_frames.pixel_spacing(dataset) or (1.0, 1.0)))
        nuclear = dicom_frames.nuclear(dataset, frames) if modality == "NM" else None
        if nuclear:
            volumes, spacing = nuclear[0], (nuclear[1], *spacing[1:])
        else:
            volumes = (range(frames),)
            irregular.append(f"{frames} frames in the order of the file, not a volume" if frames > 1 else "")

    patient = _patient(dataset)
    study, series, instance = (text(dataset, f"{word}InstanceUID") for word in ("Study", "Series", "SOP"))
    return Header(
        path=path,
        modality=modality,
        patient=sys.intern(patient or _stranger(study, series, instance)),
        named=bool(patient),
        study=sys.intern(study),
        series=sys.intern(series),
        instance=instance,
        body_part=body_part(text(dataset, "BodyPartExamined")),
        frames=frames,
        rows=rows,
        columns=columns,
        samples=samples,
        tiles=tiles,
        slices=slices,
        volumes=volumes,
        spacing_mm=spacing,
        burned_in=text(dataset, "BurnedInAnnotation").upper() == "YES",
        irregular="; ".join(filter(None, irregular)),
    )


def _patient(dataset: Dataset) -> str:
    name = text(dataset, "PatientID")
    if name.isascii() and "\x1b" not in name:
        return name
    return str(dataset.PatientID).strip()  # the slow road knows the character set, and its escapes


def _stranger(study: str, series: str, instance: str) -> str:
    known = {"study": study, "series": series, "instance": instance}
    return next((f"{word} {uid}" for word, uid in known.items() if uid), "")


def _concatenation(dataset: Dataset) -> str:
    """A multi-frame image may be spread over several files (PS3.3 C.7.6.16.2.2.4)."""
    part, whole = (integer(dataset, f"InConcatenation{word}Number") for word in ("", "Total"))
    return f"part {part} of a concatenation{f' of {whole}' if whole else ''}" if part else ""


def _refuse_pictures(dataset: Dataset, modality: str, image_type: str, samples: int) -> None:
    """Pictures of a scan that are filed among its slices: their grey levels are not the scanner's values."""
    kinds = set(image_type.split("\\"))
    is_capture = text(dataset, "SOPClassUID").startswith(SecondaryCaptureImageStorage)
    if "LOCALIZER" in kinds:
        also = ", a projection and not a slice" if modality == "CT" else ""
        raise ScanError(f"is a localizer, made to plan the {modality} scan{also}")
    if kinds & _SCREENS or (is_capture and not numbers(dataset, "ImagePositionPatient", 3)):
        raise ScanError(f"is a secondary capture filed under {modality}: a picture of a screen or page, not a slice")
    if samples > 1 or text(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        raise ScanError(f"is in colour and filed under {modality}: a rendering, not the scanner's values")


def _check_hounsfield(dataset: Dataset, frames: int) -> None:
    """CT numbers are only comparable if they are Hounsfield units (PS3.3 C.8.2.1.1.2, C.11.1.1.2)."""
    for frame in range(frames):
        holder = functional(dataset, frame, "PixelValueTransformationSequence") or dataset
        if not numbers(holder, "RescaleSlope", 1) or not numbers(holder, "RescaleIntercept", 1):
            raise ScanError("is a CT image without Rescale Slope and Intercept, so its Hounsfield units are unknown")
        # GDCM, and what is built on it, writes US (unspecified) into every CT that it converts.
        if text(holder, "RescaleType").upper() not in ("", "HU", "HU_MOD", *(["US"] if holder is dataset else [])):
            raise ScanError("is a CT image whose Rescale Type says that its values are not Hounsfield units")
