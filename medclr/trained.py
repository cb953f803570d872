"""A trained model on disk: what ``finetune`` and ``distill`` leave, and ``predict`` reads.

RUN/model/model.safetensors   its tensors
RUN/model/model.json          task, classes, architecture, what it was trained on, and the tensors' checksum
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from medclr import checkpoint, files, tasks
from medclr.config import EncoderConfig
from medclr.errors import MedclrError, one_line
from medclr.models.encoder import build_encoder
from medclr.tasks import TaskModel

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Trained:
    """A model that was loaded, in eval mode."""

    path: Path
    """Its folder."""
    task: str
    """A file of ``medclr/tasks``."""
    config: Any
    """The task's Config."""
    model: TaskModel
    modalities: tuple[str, ...]
    """Of the scans that it was trained on."""
    patients: frozenset[str]
    """Ids of the patients that it was trained on, labelled or not: nobody of them may test it."""
    facts: Mapping[str, Any]
    """All that model.json says."""


def export_model(folder: Path, task: str, config: Any, model: TaskModel, facts: Mapping[str, Any]) -> None:
    """Write a model.

    Args:
        folder: to write to.
        task: name of its task.
        config: the task's Config.
        model: its tensors.
        facts: plain facts of its origin; must hold ``modalities`` and ``patients``.
    """
    encoder = model.encoder
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors)
    checksum = checkpoint.write_bytes(folder / "model.safetensors", content)
    described = {
        "format_version": FORMAT_VERSION,
        "task": task,
        "config": asdict(config),
        "classes": list(model.classes),
        "encoder": encoder.description() | {"store_px": encoder.store_px},
    }
    files.write_json(folder / "model.json", {**described, **facts, "sha256": checksum})


def load_model(path: Path | str) -> Trained:
    """The model of a run folder (or a model folder), in eval mode.

    Raises:
        MedclrError: there is none, it is of another version, or a file is damaged.
    """
    found = [folder for folder in (Path(path), Path(path) / "model") if (folder / "model.json").is_file()]
    if not found:
        raise MedclrError(f"{path}: holds no trained model (model/model.json); name a finished run of medclr finetune")
    folder = found[0]
    try:
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if facts["format_version"] != FORMAT_VERSION:
            raise MedclrError(
                f"{folder}: has model format {facts['format_version']}, this medclr reads {FORMAT_VERSION}"
            )
        if files.sha256(folder / "model.safetensors") != facts["sha256"]:
            raise MedclrError(f"{folder}: model.safetensors does not match its checksum; run the training again")
        module = tasks.get(facts["task"])
        described = facts["encoder"]
        encoder = build_encoder(EncoderConfig(**described["architecture"]), described["size_px"])
        encoder.store_px = described["store_px"]
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["config"].items()}  # JSON has none
        config = module.Config(**settings)
        model: TaskModel = module.Model(config, encoder, tuple(facts["classes"]))
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        patients = frozenset(facts["patients"])
        loaded = Trained(folder, facts["task"], config, model, tuple(facts["modalities"]), patients, facts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MedclrError(
            f"{folder}: cannot be read as a trained model ({one_line(error)}); run the training again"
        ) from error
    encoder.seen_patients = loaded.patients
    model.eval()
    return loaded
