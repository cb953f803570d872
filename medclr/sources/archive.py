"""Archives: zip and tar (plain, gzip, bzip2, xz), unpacked into a folder of copies.

Nothing that an archive says of itself is trusted. A member becomes a file only under a plain name below its folder;
links and devices are refused, bytes are counted as they are inflated, entries that share bytes are refused, and an
archive inside an archive is opened one level deep. What is refused is reported with the reason; the rest is read.

``.source.json`` in the folder says of which archive (size and time) it holds the members, and whether all of them.
A compressed tar has one checksum for all of its files, so a wrong one refuses them all.
Members carry the archive's time, so that a new edition of an archive counts as new files.
"""

import contextlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import IO, Any

from medclr import files
from medclr.errors import MedclrError, ScanError
from medclr.progress import Advance, progress
from medclr.sources import Brought, place
from medclr.sources.members import (
    COMPRESSED,
    DAMAGE,
    HEAD_BYTES,
    Bomb,
    Corrupt,
    Member,
    Names,
    kind_of,
    members_of,
    printable,
)

RATIO = 200
"""An archive may unfold to so many times its own size, ..."""

HARMLESS_BYTES = 2**30
"""... and in any case to this: blank masks in a small archive deflate 1000:1."""

FREE_BYTES = 2**30
"""What unpacking leaves free on the disk."""

_BLOCK = 2**20
_LOOK_BYTES = 64 * 2**20
_RECORD = ".source.json"
_PART = ".part.tmp"


def is_archive(root: str | Path) -> bool:
    """Whether ``root`` is a zip or tar file, by its content; not a document or program that is a zip inside."""
    path = Path(root)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(512)
        return bool(kind_of(head + file.read(HEAD_BYTES) if head.startswith(COMPRESSED) else head))


def bring(root: str | Path, copies: Path) -> Brought:
    """Unpack the archive ``root`` below ``copies``, unless that was done before.

    Raises:
        MedclrError: nothing can be read of it, or the disk is too small.
    """
    archive = Path(root).absolute()
    folder = place(copies, str(archive))
    try:
        refused = unpack(archive, folder, copies)
    except ScanError as error:
        raise MedclrError(f"{root}: {error}") from error
    if not any(not child.name.startswith(".") for child in folder.iterdir()):
        raise MedclrError(f"{root}: " + next((reason for _, reason in refused), "holds no files"))
    return Brought(folder, refused=tuple(refused))


def unpack(archive: Path, folder: Path, copies: Path) -> list[tuple[str, str]]:
    """Unpack ``archive`` into ``folder``, or go on with it; nothing is done if that is complete and unchanged.

    Args:
        archive: the zip or tar file.
        folder: where its members go; made if it is needed.
        copies: the folder of copies that holds ``folder``: errors name no other.

    Returns:
        (name, reason) of what was refused; the name is '' where it is the archive itself that is damaged or a bomb.

    Raises:
        ScanError: the archive cannot be read; the reason.
        MedclrError: the disk is too small or cannot be written to, or another process is writing there.
    """
    try:
        file = archive.open("rb")
    except OSError as error:
        raise ScanError(f"cannot be opened ({error.strerror})") from error
    with file, files.alone(copies), files.mendable(copies):
        status = os.fstat(file.fileno())
        edition = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        folder.mkdir(parents=True, exist_ok=True)
        record = _record(folder)
        if {name: record.get(name) for name in edition} != edition:
            _empty(folder)
            record = {**edition, "complete": False, "refused": []}
            files.write_json(folder / _RECORD, record)
        if not record["complete"]:
            with progress("unpack", status.st_size // 10**6, "MB") as advance:
                unpacking = _Unpacking(folder, copies, status, advance)
                try:
                    unpacking.take_all(file)
                except Bomb as bomb:  # nothing of it is worth keeping
                    _empty(folder)
                    unpacking.refused = [("", str(bomb))]
            os.sync()  # once, instead of once a member
            record |= {"complete": True, "refused": unpacking.refused}
            files.write_json(folder / _RECORD, record)
        return [(name, reason) for name, reason in record["refused"]]


def _record(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return {}


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


class _Unpacking:
    """One archive on its way into a folder: what was refused, and what may still come out of it."""

    def __init__(self, folder: Path, copies: Path, status: os.stat_result, advance: Advance) -> None:
        self._folder = folder
        self._copies = copies
        self._mtime_ns = status.st_mtime_ns
        self._may_inflate = max(HARMLESS_BYTES, RATIO * status.st_size)
        self._unseen = _LOOK_BYTES  # written since the last look at the disk
        self._advance = advance
        self.refused: list[tuple[str, str]] = []

    def take_all(self, file: IO[bytes], inside: str = "") -> None:
        """Unpack an archive; ``inside`` is its own name, if it lay in another.

        Raises:
            Bomb: it unfolds to too much.
            MedclrError: the disk is too small.
        """
        names = Names()
        done = 0  # MB
        try:
            for member in members_of(file, self._inflated):
                self._take(member, names, inside)
                if not inside:
                    self._advance(member.end // 10**6 - done)
                    done = member.end // 10**6
        except Corrupt as error:
            if (folder := self._folder / inside).is_dir():
                _empty(folder)
            self.refused = [one for one in self.refused if inside and not one[0].startswith(f"{inside}/")]
            self.refused.append((inside, str(error)))
        except DAMAGE as error:
            self.refused.append((inside, f"is damaged or incomplete ({type(error).__name__}); fetch it again"))

    def _take(self, member: Member, names: Names, inside: str) -> None:
        try:
            name = names.claim(member.name)
            if not name:
                return
            if member.problem:
                raise ScanError(member.problem)
            self._copy(member, "/".join(filter(None, (inside, name))), nested=bool(inside))
        except Bomb:
            raise
        except ScanError as error:
            self.refused.append(("/".join(filter(None, (inside, printable(member.name)))), str(error)))

    def _copy(self, member: Member, name: str, nested: bool) -> None:
        path = self._folder / name
        if _is_there(path, member):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(_PART)
        try:
            if not kind_of(self._write(member, part)):
                os.utime(part, ns=(self._mtime_ns, self._mtime_ns))
                part.replace(path)
            elif nested:
                raise ScanError("is an archive in an archive in an archive; unpack it yourself")
            else:
                with part.open("rb") as file:
                    self.take_all(file, name)
        finally:
            part.unlink(missing_ok=True)

    def _write(self, member: Member, part: Path) -> bytes:
        """Write the member's bytes; returns the first of them."""
        first = b""
        count = 0
        with part.open("wb") as out:
            try:
                source = member.open()
                while block := source.read(_BLOCK):
                    first = first or block
                    count += len(block)
                    self._look(len(block))
                    out.write(block)
            except DAMAGE as error:
                raise ScanError(f"is damaged, or packed in an unknown way ({type(error).__name__})") from error
        if count != member.size:
            raise ScanError("is cut short")
        return first

    def _inflated(self, count: int) -> None:
        self._may_inflate -= count
        if self._may_inflate < 0:
            raise Bomb(f"unfolds to more than {RATIO} times its size; if you trust it, unpack it yourself")

    def _look(self, count: int) -> None:
        """Keep some of the disk free, to which others write too."""
        self._unseen += count
        if self._unseen >= _LOOK_BYTES:
            self._unseen = 0
            if shutil.disk_usage(self._copies).free < FREE_BYTES:
                raise MedclrError(
                    f"{self._copies}: less than {FREE_BYTES / 2**30:.0f} GiB is left free on this disk; free some and"
                    " run the same command again, or give --copies a folder on a larger one"
                )


def _is_there(path: Path, member: Member) -> bool:
    """Whether an interrupted run has left the whole member."""
    if member.crc is None or not path.is_file() or path.stat().st_size != member.size:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc == member.crc
