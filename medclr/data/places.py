"""What a file is called outside its ward, and the table that leads back from there.

The name of a file or a folder may name a patient. So tables and messages call a file by an id such as
``f-3f2a90c41b7de685``, the keyed pseudonym of its root and its path. Where it lies stands in ``KEY.paths.csv``, beside
the key and as secret: one table for all manifests of the key, to which lines are only ever added. ``medclr whereis``
looks into it.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

from medclr.errors import MedclrError
from medclr.files import lock, mendable
from medclr.scans.privacy import Pseudonyms

_TAIL_BYTES = 2**16
"""A line is shorter: a path has at most 4096 bytes."""


class Place(NamedTuple):
    """Where a file or a folder lies."""

    root: str
    """The absolute folder that was indexed, or that held the masks."""
    path: str
    """Relative to ``root``, '/' between its parts; '.' is the root itself."""

    def absolute(self) -> Path:
        """As one path."""
        return Path(self.root, self.path)


class File(NamedTuple):
    """A file as it was found in its place: as long as nothing of this changes it is not read again."""

    root: str
    """As in ``Place``, and below."""
    path: str
    size: int
    """Bytes."""
    mtime_ns: int
    """Nanoseconds since 1970."""

    def absolute(self) -> Path:
        """As one path."""
        return Path(self.root, self.path)


class Namer:
    """Gives files and folders their names for tables and messages."""

    def __init__(self, key: Pseudonyms, key_file: Path, keep_paths: bool) -> None:
        self.keep_paths = keep_paths
        self._key = key
        self._key_file = key_file
        self._new: dict[str, Place] = {}

    def __call__(self, root: str, path: str) -> str:
        """The id, which ``save`` makes known; with ``keep_paths`` the path."""
        if self.keep_paths:
            return path
        name = self._key("file", root, path)
        self._new[name] = Place(root, path)
        return name

    def shown(self, root: str, path: str) -> str:
        """What to call it in a message, which may be the last thing that is heard: the id is made known at once."""
        name = self(root, path)
        if self.keep_paths:
            return str(Place(root, path).absolute())
        add_places(self._key_file, {name: self._new[name]})
        return name

    def save(self) -> None:
        """Make known all ids that were given: before a table with them is written."""
        add_places(self._key_file, self._new)


def places_path(key_file: Path) -> Path:
    """``KEY.paths.csv`` beside ``KEY``."""
    return key_file.with_name(f"{key_file.name}.paths.csv")


def find_places(key_file: Path, ids: Iterable[str]) -> dict[str, Place]:
    """Where the files and folders of these ids lie.

    Raises:
        MedclrError: an id is not in the key's table, or the table cannot be read.
    """
    wanted = set(ids)
    path = places_path(key_file)
    places: dict[str, Place] = {}
    try:
        if wanted:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as table:
                places = {cells[0]: Place(cells[1], cells[2]) for cells in _lines(table) if cells[0] in wanted}
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MedclrError(f"{path}: cannot be read ({error.strerror}); it says where the scans lie") from error
    escaped = [name for name, (root, path) in places.items() if "\\" in path or "\\" in root]
    places |= {name: Place(*map(_plain, places[name])) for name in escaped}
    if strange := wanted - places.keys():
        raise MedclrError(
            f"{path}: does not know {min(strange)}; was the manifest made with another key (--key-file), or on another"
            " machine?"
        )
    return places


def add_places(key_file: Path, places: Mapping[str, Place]) -> None:
    """Add to the key's table what is not there yet, and see it on the disk; raises as ``append``."""
    append(places_path(key_file), ("id", *Place._fields), places)


def append(path: Path, columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> None:
    """Add lines to a table beside a key, but those whose first cell it has already, and see them on the disk.

    Args:
        path: the table; made if it is not there, readable by its owner alone.
        columns: of the table.
        lines: first cell -> the others.

    Raises:
        MedclrError: the disk is full, or the table cannot be written.
    """
    if not lines:
        return
    with mendable(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "r+", encoding="utf-8", errors="surrogateescape", newline="") as table:  # noqa: PTH123
            lock(descriptor, wait=True)
            known = {line.partition(",")[0] for line in table if line.endswith("\n")}
            new = [(name, *map(_escaped, cells)) for name, cells in lines.items() if name not in known]
            if not new:
                return
            size = _whole(descriptor)
            os.truncate(descriptor, size)  # what a process that was killed has left of a line
            csv.writer(table, lineterminator="\n").writerows(new if size else [tuple(columns), *new])
            table.flush()
            os.fsync(descriptor)


def _lines(table: Iterable[str]) -> Iterator[list[str]]:
    """The lines; one that somebody is still writing, or never finished, is passed over."""
    return filter(None, csv.reader(filter(methodcaller("endswith", "\n"), table)))


def _whole(descriptor: int) -> int:
    """How many bytes of a table are whole lines."""
    size = os.fstat(descriptor).st_size
    start = max(size - _TAIL_BYTES, 0)
    return start + os.pread(descriptor, _TAIL_BYTES, start).rfind(b"\n") + 1


def _escaped(text: str) -> str:
    """Without line breaks, so that a line of the table is a line of the file."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _plain(text: str) -> str:
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in text.split("\\\\"))
