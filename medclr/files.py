"""Writing that leaves either the whole new file or the old one, never a half."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medclr.errors import MedclrError

LOCK_NAME = ".lock.tmp"
"""What lies in a folder while a process writes there; see ``alone``."""


@contextlib.contextmanager
def writing(path: Path, *, flushed: bool = True, pending: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is flushed to disk and renamed, on failure removed.

    Args:
        path: the file to write.
        flushed: False leaves the flushing to the caller, who writes many files and calls ``flush`` at the end.
        pending: rename it to where ``finish`` will look for it.

    Raises:
        MedclrError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mendable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if flushed:
                flush(temporary)
            temporary.replace(_pending(path) if pending else path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it is renamed, on failure removed with all that is in it.

    Raises:
        MedclrError: ``path`` exists and is not an empty folder, the disk is full, or the place cannot be written to.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise MedclrError(f"{path} exists already and is left as it is; remove it or choose another --out")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mendable(path):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path, name: str = LOCK_NAME) -> Iterator[None]:
    """Keep other processes that write to ``folder``, and ask the same, out of it; it is made if it is not there.

    The lock ends with the process, however that ends. A file system without locks is written to all the same.

    Args:
        folder: where to write; if nothing was put into a folder made here, it is removed again.
        name: of the lock; those of another name may write there at the same time.

    Raises:
        MedclrError: another process is writing there, or the folder cannot be made.
    """
    path = folder / name
    with mendable(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock(descriptor, wait=False)
            if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
                raise BlockingIOError  # it was removed by its owner, who may have been followed by another
        except BlockingIOError:
            advice = "wait until it is done, or choose another --out"
            raise MedclrError(f"{folder}: another medclr is writing there; {advice}") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # refused if there is something in it
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file until it is closed, if its file system knows locks; BlockingIOError if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


@contextlib.contextmanager
def mendable(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals that a user can do something about into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MedclrError(f"{path}: the disk is full; free some space and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise MedclrError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        raise


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_together(texts: Mapping[Path, str]) -> None:
    """Write several files of one folder, all or none: if it is killed, ``finish`` makes it so.

    Raises:
        MedclrError: the disk is full, or the folder cannot be written to.
    """
    try:
        for path, text in texts.items():
            with writing(path, pending=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
    finally:
        finish(list(texts))


def finish(paths: Sequence[Path]) -> None:
    """Go on where ``write_together`` was interrupted, and clear up what killed processes left of these files."""
    *others, last = paths
    if is_pending(last):  # it was written last, so the others are whole
        with mendable(last):
            for path in (*others, last):
                if _pending(path).exists():
                    _pending(path).replace(path)
    for path in paths:
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)


def is_pending(last: Path) -> bool:
    """Whether ``write_together`` was interrupted after the last file was written and before all were in their place."""
    return _pending(last).exists()


def _pending(path: Path) -> Path:
    return path.with_name(f".{path.name}.pending.tmp")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
