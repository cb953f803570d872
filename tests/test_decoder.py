"""The decoder that pretraining leaves, and segmentation that starts from it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import medclr
from medclr import checkpoint, methods
from medclr.cli import main
from medclr.errors import MedclrError
from medclr.models.unet import FIRST, UNetDecoder, load_decoder
from medclr.track import read_metrics
from medclr.trained import load_model

PRETRAIN = {"epochs": 2, "batch": 8, "views.size_px": 16, "device": "cpu", "monitor.sample": 8}
TUNE = {"steps": 1, "batch": 4, "size_px": 16, "device": "cpu", "lr": 1e-9, "frozen_steps": 0, "weight_decay": 0}
DENSE = {"method": "dense", "dense.points": 6, "dense.distance": 2.0, "dense.width": 4}


@pytest.fixture(scope="module", autouse=True)
def tiny_network() -> Iterator[None]:
    with tiny.in_place_of("resnet18"):
        yield


@pytest.fixture(scope="module")
def run(volume_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dense"
    medclr.pretrain(volume_store, out, settings={**PRETRAIN, **DENSE, "data.split": "train"})
    return out


def tune(store: Path, out: Path, encoder: Path, **settings: Any) -> Path:
    medclr.finetune(store, out, task="segment", encoder=str(encoder), settings={**TUNE, **settings})
    return out


def decoder_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder" / "decoder.safetensors")


def assert_decoder(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    """That of a model which has hardly learnt is still that of the run; running statistics have moved."""
    found = load_file(model / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(found[f"decoder.{name}"], tensor, rtol=0, atol=1e-6)


def test_a_run_keeps_the_decoder_without_its_outputs(run: Path) -> None:
    facts = json.loads((run / "encoder" / "encoder.json").read_text())["decoder"]
    tensors = decoder_of(run)
    assert facts["tensors"] == len(tensors)
    assert (facts["width"], facts["slices"], facts["level"], facts["channels"]) == (4, 1, 0, [4, 4, 5, 5, 6])
    trained = checkpoint.load(sorted(run.glob("checkpoints/step-*.pt"))[-1])["method"]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained[f"decoder.{name}"])
    assert not any(name.startswith("head") for name in tensors)


def test_segmentation_loads_both_and_the_match_report_says_so(run: Path, volume_store: Path, tmp_path: Path) -> None:
    out = tune(volume_store, tmp_path / "run", run)
    lines = (out / "match.txt").read_text().splitlines()
    loaded = {line.split("\t")[1] for line in lines if line.startswith("loaded\t")}
    assert loaded == {f"decoder.{name}" for name in decoder_of(run)} | {
        f"encoder.{name}" for name in load_file(run / "encoder" / "encoder.safetensors")
    }
    assert [line for line in lines if line.startswith("new\t")] == [
        "new\tdecoder.head.weight",
        "new\tdecoder.head.bias",
    ]
    assert_decoder(out, decoder_of(run))
    model = load_model(out).model
    assert model.config.width == 4  # type: ignore[attr-defined]
    again = tune(volume_store, tmp_path / "again", run)
    assert (again / "predictions.csv").read_bytes() == (out / "predictions.csv").read_bytes()


def test_the_width_is_that_of_the_run_or_one_sentence(run: Path, volume_store: Path, tmp_path: Path) -> None:
    tune(volume_store, tmp_path / "same", run, **{"segment.width": 4})
    with pytest.raises(MedclrError, match=r"segment.width: 8, but the decoder of .*dense has 4; leave it out, or set"):
        tune(volume_store, tmp_path / "other", run, **{"segment.width": 8})
    assert not (tmp_path / "other").exists()
    out = tune(volume_store, tmp_path / "new", run, **{"segment.width": 8, "segment.decoder": "new"})
    assert "loaded\tdecoder" not in (out / "match.txt").read_text()
    assert load_model(out).model.config.width == 8  # type: ignore[attr-defined]


def test_without_a_decoder_to_start_from_it_is_new(volume_store: Path, tmp_path: Path) -> None:
    medclr.pretrain(volume_store, tmp_path / "simclr", settings=PRETRAIN)
    medclr.finetune(
        volume_store,
        tmp_path / "run",
        task="segment",
        encoder=str(tmp_path / "simclr"),
        settings=TUNE,
        transductive=True,
    )
    assert "loaded\tdecoder" not in (tmp_path / "run" / "match.txt").read_text()
    assert load_model(tmp_path / "run").model.config.width == 16  # type: ignore[attr-defined]


def test_neighbouring_slices_change_nothing_at_first(run: Path, volume_store: Path, tmp_path: Path) -> None:
    out = tune(volume_store, tmp_path / "run", run, **{"network.slices": 3})
    tensors = decoder_of(run)
    narrow = tensors.pop(FIRST)
    assert_decoder(out, tensors)
    wide = load_file(out / "model" / "model.safetensors")[f"decoder.{FIRST}"]
    torch.testing.assert_close(wide[:, [1, *range(3, wide.shape[1])]], narrow, rtol=0, atol=1e-6)
    assert wide[:, [0, 2]].abs().max() < 1e-6


def test_levels_that_were_not_trained_are_new(volume_store: Path, tmp_path: Path) -> None:
    settings = {**PRETRAIN, **DENSE, "data.split": "train", "dense.level": 1}
    medclr.pretrain(volume_store, tmp_path / "coarse", settings=settings)
    out = tune(volume_store, tmp_path / "run", tmp_path / "coarse")
    text = (out / "match.txt").read_text()
    assert "new\tdecoder.levels.0.conv_0.conv.weight" in text
    assert "loaded\tdecoder.levels.1.conv_0.conv.weight" in text


def test_what_does_not_fit_or_is_damaged_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="its decoder is of another shape"):
        load_decoder(UNetDecoder((4, 4, 5, 5, 7), 1, 2, 4), run)
    folder = tmp_path / "run" / "encoder"
    folder.mkdir(parents=True)
    for path in (run / "encoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "decoder.safetensors").write_bytes(b"x")
    with pytest.raises(MedclrError, match=r"decoder\.safetensors: does not match its checksum"):
        load_decoder(UNetDecoder((4, 4, 5, 5, 6), 1, 2, 4), tmp_path / "run")


def test_the_decoder_is_trained_after_the_encoder(volume_store: Path, tmp_path: Path) -> None:
    """One after the other: the whole slices first, then the decoder on the encoder as it is."""
    medclr.pretrain(
        volume_store, tmp_path / "first", settings={**PRETRAIN, "method": "positional", "positional.reach": 0.4}
    )
    settings = {**PRETRAIN, **DENSE, "dense.frozen": True, "init": str(tmp_path / "first")}
    medclr.pretrain(volume_store, tmp_path / "second", settings=settings)
    first, second = (load_file(tmp_path / name / "encoder" / "encoder.safetensors") for name in ("first", "second"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", [name for name in methods.names() if name != "simclr"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    name: str, volume_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PRETRAIN | {"method": name} | (DENSE | {"dense.global_weight": 0.5} if name == "dense" else {})
    medclr.pretrain(volume_store, tmp_path / "whole", settings=settings)
    words = ["pretrain", "--store", str(volume_store), "--out", str(tmp_path / "run")]
    words += [f"--{key}={value}" for key, value in settings.items()]
    method, calls = methods.get(name).Method, []
    objective = method.objective

    def terminated(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return objective(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(method, "objective", terminated)
        assert main(words) == 0
    assert len(read_metrics(tmp_path / "run")) == 3
    assert main(words) == 0
    for file in ("encoder.safetensors", "decoder.safetensors"):
        expected = tmp_path / "whole" / "encoder" / file
        assert expected.exists() == (file == "encoder.safetensors" or name in ("dense", "masked"))
        if expected.exists():
            tensors = load_file(tmp_path / "run" / "encoder" / file)
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(expected).items())
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "run")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
