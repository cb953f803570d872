"""Transfer syntaxes, codecs that are missing, and files that announce what they do not hold."""

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
from conftest import shared_data
from dicom_files import CT, NOWHERE, XRAY, at, enhanced, find, ramp, write
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medclr.errors import ScanError
from medclr.scans import dicom, dicom_syntax

UNCOMPRESSED = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def as_gdcm_writes(path: Path, syntax: UID) -> None:
    """Encode a file anew with GDCM, which shares no code with pydicom."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str.__str__(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def encoded(path: Path, stored: np.ndarray[Any, Any], syntax: UID, **elements: Any) -> Path:
    """A file of ``stored`` in a lossless syntax."""
    write(path, stored, syntax=syntax if syntax in UNCOMPRESSED else ExplicitVRLittleEndian, **elements)
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    elif syntax not in UNCOMPRESSED:
        as_gdcm_writes(path, syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    return path


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize(
    "syntax",
    [*UNCOMPRESSED, RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless],
    ids=lambda uid: uid.name.split(" Image")[0].split(" (Process")[0],
)
def test_hounsfield_units_are_exact_in_every_lossless_syntax(tmp_path: Path, syntax: UID, signed: bool) -> None:
    stored = np.random.RandomState(0).randint(0, 4096, (48, 64)).astype(np.uint16)
    if signed:
        stored = stored.astype(np.int16) - 2048
    path = encoded(tmp_path / "a", stored, syntax, BitsStored=12, **CT)
    scan = dicom.read([path])
    assert scan.voxels.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels[0], stored.astype(int) - 1024)
    assert dicom.read_header(path, path.read_bytes()) == dicom.read_header(path)
    with path.open("rb") as file:
        assert dicom.read_header(path, file) == dicom.read_header(path)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_one_volume_of_an_encapsulated_file(tmp_path: Path, syntax: UID) -> None:
    frames = [at(0, 0, 3 * (2 - i // 2)) | {"FrameContentSequence": {"StackID": str(i % 2)}} for i in range(6)]
    pixels = np.random.RandomState(0).randint(0, 4096, (6, 48, 64)).astype(np.uint16)
    path = enhanced(tmp_path / "a", frames, pixels)
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path)
    for volume, order in enumerate(([4, 2, 0], [5, 3, 1])):
        np.testing.assert_array_equal(dicom.read([path], volume=volume).voxels, pixels[order])


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit], ids=lambda uid: uid.name)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_what_another_decoder_makes_of_it(tmp_path: Path, syntax: UID, mode: str) -> None:
    x, y = np.meshgrid(np.arange(32), np.arange(24))
    image = np.stack([x * 8, y * 10, (x + y) * 4], -1).astype(np.uint8)
    image = image if mode == "RGB" else image[..., 0]
    elements = {**XRAY, "Modality": "OT", "PhotometricInterpretation": "YBR_FULL" if mode == "RGB" else "MONOCHROME2"}
    path = write(tmp_path / "a", image, **elements)
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=95, subsampling=0)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([jpeg.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    other = np.asarray(Image.open(jpeg)).astype(float)
    expected = other @ [0.299, 0.587, 0.114] if mode == "RGB" else other
    np.testing.assert_allclose(dicom.read([path]).voxels[0], expected, atol=2)
    np.testing.assert_allclose(expected, image @ [0.299, 0.587, 0.114] if mode == "RGB" else image, atol=8)


def test_jpeg_extended_of_12_bits_is_what_gdcm_reads() -> None:
    path = Path(get_testdata_file("JPGExtended.dcm", download=False))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    values = np.frombuffer(reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape"), np.uint16)
    scan = dicom.read([path])
    assert values.max() > 255
    np.testing.assert_array_equal(scan.voxels.ravel(), values)


@pytest.mark.parametrize(("name", "syntax"), [("HTJ2KLossless_08_RGB", HTJ2KLossless), ("HTJ2K_08_RGB", HTJ2K)])
def test_high_throughput_jpeg_2000(name: str, syntax: UID) -> None:
    path = shared_data("dicom_zoo") / "pydicom_files" / f"{name}.dcm"
    dataset = pydicom.dcmread(path)
    assert dataset.file_meta.TransferSyntaxUID == syntax
    import openjpeg

    rgb = openjpeg.decode(b"".join(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)))
    np.testing.assert_allclose(dicom.read([path], "OT").voxels[0], rgb @ [0.299, 0.587, 0.114], rtol=1e-6)


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEGLosslessSV1, "python-gdcm"), (JPEGLSLossless, "pyjpegls"), (JPEG2000Lossless, "pylibjpeg-openjpeg"),
     (RLELossless, "pylibjpeg-rle")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_a_missing_codec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: UID, package: str) -> None:
    path = packed(tmp_path / "a", syntax)
    decoder = get_decoder(syntax)
    monkeypatch.setattr(decoder, "_available", {})
    _, ((_, reason),) = find(tmp_path)  # refused when found, not after a night of preparing
    assert reason.startswith(f"has pixels in {syntax.name}, which needs {package}, not installed here: pip install")
    with pytest.raises(ScanError, match=f"pip install {package}"):
        dicom.read([path])


def test_a_syntax_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    for name, syntax in (("video", MPEG2MPML), ("unheard", UID("1.2.3.4.5.6"))):
        path = encoded(tmp_path / name, ramp("uint8", 0, 99), RLELossless, **XRAY)
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path)
    reasons = {path.name: reason for path, reason in find(tmp_path)[1]}
    assert "MPEG2" in reasons["video"]
    assert reasons["unheard"] == "has pixels in an unknown Transfer Syntax, which medclr does not read"


# Files that lie


@contextmanager
def within_bounds() -> Iterator[None]:
    """At most 10 s of computing (others may load the machine), and at most 1 GB more than before."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def forged(path: Path, **elements: Any) -> Path:
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


PIXELS = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)


def native(path: Path, **elements: Any) -> Path:
    return forged(encoded(path, PIXELS, ExplicitVRLittleEndian, **CT), **elements)


def packed(path: Path, syntax: UID = JPEG2000Lossless, **elements: Any) -> Path:
    return forged(encoded(path, PIXELS, syntax, **CT), **elements)


def spliced(path: Path, element: bytes) -> Path:
    """A file with the bytes of an element before its pixels."""
    data = native(path).read_bytes()
    place = data.index(b"\xe0\x7f\x10\0OW")
    path.write_bytes(data[:place] + element + data[place:])
    return path


def deflated(path: Path, tail: bytes) -> Path:
    """A deflated file with more behind its pixels."""
    data = encoded(path, PIXELS, DeflatedExplicitVRLittleEndian, **CT).read_bytes()
    place = data.index(DeflatedExplicitVRLittleEndian.encode()) + len(DeflatedExplicitVRLittleEndian)
    body = zlib.decompressobj(-15).decompress(data[place:])
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(data[:place] + pack.compress(body + tail) + pack.flush())
    return path


def with_length(path: Path, length: int) -> Path:
    data = native(path).read_bytes()
    place = data.index(b"\xe0\x7f\x10\0OW") + 8
    path.write_bytes(data[:place] + struct.pack("<I", length) + data[place + 4 :])
    return path


def another_size(path: Path, syntax: UID) -> Path:
    """Every frame is a sound codestream of 48 x 64, and the header says 64 x 48."""
    return packed(path, syntax, Rows=64, Columns=48)


def flawed(path: Path, sound: bytes, flaw: bytes) -> Path:
    """A JPEG file in whose frame the first ``sound`` bytes are replaced."""
    (frame,) = generate_frames(pydicom.dcmread(packed(path, JPEGLosslessSV1)).PixelData, number_of_frames=1)
    assert sound in frame
    return forged(path, PixelData=encapsulate([frame.replace(sound, flaw, 1)]))


SEQUENCE = struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF)
ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
EMPTY_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)

LIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "size": (lambda p: native(p, Rows=65535, Columns=65535), "is cut short: 6144 of 8589672450 bytes of pixels"),
    "frames": (lambda p: native(p, NumberOfFrames=2**31 - 1), "is cut short"),
    "many frames": (lambda p: native(p, NumberOfFrames=2**63), "is cut short"),
    "negative frames": (lambda p: native(p, NumberOfFrames=-5, ImagePositionPatient=None), "cannot be put in space"),
    "bits": (lambda p: native(p, BitsStored=255), "stores 255 bits in 16"),
    "no bits": (lambda p: native(p, BitsAllocated=0), "Bits Allocated are absent"),
    "far away": (lambda p: native(p, ImagePositionPatient=["1e38", "1e38", "1e38"]), "beyond any scanner"),
    "stored bits": (lambda p: packed(p, JPEGLosslessSV1, BitsStored=1, HighBit=0), "more than the 1 Bits Stored"),
    "packed size": (lambda p: packed(p, Rows=65535, Columns=65535), "which no codec could have done"),
    "packed frames": (lambda p: packed(p, NumberOfFrames=2**31 - 1, Rows=1, Columns=1), "which no codec could"),
    "packed rows": (lambda p: packed(p, Rows=4096, Columns=4096), "holds a frame of rows 48, columns 64"),
    "packed, one frame of two": (lambda p: packed(p, NumberOfFrames=2, **NOWHERE, Modality="OT"), "1 of 2 frames"),
    "packed samples": (lambda p: packed(p, SamplesPerPixel=3, Modality="OT"), "and announces rows 48, columns 64"),
    **{
        f"another size, {syntax.name}": (
            lambda p, syntax=syntax: another_size(p, syntax), "holds a frame of rows 48, columns 64")
        for syntax in (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)
    },
    "no codestream": (lambda p: forged(packed(p), PixelData=encapsulate([b"GIF89a" * 50])), "holds a frame that is no"),
    **{  # GDCM would end the process at the first three
        f"flawed JPEG, {flaw.hex()}": (lambda p, sound=sound, flaw=flaw: flawed(p, sound, flaw), "is no sound JPEG")
        for sound, flaw in (
            (b"\xff\xc4", b"\x7f\xc4"),
            (b"\xff\xc4", b"\xff\xd4"),
            (b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10JFIF\0\2\0\0\0\1\0\1\0\0"),
            (b"\xff\xd9", b"\0\0"),
        )
    },
    "no fragments": (lambda p: forged(packed(p), PixelData=b"\xfe\xff\0\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"), ""),
    "rle": (lambda p: forged(packed(p, RLELossless), PixelData=encapsulate([b"\xff" * 64 + b"\x81\0" * 99])), ""),
    "length": (lambda p: with_length(p, 2**32 - 2), "is read"),
    "odd length": (lambda p: with_length(p, 7), "is cut short"),
    "long element": (lambda p: spliced(p, struct.pack("<HH2sHI", 0x29, 0x10, b"OB", 0, 2**32 - 2)), "holds no pixel"),
    "deep sequence": (lambda p: spliced(p, (SEQUENCE + ITEM) * 5000), "cannot be read as DICOM"),
    "endless sequence": (lambda p: spliced(p, SEQUENCE + EMPTY_ITEM * 200_000), "holds more elements than any scanner"),
    "endless elements": (lambda p: deflated(p, b"\0" * 60_000_000), "is read"),
    "deflate bomb": (lambda p: deflated(p, b"\0" * 150_000_000), "holds a deflated part that goes on behind"),
    "deflated and cut": (lambda p: p.write_bytes(deflated(p, b"").read_bytes()[:-9]) and p, "is cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_soon_and_in_little_memory(tmp_path: Path, name: str) -> None:
    make, reason = LIES[name]
    path = make(tmp_path / "a")
    try:
        with within_bounds():
            header = dicom.read_header(path)
            scan = dicom.read([path], header.modality or "OT")
    except ScanError as error:
        outcome = str(error)
    else:
        outcome = "is read"
        np.testing.assert_array_equal(scan.voxels[0], PIXELS - 1024.0)
    assert reason in outcome


def test_encapsulated_pixels_without_an_end_are_what_is_broken(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "a", ramp("uint16", 0, 4095))
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    path.write_bytes(path.read_bytes()[:-8])  # the sequence delimiter
    with pytest.raises(ScanError, match="is cut short or broken after its header"):
        dicom.read([path])
    assert not caplog.records, "pydicom would name the file, which may be a patient's name"


def test_a_panicking_codec_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyo3's PanicException derives from BaseException, and would end a night of preparing."""

    class PanicError(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Iterator[None]:
        raise PanicError("index out of bounds")
        yield

    path = packed(tmp_path / "a")
    monkeypatch.setattr(type(get_decoder(JPEG2000Lossless)), "iter_array", panic)
    with pytest.raises(ScanError, match="its pixels cannot be decoded"):
        dicom.read([path])
    monkeypatch.setattr(dicom_syntax, "decoder_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dicom.read([path])
