"""The encoder that supervised training starts from, and what became of the tensors of its weights."""

from dataclasses import replace
from pathlib import Path

import torch

from medclr import checkpoint
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, build_encoder
from medclr.models.weights import MatchReport, load_weights, read_state_dict, resnet_name


def start_encoder(
    init: str, network: EncoderConfig, size_px: int | None, store_px: int, seed: int
) -> tuple[Encoder, MatchReport | None]:
    """The encoder that the user names, ready to be trained.

    Args:
        init: ``random``; ``imagenet``: EfficientNet-Lite0; a run folder of pretraining; or a file of torchvision's
            ResNet weights.
        network: of ``random``; of the others its ``slices`` alone.
        size_px: side of the images; None: what the encoder was made for, but at most ``store_px``.
        store_px: side of the stored slices.
        seed: of new weights.

    Raises:
        MedclrError: there are no such weights, they match nothing, or are of another network.
    """
    made_for = size_px or store_px
    if init == "random":
        pass
    elif init == "imagenet":
        network, made_for = EncoderConfig("efficientnet-lite0", slices=network.slices), 224
    elif Path(init).is_dir():
        _, facts = checkpoint.read_encoder(checkpoint.encoder_folder(Path(init)))
        try:
            trained, made_for = EncoderConfig(**facts["architecture"]), int(facts["size_px"])
        except (KeyError, TypeError, ValueError) as error:
            raise MedclrError(f"{init}: its encoder.json describes no encoder ({error}); export it again") from error
        if trained.slices > 1 and trained.slices != network.slices:
            raise MedclrError(
                f"{init}: its encoder sees {trained.slices} slices as channels, and {network.slices} are asked for; "
                f"set network.slices to {trained.slices}"
            )
        network = replace(trained, slices=network.slices)
    else:
        if not Path(init).is_file():
            raise MedclrError(
                f"{init}: is neither a run folder nor a file of weights; or start from random, or imagenet"
            )
        name = resnet_name(read_state_dict(Path(init)), init)
        network = EncoderConfig(name, stem="imagenet", normalise="imagenet", slices=network.slices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(network, made_for)
    report = load_weights(encoder, init)
    encoder.size_px = size_px or min(made_for, store_px)
    encoder.store_px = store_px
    return encoder, report
