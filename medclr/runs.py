"""A run folder: made once, resumed by the same settings and by no others, replaced only if asked."""

import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from medclr.config import differences, read_yaml, to_yaml
from medclr.errors import MedclrError
from medclr.files import LOCK_NAME, write_text

MOST = 8
"""Settings that a message names, of all that differ."""


def is_passing(path: Path) -> bool:
    """Whether a file is a lock, or what a killed process left half-written (``medclr.files.writing``)."""
    return path.name == LOCK_NAME or (path.name.startswith(".") and path.suffix == ".tmp")


def open_folder(
    out: Path,
    resolved: dict[str, Any],
    written: Set[str],
    harmless: Set[str],
    *,
    overwrite: bool = False,
    earlier: Mapping[str, Any] = {},
) -> None:
    """Make the folder of a run and its config.yaml, or accept one with the same settings.

    Args:
        out: the folder.
        resolved: all settings, as plain types.
        written: names of all that a run of this kind writes, and so all that ``overwrite`` may remove.
        harmless: dotted names of settings that cannot change the result, and so may differ.
        overwrite: replace a run that is there.
        earlier: settings that a run of an earlier version may not name, by their dotted name, and what it did.

    Raises:
        MedclrError: it holds another run, or something that no run wrote.
    """
    existing = out / "config.yaml"
    if not existing.exists():
        if out.exists() and (not out.is_dir() or not all(is_passing(p) for p in out.iterdir())):
            raise MedclrError(f"{out}: exists and is not a run of medclr; choose another --out")
    elif overwrite:
        if strange := sorted(p.name for p in out.iterdir() if p.name not in written and not is_passing(p)):
            raise MedclrError(
                f"{out}: holds {strange[0]}, which no run wrote, and is not overwritten; choose another --out"
            )
        for name in set(written) - {LOCK_NAME, existing.name}:  # killed meanwhile, it still is a run
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        changed = differences(read_yaml(existing), resolved)
        telling = [
            f"{name} was {was} and is now {now}"
            for name, (was, now) in changed.items()
            if name not in harmless and (earlier.get(name) if was is None else was) != now
        ]
        if telling:
            more = [f"and {len(telling) - MOST} more"] if len(telling) > MOST else []
            told = "; ".join(telling[:MOST] + more)
            raise MedclrError(
                f"{out}: holds a run with other settings ({told}); choose another --out, or --overwrite true"
            )
        if not changed:
            return
    write_text(existing, to_yaml(resolved))
