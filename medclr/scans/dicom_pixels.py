"""Stored pixels -> physical values, as the scanner meant them (PS3.3 C.7.6.3, C.11.1).

What cannot be read with certainty is refused.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from medclr.errors import ScanError
from medclr.scans.dicom_header import Header, read_whole
from medclr.scans.dicom_syntax import decoded
from medclr.scans.dicom_values import functional, unheard
from medclr.scans.modality import MODALITIES, Modality, Window

# Recommendation ITU-R BT.601, as in YBR_FULL (PS3.3 C.7.6.3.1.2).
_LUMINANCE = np.array([0.299, 0.587, 0.114])

# Grey levels of these are measurements, whichever end is shown white: MONOCHROME1 does not turn them round.
_MEASURED = {"CT", "PT", "NM"}

Physical = tuple[NDArray[np.float32], Window | None]


def physical(dataset: Dataset, header: Header, row: Modality, frames: Sequence[int]) -> Iterator[Physical]:
    """Values [H,W] and window of some frames, which rise, of one file.

    Raises:
        ScanError: the pixels are damaged, or cannot be read with certainty.
    """
    try:
        if header.tiles:
            ((values, window),) = _images(dataset, row, [0])
            side = header.tiles
            tiles = values.reshape(side, header.rows, side, header.columns).transpose(0, 2, 1, 3)
            values = tiles.reshape(side**2, header.rows, header.columns)  # [tiles,H,W]
            yield from ((values[frame], window) for frame in frames)
            return
        for values, window in _images(dataset, row, frames):
            if values.shape != (header.rows, header.columns):
                raise ScanError(f"decodes to {list(values.shape)} and announces {[header.rows, header.columns]}")
            yield values, window
    except ScanError:
        raise
    except RuntimeError as error:  # of a codec, in its words
        raise ScanError(f"its pixels cannot be decoded ({' '.join(str(error).split())[:200]})") from error
    except Exception as error:  # may quote what stands in the file
        raise ScanError(f"its pixels cannot be decoded ({type(error).__name__})") from error


def fingerprint(path: Path) -> str:
    """A hash of the values of all its frames; raises as ``physical`` and ``read_header``."""
    with unheard():
        dataset, header = read_whole(path)
        digest = hashlib.sha256()
        for values, _ in physical(dataset, header, MODALITIES[header.modality or "OT"], range(header.frames)):
            digest.update(values.tobytes())
    return digest.hexdigest()


def _images(dataset: Dataset, row: Modality, frames: Sequence[int]) -> Iterator[Physical]:
    """Frames as they are encoded."""
    for frame, (stored, colour) in zip(frames, decoded(dataset, frames), strict=True):
        if colour in ("PALETTE COLOR", "RGB", "YBR_ICT", "YBR_RCT"):
            if stored.max() >> int(dataset.BitsStored):
                raise ScanError(f"holds colours of more than the {dataset.BitsStored} Bits Stored")
            rgb = apply_color_lut(stored, dataset) if colour == "PALETTE COLOR" else stored
            yield (rgb[..., :3] @ _LUMINANCE).astype(np.float32), None
        elif colour in ("MONOCHROME1", "MONOCHROME2"):
            yield _grey(stored, dataset, frame, row, turned=colour == "MONOCHROME1" and row.name not in _MEASURED)
        else:
            raise ScanError("has a Photometric Interpretation that medclr does not read")


def _grey(stored: NDArray[Any], dataset: Dataset, frame: int, row: Modality, turned: bool) -> Physical:
    """Stored [H,W] -> physical [H,W]: unused bits off, modality LUT, MONOCHROME1, padding."""
    padding = _padding(dataset, stored.dtype)
    padded = None if padding is None else (stored >= padding[0]) & (stored <= padding[1])
    low = high = 0
    if stored.dtype.kind in "iu":
        low, high = _representable(stored.dtype, int(dataset.BitsStored))
        stored = _used_bits(stored, dataset, padded)
    elif turned:
        raise ScanError("is MONOCHROME1 with floating-point pixels, which have no highest value to turn round")

    is_air = padding is not None
    if dataset.get("ModalityLUTSequence"):
        lut = dataset.ModalityLUTSequence[0]
        values = _looked_up(stored, lut, "<u2" if dataset.original_encoding[1] else ">u2")
        ends = 0.0, 2.0 ** int(lut.LUTDescriptor[2]) - 1
    else:
        slope, intercept = _rescale(dataset, frame)
        if slope == 1 and intercept.is_integer():  # exact: float32 holds the integers of 24 bits
            values = stored.astype(np.float32)
            values += np.float32(intercept)
        else:
            values = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
        ends = low * slope + intercept, high * slope + intercept
        if padding is not None and row.scaling == "window":
            # A padding value that is also a tissue's Hounsfield unit cannot be told from the tissue: leave it.
            is_air = not -900 < padding[1] * slope + intercept <= 3071
    window = _window(dataset, frame)
    if turned:
        values = np.float32(sum(ends)) - values
        window = window and Window(window.name, sum(ends) - window.center, window.width)
    if padded is not None and is_air:
        values[padded] = values.min() if row.air is None else row.air
    return values, window


def _looked_up(stored: NDArray[Any], lut: Dataset, word: str) -> NDArray[np.float32]:
    """Stored [H,W] through a Modality LUT (PS3.3 C.11.1.1), of any number of bits: pydicom knows only 8 and 16."""
    entries, first = int(lut.LUTDescriptor[0]) or 2**16, int(lut.LUTDescriptor[1])
    data = lut.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else word)
    table = np.atleast_1d(data)[:entries].astype(np.float32)
    if len(table) < entries:
        raise ScanError(f"has a Modality LUT of {len(table)} values and announces {entries}")
    return table[np.clip(stored.astype(np.int64) - first, 0, entries - 1)]


def _rescale(dataset: Dataset, frame: int) -> tuple[float, float]:
    """Rescale Slope and Intercept of one frame (PS3.3 C.11.1.1.2, C.7.6.16.2.9); (1, 0) if there are none."""
    holder = functional(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope, intercept = holder.get("RescaleSlope"), holder.get("RescaleIntercept")
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ScanError("has a Rescale Slope of zero, or one that is no number")
    return slope, intercept


def _window(dataset: Dataset, frame: int) -> Window | None:
    """The first window of a frame (PS3.3 C.11.2.1.2), or the range that its first VOI LUT maps (C.11.2.1.1)."""
    holder = functional(dataset, frame, "FrameVOILUTSequence") or dataset
    center, width = (np.atleast_1d(holder.get(name) or []) for name in ("WindowCenter", "WindowWidth"))
    if len(center) and len(width) and np.isfinite([center[0], width[0]]).all() and width[0] > 0:
        return Window("file", float(center[0]), float(width[0]))
    if holder.get("VOILUTSequence"):
        entries, first, _ = holder.VOILUTSequence[0].LUTDescriptor
        entries = entries or 2**16  # PS3.3 C.11.2.1.1: 0 means 65536
        return Window("file", first + entries / 2, float(entries))
    return None


def _representable(dtype: np.dtype[Any], bits: int) -> tuple[int, int]:
    """Lowest and highest value of ``bits`` Bits Stored (PS3.3 C.7.6.3.1.4, PixelRepresentation)."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)


def _padding(dataset: Dataset, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Lowest and highest stored value that mean: nothing was measured here (PS3.3 C.7.5.1.1.2)."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if not isinstance(ends[0], int) or dtype.kind not in "iu":
        return None
    span = 2 ** (8 * dtype.itemsize)
    sign = span // 2 if dtype.kind == "i" else 0
    # Its VR (US or SS) is often the wrong one of the two; the bits are right.
    values = [(end + sign) % span - sign for end in ends if isinstance(end, int)]
    return min(values), max(values)


def _used_bits(stored: NDArray[Any], dataset: Dataset, padded: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Sign-extend from Bits Stored, drop overlays in the bits above (PS3.5 8.1.1); ``padded`` is widened in place."""
    bits = int(dataset.BitsStored)
    low, high = _representable(stored.dtype, bits)
    if int(dataset.get("HighBit", bits - 1)) != bits - 1:
        raise ScanError(
            f"has High Bit {dataset.HighBit} with {bits} Bits Stored, an alignment that medclr does not read"
        )
    if stored.min() >= low and stored.max() <= high:
        return stored
    spare = 8 * stored.dtype.itemsize - bits
    used: NDArray[Any] = (stored << spare) >> spare  # an arithmetic shift where signed
    if not any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in range(0x6000, 0x6020, 2)):
        stray = used != stored
        if stored.dtype.kind == "i":
            stray &= (stored >> bits) != 0  # clear above the sign bit: merely not extended
        if padded is not None:
            stray &= ~padded
        if stray.any():
            raise ScanError(f"holds pixels of more than the {bits} Bits Stored, and no overlay that would explain them")
    padding = _padding(dataset, stored.dtype)
    if padded is not None and padding is not None and padding[0] >= low:
        padded |= (used >= padding[0]) & (used <= padding[1])
    return used
