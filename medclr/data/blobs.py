"""Where the shards of a store lie, and how their bytes are read: in its folder, or wherever you say.

A store on several disks or in an object store is a class with the two methods of ``Blobs``, put into ``SHARDS``; the
tables stay in the store's folder. ``docs/scaling.md`` shows one.

Bytes are read, not mapped: the pages of a map count as memory of the process for as long as the system lets them, and
a store that is larger than the memory would seem to fill it. The system keeps what was read lately all the same.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from medclr.errors import MedclrError

STREAM_BYTES = 2**20
"""``stream`` asks for so many at a time: in an object store each time is a request."""

OPEN_FILES = 128
"""So many shards stay open; the usual limit of a process is 1024 files."""


class Blobs(Protocol):
    """The files of the shards, by name. Both methods are called from several threads at once."""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read(self, name: str, offset: int, into: memoryview) -> int:
        """Fill ``into`` with the bytes from ``offset`` on; how many there were, fewer only where the file ends.

        Raises:
            OSError: they cannot be read.
        """
        ...


class Folder:
    """Files of a folder, the ones that were used last kept open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = Lock()

    def size(self, name: str) -> int:
        """As ``Blobs``."""
        return (self._path / name).stat().st_size

    def read(self, name: str, offset: int, into: memoryview) -> int:
        """As ``Blobs``."""
        with self._lock:
            file = self._files.pop(name, None) or _File(self._path / name)
            self._files[name] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread is done with it
        done = 0
        while done < len(into):
            n = os.preadv(file.number, [into[done:]], offset + done)
            if n == 0:
                break
            done += n
        return done


SHARDS: Callable[[Path], Blobs] = Folder
"""Opens the shards of the store in a folder. Set it to a class of your own before any verb opens a store."""


class _File:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def read_whole(blobs: Blobs, path: Path, offset: int, into: memoryview, advice: str) -> None:
    """Fill ``into`` from the file that is called ``path`` where an error is told.

    Raises:
        MedclrError: the file is too short, or cannot be read.
    """
    try:
        n = blobs.read(path.name, offset, into)
    except OSError as error:
        raise MedclrError(f"{path}: cannot be read ({error.strerror or error}); {advice}") from error
    if n < len(into):
        raise MedclrError(f"{path}: cannot be read (it ends at {offset + n:,} bytes); {advice}")


def stream(blobs: Blobs, path: Path, size: int, advice: str) -> io.BufferedReader:
    """A file of ``size`` bytes for those who read files, such as zipfile; it raises as ``read_whole``."""
    return io.BufferedReader(_Raw(blobs, path, size, advice), STREAM_BYTES)


class _Raw(io.RawIOBase):
    """What ``stream`` buffers."""

    def __init__(self, blobs: Blobs, path: Path, size: int, advice: str) -> None:
        super().__init__()
        self._blobs, self._path, self._size, self._advice = blobs, path, size, advice
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer)[: max(self._size - self._at, 0)]
        read_whole(self._blobs, self._path, self._at, into, self._advice)
        self._at += len(into)
        return len(into)
