"""The decoder of a 2D U-Net (Ronneberger et al. 2015, arXiv 1505.04597) on an encoder's pyramid, of MONAI's blocks.

Letters: B images, C slices as channels, H rows, W columns, h and w those of a map, K outputs, L maps of the pyramid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import TwoConv
from torch import Tensor, nn

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
        outputs: K.
        width: channels at the full size; they double from one size to the next coarser one, up to the map's own.
        dropout: share of the channels that is dropped after each convolution.
    """

    def __init__(self, channels: Sequence[int], slices: int, outputs: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        # Channels that leave each level: that of the image, then those of all maps but the coarsest, [L] in all.
        made = [width, *(min(width * 2**i, most) for i, most in enumerate(channels[:-1], start=1))]
        bottom = min(2 * made[-1], channels[-1])
        # The coarsest map can have 1280 channels, of which 3 x 3 convolutions would cost more than the encoder.
        self.bottom = Convolution(2, channels[-1], bottom, kernel_size=1, act=ACT, norm=None)
        levels = zip([*made[1:], bottom], [slices, *channels[:-1]], made, strict=True)
        self.levels = nn.ModuleList(
            TwoConv(2, coarse + skip, out, ACT, "batch", bias=False, dropout=dropout) for coarse, skip, out in levels
        )
        self.head = nn.Conv2d(width, outputs, kernel_size=1)

    def forward(self, image: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Image [B,C,H,W] and its maps [B,channels[i],h,w], finest first -> logits [B,K,H,W]."""
        x = self.bottom(pyramid[-1])
        skips = [image, *pyramid[:-1]]
        for skip, level in zip(reversed(skips), reversed(self.levels), strict=True):
            if x.shape[2:] != skip.shape[2:]:
                x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = level(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(x)
        return logits
