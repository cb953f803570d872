"""Pretraining methods: one file each, holding its ``Config`` (frozen dataclass) and its ``Method`` (module).

A new file here is a new method: ``Method`` derives from ``PretrainingMethod``, which says what the loop asks of it.

Letters: B images, m of them in a chunk, F features of the encoder, K components of the embedding, S the image side, C
neighbouring slices as channels.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr.augment.views import Draws
from medclr.config import nearest
from medclr.data.loader import Batch
from medclr.data.store import Store
from medclr.distributed import Group
from medclr.errors import MedclrError


class PretrainingMethod(nn.Module):
    """Built as ``Method(config, encoder)``; its parameters are what is trained.

    Attributes:
        encoder: what is kept.
        head: kept too where it is a ``medclr.models.heads.ProjectionHead``.
        decoder: kept too where it is a ``medclr.models.unet.UNetDecoder``: segmentation starts from it.
    """

    encoder: nn.Module

    def check(self, store: Store, indices: NDArray[np.int64]) -> None:
        """Raise MedclrError if there is nothing to learn from those slices of ``store``; before a run is begun."""

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,C,S,S] -> features [B,F], and the embeddings [B,K] in which the loss is taken, for the monitor.

        A method that embeds several places of an image has as many rows for each image.
        """
        raise NotImplementedError

    def inputs(self, batch: Batch, draws: Draws, view: int, rows: Tensor) -> tuple[Tensor, ...]:
        """What ``forward`` needs besides view 0 (a) or 1 (b) of ``batch``, which holds the ``rows`` [m] of the step.

        A function of (seed, step, view, row) alone, [m,...] each, on the CPU; they arrive in the type of the weights.
        """
        return ()

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` gave for the two views of a batch, [B,K] each -> the loss, and what else to log.

        A function of these alone, without the network: so a batch may be embedded in chunks. ``facts`` is what the
        store knows of the slices (``medclr.data.loader.Facts``). With ``group`` the negatives come from all processes;
        the batch's loss is the mean over them. What is logged are 0-d tensors, detached.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Images [B,C,S,S], and their ``inputs`` -> embeddings [B,K]."""
        return self.embed(x)[1]

    def loss(
        self,
        a: Tensor,
        b: Tensor,
        facts: Any = None,
        group: Group | None = None,
        inputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ()),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views [B,C,S,S] of one batch, and the ``inputs`` of each -> as ``objective``.

        Both go through the network in one pass, as in the reference, so that the batch-norm statistics are those of all
        2B views.
        """
        both = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
        za, zb = self(torch.cat([a, b]), *both).chunk(2)  # [B,K] each
        return self.objective(za, zb, facts, group)


def names() -> list[str]:
    """Every method: the names of the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The method's module, with ``Config`` and ``Method``.

    Raises:
        MedclrError: there is no such method; names the nearest.
    """
    if name not in names():
        raise MedclrError(f"method: {name!r} is unknown{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
