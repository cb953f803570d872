"""The smallest network that is an encoder, where what is tested is not the network."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclr.config import EncoderConfig
from medclr.models.encoder import NETWORKS, Encoder


class Tiny(Encoder):
    """Five stages, each a convolution and batch norm: maps of 1/2, 1/4 and three times 1/8 of the image."""

    stem, has_ones = "parts.0.0.weight", False

    def __init__(self, config: EncoderConfig | None = None, size_px: int = 16) -> None:
        super().__init__()
        config = config or EncoderConfig()
        widths = (config.slices, 4, 4, 5, 5, 6)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())
            for (a, b), stride in zip(itertools.pairwise(widths), (2, 2, 2, 1, 1), strict=True)
        )
        self.describe(config, size_px, widths[1:])

    def pyramid(self, x: Tensor) -> list[Tensor]:
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return maps

    def stages(self) -> list[list[nn.Module]]:
        return [[part] for part in self.parts]


@contextmanager
def in_place_of(*names: str) -> Iterator[None]:
    """Inside, these networks are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "medclr.models.tiny", sys.modules[__name__])
        for name in names:
            patch.setitem(NETWORKS, name, ("tiny", "Tiny"))
        yield


def used(encoder: Any, seed: int = 0) -> Any:
    """As after some training: no tensor as it was at the start."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("var") or tensor.ndim == 1 else -0.5
            tensor.uniform_(low, 1.0, generator=generator)
    return encoder
