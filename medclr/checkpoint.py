"""What a run leaves on disk: checkpoints to resume from, and the exported encoder; read only if the checksum matches.

RUN/checkpoints/step-0000100.pt          training state, tensors and plain types only
RUN/checkpoints/step-0000100.pt.sha256   its checksum, as sha256sum writes it; written last
RUN/checkpoints/best.pt                  the same, of the step that the monitor liked best
RUN/encoder/encoder.safetensors          the encoder's tensors
RUN/encoder/head.safetensors             the projection head's, of methods that have one
RUN/encoder/decoder.safetensors          the U-Net decoder's, of methods that have one
RUN/encoder/encoder.json                 architecture, input size, origin, and checksums of the tensors; written last
"""

import hashlib
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from medclr import files
from medclr.errors import MedclrError

FORMAT_VERSION = 1
"""Of encoder.json."""

log = logging.getLogger(__name__)


def save(run_dir: Path, step: int, state: dict[str, Any], *, keep: int = 2, best: bool = False) -> Path:
    """Write the training ``state`` after ``step`` steps, and remove all but the newest ``keep`` checkpoints.

    ``state`` holds tensors, numbers, strings, and lists and dicts of these; only such can be loaded. With ``best`` it
    is the best one instead, which stays until a better one comes. What is there and whole is not written again, and
    what is there of later steps was passed over as damaged: it is removed.
    """
    path = run_dir / "checkpoints" / ("best.pt" if best else f"step-{step:07d}.pt")
    if not best and _damage(path) is None:
        return path
    content = io.BytesIO()
    torch.save(state, content)
    if best:  # between its two files it is damaged, and nobody resumes from it
        _checksum_path(path).unlink(missing_ok=True)
    checksum = write_bytes(path, content.getbuffer())
    files.write_text(_checksum_path(path), f"{checksum}  {path.name}\n")
    if not best:
        found = _checkpoints(run_dir)
        kept = found[: found.index(path) + 1][-keep:]
        for other in set(found) - set(kept):
            _checksum_path(other).unlink(missing_ok=True)
            other.unlink()
    return path


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None if it has none yet. A damaged newer one is logged and passed over.

    Raises:
        MedclrError: there are checkpoints that were written to the end, but all are damaged.
    """
    found = _checkpoints(run_dir)
    for path in reversed(found):
        if (damage := _damage(path)) is None:
            return path
        log.warning("%s %s; looking for the checkpoint before it", path, damage)
    if any(_checksum_path(path).is_file() for path in found):
        raise MedclrError(f"{found[0].parent}: every checkpoint is damaged; remove this folder to start the run again")
    return None


def load(path: Path) -> dict[str, Any]:
    """The training state in a checkpoint, its tensors on the CPU.

    Raises:
        MedclrError: the file is missing, truncated or altered.
    """
    if (damage := _damage(path)) is not None:
        raise MedclrError(f"{path} {damage}; remove it to resume from the checkpoint before it")
    return from_bytes(path.read_bytes(), path)


def from_bytes(content: bytes, path: Path) -> dict[str, Any]:
    """The training state in the bytes of the checkpoint ``path``, its tensors on the CPU.

    Raises:
        MedclrError: it is not one.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise MedclrError(f"{path} is not a checkpoint of medclr ({error}); remove it") from error
    return state


def write_bytes(path: Path, content: bytes | memoryview) -> str:
    """Write bytes atomically; their SHA-256. From memory, because torch and safetensors hide that a disk is full."""
    with files.writing(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not path.is_file():
        return "does not exist"
    if not _checksum_path(path).is_file():
        return "has no checksum beside it: its writing was interrupted"
    if files.sha256(path) != _checksum_path(path).read_text("utf-8", "replace").split(" ")[0]:
        return "does not match its checksum: it is truncated or was altered"
    return None


class Describable(Protocol):
    """A module that can be exported: one of ``medclr.models`` that is an encoder, a projection head or a decoder."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def description(self) -> dict[str, Any]:
        """The plain facts from which the module can be built again."""
        ...


def export_encoder(
    folder: Path,
    encoder: Describable,
    meta: dict[str, Any],
    head: Describable | None = None,
    decoder: Describable | None = None,
) -> None:
    """Write the tensors of the encoder, of the projection ``head`` and of the ``decoder`` it was trained under.

    encoder.json holds the encoder's ``description``, ``meta``, plain facts of its origin, and under "head" and
    "decoder" what is known of them.
    """
    facts = {"format_version": FORMAT_VERSION, **encoder.description(), **meta}
    facts |= _write_tensors(folder / "encoder.safetensors", encoder)
    for name, module in (("head", head), ("decoder", decoder)):
        if module is not None:
            facts[name] = module.description() | _write_tensors(folder / f"{name}.safetensors", module)
    files.write_json(folder / "encoder.json", facts)


def _write_tensors(path: Path, module: Describable) -> dict[str, Any]:
    """What encoder.json says of the file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return {"tensors": len(tensors), "sha256": write_bytes(path, safetensors.torch.save(tensors))}


def encoder_folder(path: Path) -> Path:
    """The encoder folder that ``path`` (a run folder or the encoder folder itself) stands for.

    Raises:
        MedclrError: there is no exported encoder.
    """
    for folder in (path, path / "encoder"):
        if (folder / "encoder.json").is_file():
            return folder
    raise MedclrError(f"{path}: holds no exported encoder (encoder/encoder.json); name a finished pretraining run")


def read_encoder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of an exported encoder.

    Raises:
        MedclrError: written by another version, or damaged.
    """
    facts = _read_facts(folder / "encoder.json")
    return _read_tensors(folder / "encoder.safetensors", facts["sha256"]), facts


def read_head(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors of the projection head that an exported encoder was trained under, and its ``layers``, ``features`` and
    ``out_features``; None if it was trained without one. SimCLRv2 fine-tunes from its first layer, ``hidden.0``.

    Raises:
        MedclrError: as ``read_encoder``.
    """
    return _read_part(folder, "head")


def read_decoder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors of the decoder that an exported encoder was trained under, without its outputs, and its ``channels``,
    ``slices``, ``width`` and ``level``; None if it was trained without one.

    Raises:
        MedclrError: as ``read_encoder``.
    """
    return _read_part(folder, "decoder")


def _read_part(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    facts: dict[str, Any] | None = _read_facts(folder / "encoder.json").get(name)
    if facts is None:
        return None
    return _read_tensors(folder / f"{name}.safetensors", facts["sha256"]), facts


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, _ = facts["format_version"], facts["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise MedclrError(f"{path}: is not the description of an encoder; export the encoder again") from error
    if version != FORMAT_VERSION:
        raise MedclrError(
            f"{path}: has format {version}, this medclr reads {FORMAT_VERSION}; use the medclr that wrote it"
        )
    return facts


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if files.sha256(path) != checksum:
            raise MedclrError(f"{path}: does not match its checksum in encoder.json; export the encoder again")
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise MedclrError(f"{path}: cannot be read ({error}); export the encoder again") from error
    return tensors
