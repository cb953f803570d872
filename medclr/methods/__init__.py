"""Pretraining methods: one file each, holding its ``Config`` (frozen dataclass) and its ``Method`` (module).

A new file here is a new method: ``Method`` derives from ``PretrainingMethod``, which says what the loop asks of it.

Letters: B images, F features of the encoder, K components of the embedding, S the image side.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from medclr.config import nearest
from medclr.distributed import Group
from medclr.errors import MedclrError


class PretrainingMethod(nn.Module):
    """Built as ``Method(config, encoder)``; its parameters are what is trained, its ``encoder`` is what is kept."""

    encoder: nn.Module

    def loss(
        self, a: Tensor, b: Tensor, batch: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views [B,1,S,S] of one batch -> the loss, and what else to log (0-d tensors, detached)."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,1,S,S] -> features [B,F] and the embedding [B,K] in which the loss is taken: for the monitor."""
        raise NotImplementedError


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
