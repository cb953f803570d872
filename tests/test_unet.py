"""The decoder: every encoder, every size, and a gradient that reaches everything."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medclr.config import EncoderConfig
from medclr.models.encoder import build_encoder
from medclr.models.unet import UNetDecoder

ENCODERS: tuple[dict[str, Any], ...] = (
    {"stem": "imagenet"},
    {"stem": "medium"},
    {"stem": "small"},
    {"stem": "medium", "slices": 3},
    {"stem": "imagenet", "normalise": "imagenet", "slices": 5},
    {"name": "resnet34", "stem": "medium"},
    {"name": "resnet50", "stem": "imagenet", "width": 2},
    {"name": "efficientnet-lite0"},
    {"name": "efficientnet-lite0", "slices": 3},
)


@pytest.mark.parametrize("settings", ENCODERS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_logits_have_the_size_of_the_image(settings: dict[str, Any]) -> None:
    config = EncoderConfig(**settings)
    encoder = build_encoder(config, size_px=64)
    decoder = UNetDecoder(encoder.channels, config.slices, outputs=4, width=8).eval()
    encoder.eval()
    with torch.inference_mode():
        for height, width in ((32, 32), (33, 33), (47, 61), (40, 48)):
            x = torch.rand(2, config.slices, height, width)
            logits = decoder(x, encoder.pyramid(x))
            assert logits.shape == (2, 4, height, width)
            assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0"])
def test_the_gradient_reaches_every_tensor(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name), size_px=64)  # type: ignore[arg-type]
    decoder = UNetDecoder(encoder.channels, 1, outputs=3, width=8)
    for module in encoder.modules():  # a block that starts as the identity hides the gradient of what is in it
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    x = torch.rand(4, 1, 64, 64)
    logits = decoder(x, encoder.pyramid(x))
    F.cross_entropy(logits, torch.randint(0, 3, (4, 64, 64))).backward()
    for part in (encoder, decoder):
        for key, tensor in part.named_parameters():
            assert tensor.grad is not None, key
            assert float(tensor.grad.abs().max()) > 0, key


def test_no_map_of_the_pyramid_is_idle_and_images_do_not_mix() -> None:
    torch.manual_seed(0)
    channels, sides = (16, 24, 40), (20, 10, 5)
    decoder = UNetDecoder(channels, 1, outputs=2, width=16).eval()
    image = torch.rand(2, 1, 39, 39)
    maps = [torch.rand(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    logits = decoder(image, maps)
    for i in range(4):
        changed = [tensor.clone() for tensor in (image, *maps)]
        changed[i][0] += torch.rand_like(changed[i][0])
        other = decoder(changed[0], changed[1:])
        assert not torch.allclose(other[0], logits[0])
        assert torch.allclose(other[1], logits[1], atol=1e-6)


def test_it_sees_a_border_of_one_pixel() -> None:
    """The image is a skip of its own: the gradient at a pixel is its own pixel's more than its neighbours'."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(stem="imagenet"), size_px=64).eval()
    decoder = UNetDecoder(encoder.channels, 1, outputs=2, width=16).eval()
    x = torch.rand(1, 1, 64, 64)
    pyramid = [level.detach() for level in encoder.pyramid(x)]
    x.requires_grad_()
    decoder(x, pyramid)[0, 1, 30, 30].backward()
    assert x.grad is not None
    reached = x.grad[0, 0].abs() > 1e-3 * float(x.grad.abs().max())
    assert reached[28:33, 28:33].all(), "two 3 x 3 convolutions see 5 x 5 pixels"
    reached[28:33, 28:33] = False
    assert not reached.any()


@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_width_sets_the_cost(width: int) -> None:
    """Channels double with each coarser size, up to the map's own."""
    decoder = UNetDecoder((64, 64, 128, 256, 512), 1, outputs=2, width=width)
    made = [level.conv_1.conv.out_channels for level in decoder.levels]  # type: ignore[union-attr]
    assert made == [min(width * 2**i, most) for i, most in enumerate((width, 64, 64, 128, 256))]
