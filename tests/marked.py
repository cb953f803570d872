"""Scans of which every text names a marker, and a search for the marker in whatever was written."""

import gzip
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import config
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

TEXT, NUMBER = "ZQMARKXV", "73905162"
"""What is planted: where letters may stand, and where only digits may. Both are 8 long, to stand in for a number."""

_LENGTH = {"AE": 16, "AS": 4, "CS": 16, "SH": 16, "LO": 64, "PN": 64, "UI": 64, "DA": 8, "TM": 6, "DT": 8}
_WORDS = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
_READ = {  # what the reader goes by: planted one at a time, in files of their own
    "ImageType", "SOPClassUID", "Modality", "BodyPartExamined", "PhotometricInterpretation", "RescaleType",
    "BurnedInAnnotation", "SpecificCharacterSet", "PixelPresentation", "VolumetricProperties", "PresentationLUTShape",
}  # fmt: skip
_STAND_IN = "12345678"


def slice_of(patient: str, height_mm: float, number: int) -> Dataset:
    """A plain CT slice of 6 x 8 pixels."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    uid, whose = f"1.2.{NUMBER}", zlib.crc32(patient.encode())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{uid}.{whose}.{number}"
    dataset.StudyInstanceUID = f"{uid}.3.{whose}"
    dataset.SeriesInstanceUID = f"{uid}.4.{whose}"
    dataset.PatientID, dataset.Modality, dataset.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 6, 8, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelSpacing, dataset.SliceThickness = [0.75, 0.75], 2.5
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, height_mm]
    dataset.PixelData = np.random.RandomState(number).randint(0, 2000, (6, 8)).astype(np.uint16).tobytes()
    return dataset


def plant(dataset: Dataset) -> int:
    """Fill every text element of the dictionary that is empty, private ones and nested ones; returns how many."""
    before = len(dataset)
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if not keyword or keyword in dataset or keyword in _READ or tag >> 16 in (0x0000, 0x0002, 0x0004):
            continue
        if vr in _WORDS:
            dataset.add(DataElement(tag, vr, TEXT[: _LENGTH.get(vr)]))
        elif vr == "UI":
            dataset.add(DataElement(tag, vr, f"1.2.{NUMBER}.9"))
    dataset.PatientBirthDate, dataset.BodyPartExamined = NUMBER, TEXT
    dataset.SpecificCharacterSet = "ISO_IR 192"
    block = dataset.private_block(0x0029, f"{TEXT} CREATOR", create=True)
    inner = Dataset()
    inner.PatientName, inner.PatientComments = f"{TEXT}^ÄÖ", TEXT
    outer = Dataset()
    outer.add_new(Tag(0x0008, 0x1115), "SQ", Sequence([inner]))
    for offset, (vr, value) in enumerate(
        (("LO", TEXT), ("UN", TEXT.encode()), ("UT", TEXT), ("SQ", Sequence([outer])))
    ):
        block.add_new(offset, vr, value)
    dataset.add_new(Tag(0x0010, 0x1002), "SQ", Sequence([inner]))  # Other Patient IDs Sequence
    return len(dataset) - before


def save(dataset: Dataset, path: Path) -> Path:
    """Write it, whatever its values are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


def write_dicom(root: Path) -> None:
    """Two series of three slices with markers everywhere, and single files with one in what the reader goes by."""
    before = config.settings.writing_validation_mode, config.settings.reading_validation_mode
    config.settings.writing_validation_mode = config.settings.reading_validation_mode = config.IGNORE
    try:
        _write_dicom(root)
    finally:
        config.settings.writing_validation_mode, config.settings.reading_validation_mode = before


def _write_dicom(root: Path) -> None:
    for patient in (f"{TEXT}A", f"{TEXT}B"):
        for i in range(3):
            dataset = slice_of(patient, 2.5 * i, i)
            assert plant(dataset) > 1000
            save(dataset, root / f"series {patient}" / f"{TEXT}_{i}")
    for number, keyword in enumerate(sorted(_READ)):
        dataset = slice_of(f"{TEXT}{100 + number}", 0, number)
        dataset[keyword] = DataElement(Tag(keyword), "UI" if keyword.endswith("UID") else "CS", TEXT)
        save(dataset, root / f"odd {TEXT}" / keyword)
    numbers: dict[str, Any] = {
        "RescaleSlope": _STAND_IN,
        "SliceThickness": _STAND_IN,
        "PixelSpacing": [_STAND_IN] * 2,
        "ImagePositionPatient": [_STAND_IN] * 3,
        "NumberOfFrames": _STAND_IN,
        "EchoNumbers": _STAND_IN,
        "WindowCenter": _STAND_IN,
        "PatientWeight": _STAND_IN,
    }
    for number, (keyword, value) in enumerate(numbers.items()):
        dataset = slice_of(f"{TEXT}{200 + number}", 0, number)
        setattr(dataset, keyword, value)
        path = save(dataset, root / f"odd {TEXT}" / keyword)
        path.write_bytes(path.read_bytes().replace(_STAND_IN.encode(), TEXT.encode()))
    broken = slice_of(f"{TEXT}300", 0, 300)
    plant(broken)
    path = save(broken, root / f"odd {TEXT}" / "cut")
    path.write_bytes(path.read_bytes()[:-40])
    broken = slice_of(f"{TEXT}R", 0, 301)  # its header is well, its pixels are not: only prepare finds out
    broken.file_meta.TransferSyntaxUID = RLELossless
    broken.PixelData = encapsulate([TEXT.encode() * 10])
    broken["PixelData"].VR = "OB"
    save(broken, root / f"odd {TEXT}" / "pixels")


def write_nifti(root: Path, masks: Path) -> None:
    """A volume with a mask and one that ends early; markers in all texts of the header and in its extensions."""
    voxels = np.random.RandomState(0).gamma(2, 100, (9, 8, 7)).astype(np.float32)
    image = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0]))
    for field, length in (("descrip", 80), ("aux_file", 24), ("intent_name", 16), ("db_name", 18), ("data_type", 10)):
        image.header[field] = TEXT[:length]
    for code in (2, 4, 6):  # DICOM, AFNI, comment
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, TEXT.encode() * 4))
    for folder, like in ((root, image), (masks, nib.Nifti1Image((voxels > 200).astype(np.uint8), image.affine))):
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(like, folder / f"{TEXT}_N.nii.gz")
    whole = (root / f"{TEXT}_N.nii.gz").read_bytes()
    (root / f"{TEXT}_cut.nii.gz").write_bytes(whole[: len(whole) * 3 // 4])
    (root / f"{TEXT}_head.nii.gz").write_bytes(whole[:60])


def write_pictures(root: Path) -> None:
    """PNG, TIFF and JPEG with markers in their texts, and one of each that is broken."""
    root.mkdir(parents=True)
    picture = Image.fromarray(np.random.RandomState(1).randint(0, 255, (24, 20)).astype(np.uint8))
    exif = picture.getexif()
    exif[0x010E] = exif[0x013B] = exif[0x8298] = TEXT  # description, artist, copyright
    texts = PngInfo()
    texts.add_text("Patient", TEXT)
    texts.add_text("Comment", TEXT, zip=True)
    texts.add_itxt("Title", f"{TEXT} ö", lang="de", tkey=TEXT)
    picture.save(root / f"{TEXT}.png", pnginfo=texts, exif=exif)
    picture.save(root / f"{TEXT}.tif", tiffinfo={270: TEXT, 305: TEXT, 315: TEXT, 316: TEXT, 33432: TEXT})
    picture.save(root / f"{TEXT}.jpg", exif=exif, comment=TEXT.encode())
    for name in (f"{TEXT}.png", f"{TEXT}.tif", f"{TEXT}.jpg"):
        data = (root / name).read_bytes()
        (root / f"cut_{name}").write_bytes(data[: len(data) * 2 // 3])
    (root / f"{TEXT}.txt").write_text(TEXT)


def planted(data: bytes) -> bool:
    """Whether a marker stands in some bytes: in any case, as UTF-16, or percent-encoded."""
    data = data.lower()
    forms = [word.encode(code) for word in (TEXT.lower(), NUMBER) for code in ("utf-8", "utf-16-le", "utf-16-be")]
    forms += ["".join(f"%{byte:02x}" for byte in word.encode()).encode() for word in (TEXT, TEXT.lower(), NUMBER)]
    return any(form in data for form in forms)


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and those that are compressed in it."""
    data = path.read_bytes()
    yield data
    yield from _inside(data)
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        yield repr((table.schema, table.schema.metadata, table.to_pylist())).encode()


def _inside(data: bytes) -> Iterator[bytes]:
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if data.startswith(b"\x89PNG"):
        yield from _png(data)
    if zipfile.is_zipfile(BytesIO(data)):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            for name in archive.namelist():
                yield archive.read(name)


def _png(data: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at + 8 : at + 8 + length]
        at += 12 + length
        for start in range(len(chunk)) if kind in (b"zTXt", b"iTXt", b"iCCP") else ():
            if chunk[start : start + 1] == b"\x78":
                try:
                    yield zlib.decompress(chunk[start:])
                except zlib.error:
                    continue
