"""The encoder: shapes, its start as the identity, and its way to disk and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medclr.checkpoint import export_encoder
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, build_encoder, load_encoder
from medclr.models.resnet import BLOCKS

TORCHVISION_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
"""As torchvision's documentation gives them: three input channels and 1000 classes."""


def config(name: str = "resnet18", **settings: Any) -> EncoderConfig:
    return EncoderConfig(name, **settings)  # type: ignore[arg-type]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def used(encoder: Encoder, seed: int = 0) -> Encoder:
    """As after some training: no gamma at zero, statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in encoder.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.2, generator=generator)
    encoder.eval()
    return encoder


@pytest.mark.parametrize("name", BLOCKS)
def test_every_depth_has_torchvisions_parameters(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(config(name), size_px=224)
        wide = build_encoder(config(name, width=2), size_px=224)
    features = 512 if name in ("resnet18", "resnet34") else 2048
    assert encoder.features == features
    classifier, two_colours = 1000 * features + 1000, 2 * 64 * 7 * 7
    assert parameters(encoder) + classifier + two_colours == TORCHVISION_PARAMETERS[name]
    assert wide.features == 2 * features
    assert parameters(wide) > 3.9 * parameters(encoder)
    assert all(w.shape[0] == 2 * t.shape[0] for w, t in zip(wide.parameters(), encoder.parameters(), strict=True))


def test_a_quarter_of_the_width_is_a_quarter_of_the_channels_everywhere() -> None:
    encoder, quarter = (build_encoder(config(width=width, stem="medium"), size_px=64) for width in (1, 0.25))
    assert list(quarter.channels) == [n // 4 for n in encoder.channels]
    assert [m.shape[1] for m in quarter.pyramid(torch.rand(2, 1, 64, 64))] == list(quarter.channels)
    assert all(4 * w.shape[0] == t.shape[0] for w, t in zip(quarter.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize("width", [0, -1, 0.3])
def test_a_width_without_whole_channels_is_refused(width: float) -> None:
    with pytest.raises(MedclrError, match=r"encoder\.width must be a multiple of 1/8"):
        config(width=width)


@pytest.mark.parametrize(
    ("stem", "size_px", "sides"),
    [
        ("auto", 32, [32, 32, 16, 8, 4]),
        ("auto", 33, [17, 9, 5, 3, 2]),
        ("auto", 224, [112, 56, 28, 14, 7]),
        ("imagenet", 32, [16, 8, 4, 2, 1]),
        ("medium", 64, [32, 32, 16, 8, 4]),
        ("small", 64, [64, 64, 32, 16, 8]),
    ],
)
def test_stems(stem: str, size_px: int, sides: list[int]) -> None:
    with torch.device("meta"):
        encoder = build_encoder(config(stem=stem), size_px)
        x = torch.empty(2, 1, size_px, size_px)
        maps = encoder.pyramid(x)
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip((64, 64, 128, 256, 512), sides, strict=True)]
    assert encoder(x).shape == (2, 512)


def test_each_block_starts_as_the_identity() -> None:
    """ResNet-18's first stage has no downsampling, so it must pass on what comes, exactly."""
    for name in ("resnet18", "resnet50"):
        encoder = build_encoder(config(name), size_px=64)
        stem, stage = encoder.pyramid(torch.rand(2, 1, 64, 64))[:2]
        pooled = encoder.maxpool(stem)
        for i, block in enumerate(encoder.layer2):
            if i > 0:
                x = torch.rand(2, block.conv1.in_channels, 8, 8)
                assert torch.equal(block(x), x)
        if name == "resnet18":
            assert torch.equal(stage, pooled)


def test_features_are_the_mean_of_the_last_map() -> None:
    encoder = used(build_encoder(config(), size_px=64))
    x = torch.rand(2, 1, 45, 67)  # neither square nor of the size it was made for
    torch.testing.assert_close(encoder(x), encoder.pyramid(x)[-1].mean((2, 3)))


def test_channels_last_changes_nothing_but_the_layout() -> None:
    encoder = used(build_encoder(config(), size_px=32))
    x = torch.rand(2, 1, 32, 32)
    expected = encoder(x)
    encoder = encoder.to(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("settings", [{}, {"stem": "medium"}, {"normalise": "imagenet"}])
def test_exported_encoder_comes_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    encoder = used(build_encoder(config(**settings), size_px=32))
    export_encoder(tmp_path / "run" / "encoder", encoder, {"manifest_sha256": "ab"})
    x = torch.rand(3, 1, 32, 32)
    for path in (tmp_path / "run", tmp_path / "run" / "encoder", str(tmp_path / "run")):
        loaded = load_encoder(path)
        assert not loaded.training
        assert torch.equal(loaded(x), encoder(x))
        assert (loaded.config, loaded.size_px, loaded.features) == (encoder.config, 32, encoder.features)
    facts = json.loads((tmp_path / "run/encoder/encoder.json").read_text())
    assert facts["manifest_sha256"] == "ab"
    assert facts["architecture"]["name"] == "resnet18"


def test_encoder_json_of_another_network_is_refused(tmp_path: Path) -> None:
    export_encoder(tmp_path, build_encoder(config(), size_px=32), {})
    facts = json.loads((tmp_path / "encoder.json").read_text())
    for wrong in ({"name": "resnet34"}, {"stem": "imagenet"}, {"depth": 18}):
        (tmp_path / "encoder.json").write_text(
            json.dumps({**facts, "architecture": {**facts["architecture"], **wrong}})
        )
        with pytest.raises(MedclrError, match="describe different networks"):
            load_encoder(tmp_path)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(MedclrError, match="'resnet51' is unknown; the nearest known one is 'resnet50'"):
        build_encoder(config("resnet51"), 64)
    with pytest.raises(MedclrError, match="'smal' is unknown; the nearest known one is 'small'"):
        build_encoder(config(stem="smal"), 64)
