"""Downstream tasks: one file each, holding its ``Config`` (frozen dataclass), its ``Model`` and its ``Task``.

A new file here is a new task. ``Model`` is what is trained and exported: it knows an encoder and the classes, and no
store. ``Task`` is what a model learns from in a store: which scans are labelled, what the loss is, how to judge.

Letters: n slices of a batch, C slices as channels, S side of a stored slice, m scans, K classes.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr.config import ViewsConfig, nearest
from medclr.data.loader import Batch
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder
from medclr.outcomes import Outcome

Ints = NDArray[np.int64]


class TaskModel(nn.Module):
    """Built as ``Model(config, encoder, classes)``; its tensors are what ``medclr.trained`` exports.

    Attributes:
        config: its Config, complete: with it and its tensors the model can be built again.
        encoder: what came pretrained; whatever is not in ``stages`` is new, and learns at the full rate.
        classes: names of the K outputs.
    """

    config: Any
    encoder: Encoder
    classes: tuple[str, ...]

    def stages(self) -> list[list[nn.Module]]:
        """What came pretrained, stage by stage from the image on: frozen, freed and slowed down by depth."""
        return self.encoder.stages()

    def start_from(self, run: Path) -> list[str]:
        """Take over what a run of pretraining kept besides its encoder; names of the tensors that were filled."""
        return []

    def training_batch(self, batch: Batch) -> Batch:
        """Slices as the views of training are drawn of them."""
        return batch

    def slice_logits(self, x: Tensor) -> Tensor:
        """Images [n,C,s,s] in [0,1], each for itself -> logits [n,K,...]: what a student learns from a teacher."""
        raise NotImplementedError

    def infer(self, batch: Batch) -> Tensor:
        """What the model says of slices of whole scans, ``batch.images`` [n,C,S,S] in physical units, in eval mode.

        Returns:
            classification: probabilities [m,K], a row for each distinct ``batch.scan`` in ascending order;
            segmentation: probabilities [n,K,S,S] on the stored grid, background first.
        """
        raise NotImplementedError


class Task:
    """Built as ``Task(config, store, modality)``: the labelled scans of a store, of one modality or of all.

    Attributes:
        config: its Config, complete: what was left to the store is filled in.
        classes: names of the K outputs.
        scans: rows of ``store.scans`` that carry what this task learns from, ascending.
        store: where the scans are.
        strata: patient -> stratum, by which budgets of patients are drawn alike; one for each patient of ``scans``.

    Raises:
        MedclrError: the store holds nothing to learn from; says what to give ``medclr index``.
    """

    config: Any
    classes: tuple[str, ...]
    scans: Ints
    strata: dict[str, str]
    store: Store

    def __init__(self, config: Any, store: Store, modality: str | None = None) -> None:
        raise NotImplementedError

    def check(self, scans: Ints, what: str) -> None:
        """Raise MedclrError if some class has no case among ``scans``; ``what`` names them (the 5 training cases)."""
        raise NotImplementedError

    def items(self, scans: Ints) -> Sequence[Any]:
        """The training items of ``scans``, shuffled anew each epoch by the loop: slices, or whole scans."""
        raise NotImplementedError

    def loss(self, model: Any, items: Sequence[Any], views: ViewsConfig, *, seed: int, step: int) -> Tensor:
        """The loss [] of a batch of items, their views drawn by (seed, step) alone."""
        raise NotImplementedError

    def judge(self, model: Any, scans: Ints) -> Outcome:
        """What the model in eval mode says of whole scans, against their labels."""
        raise NotImplementedError

    def draw(self, model: Any, outcome: Outcome, folder: Path, stamp: str = "") -> None:
        """Pictures of an outcome, each with the ``stamp`` on it; none unless the task has some."""


def names() -> list[str]:
    """Every task: the names of the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The task's module, with ``Config``, ``Model`` and ``Task``.

    Raises:
        MedclrError: there is no such task; names the nearest.
    """
    if name not in names():
        raise MedclrError(f"--task {name!r} is unknown{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
