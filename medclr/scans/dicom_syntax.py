"""Transfer syntaxes (PS3.5 chapter 10): which codec a file needs, and whether what it announces fits what it holds.

Headers lie, by accident or by intent. Nothing is allocated or decoded for a size that a file only claims to have.
"""

import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, BinaryIO, cast

from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    HTJ2K,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from medclr.errors import ScanError
from medclr.scans.dicom_values import integer, text

_JPEG2000 = {*JPEG2000TransferSyntaxes, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL}

# What decodes it, where several could: pydicom's name, and the package. All are dependencies of medclr. GDCM also knows
# JPEG-LS and JPEG 2000, but a damaged frame makes it end the process.
_CODECS = {
    **dict.fromkeys(JPEGTransferSyntaxes, ("gdcm", "python-gdcm")),
    **dict.fromkeys(JPEGLSTransferSyntaxes, ("pyjpegls", "pyjpegls")),
    **dict.fromkeys(_JPEG2000, ("pylibjpeg", "pylibjpeg-openjpeg")),
    RLELossless: ("pylibjpeg", "pylibjpeg-rle"),
}

_MOST_PIXELS = 2**27  # in a frame: 11585 x 11585, beyond any detector
_MOST_EXPANSION = 1024  # of encapsulated pixels, beyond the first 64 MiB, which a blank frame may well be
_MOST_INFLATION = 64  # of a whole file, likewise
_MOST_FRAMES = 2**17
_FEW_BYTES = 2**20
_FEW_STEPS = 150_000
_FREE_BYTES = 64 * 2**20


def inflated(file: BinaryIO) -> BinaryIO:
    """The same file, or, if its Transfer Syntax is Deflated Explicit VR Little Endian, its contents inflated.

    pydicom would inflate without a limit, and a kilobyte can become a megabyte.

    Raises:
        ScanError: the deflated part is broken, cut short, or larger than any picture would make it.
    """
    uid = DeflatedExplicitVRLittleEndian.encode()
    head = file.read(4096)
    file.seek(0)
    if uid not in head:
        return file
    data = file.read()
    at = 132 if data[128:132] == b"DICM" else 0
    syntax = b""
    while data[at : at + 2] == b"\2\0":  # File Meta Information is explicit, little endian (PS3.10 7.1)
        start = at + (12 if data[at + 4 : at + 6] in (b"OB", b"UN") else 8)
        length = int.from_bytes(data[at + 8 : start] or data[at + 6 : at + 8], "little")
        if data[at + 2 : at + 4] == b"\x10\0":
            syntax = data[start : start + length]
        at = start + length
    if syntax.rstrip(b" \0") != uid:
        file.seek(0)
        return file
    inflate, most = zlib.decompressobj(-zlib.MAX_WBITS), _FREE_BYTES + _MOST_INFLATION * len(data)
    try:
        body = inflate.decompress(data[at:], most)
    except zlib.error:
        raise ScanError("holds a deflated part that is broken") from None
    if not inflate.eof:
        if inflate.unconsumed_tail:
            raise ScanError(f"holds a deflated part that goes on behind {most >> 20} MiB")
        raise ScanError("is cut short: its deflated part has no end")
    plain = ExplicitVRLittleEndian.encode().ljust(len(uid), b"\0")
    return BytesIO(data[:at].replace(uid, plain) + body)


class _Bounded:
    """A binary file that is read in a bounded number of steps, each of which costs pydicom several microseconds."""

    def __init__(self, file: BinaryIO, steps: int) -> None:
        self._file = file
        self._steps = steps
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._steps -= 1
        if self._steps < 0:
            raise ScanError("holds more elements than any scanner writes")
        return self._file.read(size)


def bounded(file: BinaryIO) -> BinaryIO:
    """The same file; reading it ends with a ScanError if it is nothing but millions of elements or items."""
    size = file.seek(0, 2)
    file.seek(0)
    return file if size < _FEW_BYTES else cast(BinaryIO, _Bounded(file, max(_FEW_STEPS, size // 128)))


def syntax_of(dataset: Dataset) -> UID:
    """Its Transfer Syntax; where a file without File Meta Information names none, the one it was read with."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax:
        return UID(syntax)
    implicit, little = dataset.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def decoder_of(syntax: UID) -> Decoder:
    """What decodes pixels of a Transfer Syntax.

    Raises:
        ScanError: nothing does, or the package that would is not installed.
    """
    known = syntax.name if syntax.name != syntax else "an unknown Transfer Syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ScanError(f"has pixels in {known}, which medclr does not read") from None
    if not decoder.is_available:
        _, package = _CODECS[syntax]
        raise ScanError(f"has pixels in {known}, which needs {package}, not installed here: pip install {package}")
    return decoder


def check_held(dataset: Dataset, held: int) -> None:
    """Refuse a file whose ``held`` bytes of pixels cannot be what it announces.

    Raises:
        ScanError: it ends before its pixels do, announces more than any codec could have packed into them, or needs
            a codec that is not there.
    """
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    frames = max(integer(dataset, "NumberOfFrames"), 1)
    bits = rows * columns * frames * (integer(dataset, "SamplesPerPixel") or 1) * integer(dataset, "BitsAllocated")
    if text(dataset, "PhotometricInterpretation") == "YBR_FULL_422":
        bits = bits * 2 // 3
    announced = -(-bits // 8)
    syntax = syntax_of(dataset)
    decoder_of(syntax)
    if not syntax.is_encapsulated:
        if held < announced:
            raise ScanError(f"is cut short: {held} of {announced} bytes of pixels")
    elif held < 8 * frames or announced > _FREE_BYTES + _MOST_EXPANSION * held:  # an item's tag and length are 8 bytes
        raise ScanError(f"announces {announced} bytes of pixels and holds {held}, which no codec could have done")
    if rows * columns > _MOST_PIXELS or frames > _MOST_FRAMES:
        raise ScanError(f"announces {frames} frames of {rows} x {columns} pixels, more than medclr reads")


def decoded(dataset: Dataset, frames: Sequence[int]) -> Iterator[tuple[NDArray[Any], str]]:
    """Stored pixels, [H,W] or [H,W,3], and Photometric Interpretation of some frames; YBR is RGB by then.

    Raises:
        ScanError: the frames are not what the file announces, or a codec panicked; whatever else codecs raise.
    """
    syntax = syntax_of(dataset)
    bits = _check_frames(dataset, syntax) if syntax.is_encapsulated else 0
    # GDCM ends the process where Bits Stored is not what it expects; what it means is seen to later.
    options = {"bits_stored": 8 if dataset.BitsAllocated == 8 else bits} if syntax in JPEGTransferSyntaxes else {}
    if syntax == JPEGExtended12Bit and bits > 8:
        # pydicom keeps such frames from GDCM, which reads from each what it is and decodes them well.
        syntax = dataset.file_meta.TransferSyntaxUID = JPEGLossless
    decoder = decoder_of(syntax)
    plugin, _ = _CODECS.get(syntax, ("", ""))
    if plugin not in decoder.available_plugins:
        plugin = ""  # any
    try:
        # Without indices pydicom 3.0 hands out read-only frames to itself, and cannot correct the sign of JPEG-LS.
        for stored, description in decoder.iter_array(
            dataset, indices=list(frames), decoding_plugin=plugin, correct_unused_bits=False, **options
        ):
            yield stored, str(description["photometric_interpretation"])
    except (Exception, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the panic of a codec written in Rust is no Exception
        raise ScanError(f"its pixels cannot be decoded ({type(error).__name__})") from error


def _check_frames(dataset: Dataset, syntax: UID) -> int:
    """Refuse encapsulated frames whose own headers announce another size than the file's; bits of a sample, or 0.

    Codecs believe these headers: they allocate what they are told, and some end the process where the two differ.
    """
    frames = max(integer(dataset, "NumberOfFrames"), 1)
    announced = integer(dataset, "Rows"), integer(dataset, "Columns"), integer(dataset, "SamplesPerPixel") or 1
    offsets, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    extended = (offsets, lengths) if offsets and lengths else None
    held, precision = 0, set()
    for encoded in generate_frames(dataset.PixelData, number_of_frames=frames, extended_offsets=extended):
        held += 1
        if syntax == RLELossless:
            continue
        own = _j2k_size(encoded) if syntax in _JPEG2000 else _jpeg_size(encoded)
        if own is None:
            raise ScanError(f"holds a frame that is no sound {syntax.name}, or is cut short")
        *size, bits = own
        precision.add(bits)
        if tuple(size) != announced or len(precision) > 1 or bits > integer(dataset, "BitsAllocated"):
            holds, says = ("rows {}, columns {}, samples {}".format(*of) for of in (size, announced))
            raise ScanError(f"holds a frame of {holds} ({bits} bits) and announces {says}")
    if held < frames:
        raise ScanError(f"is cut short: {held} of {frames} frames")
    return max(precision, default=0)


def _jpeg_size(data: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, components and bits of a JPEG or JPEG-LS codestream (ITU-T T.81 B.2.2, T.87 C.2.2).

    None unless all of its header, up to the first scan, is sound, and it has an end: at whatever libjpeg would merely
    warn of there, GDCM ends the process, and CharLS searches for an end at length.
    """
    size, transform = None, 0
    at = 2
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        segment = data[at + 4 : at + 2 + length]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if len(segment) != length - 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # these have no segment: not here
            return None
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = (int.from_bytes(segment[i : i + 2]) for i in (1, 3))
            size = (rows, columns, segment[5], segment[0]) if length > 7 else None
        elif marker == 0xE0 and segment[:5] == b"JFIF\0" and segment[5:6] != b"\1":  # of a version that is not known
            return None
        elif marker == 0xEE and segment[:5] == b"Adobe" and length > 13:
            transform = segment[11]  # of three components 0: none, or 1: YCbCr
        elif marker == 0xDA:
            is_sound = size and (size[2] != 3 or transform <= 1) and data.find(b"\xff\xd9", at) > 0
            return size if is_sound else None
        at += 2 + length
    return None


def _j2k_size(data: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, components and bits of a JPEG 2000 codestream (ITU-T T.800 A.5.1), also inside a JP2 file."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(data) < at + 43:
        return None
    width, height, left, top = (int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i]) for i in range(4))
    return height - top, width - left, int.from_bytes(data[at + 40 : at + 42]), (data[at + 42] & 0x7F) + 1
