"""One scan -> square slices of uint16, and which of its slices show nothing.

Shape letters: D slices, H rows, W columns of a scan; S = size_px; h rows, w columns of the content of the square.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclr.errors import ScanError
from medclr.scans.modality import MODALITIES
from medclr.scans.scan import Scan

PERCENTILE_VOXELS = 2**15
"""The percentiles of a scan are taken over about so many of its voxels: their rank is then right within 0.1 %."""

CACHED = 2**18
"""Pixels that are encoded together: they stay in the processor's cache, and small slices cost no call each."""

BLANK_BLOCK = 4
"""Pixels are averaged over squares of so many (fewer in a slice of less than 16 squares across) before a slice is
judged blank: noise then counts a quarter..."""

BLANK_SPREAD = 0.03
"""...and blank it is if the averages spread over less than this part of the scan's robust range. The emptiest of 7,400
real slices that show anatomy, at the crown of a head, spreads over 0.39 of it."""


@dataclass(frozen=True)
class Encoding:
    """How the slices of one scan become squares of uint16: physical = offset + scale * stored."""

    top: int
    """Where the content lies in the square, in pixels."""
    left: int
    height: int
    """h, at most H and S."""
    width: int
    scale: float
    offset: float
    low: float
    """0.5 and 99.5 percentiles of the scan, physical units."""
    high: float
    air: float
    """Physical value of the padding."""


def encoding_of(scan: Scan, size_px: int) -> Encoding:
    """Choose the grid and the number range of a scan.

    The grid: square pixels, as large as the coarser of the two spacings or as it takes to fit; so nothing is enlarged,
    and a slice with square pixels that fits is not resampled at all. It is centred.

    The numbers: whole-numbered voxels that span at most 65535 are stored as they are, less their minimum (scale 1), if
    they are not resampled, or if they are in absolute units (CT), to whole ones of which they are then rounded. In all
    other cases the scan's own range is spread over the 16 bits; rounding errs by at most half of (max - min) / 65535.

    Raises:
        ScanError: all voxels are equal.
    """
    _, height, width = scan.voxels.shape
    _, spacing_h, spacing_w = scan.spacing_mm
    pixel_mm = max(spacing_h, spacing_w, height * spacing_h / size_px, width * spacing_w / size_px)
    h = min(max(round(height * spacing_h / pixel_mm), 1), height, size_px)
    w = min(max(round(width * spacing_w / pixel_mm), 1), width, size_px)

    lowest, highest = float(scan.voxels.min()), float(scan.voxels.max())
    low, high = _percentiles(scan.voxels)
    if low == high:  # nearly all voxels are alike, as in a mask-like or mostly empty scan
        low, high = lowest, highest
    modality = MODALITIES[scan.modality]
    air = lowest if modality.air is None else modality.air
    bottom, top = min(lowest, air), max(highest, air)
    scale = float(np.float32((top - bottom) / 65535))
    if lowest == highest or scale == 0:
        raise ScanError(f"every voxel is {lowest:g}: there is nothing to see")
    keeps_units = (h, w) == (height, width) or modality.scaling == "window"  # such as Hounsfield's
    if keeps_units and top - bottom <= 65535 and bottom.is_integer() and _whole(scan.voxels):
        scale = 1.0
    return Encoding((size_px - h) // 2, (size_px - w) // 2, h, w, scale, bottom, low, high, air)


def blank_slices(scan: Scan, encoding: Encoding) -> NDArray[np.bool_]:
    """[D], which slices show nothing: averaged over blocks of pixels, their darkest and their brightest place differ by
    less than ``BLANK_SPREAD`` of the scan's own robust range (``low`` to ``high``).

    So it asks neither for a unit nor for the value of air. Whatever stands out from its surroundings by an eighth of
    that range and is as large as a block keeps its slice, wherever the grid of blocks cuts it.
    """
    block = min(max(min(scan.voxels.shape[1:]) // 16, 1), BLANK_BLOCK)
    limit = BLANK_SPREAD * (encoding.high - encoding.low)
    row, width = scan.voxels.shape[1] // 2 // block * block, scan.voxels.shape[2] // block * block
    middle = scan.voxels[:, row : row + block, :width]  # [D,b,W']: a band of whole blocks, mostly enough to tell
    averages = middle.mean(1).reshape(len(middle), -1, block).mean(2)  # [D,W'/b]
    blank: NDArray[np.bool_] = np.ptp(averages, axis=1) < limit  # [D]
    for d in np.flatnonzero(blank):
        blank[d] = np.ptp(np.asarray(Image.fromarray(scan.voxels[d]).reduce(block))) < limit
    return blank


def encode(images: Iterable[NDArray[np.float32]], encoding: Encoding, size_px: int) -> Iterator[NDArray[np.uint16]]:
    """n times [H,W] in physical units -> [n,S,S] as stored, a few squares at a time in an array that is used again.

    Shrinking averages over the pixels that fall together, with a triangle filter as wide as two new pixels.
    """
    e = encoding
    few = max(1, CACHED // size_px**2)
    squares = np.full((few, size_px, size_px), np.rint((e.air - e.offset) / e.scale), dtype=np.uint16)  # [k,S,S]
    content = squares[:, e.top : e.top + e.height, e.left : e.left + e.width]  # [k,h,w]
    work = np.empty(content.shape, dtype=np.float32)  # [k,h,w]
    images = iter(images)
    while batch := list(islice(images, few)):  # [H,W] each
        for image, place in zip(batch, work, strict=False):
            if image.shape != place.shape:
                image = np.asarray(Image.fromarray(image).resize((e.width, e.height), Image.Resampling.BILINEAR))
            np.subtract(image, np.float32(e.offset), out=place)  # [h,w]
        here = work[: len(batch)]
        if e.scale != 1:
            here /= np.float32(e.scale)
        np.rint(here, out=here)
        np.clip(here, 0, 65535, out=here)
        content[: len(batch)] = here
        yield squares[: len(batch)]


def encode_mask(mask: NDArray[np.uint16], encoding: Encoding, size_px: int) -> NDArray[np.uint16]:
    """[D,H,W] labels -> [D,S,S] on the grid of the stored slices, by nearest neighbour; 0 around."""
    e = encoding
    rows, columns = nearest(mask.shape[1], e.height), nearest(mask.shape[2], e.width)
    squares = np.zeros((len(mask), size_px, size_px), dtype=np.uint16)  # [D,S,S]
    squares[:, e.top : e.top + e.height, e.left : e.left + e.width] = mask[:, rows[:, None], columns]
    return squares


def _percentiles(voxels: NDArray[np.float32]) -> tuple[float, float]:
    """0.5 and 99.5 percentiles, over every k-th voxel, k prime to H*W so that no row or column is preferred."""
    step = math.ceil(voxels.size / PERCENTILE_VOXELS)
    while math.gcd(step, voxels[0].size) != 1:
        step += 1
    sample = voxels.reshape(-1)[::step]
    ranks = [round(share * (len(sample) - 1)) for share in (0.005, 0.995)]
    low, high = np.partition(sample, ranks)[ranks]
    return float(low), float(high)


def _whole(voxels: NDArray[np.float32]) -> bool:
    """Whether all are whole numbers; slice by slice, as the first fraction settles it."""
    return all(np.array_equal(image, np.rint(image)) for image in voxels)


def nearest(n_from: int, n_to: int) -> NDArray[np.int64]:
    """[n_to], for each pixel of a resized line the pixel of the original line in which its centre lies.

    Both lines cover the same millimetres: pixel i has its centre at (i + 1/2) n_from / n_to, in pixels of the original.
    """
    return (2 * np.arange(n_to, dtype=np.int64) + 1) * n_from // (2 * n_to)
