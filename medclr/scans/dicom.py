"""DICOM -> Scan: pixels as the scanner meant them (PS3.3 C.7.6.3, C.11.1).

``dicom_header.py`` says what a file is, ``dicom_series.py`` which files make a scan and where their slices lie. Here
they are decoded, brought to physical units, and stacked. What cannot be read with certainty is refused.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medclr.errors import ScanError
from medclr.scans.dicom_header import Header, functional, header_of, read_header
from medclr.scans.dicom_series import find, grid
from medclr.scans.modality import MODALITIES, Modality
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Scan

__all__ = ["Header", "find", "is_dicom", "read", "read_header"]

_VRS = (b"UL", b"UI", b"CS", b"OB", b"SH", b"DA", b"TM", b"LO", b"US", b"ST", b"PN", b"SQ", b"DT", b"AE", b"UN")

# Recommendation ITU-R BT.601, as in YBR_FULL (PS3.3 C.7.6.3.1.2).
_LUMINANCE = np.array([0.299, 0.587, 0.114])

# Grey levels of these are measurements, whichever end is shown white: MONOCHROME1 does not turn them round.
_MEASURED = {"CT", "PT", "NM"}


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (132 bytes or more) looks like DICOM, also without its preamble."""
    if head[128:132] == b"DICM":
        return True
    for order in ("little", "big"):
        group, element = (int.from_bytes(head[i : i + 2], order) for i in (0, 2))
        if group in (0x0002, 0x0008) and element <= 0x0060 and len(head) >= 8:
            implicit = order == "little" and int.from_bytes(head[4:8], "little") <= 64
            if head[4:6] in _VRS or implicit:
                return True
    return False


def read(
    files: Sequence[Path],
    modality: str | None = None,
    *,
    volume: int = 0,
    plane: Plane | None = None,
    policy: Policy = DEFAULT,
) -> Scan:
    """Decode the files of one scan, in any order.

    Args:
        files: the slices of one volume, or one image or multi-frame file, as ``find`` gives them.
        modality: a key of MODALITIES; only needed where the files do not say.

    Returns:
        voxels [D,H,W]: rows and columns as stored, slices along the normal; after the modality LUT, so CT is in exact
        Hounsfield units. MONOCHROME1 is turned round (x -> lowest + highest representable value - x), but not where
        grey levels are measurements (CT, PT, NM). Colour becomes luminance. Padding becomes the modality's air.

    Raises:
        ScanError: the files are not exactly one scan, or their pixels cannot be read with certainty.
    """
    files = [Path(file) for file in files]
    if not files:
        raise ScanError("no DICOM files were given")
    with warnings.catch_warnings():  # what pydicom warns of is either harmless or checked below
        warnings.simplefilter("ignore")
        datasets: list[Dataset | None] = []
        headers: list[Header] = []
        for file in files:
            dataset, header = _open(file)
            datasets.append(dataset)
            headers.append(header)
        found, rejects = find(headers)
        if rejects:
            raise ScanError(f"{rejects[0][0]}: {rejects[0][1]}")
        if len(found) != 1:
            raise ScanError(f"{files[0]}: the {len(files)} files hold {len(found)} scans; give those of one")
        row = _modality(files[0], found[0].modality, modality)
        place = grid(headers)

        voxels = np.empty(found[0].shape, dtype=np.float32)  # [D,H,W]
        slot = np.argsort(place.order)  # slice as given -> place along the normal
        start = 0
        for i, (file, header) in enumerate(zip(files, headers, strict=True)):
            dataset, datasets[i] = datasets[i], None  # memory holds the files still to come, not all of them
            try:
                voxels[slot[start : start + header.frames]] = _physical(dataset, header, row)
            except ScanError as error:
                raise ScanError(f"{file}: {error}") from error
            except Exception as error:  # each codec has its own
                reason = " ".join(str(error).split())[:200]
                raise ScanError(f"{file}: its pixels cannot be decoded ({type(error).__name__}: {reason})") from error
            start += header.frames
    try:
        return Scan(voxels, place.affine, place.spacing_mm, row.name, source_shape=voxels.shape)
    except ScanError as error:
        raise ScanError(f"{files[0]}: {error}") from error


def _open(file: Path) -> tuple[Dataset, Header]:
    try:
        try:
            dataset = dcmread(file, force=True)
            return dataset, header_of(file, dataset)
        except Exception as error:  # whatever pydicom makes of broken bytes
            read_header(file)  # has the better reason, unless the break lies in or behind the pixels
            raise ScanError("is cut short or broken after its header") from error
    except ScanError as error:
        raise ScanError(f"{file}: {error}") from error


def _modality(file: Path, recorded: str | None, given: str | None) -> Modality:
    if given and recorded and given != recorded:
        raise ScanError(f"{file}: was announced as {given} and says that it is {recorded}")
    name = given or recorded
    if name is None:
        raise ScanError(f"{file}: does not say its modality; give one of {', '.join(MODALITIES)}")
    if name not in MODALITIES:
        raise ScanError(f"{file}: modality {name!r} is unknown; give one of {', '.join(MODALITIES)}")
    return MODALITIES[name]


def _physical(dataset: Dataset, header: Header, row: Modality) -> NDArray[np.float32]:
    """[F,H,W] in physical units: the slices of one file."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:  # a file without its preamble
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    stored, description = get_decoder(syntax).as_array(dataset, correct_unused_bits=False)
    stored = stored.reshape(-1, *stored.shape[-3 if header.samples > 1 else -2 :])  # [F,H,W] or [F,H,W,3]
    colour = str(description["photometric_interpretation"])  # YBR is RGB by now
    values: NDArray[np.float32]
    if colour in ("PALETTE COLOR", "RGB", "YBR_ICT", "YBR_RCT"):
        values = np.empty(stored.shape[:3], dtype=np.float32)
        for frame, pixels in enumerate(stored):
            rgb = apply_color_lut(pixels, dataset) if colour == "PALETTE COLOR" else pixels
            values[frame] = rgb[..., :3] @ _LUMINANCE
    elif colour in ("MONOCHROME1", "MONOCHROME2"):
        values = _grey(stored, dataset, row, turned=colour == "MONOCHROME1" and row.name not in _MEASURED)
    else:
        raise ScanError(f"has the Photometric Interpretation {colour}, which medclr does not read")
    if header.tiles:
        side = header.tiles
        values = values.reshape(side, header.rows, side, header.columns).transpose(0, 2, 1, 3)  # [tiles, tiles, H, W]
        values = values.reshape(side**2, header.rows, header.columns)[: header.frames]  # [F,H,W]
    if values.shape != (header.frames, header.rows, header.columns):
        raise ScanError(f"decodes to {list(values.shape)} and announces {[header.frames, header.rows, header.columns]}")
    return values


def _grey(stored: NDArray[Any], dataset: Dataset, row: Modality, turned: bool) -> NDArray[np.float32]:
    """Stored [F,H,W] -> physical [F,H,W]: unused bits off, modality LUT, MONOCHROME1, padding."""
    padding = _padding(dataset, stored.dtype)
    padded = None if padding is None else (stored >= padding[0]) & (stored <= padding[1])
    low = high = 0
    if stored.dtype.kind in "iu":
        low, high = _representable(stored.dtype, int(dataset.BitsStored))
        stored = _used_bits(stored, dataset, padded)
    elif turned:
        raise ScanError("is MONOCHROME1 with floating-point pixels, which have no highest value to turn round")

    values = np.empty(stored.shape, dtype=np.float32)
    for frame, pixels in enumerate(stored):
        is_air = padding is not None
        if dataset.get("ModalityLUTSequence"):
            values[frame] = apply_modality_lut(pixels, dataset)
            ends = 0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        else:
            slope, intercept = _rescale(dataset, frame)
            if slope == 1 and intercept.is_integer():  # exact: float32 holds the integers of 24 bits
                values[frame] = pixels
                values[frame] += np.float32(intercept)
            else:
                values[frame] = pixels.astype(np.float64) * slope + intercept
            ends = low * slope + intercept, high * slope + intercept
            if padding is not None and row.scaling == "window":
                # A padding value that is also a tissue's Hounsfield unit cannot be told from the tissue: leave it.
                is_air = not -900 < padding[1] * slope + intercept <= 3071
        if turned:
            values[frame] = ends[0] + ends[1] - values[frame]
        if padded is not None and is_air:
            values[frame][padded[frame]] = values[frame].min() if row.air is None else row.air
    return values


def _rescale(dataset: Dataset, frame: int) -> tuple[float, float]:
    """Rescale Slope and Intercept of one frame (PS3.3 C.11.1.1.2, C.7.6.16.2.9); (1, 0) if there are none."""
    holder = functional(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope, intercept = holder.get("RescaleSlope"), holder.get("RescaleIntercept")
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ScanError("has a Rescale Slope of zero, or one that is no number")
    return slope, intercept


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
