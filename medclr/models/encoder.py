"""The encoder: MONAI's 2D ResNet with torchvision's tensor names, from an image in [0,1] to a feature vector.

Letters: B images, F features, C channels, H rows, W columns, S the image side.
Source: He et al. 2015 (arXiv 1512.03385), as in SimCLR (arXiv 2002.05709, appendix B.9 for the small stem).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

from medclr import checkpoint
from medclr.config import EncoderConfig, nearest
from medclr.errors import MedclrError

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


class Encoder(ResNet):
    """Image [B,1,H,W] in [0,1] -> features [B,F], global average pooled.

    Tensors bear torchvision's names, and the imagenet stem gives torchvision's ResNet exactly. The last gamma of every
    residual block starts at 0, so each block starts as the identity (Goyal et al. 2017, section 5.1).

    Attributes:
        config: what it was built from.
        size_px: side S of the square images that it is made for; others pass too.
        features: F.
        store_px: side of the stored slices from which its views were made.
        seen_patients: ids of the patients that it was pretrained on.
    """

    def __init__(self, config: EncoderConfig, size_px: int) -> None:
        stem = config.stem
        if stem == "auto":
            stem = "small" if size_px <= SMALL_PX else "imagenet"
        for setting, value, known in (("name", config.name, BLOCKS), ("stem", stem, STEMS)):
            if value not in known:
                raise MedclrError(f"encoder.{setting}: {value!r} is unknown{nearest(value, list(known))}")
        block, layers = BLOCKS[config.name]
        super().__init__(
            block,
            layers,
            block_inplanes=[64, 128, 256, 512],
            widen_factor=config.width,
            spatial_dims=2,
            n_input_channels=2 if config.normalise == "imagenet" else 1,
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
            **STEMS[stem],
        )
        self.config = config
        self.size_px = size_px
        self.store_px = size_px
        self.seen_patients: frozenset[str] = frozenset()
        self.features: int = self.in_planes  # MONAI leaves here the channels of the last stage
        for module in self.modules():
            if isinstance(module, ResNetBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, ResNetBottleneck):
                nn.init.zeros_(module.bn3.weight)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Image [B,1,H,W] -> feature maps [B,C,h,w] of the stem and the four stages, finest first."""
        if self.config.normalise == "imagenet":
            x = torch.cat([x, torch.ones_like(x)], dim=1)  # [B,2,H,W]: see weights.py
        x = self.act(self.bn1(self.conv1(x)))  # [B,64w,H/s,W/s]
        maps = [x]
        if not self.no_max_pool:
            x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Image [B,1,H,W] in [0,1] -> features [B,F]."""
        pooled: Tensor = self.avgpool(self.pyramid(x)[-1])  # [B,F,1,1]
        return pooled.flatten(1)

    def description(self) -> dict[str, Any]:
        """What encoder.json says of the network; ``load_encoder`` builds it again from this."""
        return {"architecture": asdict(self.config), "size_px": self.size_px, "features": self.features}


def build_encoder(config: EncoderConfig, size_px: int) -> Encoder:
    """A newly initialised encoder for images of ``size_px``, which settles the stem 'auto'."""
    return Encoder(config, size_px)


def load_encoder(path: Path | str) -> Encoder:
    """The exported encoder of a run folder (or an encoder folder), in eval mode.

    Raises:
        MedclrError: there is none, a file is damaged, or a tensor is missing, left over or of another shape.
    """
    folder = checkpoint.encoder_folder(Path(path))
    tensors, facts = checkpoint.read_encoder(folder)
    try:
        encoder = build_encoder(EncoderConfig(**facts["architecture"]), facts["size_px"])
        encoder.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise MedclrError(
            f"{folder}: the tensors and encoder.json describe different networks ({error}); export the encoder again"
        ) from error
    encoder.store_px = facts.get("store_px", encoder.size_px)
    encoder.seen_patients = frozenset(facts.get("patients", ()))
    encoder.eval()
    return encoder
