"""The decoder of a 2D U-Net (Ronneberger et al. 2015, arXiv 1505.04597) on an encoder's pyramid, of MONAI's blocks.

Letters: B images, C slices as channels, H rows, W columns, h and w those of a map, K outputs, L maps of the pyramid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import TwoConv
from torch import Tensor, nn

from medclr import checkpoint
from medclr.errors import MedclrError, one_line

ACT = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
"""As in MONAI's BasicUNet."""


class UNetDecoder(nn.Module):
    """Pyramid of feature maps -> logits for every pixel of the image.

    From the coarsest map on: enlarge to the next finer one (bilinear, to whatever size that has, so that every stem and
    every odd size fits), put the two together, convolve twice. The image itself is the finest map, so that borders are
    drawn on its pixels even where the stem of the encoder starts at a quarter of them.

    Args:
        channels: of the maps, finest first, as ``Encoder.channels``.
        slices: C.
        outputs: K; 0: none, for what has an end of its own.
        width: channels at the full size; they double from one size to the next coarser one, up to the map's own.
        dropout: share of the channels that is dropped after each convolution.
        level: the finest map that is made: 0: of the size of the image; 1: of that of the pyramid's finest map; and so
            on. Above 0 there are no outputs.

    Attributes:
        made: channels of each map, of the size of the image first.
        slices: C.
    """

    def __init__(
        self,
        channels: Sequence[int],
        slices: int,
        outputs: int,
        width: int,
        dropout: float = 0.0,
        level: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= level < len(channels) or (level and outputs):
            raise ValueError(f"no decoder of {len(channels)} maps has {outputs} outputs at level {level}")
        self.slices = slices
        self.shape: dict[str, Any] = {"channels": list(channels), "slices": slices, "width": width, "level": level}
        # Channels that leave each level: that of the image, then those of all maps but the coarsest, [L] in all.
        made = [width, *(min(width * 2**i, most) for i, most in enumerate(channels[:-1], start=1))]
        bottom = min(2 * made[-1], channels[-1])
        self.made, self.level = tuple(made), level
        # The coarsest map can have 1280 channels, of which 3 x 3 convolutions would cost more than the encoder.
        self.bottom = Convolution(2, channels[-1], bottom, kernel_size=1, act=ACT, norm=None)
        levels = zip([*made[1:], bottom], [slices, *channels[:-1]], made, strict=True)
        self.levels = nn.ModuleList(
            TwoConv(2, coarse + skip, out, ACT, "batch", bias=False, dropout=dropout) for coarse, skip, out in levels
        )
        for finer in range(level):
            self.levels[finer] = nn.Identity()  # so that the others keep their names
        self.head: nn.Module = nn.Conv2d(width, outputs, kernel_size=1) if outputs else nn.Identity()

    def description(self) -> dict[str, Any]:
        """What encoder.json says of it: its arguments."""
        return dict(self.shape)

    def features(self, image: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Image [B,C,H,W] and its maps [B,channels[i],h,w], finest first -> map [B,made[level],h,w] of its level."""
        x: Tensor = self.bottom(pyramid[-1])
        skips = [image, *pyramid[:-1]]
        for i in reversed(range(self.level, len(skips))):
            if x.shape[2:] != skips[i].shape[2:]:
                x = F.interpolate(x, skips[i].shape[2:], mode="bilinear", align_corners=False)
            x = self.levels[i](torch.cat([skips[i], x], dim=1))
        return x

    def forward(self, image: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Image [B,C,H,W] and its maps [B,channels[i],h,w], finest first -> logits [B,K,H,W]."""
        logits: Tensor = self.head(self.features(image, pyramid))
        return logits


FIRST = "levels.0.conv_0.conv.weight"
"""The convolution that sees the image: its slices come first."""


def load_decoder(decoder: UNetDecoder, run: Path) -> list[str]:
    """Fill ``decoder`` with the one that a run of pretraining kept; names of the tensors, none where it kept none.

    What the run did not train, the outputs and the levels finer than its own, stays as it is. A decoder of one slice is
    laid on the middle one of several.

    Raises:
        MedclrError: it is of another shape, or damaged.
    """
    folder = checkpoint.encoder_folder(run)
    kept = checkpoint.read_decoder(folder)
    if kept is None:
        return []
    tensors, facts = kept
    wanted, slices = decoder.state_dict(), decoder.slices
    if FIRST in tensors and facts["slices"] == 1 and slices > 1:
        weight = tensors[FIRST]  # [width,1+bottom,3,3]
        wide = weight.new_zeros(len(weight), slices + weight.shape[1] - 1, *weight.shape[2:])
        wide[:, slices // 2], wide[:, slices:] = weight[:, 0], weight[:, 1:]
        tensors[FIRST] = wide
    try:
        decoder.load_state_dict({**wanted, **tensors})
    except RuntimeError as error:
        raise MedclrError(
            f"{folder}: its decoder is of another shape ({one_line(error)}); take the encoder alone, or pretrain again"
        ) from error
    return list(tensors)
