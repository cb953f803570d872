"""Frozen encoders by name: a run's, or the two baselines that it is compared with."""

import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import build_encoder, load_encoder
from medclr.models.weights import ResNetName, imagenet


class Frozen(Protocol):
    """Plain views [B,1,s,s] in [0,1] -> features [B,F]; in eval mode, without gradient."""

    features: int
    size_px: int

    def __call__(self, x: Tensor) -> Tensor: ...


def open_encoder(
    name: str, *, size_px: int, weights: Path | None = None, fetch: ResNetName | None = None, seed: int = 0
) -> Frozen:
    """The encoder that the user names.

    Args:
        name: a run folder of pretraining; ``imagenet``: EfficientNet-Lite0 from its package, or the ResNet in
            ``weights`` or of the name ``fetch``; ``random``: a ResNet-18 as it is before any training.
        size_px: side of the images for ``random``; the others know their own.
        weights: a file of ImageNet weights in torchvision's format.
        fetch: download torchvision's file for this ResNet, checked by its hash.
        seed: of ``random``.

    Raises:
        MedclrError: there is no such run, or weights are missing or do not match.
    """
    if (weights or fetch) and name != "imagenet":
        raise MedclrError("--weights and --fetch go with --encoder imagenet only")
    if weights and fetch:
        raise MedclrError("--weights and --fetch exclude each other; give the file, or have it fetched")
    encoder: nn.Module
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = build_encoder(EncoderConfig(), size_px)
    elif name == "imagenet":
        encoder, report = imagenet(weights, fetch)
        print(report, file=sys.stderr)
    else:
        encoder = load_encoder(Path(name))
    encoder.requires_grad_(False).eval()
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
