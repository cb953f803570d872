"""Frozen encoders by name: a run's, or the two baselines that it is compared with."""

import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import build_encoder, load_encoder
from medclr.models.weights import ResNetName, imagenet


class Frozen(Protocol):
    """Plain views [B,C,s,s] in [0,1] -> features [B,F]; in eval mode, without gradient."""

    config: EncoderConfig
    features: int
    size_px: int
    seen_patients: frozenset[str]

    def __call__(self, x: Tensor) -> Tensor: ...


def open_encoder(
    name: str,
    *,
    size_px: int | None = None,
    like: Path | None = None,
    weights: Path | None = None,
    fetch: ResNetName | None = None,
    seed: int = 0,
) -> Frozen:
    """The encoder that the user names.

    Args:
        name: a run folder of pretraining; ``imagenet``: EfficientNet-Lite0 from its package, or the ResNet in
            ``weights`` or of the name ``fetch``; ``random``: the network of the run ``like`` before any training, or
            a ResNet-18.
        size_px: side of the images; None: what the encoder was made for (``random`` without ``like``: 224).
        like: a run folder.
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
    if like is not None and name != "random":
        raise MedclrError("--like goes with --encoder random only")
    if name == "random":
        model = load_encoder(like) if like else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made_for = (model.size_px if model else size_px) or 224
            encoder = build_encoder(model.config if model else EncoderConfig(), made_for)
    elif name == "imagenet":
        encoder, report = imagenet(weights, fetch)
        print(report, file=sys.stderr)
    else:
        encoder = load_encoder(Path(name))
    encoder.size_px = size_px or encoder.size_px
    encoder.requires_grad_(False)
    encoder.eval()
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")
