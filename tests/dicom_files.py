"""DICOM files written for tests, and what a test asks of the reader about a folder of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.dicom_header import Header
from medclr.scans.policy import DEFAULT, Policy
from medclr.scans.scan import Found

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
PATIENT = "Erika^Mustermann"


def write(path: Path, pixels: NDArray[Any], *, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Path:
    """A file with ``pixels`` [H,W], [H,W,3] or, if NumberOfFrames is given, [F,H,W]; MR unless ``elements`` differ.

    An element of None is left out.
    """
    implicit, big = syntax == ImplicitVRLittleEndian, syntax == ExplicitVRBigEndian
    dataset = FileDataset(str(path), {}, b"\0" * 128, FileMetaDataset(), implicit, not big)
    frames = "NumberOfFrames" in elements
    words: dict[str, Any] = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "Modality": "MR",
        "PatientID": PATIENT,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "PixelSpacing": [2.0, 0.5],
        "SliceThickness": 3.0,
        "Rows": pixels.shape[1 if frames else 0],
        "Columns": pixels.shape[2 if frames else 1],
        "SamplesPerPixel": 1 if frames or pixels.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if frames or pixels.ndim == 2 else "RGB",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    words |= elements
    if words["SamplesPerPixel"] == 3:
        words["PlanarConfiguration"] = 0
    words.setdefault("HighBit", words["BitsStored"] - 1 if words["BitsStored"] else None)
    for name, value in words.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, implicit_vr=implicit, little_endian=not big)
    return path


CT = {"SOPClassUID": CTImageStorage, "Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
NOWHERE = {"ImageOrientationPatient": None, "ImagePositionPatient": None}
XRAY = {"Modality": "DX", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", **NOWHERE}


def slab(folder: Path, z_mm: Sequence[float], **elements: Any) -> list[Path]:
    """One file a position; its pixels are ``100 + index``, InstanceNumber runs against z, and so do the file names."""
    return [
        write(folder / f"{len(z_mm) - i:03}.dcm", np.full((4, 5), 100 + i, np.uint16),
              **{"ImagePositionPatient": [1.0, 2.0, z], "InstanceNumber": len(z_mm) - i, **elements})
        for i, z in enumerate(z_mm)
    ]  # fmt: skip


def find(folder: Path, policy: Policy = DEFAULT) -> tuple[list[Found], list[tuple[Path, str]]]:
    """``dicom.find`` over a folder. No reason may repeat an identity, and every file ends in exactly one place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    headers: list[Header] = []
    rejects: list[tuple[Path, str]] = []
    for path in files:
        try:
            headers.append(dicom.read_header(path))
        except ScanError as error:
            rejects.append((path, str(error)))
    found, refused = dicom.find(headers, policy)
    rejects += refused
    used = sorted({path for scan in found for path in scan.files})  # a file may hold several volumes
    assert sorted(used + [path for path, _ in rejects]) == files
    assert not any(PATIENT in reason for _, reason in rejects)
    return found, rejects


def only_reason(folder: Path, policy: Policy = DEFAULT) -> str:
    """The one reason for which every file of a folder is refused."""
    found, rejects = find(folder, policy)
    assert not found
    (reason,) = {reason for _, reason in rejects}
    return reason


def report(path: Path, **elements: Any) -> None:
    """A file without pixels."""
    write(path, np.zeros((2, 2), np.uint8), **elements)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.Rows, dataset.Columns
    dataset.save_as(path)


def ramp(dtype: str, low: int, high: int) -> NDArray[Any]:
    """Values [3,4] from ``low`` to ``high``."""
    return np.linspace(low, high, 12).astype(dtype).reshape(3, 4)


def sequence(*items: dict[str, Any]) -> Items:
    """A sequence of items with these elements."""
    datasets = []
    for elements in items:
        datasets.append(Dataset())
        for name, value in elements.items():
            if name.startswith("LUT"):  # US or SS: pydicom wants to be told
                datasets[-1].add_new(name, "US", value)
            else:
                setattr(datasets[-1], name, value)
    return Items(datasets)


ENHANCED_CT = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1", "Modality": "CT"}
ENHANCED_MR = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "Modality": "MR"}


def enhanced(path: Path, frames: Sequence[dict[str, Any]], pixels: NDArray[Any] | None = None, **elements: Any) -> Path:
    """A multi-frame image with functional groups: each of ``frames`` names the macros of one frame.

    What a frame leaves out is shared: an axial orientation, and pixels of 2.0 x 0.5 mm. If not given, the pixels of
    frame k are all k.
    """
    if pixels is None:
        pixels = np.broadcast_to(np.arange(len(frames), dtype=np.uint16)[:, None, None], (len(frames), 3, 4))
    shared = {"PlaneOrientationSequence": {"ImageOrientationPatient": list(AXIAL)},
              "PixelMeasuresSequence": {"PixelSpacing": [2.0, 0.5], "SliceThickness": 1}}  # fmt: skip

    def groups(macros: dict[str, Any]) -> dict[str, Any]:
        return {name: sequence(macro) for name, macro in macros.items()}

    return write(
        path, pixels, NumberOfFrames=len(frames),
        **{"SharedFunctionalGroupsSequence": sequence(groups(shared)),
           "PerFrameFunctionalGroupsSequence": sequence(*map(groups, frames)),
           "PixelSpacing": None, "SliceThickness": None, **NOWHERE, **ENHANCED_MR, **elements},
    )  # fmt: skip


def at(x: float, y: float, z: float) -> dict[str, Any]:
    """The macro of a frame's place."""
    return {"PlanePositionSequence": {"ImagePositionPatient": [x, y, z]}}
