"""A trained model on disk: it comes back as it was, or in one sentence not at all."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from medclr import files
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import build_encoder
from medclr.tasks import classify, segment
from medclr.trained import export_model, load_model

FACTS = {"modalities": ["CT", "MR"], "patients": ["p2", "p1"], "more": {"a": 1}}


@pytest.fixture(scope="module", autouse=True)
def tiny_network() -> Iterator[None]:
    with tiny.in_place_of("resnet18"):
        yield


def a_model(config: Any = None, slices: int = 3) -> Any:
    encoder = build_encoder(EncoderConfig(slices=slices), 16)
    encoder.store_px = 48
    module = segment if isinstance(config, segment.Config) else classify
    return tiny.used(module.Model(config or classify.Config(pool="attention"), encoder, ("b", "a")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = a_model()
    export_model(tmp_path / "run" / "model", "classify", model.config, model, FACTS)
    return tmp_path / "run"


@pytest.mark.parametrize("folder", ["", "model"])
def test_a_model_comes_back(folder: str, run: Path) -> None:
    loaded, model = load_model(run / folder), a_model().eval()
    assert (loaded.path, loaded.task, loaded.config) == (run / "model", "classify", model.config)
    assert (loaded.modalities, loaded.patients) == (("CT", "MR"), {"p1", "p2"})
    assert loaded.facts["more"] == {"a": 1}
    encoder = loaded.model.encoder
    assert (encoder.config.slices, encoder.size_px, encoder.store_px) == (3, 16, 48)
    assert encoder.seen_patients == {"p1", "p2"}
    assert loaded.model.classes == ("b", "a")
    assert not any(module.training for module in loaded.model.modules())
    x, scan = torch.rand(4, 3, 16, 16), torch.tensor([0, 0, 1, 0])
    assert torch.equal(loaded.model(x, scan), model(x, scan))
    assert not list(run.rglob("*.tmp"))


def test_settings_with_several_values_come_back_equal(tmp_path: Path) -> None:
    config = segment.Config(labels=(3, 1), names=("b", "a"), width=8)
    export_model(tmp_path / "model", "segment", config, a_model(config), FACTS)
    assert load_model(tmp_path).config == config


def test_the_same_model_is_written_the_same(run: Path, tmp_path: Path) -> None:
    model = a_model()
    export_model(tmp_path / "again", "classify", model.config, model, FACTS)
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_a_stem_that_was_settled_stays(tmp_path: Path) -> None:
    """Made for 64 px and fine-tuned on 32 px, for which 'auto' would be another stem."""
    encoder = build_encoder(EncoderConfig("resnet34"), 64)
    encoder.size_px = 32
    model = classify.Model(classify.Config(), encoder, ("a", "b"))
    export_model(tmp_path / "model", "classify", model.config, model, FACTS)
    assert load_model(tmp_path).model.encoder.config.stem == "imagenet"


def altered(**facts: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        said = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({k: v for k, v in {**said, **facts}.items() if v is not None}))

    return alter


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors")
    altered(sha256=files.sha256(folder / "model.safetensors"))(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.json").unlink(), "holds no trained model"),
        (lambda folder: (folder / "model.json").write_text("{"), "cannot be read as a trained model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a trained model"),
        (truncated, "does not match its checksum"),
        (without_a_tensor, "Missing key"),
        (altered(format_version=2), "has model format 2, this medclr reads 1"),
        (altered(task="clasify"), "'clasify' is unknown; the nearest known one is 'classify'"),
        (altered(classes=["a", "b", "c"]), "size mismatch for classifier.weight"),
        (altered(config={"pol": "mean"}), "cannot be read as a trained model"),
        (altered(patients=None), "cannot be read as a trained model"),
        (altered(encoder={}), "cannot be read as a trained model"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(damage: Callable[[Path], Any], sentence: str, run: Path) -> None:
    damage(run / "model")
    with pytest.raises(MedclrError) as error:
        load_model(run)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
