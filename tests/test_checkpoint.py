"""Checkpoints and exports: whole or refused, whatever happened to the file."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclr import checkpoint, files
from medclr.errors import MedclrError
from medclr.models.heads import ProjectionHead


def state(step: int) -> dict[str, Any]:
    """What a training loop would save."""
    return {"step": step, "lr": 0.1, "model": {"w": torch.full((4, 5), float(step))}, "names": ["a"], "tuple": (1, 2)}


def run(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(tmp_path, step, state(step))
    return tmp_path


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    path = checkpoint.save(tmp_path, 12, state(12))
    assert path == tmp_path / "checkpoints" / "step-0000012.pt"
    assert checkpoint.latest(tmp_path) == path
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"].pop("w"), torch.full((4, 5), 12.0))
    assert loaded == {"step": 12, "lr": 0.1, "model": {}, "names": ["a"], "tuple": (1, 2)}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    run(tmp_path, 5, 10, 9_999_999, 10_000_000)  # the last has one digit more
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{n}.pt{end}" for n in ("10000000", "9999999") for end in ("", ".sha256")]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-10000000.pt"


def test_checksum_is_what_sha256sum_checks(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(1))
    subprocess.run(["sha256sum", "--check", "--status", path.name + ".sha256"], cwd=path.parent, check=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


def garble_the_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_bytes(b"\xff\x00" * 40)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_checksum, garble_the_checksum])
def test_damaged_one_is_passed_over_and_said(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "step-0000002.pt"
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-0000001.pt"
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(f"{newest} ")
    with pytest.raises(MedclrError, match=r"step-0000002.pt (does not match|has no checksum).*remove it to resume"):
        checkpoint.load(newest)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        truncate(path)
    with pytest.raises(MedclrError, match="checkpoints: every checkpoint is damaged; remove this folder"):
        checkpoint.latest(tmp_path)


def test_killed_while_the_first_is_written_is_a_fresh_start(tmp_path: Path) -> None:
    run(tmp_path, 1)
    lose_the_checksum(tmp_path / "checkpoints" / "step-0000001.pt")
    assert checkpoint.latest(tmp_path) is None


def test_damaged_later_ones_never_push_out_a_whole_one(tmp_path: Path) -> None:
    run(tmp_path, 10)
    for step in (20, 30):
        truncate(checkpoint.save(tmp_path, step, state(step), keep=3))
    path = checkpoint.save(tmp_path, 15, state(15), keep=2)
    assert checkpoint.latest(tmp_path) == path
    assert [p.name for p in sorted(path.parent.glob("*.pt"))] == ["step-0000010.pt", "step-0000015.pt"]


def test_a_whole_one_is_not_written_again(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 10, state(10))
    before = path.stat().st_ino
    assert checkpoint.save(tmp_path, 10, state(10)) == path
    assert path.stat().st_ino == before
    truncate(path)
    checkpoint.save(tmp_path, 10, state(10))
    assert checkpoint.latest(tmp_path) == path


def test_interrupted_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 1)

    def killed(path: Path, content: bytes) -> None:
        path.write_text("half of a checkp")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, state(2))
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-0000001.pt"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_said_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 1)

    def full(path: Path, content: bytes) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MedclrError, match=r"step-0000002.pt: the disk is full"):
        checkpoint.save(tmp_path, 2, state(2))
    with pytest.raises(MedclrError, match=r"encoder.safetensors: the disk is full"):
        exported(tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-0000001.pt"


def test_missing_file_and_foreign_content(tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match=r"none.pt does not exist"):
        checkpoint.load(tmp_path / "none.pt")
    path = checkpoint.save(tmp_path, 1, {"path": Path("x")})  # not a plain type: refused on loading, not executed
    with pytest.raises(MedclrError, match="is not a checkpoint of medclr"):
        checkpoint.load(path)


class Exportable(nn.Linear):
    def description(self) -> dict[str, Any]:
        return {"architecture": {"name": "linear"}, "size_px": 3}


def exported(tmp_path: Path) -> tuple[Path, Exportable]:
    module = Exportable(3, 2)
    checkpoint.export_encoder(tmp_path / "encoder", module, {"modalities": ["CT"]})
    assert not (tmp_path / "encoder" / "head.safetensors").exists()
    return tmp_path / "encoder", module


def test_export_comes_back_and_a_person_can_read_it(tmp_path: Path) -> None:
    folder, module = exported(tmp_path)
    assert checkpoint.encoder_folder(tmp_path) == checkpoint.encoder_folder(folder) == folder
    tensors, facts = checkpoint.read_encoder(folder)
    expected: dict[str, Tensor] = module.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert facts.pop("sha256") == files.sha256(folder / "encoder.safetensors")
    assert facts == {
        "format_version": 1, "architecture": {"name": "linear"}, "size_px": 3, "modalities": ["CT"], "tensors": 2,
    }  # fmt: skip


def test_the_head_comes_back_or_none_or_is_refused(tmp_path: Path) -> None:
    folder, module = exported(tmp_path)
    assert checkpoint.read_head(folder) is None
    head = ProjectionHead(features=6, layers=3, out_features=4)
    checkpoint.export_encoder(folder, module, {}, head)
    found = checkpoint.read_head(folder)
    assert found is not None
    tensors, facts = found
    assert (facts["layers"], facts["features"], facts["out_features"]) == (3, 6, 4)
    ProjectionHead(facts["features"], facts["layers"], facts["out_features"]).load_state_dict(tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in head.state_dict().items())
    assert checkpoint.read_encoder(folder)[1]["sha256"] == files.sha256(folder / "encoder.safetensors")
    flip_a_bit(folder / "head.safetensors")
    with pytest.raises(MedclrError, match=r"head.safetensors: does not match its checksum"):
        checkpoint.read_head(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(MedclrError, match=r"head.safetensors: cannot be read"):
        checkpoint.read_head(folder)


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="holds no exported encoder"):
        checkpoint.encoder_folder(tmp_path)
    folder, _ = exported(tmp_path)
    facts = json.loads((folder / "encoder.json").read_text())

    flip_a_bit(folder / "encoder.safetensors")
    with pytest.raises(MedclrError, match=r"encoder.safetensors: does not match its checksum"):
        checkpoint.read_encoder(folder)
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(MedclrError, match=r"encoder.safetensors: cannot be read"):
        checkpoint.read_encoder(folder)
    (folder / "encoder.json").write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(MedclrError, match=r"encoder.json: has format 99, this medclr reads 1"):
        checkpoint.read_encoder(folder)
    for text in ('{"format_ver', "[]", "{}"):
        (folder / "encoder.json").write_text(text)
        with pytest.raises(MedclrError, match=r"encoder.json: is not the description of an encoder"):
            checkpoint.read_encoder(folder)
