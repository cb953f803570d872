"""Scan files with one to three things wrong in them, each the same for the same seed and number.

A compressed file is mutated now in its compressed bytes, now in what they hold.
"""

import gzip
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tests.originals import Original

Random = np.random.Generator
T = TypeVar("T")

# What breaks readers that trust a number: zero, the ends of each width, and around powers of two.
NUMBERS = (
    0, 1, 2, 3, 255, 256, 32767, 32768, 65534, 65535, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**62, 2**63, -1, -2,
    -32768, -(2**31),
)  # fmt: skip
TEXTS = (
    "", "-1", "0", "65535", "2147483647", "4294967295", "1e400", "nan", "inf", "1E-300", "-0", "1\\2", "1\\2\\3\\4",
    "0\\0\\0", "nan\\nan\\nan", "1e38\\1e38\\1e38", "0\\0\\0\\0\\0\\0", "1\\0\\0\\1\\0\\0", "x", "\u00e4" * 70,
    "9" * 300,
)  # fmt: skip

BOMB_MB = 4096
LARGEST_MUTANT = 2**26  # bytes: what takes long to write says nothing of who reads it

# Numbers and words on which a DICOM reader depends.
_TOLD = (
    "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
    "PixelRepresentation", "PlanarConfiguration", "PhotometricInterpretation", "Modality", "SOPClassUID", "ImageType",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "WindowCenter", "WindowWidth",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "ExtendedOffsetTable", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "ModalityLUTSequence",
    "PixelData", "FloatPixelData", "SpecificCharacterSet", "PatientID", "TransferSyntaxUID",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged copy, and how it was made."""

    number: int
    format: str
    recipe: str
    files: tuple[tuple[str, bytes], ...]


def format_of(originals: Sequence[Original], number: int) -> str:
    """The format of the mutant of that number."""
    formats = sorted({original.format for original in originals})
    return formats[number % len(formats)]


def mutant(originals: Sequence[Original], seed: int, number: int) -> Mutant:
    """The mutant of that number; a format is drawn first, so that those with few originals come as often."""
    rng = np.random.default_rng([seed, number])
    form = format_of(originals, number)
    original = _one(rng, [original for original in originals if original.format == form])
    which = int(rng.integers(len(original.files)))
    name, data = original.files[which]
    steps = []
    with warnings.catch_warnings():  # pydicom's, as it meets what an earlier step has done
        warnings.simplefilter("ignore")
        for _ in range(int(rng.integers(1, 4))):
            changed, step = _mutated(rng, data)
            if len(changed) <= LARGEST_MUTANT:
                data = changed
                steps.append(step)
    files = tuple((name, data) if i == which else file for i, file in enumerate(original.files))
    return Mutant(number, form, f"{original.name}: {'; '.join(steps)}", files)


def _mutated(rng: Random, data: bytes) -> tuple[bytes, str]:
    """One step: half of the time one that knows the format, if it applies, else one on plain bytes."""
    if rng.random() < 0.7:
        for is_its, inside in (
            (_is_gzip, _gzip), (_is_dicom, _dicom), (_is_nifti, _nifti), (_is_png, _png), (_is_tiff, _tiff),
            (_is_jpeg, _jpeg),
        ):  # fmt: skip
            if is_its(data):
                try:
                    return inside(rng, data)
                except Exception:  # too damaged by an earlier step
                    break
    return _one(rng, _PLAIN)(rng, data)


def _one(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _place(rng: Random, data: bytes) -> int:
    """An offset, more often near the start, where headers are."""
    end = min(len(data), int(_one(rng, (64, 512, 4096, 2**40))))
    return int(rng.integers(max(end, 1)))


# On plain bytes


def _truncate(rng: Random, data: bytes) -> tuple[bytes, str]:
    end = int(rng.integers(len(data) + 1))
    return data[:end], f"cut at {end}"


def _flip(rng: Random, data: bytes) -> tuple[bytes, str]:
    changed = bytearray(data)
    places = [_place(rng, data) for _ in range(int(rng.integers(1, 9)))]
    for at in places:
        if at < len(changed):
            changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed), f"bits flipped at {places}"


def _overwrite(rng: Random, data: bytes) -> tuple[bytes, str]:
    at, length = _place(rng, data), int(2 ** rng.integers(0, 13))
    filling = _one(rng, (b"\0" * length, b"\xff" * length, rng.bytes(length)))[: max(len(data) - at, 0)]
    return data[:at] + filling + data[at + len(filling) :], f"{len(filling)} bytes overwritten at {at}"


def _forge(rng: Random, data: bytes) -> tuple[bytes, str]:
    at, number, form = _place(rng, data), _one(rng, NUMBERS), _one(rng, ("<H", ">H", "<I", ">I", "<Q"))
    width = struct.calcsize(form)
    value = struct.pack(form, number % 2 ** (8 * width))
    return data[:at] + value + data[at + width :], f"{number} as {form} at {at}"


def _remove(rng: Random, data: bytes) -> tuple[bytes, str]:
    at, length = _place(rng, data), int(2 ** rng.integers(0, 11))
    return data[:at] + data[at + length :], f"{length} bytes removed at {at}"


def _repeat(rng: Random, data: bytes) -> tuple[bytes, str]:
    at, length, times = _place(rng, data), int(2 ** rng.integers(0, 11)), int(2 ** rng.integers(0, 7))
    return data[:at] + data[at : at + length] * times + data[at:], f"{length} bytes at {at} repeated {times} times"


_PLAIN = (_truncate, _flip, _overwrite, _forge, _remove, _repeat)

# Knowing the format


def _is_gzip(data: bytes) -> bool:
    return data[:2] == b"\x1f\x8b"


def _gzip(rng: Random, data: bytes) -> tuple[bytes, str]:
    inner, step = _mutated(rng, _inflated(data, 31))
    if rng.random() < 0.1:
        check = struct.pack("<II", zlib.crc32(inner), len(inner))
        return data[:10] + _bomb(inner) + check, f"inside gzip: {step}; {BOMB_MB} MB of zeros behind it"
    return gzip.compress(inner, 1, mtime=0), f"inside gzip: {step}"


def _inflated(data: bytes, wbits: int) -> bytes:
    """What is in a stream that is no bomb yet."""
    inflater = zlib.decompressobj(wbits)
    inner = inflater.decompress(data, 2**25)
    if inflater.unconsumed_tail:
        raise ValueError("a bomb")
    return inner


def _bomb(data: bytes) -> bytes:
    """``data`` and then zeros, deflated (RFC 1951): a fully flushed block can be repeated as it is."""
    first, more = zlib.compressobj(1, wbits=-15), zlib.compressobj(9, wbits=-15)
    block = more.compress(bytes(2**23)) + more.flush(zlib.Z_FULL_FLUSH)
    start = first.compress(data) + first.flush(zlib.Z_FULL_FLUSH)
    return start + block * (BOMB_MB // 8) + first.flush()


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def _dicom(rng: Random, data: bytes) -> tuple[bytes, str]:
    if DeflatedExplicitVRLittleEndian.encode() in data[:1024]:  # not asked of pydicom, which inflates a bomb
        start = _meta_end(data)
        inner, step = _one(rng, _PLAIN)(rng, _inflated(data[start:], -15))
        if rng.random() < 0.2:
            return data[:start] + _bomb(inner), f"deflated again: {step}; {BOMB_MB} MB of zeros behind it"
        return data[:start] + zlib.compress(inner, 1, wbits=-15), f"deflated again: {step}"
    return _one(rng, (_tell, _tell, _lengths, _reorder, _nest, _frame))(rng, data)


def _meta_end(data: bytes) -> int:
    """Where the dataset begins: behind File Meta Information, whose length is its first element (PS3.10 7.1)."""
    (length,) = struct.unpack_from("<I", data, 140)
    return 144 + int(length)


def _dataset(data: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data), force=True)


def _saved(dataset: Dataset, data: bytes) -> bytes:
    """The preamble and meta information as they were, then the dataset written anew in the same encoding."""
    buffer = DicomBytesIO()
    implicit, little = dataset.original_encoding
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, little
    write_dataset(buffer, dataset)
    return data[: _meta_end(data)] + buffer.getvalue()


def _tell(rng: Random, data: bytes) -> tuple[bytes, str]:
    """An element's value forged, emptied, or the element removed; also inside functional groups."""
    dataset = _dataset(data)
    words = [word for word in _TOLD if word in dataset]
    target, word = dataset, _one(rng, words or ["Rows"])
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) and rng.random() < 0.5:
        frame = _one(rng, groups)
        sequence = _one(rng, [element for element in frame if element.VR == "SQ" and element.value])
        target = sequence.value[0]
        word = _one(rng, [element.keyword for element in target if element.keyword])
    if rng.random() < 0.2:
        if word in target:
            del target[word]
        return _saved(dataset, data), f"{word} removed"
    element = target[word] if word in target else pydicom.DataElement(word, "US", 0)
    width = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FD": "d", "FL": "f"}.get(element.VR)
    _, little = dataset.original_encoding
    if width:
        numbers = [_one(rng, NUMBERS) for _ in range(max(element.VM, 1))]
        if width in "df":
            forged = [float(_one(rng, ("nan", "inf", "0", "-1", "1e300", "1e-300"))) for _ in numbers]
        else:
            bits = 8 * struct.calcsize(width)
            forged = [struct.unpack(f"<{width}", (n % 2**bits).to_bytes(bits // 8, "little"))[0] for n in numbers]
        if width == "f":
            forged = [float(np.clip(n, -3e38, 3e38)) for n in forged]
        value = b"".join(struct.pack(("<" if little else ">") + width, n) for n in forged)
        told: object = forged
    elif element.VR == "SQ":
        value, told = b"", "no items"
    elif word.endswith(("Data", "Table")):
        size = _one(rng, (0, 1, 2, 7, 1000))
        value, told = rng.bytes(size), f"{size} bytes"
    else:
        told = _one(rng, TEXTS)
        value = str(told).encode("latin-1")
        value += b" " * (len(value) % 2)
    target[element.tag] = pydicom.dataelem.RawDataElement(
        element.tag, "OB" if element.VR == "SQ" else element.VR, len(value), value, 0, False, little
    )
    return _saved(dataset, data), f"{word} = {told}"


def _starts(data: bytes) -> list[int]:
    """Where the elements of the dataset begin."""
    starts = []
    for tag in (dataset := _dataset(data)).keys():  # noqa: SIM118
        element = dataset.get_item(tag)
        if (value := getattr(element, "value_tell", 0) or getattr(element, "file_tell", 0)) > 8:
            group = struct.pack("<HH", tag.group, tag.elem), struct.pack(">HH", tag.group, tag.elem)
            starts += [value - back for back in (8, 12) if data[value - back : value - back + 4] in group][:1]
    return sorted(starts)


def _lengths(rng: Random, data: bytes) -> tuple[bytes, str]:
    """The length of an element forged."""
    at = _one(rng, _starts(data)) + int(_one(rng, (4, 6, 8)))
    number, form = _one(rng, NUMBERS), _one(rng, ("<H", "<I"))
    value = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    return data[:at] + value + data[at + len(value) :], f"length {number} as {form} at {at}"


def _reorder(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Elements exchanged, or one of them given twice."""
    starts = _starts(data)
    bounds = [*starts, len(data)]
    parts = [data[a:b] for a, b in pairwise(bounds)]
    i, j = (int(n) for n in rng.integers(len(parts), size=2))
    if rng.random() < 0.5:
        parts[i], parts[j] = parts[j], parts[i]
        step = f"elements {i} and {j} exchanged"
    else:
        parts.insert(j, parts[i])
        step = f"element {i} again at {j}"
    return data[: starts[0]] + b"".join(parts), step


def _nest(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A sequence in a sequence in a sequence, of undefined length and never closed, before the first element."""
    depth = int(_one(rng, (10, 500, 5000, 50000)))
    implicit, little = _dataset(data).original_encoding
    order = "<" if little else ">"
    item = struct.pack(f"{order}HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    kind = b"" if implicit else b"SQ\0\0"
    level = struct.pack(f"{order}HH", 0x0008, 0x1140) + kind + struct.pack(f"{order}I", 0xFFFFFFFF) + item
    start = _starts(data)[0]
    return data[:start] + level * depth + data[start:], f"sequences nested {depth} deep"


_NIFTI = (
    "dim", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "xyzt_units", "qform_code",
    "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "sizeof_hdr",
)  # fmt: skip


def _frame(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes of the pixels damaged, most often where the header of an encapsulated frame is."""
    start = max(data.rfind(b"\xe0\x7f\x10\0"), data.rfind(b"\x7f\xe0\0\x10")) + 8
    end = min(len(data), start + _one(rng, (64, 256, 1024, 2**20)))
    inner, step = _one(rng, _PLAIN)(rng, data[start:end])
    return data[:start] + inner + data[end:], f"in the pixels at {start}: {step}"


def _is_nifti(data: bytes) -> bool:
    return data[344:347] in (b"n+1", b"ni1") or data[4:7] in (b"n+2", b"ni2")


def _nifti(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A field of the header forged."""
    kind = nibabel.Nifti2Header if data[4:6] in (b"n+", b"ni") else nibabel.Nifti1Header
    layout = kind.template_dtype
    name = _one(rng, _NIFTI)
    field, at = layout.fields[name][:2]
    item = field.base
    at += item.itemsize * int(rng.integers(field.itemsize // item.itemsize))
    if item.kind == "f":
        number: object = float(_one(rng, ("nan", "inf", "-inf", "0", "-1", "1e30", "1e-30", "3")))
        value = np.array([number], item).tobytes()
    else:
        number = _one(rng, (*NUMBERS, *range(2, 9), 16, 64, 128, 512, 1536, 2304))
        value = (number % 2 ** (8 * item.itemsize)).to_bytes(item.itemsize, "little")
    return data[:at] + value + data[at + len(value) :], f"{name} = {number} at {at}"


def _is_png(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n"


def _png(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A chunk forged, repeated or put elsewhere, with a checksum that fits."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    what = int(rng.integers(5))
    i = int(rng.integers(len(chunks)))
    if what < 2:
        width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
        fields = [width, height, *rest]
        field = int(rng.integers(7))
        fields[field] = _one(rng, NUMBERS) % (2**32 if field < 2 else 256)
        chunks[0] = chunks[0][0], struct.pack(">IIBBBBB", *fields)
        step = f"IHDR = {fields}"
    elif what == 2:
        times = int(2 ** rng.integers(0, 12))
        chunks[i:i] = [chunks[i]] * times
        step = f"chunk {i} repeated {times} times"
    elif what == 3:
        kind = _one(rng, (b"zTXt", b"iTXt", b"iCCP", b"IDAT"))
        body = (
            {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0", b"IDAT": b""}[kind]
            + b"\x78\xda"
            + _bomb(b"")
        )
        chunks.insert(1, (kind, body))
        step = f"{kind.decode()} that unpacks to {BOMB_MB} MB"
    else:
        chunk = chunks.pop(i)
        j = int(rng.integers(len(chunks) + 1))
        chunks.insert(j, chunk)
        step = f"chunk {i} moved to {j}"
    body = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks)
    return data[:8] + b"".join(body), step


def _is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*")


def _tiff(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Type, count or value of an entry of the first directory forged, or the next directory."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entry = start + 2 + 12 * int(rng.integers(count + 1))
    number = _one(rng, (*NUMBERS, start, 8))
    form, back = _one(rng, (("H", 2), ("I", 4), ("I", 8))) if entry < start + 2 + 12 * count else ("I", 0)
    value = struct.pack(order + form, number % 2 ** (8 * struct.calcsize(form)))
    at = entry + back
    return data[:at] + value + data[at + len(value) :], f"{number} as {form} at {at} of the directory at {start}"


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _jpeg(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Size, depth or components of the frame forged."""
    frame = next(at for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2") if (at := data.find(marker)) >= 0)
    at, form = _one(rng, ((4, ">B"), (5, ">H"), (7, ">H"), (9, ">B"), (2, ">H"), (11, ">B")))
    number = _one(rng, NUMBERS)
    value = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    return data[: frame + at] + value + data[frame + at + len(value) :], f"{number} as {form} at {at} of the frame"
