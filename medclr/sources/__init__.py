"""Where scans come from besides a folder: a DICOMDIR, an archive, a PACS. Each becomes an ordinary folder of files.

A source is one module with two functions: ``is_NAME(root)`` and ``bring(root, copies)``. To add one, write its file
and put NAME into ``SOURCES``. What has to be copied goes below a folder of copies that only its owner may enter; the
same command again copies nothing twice, and one that was interrupted goes on.
"""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclr import files
from medclr.errors import MedclrError

SOURCES = ("dicomweb", "dicomdir", "archive")
"""Modules of this package, imported when first asked, in the order in which they are asked."""


@dataclass(frozen=True)
class Brought:
    """A folder that can be walked like any other."""

    folder: Path
    """Absolute."""

    files: list[str] | None = None
    """The files that count, relative to ``folder``, '/' between their parts; None: all that lie below it."""

    refused: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what was not taken; names are relative to ``folder`` and made printable, and name no file."""


def bring(root: str | Path, copies: Path) -> Brought:
    """Make a folder of whatever ``root`` is.

    Args:
        root: a folder, a DICOMDIR, a zip or tar file, or ``dicomweb+https://host/path``; only the last is asked for
            over a network.
        copies: folder that holds what has to be copied; made if it is needed, mode 0700.

    Raises:
        MedclrError: there is no such thing, it cannot be read, or the copies do not fit on the disk.
    """
    for name in SOURCES:
        module: Any = importlib.import_module(f"{__name__}.{name}")
        if getattr(module, f"is_{name}")(root):
            brought: Brought = module.bring(root, copies)
            return brought
    folder = Path(root).absolute()
    if not folder.is_dir():
        kinds = "is neither a folder, a DICOMDIR nor a zip or tar archive"
        raise MedclrError(f"{root}: " + (kinds if folder.exists() else "no such folder or file"))
    return Brought(folder)


def place_of(copies: Path, source: str) -> Path:
    """Where the copies of one source lie, always the same; the name says nothing about it."""
    return copies.absolute() / hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def place(copies: Path, source: str) -> Path:
    """``place_of``, made if it is not there.

    Raises:
        MedclrError: it cannot be made.
    """
    folder = place_of(copies, source)
    with files.mendable(copies):
        for made in (copies, folder):
            if not made.exists():
                made.parent.mkdir(parents=True, exist_ok=True)
                made.mkdir(mode=0o700)
    return folder
