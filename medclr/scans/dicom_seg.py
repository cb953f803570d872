"""Label maps as DICOM SEG (Segmentation IOD, PS3.3 A.51), next to the images that they belong to.

A SEG is an instance of the patient's study: its Patient and Study modules are copied from the images by necessity
(PS3.3 A.1.2), and nothing else that medclr writes holds an identity.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

import medclr
from medclr.errors import MedclrError, ScanError
from medclr.files import writing
from medclr.scans.dicom import read_header, volume_of
from medclr.scans.dicom_series import Frame
from medclr.scans.dicom_values import functional, numbers, text, unheard
from medclr.scans.policy import ACCEPTED

SERIES_NUMBER = 1000
"""Of the series that a SEG makes; scanners count from 1."""

_TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_FORM = {"Date": r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", "Time": r"([01]\d|2[0-3])([0-5]\d){0,2}(\.\d{1,6})?",
         "PatientSex": "[MFO]"}  # fmt: skip


def write_seg(
    path: Path,
    labels: NDArray[np.unsignedinteger[Any]],
    classes: Sequence[str],
    files: Sequence[Path],
    *,
    volume: int = 0,
) -> None:
    """Write labels as a BINARY segmentation: a segment a class, a frame for each slice on which a class was found.

    Each frame names the image, or the frame of a multi-frame image, on whose pixels it lies. If no class was found on
    any slice, all slices are written, empty.

    Args:
        path: DICOM file to write.
        labels: [D,H,W], 0 for the background and 1..K for the classes, on the slices of the scan as it was read.
        classes: names of the K classes.
        files: the scan's files, as for ``dicom.read``.
        volume: as for ``dicom.read``.

    Raises:
        ScanError: the images lack what a segmentation must refer to.
    """
    from highdicom import UID, AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    made_by = AlgorithmIdentificationSequence(
        name="medclr", family=codes.DCM.ArtificialIntelligence, version=medclr.__version__
    )
    segments = [
        SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            # What a class is, its name alone does not tell; so its type is a code of medclr's own (PS3.16 8).
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=CodedConcept(f"CLASS_{number}", "99MEDCLR", name[:64]),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=made_by,
        )
        for number, name in enumerate(classes, start=1)
    ]
    with unheard(), _unheard():
        headers = [read_header(file) for file in files]
        chosen = volume_of(files, headers, volume, ACCEPTED)
        frames = chosen.frames  # [D]
        if any(frame.header.tiles for frame in frames):
            raise ScanError("is a Siemens mosaic, of whose tiles a DICOM SEG can name none")
        images = _images(frames, chosen.found.spacing_mm[0])
        try:
            seg = Segmentation(
                source_images=images,
                pixel_array=labels.astype(np.uint8 if len(classes) < 256 else np.uint16),
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=UID(),
                instance_number=1,
                manufacturer="medclr",
                manufacturer_model_name="medclr",
                software_versions=medclr.__version__,
                device_serial_number="0",
                content_label="SEGMENTATION",
                series_description="medclr segmentation",
                omit_empty_frames=bool(labels.any()),
            )
            if frames[0].header.frames > 1:
                _number_frames(seg, [frame.number + 1 for frame in frames])
            if "FrameOfReferenceUID" not in seg:  # then it must say how the picture is turned, or that nobody knows
                seg.PatientOrientation = images[0].get("PatientOrientation")
            with writing(path) as temporary:
                seg.save_as(temporary, enforce_file_format=True)
        except (MedclrError, MemoryError, OSError):
            raise
        except Exception as error:  # whatever highdicom makes of images out of order; its text may quote their values
            raise ScanError(f"holds what no DICOM SEG can refer to ({type(error).__name__})") from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing of what highdicom logs is heard: it quotes the patient's name where that is oddly written."""
    logger, handler = logging.getLogger("highdicom"), logging.NullHandler()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _images(frames: Sequence[Frame], spacing_mm: float) -> list[Dataset]:
    """What highdicom is to take for the images: one a slice, or a multi-frame image of just these slices, in order.

    Args:
        frames: [D].
        spacing_mm: between slices: how thick they are where the images do not say it.

    Raises:
        ScanError: they lack what a segmentation must refer to.
    """
    datasets = {path: dcmread(path, stop_before_pixels=True, force=True) for path in {f.header.path for f in frames}}
    images = [datasets[frame.header.path] for frame in frames]
    first, in_space = images[0], bool(frames[0].header.slices)
    if (in_space or len(frames) > 1) and not (in_space and text(first, "FrameOfReferenceUID")):
        raise ScanError("records no Frame of Reference UID for its slices, to which a DICOM SEG must refer")
    for dataset in datasets.values():
        if missing := [name for name in _NEEDED if not text(dataset, name)]:
            raise ScanError(f"records no {', '.join(missing)}, to which a DICOM SEG must refer")
        for name in _TYPE_2:
            if name not in dataset or not _is_sound(name, text(dataset, name)):
                setattr(dataset, name, None)
        if not all(spacing > 0 for spacing in numbers(dataset, "PixelSpacing", 2)):
            del dataset.PixelSpacing
        if not in_space:  # then it has no place in a frame of reference either
            dataset.pop("FrameOfReferenceUID", None)
        elif not any(numbers(dataset, "SliceThickness", 1)):
            dataset.SliceThickness = f"{spacing_mm:.6g}"
    if frames[0].header.frames == 1:
        for image in images[1:] if in_space else []:  # equal but for the last digits, as ``read`` has checked
            image.ImageOrientationPatient = first.ImageOrientationPatient
        return images
    if not in_space:
        return [first]
    image = deepcopy(first)
    places = [frame.number for frame in frames]
    image.NumberOfFrames = len(places)
    shared = _groups(first, places[0], "PlaneOrientationSequence", "PixelMeasuresSequence")
    if not any(numbers(shared.PixelMeasuresSequence[0], "SliceThickness", 1)):
        shared.PixelMeasuresSequence[0].SliceThickness = f"{spacing_mm:.6g}"
    image.SharedFunctionalGroupsSequence = Items([shared])
    image.PerFrameFunctionalGroupsSequence = Items([_groups(first, n, "PlanePositionSequence") for n in places])
    return [image]


def _is_sound(name: str, value: str) -> bool:
    """Whether a value can be repeated: what is malformed is left out, as PS3.5 7.4.3 allows (type 2)."""
    pattern = _FORM.get(name[-4:]) or _FORM.get(name)
    return pattern is None or not value or re.fullmatch(pattern, value) is not None


def _groups(dataset: Dataset, frame: int, *names: str) -> Dataset:
    """An item with some functional groups of a frame, wherever the image keeps them."""
    item = Dataset()
    for name in names:
        setattr(item, name, Items([functional(dataset, frame, name)]))
    return item


def _number_frames(seg: Dataset, numbers: Sequence[int]) -> None:
    """Give references to the i-th slice of the scan the number that its frame has in the source, counted from 1."""
    items = (item.get("DerivationImageSequence", ()) for item in seg.PerFrameFunctionalGroupsSequence)
    sources = {id(source): source for item in items for each in item for source in each.SourceImageSequence}
    for source in sources.values():  # the segments of a slice may share it
        source.ReferencedFrameNumber = numbers[int(source.ReferencedFrameNumber) - 1]
