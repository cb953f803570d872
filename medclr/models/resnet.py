"""MONAI's 2D ResNet with torchvision's tensor names.

Source: He et al. 2015 (arXiv 1512.03385), as in SimCLR (arXiv 2002.05709, appendix B.9 for the small stem).
"""

from dataclasses import replace
from typing import Any

from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

from medclr.config import EncoderConfig, nearest
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, with_ones

BLOCKS: dict[str, tuple[type[nn.Module], list[int]]] = {
    "resnet18": (ResNetBlock, [2, 2, 2, 2]),
    "resnet34": (ResNetBlock, [3, 4, 6, 3]),
    "resnet50": (ResNetBottleneck, [3, 4, 6, 3]),
    "resnet101": (ResNetBottleneck, [3, 4, 23, 3]),
    "resnet152": (ResNetBottleneck, [3, 8, 36, 3]),
}
"""Residual block, and how many of it in each stage."""

STEMS: dict[str, dict[str, Any]] = {
    "imagenet": {"conv1_t_size": 7, "conv1_t_stride": 2, "no_max_pool": False},
    "medium": {"conv1_t_size": 3, "conv1_t_stride": 2, "no_max_pool": True},
    "small": {"conv1_t_size": 3, "conv1_t_stride": 1, "no_max_pool": True},
}
"""Stem -> arguments of MONAI's ResNet."""

SMALL_PX = 32
"""Largest image side for which the stem 'auto' is 'small', as in the reference."""


class ResNetEncoder(Encoder, ResNet):
    """A ResNet; its imagenet stem gives torchvision's exactly.

    The last gamma of every residual block starts at 0, so each block starts as the identity (Goyal et al. 2017,
    section 5.1).
    """

    stem = "conv1.weight"

    in_planes: int
    no_max_pool: bool
    conv1: nn.Module
    bn1: nn.Module
    act: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, config: EncoderConfig, size_px: int) -> None:
        stem = config.stem
        if stem == "auto":
            stem = "small" if size_px <= SMALL_PX else "imagenet"
        if stem not in STEMS:
            raise MedclrError(f"encoder.stem: {stem!r} is unknown{nearest(stem, list(STEMS))}")
        block, layers = BLOCKS[config.name]
        ResNet.__init__(
            self,
            block,
            layers,
            block_inplanes=[64, 128, 256, 512],
            widen_factor=config.width,
            spatial_dims=2,
            n_input_channels=config.slices + (config.normalise == "imagenet"),
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
            **STEMS[stem],
        )
        self.has_ones = config.normalise == "imagenet"
        # MONAI leaves in in_planes the channels of the last stage
        channels = [int(64 * config.width), *(self.in_planes // 2**k for k in (3, 2, 1, 0))]
        # With the stem that was settled: for images of another size 'auto' might be another one.
        self.describe(replace(config, stem=stem), size_px, channels)
        for module in self.modules():
            if isinstance(module, ResNetBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, ResNetBottleneck):
                nn.init.zeros_(module.bn3.weight)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the stem and of the four stages."""
        x = with_ones(x) if self.has_ones else x
        x = self.act(self.bn1(self.conv1(x)))  # [B,64w,H/s,W/s]
        maps = [x]
        if not self.no_max_pool:
            x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def stages(self) -> list[list[nn.Module]]:
        """Stem, then the four stages."""
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return [[self.conv1, self.bn1], *([stage] for stage in stages)]
