"""Modality -> chain of augmentations, and two views of every image of a batch."""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.augment.chain import Chain, crop_for, custom_chain, scale_for
from medclr.augment.intensity import (
    RandomBiasField,
    RandomBlur,
    RandomContrast,
    RandomCutout,
    RandomGain,
    RandomGamma,
    RandomGaussianNoise,
    RandomQuantumNoise,
    RandomRicianNoise,
    RandomSpeckle,
    scale_to_unit,
)
from medclr.augment.transform import BatchTransform, Params, put, run, select, send
from medclr.config import ViewsConfig
from medclr.scans.modality import MODALITIES, Modality

if TYPE_CHECKING:
    from medclr.data.loader import Batch


def chain_for(modality: Modality, config: ViewsConfig) -> Chain:
    """One modality's augmentations: geometry on physical values, scaling to [0,1], intensity, blur, noise, cut-out.

    A new modality without a case of its own gets gamma, contrast and Gaussian noise. ``config.chain`` replaces it all.
    """
    if config.chain is not None:
        return custom_chain(modality, config)
    k = config.strength
    crop, scale = crop_for(modality, config), scale_for(modality, config)
    gamma, contrast = RandomGamma(0.5 * k), RandomContrast(0.4 * k, 0.1 * k)
    # SimCLR's sigma of up to 2 px belongs to 224 px; it shrinks with the view, but not below a pixel.
    blur = RandomBlur((0.1, max(1.0, config.size_px / 112)), config.blur)
    cutout = RandomCutout(prob=config.cutout)
    match modality.name:
        case "CT":  # the window already is the contrast, and noise is there before it
            return (crop, RandomQuantumNoise(15 * k, config.noise), scale, blur, cutout)
        case "MR":
            noise: BatchTransform = RandomRicianNoise(0.08 * k, config.noise)
            return (crop, scale, gamma, contrast, RandomBiasField(0.3 * k), blur, noise, cutout)
        case "US":
            noise = RandomSpeckle(0.15 * k, config.noise)
            return (crop, scale, RandomGamma(0.3 * k), RandomGain(0.3 * k), blur, noise, cutout)
        case "XR":
            gamma = RandomGamma(0.5 * k, invertible=True)
    return (crop, scale, gamma, contrast, blur, RandomGaussianNoise(0.05 * k, config.noise), cutout)


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
    """[B,C,s,s] float32."""

    b: Tensor
    """[B,C,s,s] float32."""

    drawn: tuple[tuple[Drawn, ...], tuple[Drawn, ...]]
    """For view a and for view b: one entry a modality of the batch."""


class Draws:
    """The parameters of a step's two views for the whole global batch, drawn once and handed out piece by piece.

    A function of (seed, step, view, modality, transform, row of the global batch), and of nothing else.

    Args:
        config: sizes and strengths.
        n: images in the global batch.
        seed: of the run.
        step: of the run; every step has new views.
    """

    def __init__(self, config: ViewsConfig, n: int, *, seed: int, step: int) -> None:
        self._config, self._n, self._key = config, n, (seed, step)
        self._drawn: dict[tuple[int, str], tuple[Chain, list[Params]]] = {}

    def _of(self, view: int, modality: Modality) -> tuple[Chain, list[Params]]:
        """A modality's chain, and the parameters of each of its transforms for all ``n`` rows."""
        if (view, modality.name) not in self._drawn:
            chain, params = chain_for(modality, self._config), []
            keys = [transform.key for transform in chain]
            for position, transform in enumerate(chain):
                # Keyed by name, so that a transform added to a chain leaves the draws of the others as they were.
                again = keys[:position].count(transform.key)
                key = transform.key + (f"#{again + 1}" if again else "")
                name = zlib.crc32(f"{modality.name}.{key}".encode())
                state = np.random.RandomState(np.random.PCG64(np.random.SeedSequence([*self._key, view, name])))
                params.append(transform.draw(self._n, state))
            self._drawn[view, modality.name] = chain, params
        return self._drawn[view, modality.name]

    @property
    def size_px(self) -> int:
        """Side of the views."""
        return self._config.size_px

    def generator(self, name: str, row: int) -> np.random.Generator:
        """For what else is drawn for a row of the global batch: a function of (seed, step, name, row)."""
        key = np.random.SeedSequence([*self._key, zlib.crc32(name.encode())]).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))

    def drawn(self, batch: "Batch", view: int, rows: Tensor) -> tuple[Drawn, ...]:
        """What happens to ``batch`` in view 0 (a) or 1 (b); it holds the ``rows`` [B] of the global batch."""
        modality = batch.modality.cpu()  # [B]
        drawn = []
        for index in modality.unique().tolist():
            mine = (modality == index).nonzero()[:, 0]  # [m]
            chain, everything = self._of(view, MODALITIES[batch.modalities[index]])
            params = []
            for transform, all_rows in zip(chain, everything, strict=True):
                facts = {fact: getattr(batch, fact).cpu()[mine] for fact in transform.facts}  # [m] each
                params.append(select(all_rows, rows[mine]) | facts)
            drawn.append(Drawn(mine, chain, tuple(params)))
        return tuple(drawn)

    def view(self, batch: "Batch", view: int, rows: Tensor, device: torch.device | str | None = None) -> Tensor:
        """View 0 (a) or 1 (b) of ``batch``, which holds the ``rows`` [B] of the global batch: [B,C,s,s] in [0,1].

        Made on ``device``; None: where the images are. With the batch on the CPU and a GPU here, only the pixels
        travel, and the GPU is never waited for.
        """
        images = batch.images.to(device or batch.images.device, torch.float32, non_blocking=True)
        with torch.autocast(images.device.type, enabled=False):  # physical values need float32
            return replay(images, self.drawn(batch, view, rows))


def replay(images: Tensor, drawn: tuple[Drawn, ...]) -> Tensor:
    """One view of images [B,C,H,W] in physical units by recorded parameters, the same for all channels: [B,C,s,s]."""
    if images.shape[1] > 1:
        return torch.cat([replay(channel, drawn) for channel in images.split(1, dim=1)], dim=1)
    if len(drawn) == 1:
        return run(drawn[0].chain, images, drawn[0].params)
    views: Tensor | None = None
    for part in drawn:
        rows = send(part.rows, images.device)
        made = run(part.chain, images.index_select(0, rows), part.params)  # [m,1,s,s]
        if views is None:
            views = made.new_empty(len(images), *made.shape[1:])
        put(views, rows, made)
    assert views is not None, "a batch has images"
    return views


def two_views(
    batch: "Batch",
    config: ViewsConfig,
    *,
    seed: int,
    step: int,
    rows: slice = slice(None),
    global_batch: int | None = None,
    device: torch.device | str | None = None,
) -> Views:
    """Two random views of every image, a function of (seed, step, row of the global batch) and of nothing else.

    Args:
        batch: this process's part of the global batch; images [B,C,H,W] in physical units.
        config: sizes and strengths.
        seed: of the run.
        step: of the run; every step has new views.
        rows: which rows of the global batch ``batch`` holds.
        global_batch: images in the global batch; None: ``batch`` is all of it.
        device: where the views are made; None: where the images are. With the batch on the CPU and a GPU here, only
            the pixels travel, and the GPU is never waited for.

    Raises:
        ValueError: ``rows`` does not have the batch's length.
    """
    n = len(batch.images) if global_batch is None else global_batch
    here = torch.arange(n)[rows]  # [B], rows of the global batch
    if len(here) != len(batch.images):
        raise ValueError(f"{rows} of {n} images is {len(here)} rows, but the batch holds {len(batch.images)}")
    draws = Draws(config, n, seed=seed, step=step)
    images = batch.images.to(device or batch.images.device, torch.float32, non_blocking=True)
    with torch.autocast(images.device.type, enabled=False):  # physical values need float32
        a, b = (draws.drawn(batch, view, here) for view in (0, 1))
        return Views(replay(images, a), replay(images, b), (a, b))


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
    """Every image as a viewer shows it, for evaluation: [B,C,s,s] in [0,1], nothing random.

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
