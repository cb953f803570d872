"""What readers of several formats do alike with the numbers in a file."""

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.modality import MODALITIES

_BT601 = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, of R, G and B


def luminance(channels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[...,3] RGB or [...,4] RGBA of 8 bits -> [...] grey from 0 to 255; transparent parts lie on black."""
    grey = channels[..., :3] @ _BT601
    if channels.shape[-1] == 4:
        grey *= channels[..., 3] / 255
    return np.asarray(grey, dtype=np.float32)


def fill_nan(voxels: NDArray[np.float32], modality: str) -> str:
    """Put the air of a modality, in place, where [D,H,W] voxels are NaN: by custom, nothing was measured there.

    Returns:
        What ``Scan.irregular`` says of it; '' if none was NaN.

    Raises:
        ScanError: all are NaN, or some are infinite; nobody knows what those stand for.
    """
    with np.errstate(invalid="ignore"):  # some NaN "signal"
        lowest, highest = np.fmin.reduce(voxels, axis=None), np.fmax.reduce(voxels, axis=None)
    if np.isnan(lowest):
        raise ScanError("holds nothing but NaN")
    if np.isinf([lowest, highest]).any():
        raise ScanError("holds infinite voxels, or such as float32 cannot hold; put in what they stand for")
    air = MODALITIES[modality].air if modality in MODALITIES else None
    n_missing = 0
    for image in voxels:  # [H,W]: slice by slice, to save memory
        missing = np.isnan(image)
        n_missing += int(missing.sum())
        image[missing] = lowest if air is None else air
    return f"{n_missing:,} of its {voxels.size:,} voxels are NaN, taken as air" if n_missing else ""


def check_precision(low: float, high: float) -> None:
    """Raise ScanError if float32 would blur the contrast between the lowest and the highest value, or lose it."""
    largest, span = max(abs(low), abs(high)), high - low
    if span > 0 and (span < largest * 2**-14 or largest < 1e-30):  # of 24 bits, 10 would remain
        raise ScanError(f"holds values from {low:.9g} to {high:.9g}, too fine for float32; shift or rescale them")
