"""Pretraining methods: one file each, holding its ``Config`` (frozen dataclass) and its ``Method`` (module).

A new file here is a new method: ``Method`` derives from ``PretrainingMethod``, which says what the loop asks of it.

Letters: B images, F features of the encoder, K components of the embedding, S the image side.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from medclr.config import nearest
from medclr.distributed import Group
from medclr.errors import MedclrError


class PretrainingMethod(nn.Module):
    """Built as ``Method(config, encoder)``; its parameters are what is trained, its ``encoder`` is what is kept."""

    encoder: nn.Module

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,1,S,S] -> features [B,F] and the embedding [B,K] in which the loss is taken."""
        raise NotImplementedError

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings [B,K] of the two views of a batch -> the loss, and what else to log (0-d tensors, detached).

        A function of the embeddings alone, without the network: so a batch may be embedded in chunks. ``facts`` is what
        the store knows of the slices (``medclr.data.loader.Facts``). With ``group`` the negatives come from all
        processes; the batch's loss is the mean over them.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,1,S,S] -> embedding [B,K]."""
        return self.embed(x)[1]

    def loss(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views [B,1,S,S] of one batch -> as ``objective``.

        Both go through the network in one pass, as in the reference, so that the batch-norm statistics are those of all
        2B views.
        """
        za, zb = self(torch.cat([a, b])).chunk(2)  # [B,K] each
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
