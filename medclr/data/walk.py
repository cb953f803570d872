"""Folders -> the files in them that may be scans."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medclr.data.annotations import stem
from medclr.data.places import File
from medclr.errors import MedclrError

_LABEL_FOLDERS = {"labels": "images", "labelsTr": "imagesTr", "labelsTs": "imagesTs"}
"""Folders of label maps, and those of their scans, as in the Medical Segmentation Decathlon and nnU-Net."""


@dataclass(frozen=True)
class Refused:
    """A file or folder that cannot be used."""

    root: str
    path: str
    """Relative to ``root``; '.' is the root itself."""
    reason: str
    """Without any name or path."""


def absolute_folders(roots: Sequence[Path]) -> list[str]:
    """The roots as absolute paths.

    Raises:
        MedclrError: one is no folder, or lies inside another.
    """
    folders = [os.path.normpath(Path(root).absolute()) for root in roots]
    for i, folder in enumerate(folders):
        if not Path(folder).is_dir():
            raise MedclrError(
                f"{folder}: " + ("is a file, not a folder" if Path(folder).exists() else "no such folder")
            )
        for other in folders[:i]:
            refuse_nested(folder, other)
    return folders


def refuse_nested(folder: str, other: str) -> None:
    """Raise if one lies in the other: a file would have two names."""
    a, b = Path(folder).resolve(), Path(other).resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise MedclrError(f"{folder} and {other}: one folder lies in the other; index the same one each time")


def files_below(folder: str, skip: Iterable[Path | None]) -> tuple[list[File], list[Refused]]:
    """All files below a folder but those to skip, in the order of their paths, and what cannot be opened.

    Links are followed; names that begin with a dot are passed over. A label map is refused where its place leaves no
    doubt that it is one: taken for a scan, it would be trained on.
    """
    refused: list[Refused] = []
    found = sorted(_walk(folder, _identities(skip), refused), key=lambda file: file.path)
    label_maps = _label_maps(found)
    refused += [Refused(folder, path, reason) for path, reason in label_maps.items()]
    return [file for file in found if file.path not in label_maps], refused


def _identities(paths: Iterable[Path | None]) -> set[tuple[int, int]]:
    """Device and inode of those that exist: also found under another name or through a link."""
    identities = set()
    for path in paths:
        if path is not None and path.exists():
            status = path.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities


def _walk(root: str, skip: set[tuple[int, int]], refused: list[Refused]) -> Iterator[File]:
    """All files under a root; a folder that is reached twice is entered once."""
    seen = skip | _identities([Path(root)])
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(f"{root}/{folder}" if folder else root) as entries:
                children = sorted(entries, key=lambda child: child.name)
        except OSError as error:
            refused.append(Refused(root, folder or ".", f"cannot be opened ({error.strerror})"))
            continue
        for child in children:
            if child.name.startswith("."):
                continue
            path = f"{folder}/{child.name}" if folder else child.name
            try:
                if not path.isascii():
                    path.encode()
                status = child.stat()
            except UnicodeEncodeError:
                refused.append(Refused(root, path, "has a name that is not UTF-8; rename it"))
                continue
            except OSError as error:
                refused.append(Refused(root, path, f"cannot be opened ({error.strerror})"))
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            if stat.S_ISDIR(status.st_mode):
                seen.add(identity)
                pending.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield File(root, path, status.st_size, status.st_mtime_ns)


def _label_maps(found: Sequence[File]) -> dict[str, str]:
    """Path -> reason of those that are label maps by a ``dataset.json``, or by their folder and a scan beside it."""
    reasons: dict[str, str] = {}
    if not any("labels" in file.path or file.path.endswith("dataset.json") for file in found):
        return reasons
    paths = {file.path for file in found}
    stems: set[str] | None = None
    for file in found:
        folder, _, name = file.path.rpartition("/")
        if name == "dataset.json":
            told = "is a label map by a dataset.json, not a scan; give that with --masks"
            reasons |= {path: told for path in _labels_told(file, folder) if path in paths}
        parent, _, last = folder.rpartition("/")
        if last in _LABEL_FOLDERS:
            stems = stems or {stem(path) for path in paths}
            scan = stem("/".join(filter(None, (parent, _LABEL_FOLDERS[last], name))))
            if scan in stems or f"{scan}_0000" in stems:  # nnU-Net numbers the channels of a scan
                folders = f"{last} beside {_LABEL_FOLDERS[last]}"
                reasons[file.path] = f"is a label map by its folder, {folders}, not a scan; give that with --masks"
    return reasons


def _labels_told(file: File, folder: str) -> Iterator[str]:
    """Paths under the root of the label maps in a Decathlon or MONAI ``dataset.json``."""
    try:
        training = json.loads(file.absolute().read_text(encoding="utf-8"))["training"]
        labels = [item["label"] for item in training]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return  # another program's file of that name
    for label in labels:
        if isinstance(label, str):
            yield os.path.normpath(os.path.join(folder, label))  # noqa: PTH118
