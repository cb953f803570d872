"""Sound scan files of every format, for mutants to be made of.

They are pydicom's installed test files (every transfer syntax but HTJ2K), a further folder of DICOM files if one is
given, and small enhanced DICOM, NIfTI, PNG, TIFF and JPEG files written here.
"""

import gzip
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset

LARGEST = 1_500_000  # bytes: larger files only slow the search


@dataclass(frozen=True)
class Original:
    """A sound file, or the two of a NIfTI pair; the first is the one that is opened."""

    name: str
    format: str
    files: tuple[tuple[str, bytes], ...]


_SYNTAXES = {
    "1.2.840.10008.1.2": "implicit little endian",
    "1.2.840.10008.1.2.1": "explicit little endian",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.2": "explicit big endian",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "HTJ2K",
    "1.2.840.10008.1.2.4.202": "HTJ2K",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
    "1.2.840.10008.1.2.5": "RLE",
}  # fmt: skip


@cache
def originals(zoo: Path | None = None) -> tuple[Original, ...]:
    """Every sound file that mutants are made of; ``zoo`` is a further folder of DICOM files."""
    folders = [Path(pydicom.__file__).parent / "data" / "test_files", *([zoo] if zoo else [])]
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.dcm")):
            if path.stat().st_size <= LARGEST:
                data = path.read_bytes()
                try:  # what is odd about some is the point of them
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        meta = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta
                    syntax = _SYNTAXES.get(meta.TransferSyntaxUID, "other")
                except Exception:
                    syntax = "other"
                found.append(Original(path.name, f"DICOM {syntax}", ((path.name, data),)))
    return (*found, *_enhanced(), *_niftis(), *_images())


def _enhanced() -> list[Original]:
    """A multi-frame MR with functional groups (PS3.3 C.7.6.16), in three encodings."""
    made = []
    for big, implicit, name in ((False, False, "explicit"), (True, False, "big-endian"), (False, True, "implicit")):
        source = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm"
        dataset = pydicom.dcmread(source)
        pixels = dataset.pixel_array.astype(">i2" if big else "<i2").tobytes()
        frames = []
        for z in range(3):
            frame, position, orientation, measures = Dataset(), Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = [0, 0, 2 * z]
            orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            measures.PixelSpacing, measures.SliceThickness = [1, 1], 2
            frame.PlanePositionSequence, frame.PlaneOrientationSequence = [position], [orientation]
            frame.PixelMeasuresSequence = [measures]
            frames.append(frame)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
        dataset.NumberOfFrames, dataset.PerFrameFunctionalGroupsSequence = 3, frames
        dataset.PixelData = pixels * 3
        dataset["PixelData"].VR = "OW"
        dataset.file_meta.TransferSyntaxUID = (
            pydicom.uid.ExplicitVRBigEndian if big
            else pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        )  # fmt: skip
        buffer = io.BytesIO()
        plain = Dataset()
        plain.update(dataset)
        plain.file_meta = dataset.file_meta
        pydicom.dcmwrite(buffer, plain, implicit_vr=implicit, little_endian=not big, enforce_file_format=True)
        made.append(Original(f"enhanced {name}", "DICOM enhanced multi-frame", ((f"{name}.dcm", buffer.getvalue()),)))
    return made


def _niftis() -> list[Original]:
    rng = np.random.default_rng(0)
    grey = rng.integers(-1000, 1000, (12, 11, 9)).astype(np.int16)
    affine = np.diag([1.0, 1.5, 3.0, 1.0])
    rgb = np.zeros((6, 5, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    scaled = nibabel.Nifti1Image(grey, affine)
    scaled.header.set_slope_inter(0.5, -3)
    images: list[tuple[str, Callable[[], nibabel.Nifti1Image]]] = [
        ("NIfTI-1", lambda: nibabel.Nifti1Image(grey, affine)),
        ("NIfTI-1", lambda: scaled),
        ("NIfTI-1", lambda: nibabel.Nifti1Image(grey.astype(np.float32), affine)),
        ("NIfTI-1", lambda: nibabel.Nifti1Image(grey.astype(">i2"), affine, nibabel.Nifti1Header(endianness=">"))),
        ("NIfTI-2", lambda: nibabel.Nifti2Image(grey.astype(np.float64), affine)),
        ("NIfTI 4D", lambda: nibabel.Nifti1Image(np.stack([grey] * 3, -1), affine)),
        ("NIfTI RGB", lambda: nibabel.Nifti1Image(rgb, affine)),
    ]
    made = []
    for i, (form, image) in enumerate(images):
        data = image().to_bytes()
        name = f"{form} {i}"
        made.append(Original(name, f"{form} .nii", (("volume.nii", data),)))
        made.append(Original(f"{name} gz", f"{form} .nii.gz", (("volume.nii.gz", gzip.compress(data, mtime=0)),)))
    pair = nibabel.Nifti1Pair(grey, affine)
    holders = nibabel.Nifti1Pair.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    pair.to_file_map(holders)
    halves = tuple(holders[half].fileobj.getvalue() for half in ("header", "image"))
    made.append(Original("NIfTI pair", "NIfTI pair", (("volume.hdr", halves[0]), ("volume.img", halves[1]))))
    zipped = tuple(gzip.compress(half, mtime=0) for half in halves)
    made.append(Original("NIfTI pair gz", "NIfTI pair", (("volume.hdr.gz", zipped[0]), ("volume.img.gz", zipped[1]))))
    return made


def _images() -> list[Original]:
    rng = np.random.default_rng(1)
    grey8, colour = rng.integers(0, 256, (23, 31), np.uint8), rng.integers(0, 256, (23, 31, 3), np.uint8)
    grey16 = rng.integers(0, 65536, (23, 31), np.uint16)
    kinds = {"8": grey8, "16": grey16, "colour": colour, "alpha": np.dstack([colour, grey8])}
    made = []
    for form, names, options in (
        ("PNG", ("8", "16", "colour", "alpha"), ({},)),
        ("TIFF", ("8", "16", "colour", "alpha"), ({}, {"compression": "tiff_lzw"})),
        ("TIFF", ("8", "16", "colour", "alpha"), ({"compression": "tiff_adobe_deflate"},)),
        ("TIFF", ("8", "colour"), ({"compression": "jpeg"},)),
        ("TIFF", ("8", "16"), ({"save_all": True, "append": True},)),
        ("JPEG", ("8", "colour"), ({}, {"progressive": True})),
    ):  # fmt: skip
        for name in names:
            for option in options:
                image, buffer = Image.fromarray(kinds[name]), io.BytesIO()
                more = {"append_images": [image, image]} if option.get("append") else {}
                image.save(buffer, form, **{k: v for k, v in option.items() if k != "append"}, **more)
                words = " ".join(str(value) for value in option.values())
                made.append(Original(f"{form} {name} {words}", form, ((f"picture.{form.lower()}", buffer.getvalue()),)))
    palette = io.BytesIO()
    Image.fromarray(grey8 // 64).convert("P").save(palette, "PNG")
    return [*made, Original("PNG palette", "PNG", (("picture.png", palette.getvalue()),))]
