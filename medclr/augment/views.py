"""Modality -> chain of augmentations, and two views of every image of a batch."""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.augment.geometry import RandomResizedCrop
from medclr.augment.intensity import (
    PercentileScale,
    RandomBiasField,
    RandomBlur,
    RandomContrast,
    RandomCutout,
    RandomGain,
    RandomGamma,
    RandomGaussianNoise,
    RandomRicianNoise,
    RandomSpeckle,
    RandomWindow,
    scale_to_unit,
)
from medclr.augment.transform import BatchTransform, Params, select
from medclr.errors import MedclrError
from medclr.scans.modality import MODALITIES, Modality

if TYPE_CHECKING:
    from medclr.data.loader import Batch

Chain = tuple[BatchTransform, ...]


@dataclass(frozen=True)
class ViewsConfig:
    """How two views of a slice are made."""

    size_px: int = 64
    """Rows and columns of a view."""

    crop_area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as fractions of the slice."""

    rotation_deg: float | None = None
    """Largest rotation either way, in degrees; null: what is plausible for the modality."""

    flip: bool = True
    """Mirror views at random, where the modality allows it."""

    strength: float = 1.0
    """Multiplies the width of every intensity jitter: window, range, gamma, contrast, bias field, gain and noise."""

    noise: float = 0.5
    """Probability of noise (of speckle, in ultrasound)."""

    blur: float = 0.5
    """Probability of a Gaussian blur."""

    cutout: float = 0.2
    """Probability that a rectangle is cut out."""

    def __post_init__(self) -> None:
        if self.size_px < 8:
            raise MedclrError(f"views.size_px is {self.size_px}; choose at least 8")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise MedclrError(f"views.crop_area is {list(self.crop_area)}; choose 0 < smallest <= largest <= 1")
        if self.rotation_deg is not None and not 0 <= self.rotation_deg <= 180:
            raise MedclrError(f"views.rotation_deg is {self.rotation_deg}; choose 0 to 180, or null")
        if not 0 <= self.strength <= 2:
            raise MedclrError(f"views.strength is {self.strength}; choose 0 (no intensity jitter) to 2")
        for name in ("noise", "blur", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise MedclrError(f"views.{name} is {getattr(self, name)}; a probability lies between 0 and 1")


def chain_for(modality: Modality, config: ViewsConfig) -> Chain:
    """The augmentations of one modality: geometry on physical values, scaling to [0,1], intensity, blur, noise, cut-out.

    A new modality without a case of its own gets gamma, contrast and Gaussian noise.
    """
    k = config.strength
    crop = RandomResizedCrop(
        config.size_px,
        area=config.crop_area,
        rotation_deg=modality.rotation_deg if config.rotation_deg is None else config.rotation_deg,
        flip_lr=config.flip and modality.flip_lr,
        flip_ud=config.flip and modality.flip_ud,
    )
    scale = RandomWindow(modality.windows, 0.2 * k) if modality.windows else PercentileScale(0.05 * k)
    # SimCLR's sigma of up to 2 px belongs to 224 px; it shrinks with the view, but not below a pixel.
    blur = RandomBlur((0.1, max(1.0, config.size_px / 112)), config.blur)
    intensity: Chain
    noise: BatchTransform
    match modality.name:
        case "CT":  # the window already is the contrast
            intensity = ()
            noise = RandomGaussianNoise(0.05 * k, config.noise)
        case "MR":
            intensity = (RandomGamma(0.5 * k), RandomContrast(0.4 * k, 0.1 * k), RandomBiasField(0.3 * k))
            noise = RandomRicianNoise(0.08 * k, config.noise)
        case "XR":
            intensity = (RandomGamma(0.5 * k, invertible=True), RandomContrast(0.4 * k, 0.1 * k))
            noise = RandomGaussianNoise(0.05 * k, config.noise)
        case "US":
            intensity = (RandomGamma(0.3 * k), RandomGain(0.3 * k))
            noise = RandomSpeckle(0.3 * k, config.noise)
        case _:
            intensity = (RandomGamma(0.5 * k), RandomContrast(0.4 * k, 0.1 * k))
            noise = RandomGaussianNoise(0.05 * k, config.noise)
    return (crop, scale, *intensity, blur, noise, RandomCutout(prob=config.cutout))


@dataclass(frozen=True)
class Drawn:
    """What was done to the images of one modality, to replay and to caption it."""

    rows: Tensor
    """[m] int64, which images of the batch."""

    chain: Chain
    params: tuple[Params, ...]
    """One a transform; every tensor [m,...]."""


@dataclass(frozen=True)
class Views:
    """Two views of every image, all values in [0,1]."""

    a: Tensor
    """[B,1,s,s] float32."""

    b: Tensor
    """[B,1,s,s] float32."""

    drawn: tuple[tuple[Drawn, ...], tuple[Drawn, ...]]
    """For view a and for view b: one entry a modality of the batch."""


def _draw(transform: BatchTransform, n: int, *key: int, name: str) -> Params:
    """Parameters of ``n`` images, a function of the key and the names alone."""
    # Keyed by name, so that a transform added to a chain leaves the draws of the others as they were.
    sequence = np.random.SeedSequence([*key, zlib.crc32(f"{name}.{type(transform).__name__}".encode())])
    return transform.draw(n, np.random.RandomState(np.random.MT19937(sequence)))


def replay(images: Tensor, drawn: Drawn) -> Tensor:
    """Apply recorded parameters to the images [m,1,H,W] of ``drawn.rows``: [m,1,s,s]."""
    for position, (transform, params) in enumerate(zip(drawn.chain, drawn.params, strict=True)):
        images = transform.apply(images, params, inplace=position > 0)  # the first step makes new images
    return images


def two_views(
    batch: "Batch",
    config: ViewsConfig,
    *,
    seed: int,
    step: int,
    rows: slice = slice(None),
    global_batch: int | None = None,
) -> Views:
    """Two random views of every image, a function of (seed, step, row of the global batch) and of nothing else.

    Args:
        batch: this process's part of the global batch; images [B,1,H,W] in physical units.
        config: sizes and strengths.
        seed: of the run.
        step: of the run; every step has new views.
        rows: which rows of the global batch ``batch`` holds.
        global_batch: images in the global batch; None: ``batch`` is all of it.

    Raises:
        ValueError: ``rows`` does not have the batch's length.
    """
    n = len(batch.images) if global_batch is None else global_batch
    here = torch.arange(n)[rows]  # [B], rows of the global batch
    if len(here) != len(batch.images):
        raise ValueError(f"{rows} of a global batch of {n} is {len(here)} rows, but the batch holds {len(batch.images)}")
    modality = batch.modality.cpu()
    facts = {name: getattr(batch, name).cpu() for name in ("low", "high", "air")}  # [B] each
    views, drawn = [], []
    with torch.autocast(batch.images.device.type, enabled=False):  # physical values need float32
        images = batch.images.float()
        for view in (0, 1):
            out = images.new_empty(len(images), 1, config.size_px, config.size_px)
            record = []
            for index in modality.unique().tolist():
                row = MODALITIES[batch.modalities[index]]
                mine = (modality == index).nonzero()[:, 0]  # [m]
                chain = chain_for(row, config)
                params = tuple(
                    select(_draw(transform, n, seed, step, view, name=row.name), here[mine])
                    | {name: facts[name][mine] for name in transform.facts}
                    for transform in chain
                )
                record.append(Drawn(mine, chain, params))
                if len(mine) == len(images):
                    out = replay(images, record[-1])
                else:
                    where = mine.to(images.device)
                    out.index_copy_(0, where, replay(images.index_select(0, where), record[-1]))
            views.append(out)
            drawn.append(tuple(record))
    return Views(views[0], views[1], (drawn[0], drawn[1]))


def describe(views: Views, view: int, i: int) -> str:
    """Caption of image ``i`` in view 0 (a) or 1 (b): everything that was done to it."""
    for drawn in views.drawn[view]:
        at = (drawn.rows == i).nonzero()[:, 0]
        if len(at):
            j = int(at[0])
            steps = zip(drawn.chain, drawn.params, strict=True)
            return " · ".join(transform.describe(params, j) for transform, params in steps if params["on"][j])
    raise IndexError(f"the batch has no image {i}")


def plain_view(batch: "Batch", size_px: int) -> Tensor:
    """Every image as a viewer shows it, for evaluation: [B,1,s,s] in [0,1], nothing random.

    The whole image is resized (antialiased) in physical values, then the modality's display window, or the scan's
    robust range, becomes [0,1].
    """
    with torch.autocast(batch.images.device.type, enabled=False):
        images = batch.images.float()
        if images.shape[2:] != (size_px, size_px):
            images = F.interpolate(images, (size_px, size_px), mode="bilinear", antialias=True)
        low, high = batch.low, batch.high
        for index, name in enumerate(batch.modalities):
            display = MODALITIES[name].display
            if display is not None:
                here = batch.modality == index
                low = torch.where(here, display.center - display.width / 2, low)
                high = torch.where(here, display.center + display.width / 2, high)
        return scale_to_unit(images, low, high)
