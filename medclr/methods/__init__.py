"""Pretraining methods: one file each, holding its ``Config`` (frozen dataclass) and its ``Method`` (module).

``Method(config, encoder)`` owns the encoder as ``.encoder``; ``.loss(a, b, batch, group)`` takes two views [B,1,S,S] of
one batch and gives the loss and what to log. A new file here is a new method.
"""

import importlib
import pkgutil
from types import ModuleType

from medclr.config import nearest
from medclr.errors import MedclrError


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
