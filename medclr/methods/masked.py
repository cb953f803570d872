"""Masked images: patches are hidden, and the U-Net restores them. No contrast; a control for the methods that have one.

As SimMIM (Xie et al., arXiv 2111.09886) for a network of convolutions: hidden patches are filled, the loss is taken on
them alone.

Letters: B images, m of them in a chunk, F features of the encoder, S the image side, C neighbouring slices as
channels, g patches along a side.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medclr.augment.views import Draws
from medclr.data.loader import Batch
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.methods import PretrainingMethod
from medclr.models.encoder import Encoder
from medclr.models.unet import UNetDecoder


@dataclass(frozen=True)
class Config:
    """Settings of the restoration of masked images."""

    ratio: float = 0.6
    """Share of the patches that is hidden."""

    patch_px: int = 8
    """Side of a patch, in pixels of the view."""

    fill: Literal["zero", "noise"] = "zero"
    """What stands in hidden patches: 0, or uniform noise between 0 and 1."""

    error: Literal["l1", "l2"] = "l2"
    """What is made small on hidden pixels: the mean absolute or the mean squared error."""

    width: int = 16
    """Channels of the decoder at the full size; they double from one size to the next coarser one. Segmentation that
    starts from the run has the same."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        if not 0 < self.ratio < 1:
            raise MedclrError(f"ratio: {self.ratio} is no share above 0 and below 1; 0.5 to 0.75 is usual")
        if self.patch_px < 1:
            raise MedclrError(f"patch_px: {self.patch_px} is below 1; an eighth of the view is usual")
        if self.width < 1:
            raise MedclrError(f"width: {self.width} is below 1; 8 to 32 is usual")


class Method(PretrainingMethod):
    """Encoder and decoder.

    Attributes:
        encoder: what is kept after pretraining.
        decoder: kept too.
        output: the pixel from the decoder's features, thrown away.
    """

    encoder: Encoder

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.decoder = UNetDecoder(encoder.channels, encoder.config.slices, 0, config.width)
        self.output = nn.Conv2d(config.width, encoder.config.slices, kernel_size=1)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,C,S,S] -> features [B,F], twice: the loss is not taken in an embedding."""
        features = self.encoder(x)
        return features, features

    def inputs(self, batch: Batch, draws: Draws, view: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Which patches are hidden, 1 in [m,1,g,g], and what stands there, [m,1,S,S], unless that is 0."""
        config, size = self.config, draws.size_px
        side = math.ceil(size / config.patch_px)
        hidden = min(max(round(config.ratio * side**2), 1), side**2 - 1)
        if hidden < 1:
            raise MedclrError(f"masked.patch_px: {config.patch_px} leaves one patch of a view of {size} px; lower it")
        masks, fills = [], []
        for row in rows.tolist():
            generator = draws.generator(f"masked {view}", row)
            mask = np.zeros(side**2, dtype=np.float32)
            mask[generator.permutation(side**2)[:hidden]] = 1
            masks.append(mask.reshape(1, side, side))
            if config.fill == "noise":
                fills.append(generator.random((1, size, size), dtype=np.float32))
        return tuple(torch.from_numpy(np.stack(parts)) for parts in (masks, fills) if parts)

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Images [m,C,S,S] and their ``inputs`` -> [m,3]: error, squared error and variance of the hidden pixels.

        What is hidden is hidden in all C slices: a neighbour would give it away.
        """
        mask, *fill = inputs
        size = x.shape[2:]
        hidden = mask.repeat_interleave(self.config.patch_px, 2).repeat_interleave(self.config.patch_px, 3)
        hidden = hidden[:, :, : size[0], : size[1]]  # [m,1,S,S]
        seen = x * (1 - hidden) + (fill[0] * hidden if fill else 0)  # [m,C,S,S]
        restored = self.output(self.decoder.features(seen, self.encoder.pyramid(seen)))  # [m,C,S,S]
        with torch.autocast(x.device.type, enabled=False):  # means over all pixels need float32
            count = hidden.sum((1, 2, 3))  # [m]
            error = (restored.to(x.dtype) - x) * hidden  # [m,C,S,S]
            squared = error.square().mean(1).sum((1, 2)) / count  # [m]
            loss = squared if self.config.error == "l2" else error.abs().mean(1).sum((1, 2)) / count  # [m]
            mean = (x * hidden).sum((2, 3)) / count[:, None]  # [m,C]
            variance = ((x - mean[:, :, None, None]) * hidden).square().mean(1).sum((1, 2)) / count  # [m]
            return torch.stack([loss, squared.detach(), variance], 1)

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` gave for the two views -> the mean error.

        Logged is the squared error as a share of the variance of the hidden pixels: 1 is what their mean would give.
        """
        both = torch.cat([a, b])  # [2B,3]
        loss, squared, variance = both.mean(0)  # [] each
        return loss, {"unexplained": (squared / variance.clamp(min=1e-12)).detach()}
