"""The encoder: from an image in [0,1] to a feature vector, or to a pyramid of feature maps.

A network is a file of this folder and a line of ``NETWORKS``. Letters: B images, C slices as channels, F features, H
rows, W columns, S the image side.
"""

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medclr import checkpoint
from medclr.config import EncoderConfig, nearest
from medclr.errors import MedclrError, one_line

NETWORKS: dict[str, tuple[str, str]] = {
    **{f"resnet{depth}": ("resnet", "ResNetEncoder") for depth in (18, 34, 50, 101, 152)},
    "efficientnet-lite0": ("lite", "EfficientNetLite0"),
}
"""Name of the network -> file of this folder and its class."""


class Encoder(nn.Module):
    """Image [B,C,H,W] in [0,1] -> features [B,F], global average pooled.

    Attributes:
        config: what it was built from.
        size_px: side S of the square images that it is made for; others pass too.
        features: F.
        channels: channels of each map of the pyramid, finest first.
        store_px: side of the stored slices from which its views were made.
        seen_patients: ids of the patients that it was pretrained on.
        decoder_width: channels at the full size of the U-Net decoder that it was pretrained under; None: under none.
        stem: name of the tensor of its first convolution.
        has_ones: whether that sees a channel of ones behind the slices.
    """

    config: EncoderConfig
    size_px: int
    store_px: int
    features: int
    channels: tuple[int, ...]
    seen_patients: frozenset[str]
    decoder_width: int | None
    stem: str
    has_ones: bool

    def describe(self, config: EncoderConfig, size_px: int, channels: Sequence[int]) -> None:
        """Set the attributes; a subclass calls it when it is built."""
        self.config, self.size_px, self.store_px = config, size_px, size_px
        self.channels, self.features = tuple(channels), channels[-1]
        self.seen_patients, self.decoder_width = frozenset(), None

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Image [B,C,H,W] -> feature maps [B,channels[i],h,w], finest first; each has at most half the rows before."""
        raise NotImplementedError

    def stages(self) -> list[list[nn.Module]]:
        """All modules with weights, a stage for each map of the pyramid: for learning rates and freezing by depth."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Image [B,C,H,W] in [0,1] -> features [B,F]."""
        return self.pyramid(x)[-1].mean((2, 3))

    def description(self) -> dict[str, Any]:
        """What encoder.json says of the network; ``load_encoder`` builds it again from this."""
        return {"architecture": asdict(self.config), "size_px": self.size_px, "features": self.features}


def with_ones(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,C+1,H,W]: a last channel of ones, by which a stem can subtract a mean (see weights.py)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def build_encoder(config: EncoderConfig, size_px: int) -> Encoder:
    """A newly initialised encoder for images of ``size_px``, which settles the stem 'auto'.

    Raises:
        MedclrError: a network or a stem that is unknown, or whose package is not installed.
    """
    if config.name not in NETWORKS:
        raise MedclrError(f"encoder.name: {config.name!r} is unknown{nearest(config.name, list(NETWORKS))}")
    file, name = NETWORKS[config.name]
    encoder: Encoder = getattr(importlib.import_module(f"medclr.models.{file}"), name)(config, size_px)
    return encoder


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
            f"{folder}: the tensors and encoder.json describe different networks ({one_line(error)}); export the "
            "encoder again"
        ) from error
    encoder.store_px = facts.get("store_px", encoder.size_px)
    encoder.seen_patients = frozenset(facts.get("patients", ()))
    encoder.eval()
    return encoder
