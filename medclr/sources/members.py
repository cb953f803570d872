"""What an archive says that it holds, file by file, before anything of it is believed."""

import bz2
import contextlib
import gzip
import lzma
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

from medclr.errors import ScanError

HEAD_BYTES = 2**20
"""How much of a file's start tells an archive: a block of bzip2 shows nothing before it is complete."""

PART_BYTES = 200
"""Longest part of a name; file systems end at 255, and a temporary name is longer."""

NAME_BYTES = 2000
"""Longest name, with its folders."""

MEMBERS = 1_000_000
"""No archive of scans holds more."""

DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, ValueError,
          OverflowError, NotImplementedError, RuntimeError)  # fmt: skip
"""What the standard library raises on damaged archives."""

_HEADER_BYTES = 16 * 2**20  # longest that a name or a list of attributes inside a tar may be
_DOCUMENTS = (b"[Content_Types].xml", b"mimetype", b"META-INF/")  # how zips begin that are documents or programs
_COMPRESSIONS: dict[str, tuple[bytes, Callable[[], Any], Callable[[IO[bytes]], Any]]] = {
    "gzip": (b"\x1f\x8b", lambda: zlib.decompressobj(31), lambda file: gzip.GzipFile(fileobj=file)),
    "bzip2": (b"BZh", bz2.BZ2Decompressor, bz2.BZ2File),
    "xz": (b"\xfd7zXZ\0", lzma.LZMADecompressor, lzma.LZMAFile),
}

COMPRESSED = tuple(magic for magic, _, _ in _COMPRESSIONS.values())
"""How files begin of which more than 512 bytes must be seen."""


class Bomb(ScanError):
    """The archive unfolds to more than it may."""


class Corrupt(ScanError):
    """What came out of a compressed tar cannot be trusted, not even what came out long before."""


class Readable(Protocol):
    """As much of a file as unpacking needs."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One file of an archive, or what pretends to be one."""

    name: str
    size: int
    """Bytes, as declared."""
    crc: int | None
    """CRC-32 of its bytes, where the archive keeps one."""
    problem: str
    """Why it is refused, or ''."""
    end: int
    """How far into the archive one is then, in bytes."""
    open: Callable[[], Readable]


def kind_of(head: bytes) -> str:
    """``zip``, ``tar``, or the compression of a tar (``gzip``, ``bzip2``, ``xz``); '' for anything else.

    Args:
        head: the first HEAD_BYTES of a file.
    """
    if head[:4] in (b"PK\3\4", b"PK\5\6", b"PK\7\x08"):
        return "" if head.startswith(_DOCUMENTS, 30) else "zip"
    for name, (magic, decompressor, _) in _COMPRESSIONS.items():
        if head.startswith(magic):
            with contextlib.suppress(*DAMAGE, OSError):
                return name if _is_tar(decompressor().decompress(head, tarfile.BLOCKSIZE)) else ""
    return "tar" if _is_tar(head) else ""


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")  # it has a checksum
    except (tarfile.TarError, ValueError):
        return False
    return True


def members_of(file: IO[bytes], inflated: Callable[[int], None]) -> Iterator[Member]:
    """The files of an archive in the order in which they lie there, each to be read before the next is asked for.

    Args:
        file: the archive.
        inflated: told how many bytes came out of it, before they are handed on; it may raise.

    Raises:
        Bomb: it holds more than MEMBERS entries.
        Corrupt: it is damaged, and so may be what came before.
        DAMAGE: it is damaged or cut short; what came before is whole.
    """
    kind = kind_of(file.read(HEAD_BYTES))
    file.seek(0)
    members = _zip_members(file, inflated) if kind == "zip" else _tar_members(file, kind, inflated)
    for number, member in enumerate(members):
        if number == MEMBERS:
            raise Bomb(f"holds more than {MEMBERS:,} files; if you trust it, unpack it yourself")
        yield member


def _zip_members(file: IO[bytes], inflated: Callable[[int], None]) -> Iterator[Member]:
    """No byte belongs to two members of those that are not refused.

    Overlapping entries are how a small zip unfolds without end and without nesting (Fifield, WOOT 2019).
    """
    with zipfile.ZipFile(file) as opened:
        infos = sorted(opened.infolist(), key=lambda info: info.header_offset)
        starts = [*(info.header_offset for info in infos), opened.start_dir]
        for info, next_start in zip(infos, starts[1:], strict=True):
            if info.is_dir():
                continue
            end = info.header_offset + zipfile.sizeFileHeader + info.compress_size  # type: ignore[attr-defined]
            file_type = stat.S_IFMT(info.external_attr >> 16)
            problem = ""
            if info.flag_bits & 0x1:
                problem = "is encrypted; decrypt it first"
            elif file_type == stat.S_IFLNK:
                problem = "is a link; give what it leads to"
            elif file_type not in (0, stat.S_IFREG):
                problem = "is no plain file"
            elif end > next_start:
                problem = "shares its bytes with another entry of the archive"
            yield Member(
                info.filename, info.file_size, info.CRC, problem, end, partial(_opened, opened, info, inflated)
            )


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo, inflated: Callable[[int], None]) -> Readable:
    return _Inflating(archive.open(info), inflated)


def _tar_members(file: IO[bytes], kind: str, inflated: Callable[[int], None]) -> Iterator[Member]:
    stream = _Inflating(file if kind == "tar" else _COMPRESSIONS[kind][2](file), inflated)
    try:
        with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as opened:  # type: ignore[call-overload]
            for info in opened:
                opened.members.clear()  # it would keep them all
                if info.isdir():
                    continue
                problem = ""
                if info.issym() or info.islnk():
                    problem = "is a link; give what it leads to"
                elif not info.isreg():
                    problem = "is no plain file"
                yield Member(info.name, info.size, None, problem, file.tell(), partial(opened.extractfile, info))
        is_ended = stream.last == bytes(tarfile.BLOCKSIZE)  # tarfile takes a damaged header for the end
        while stream.read(HEAD_BYTES):  # behind the last file comes the checksum of all
            pass
    except DAMAGE as error:
        if stream.is_corrupt:
            raise Corrupt("is damaged, and nobody knows which of its files are whole; fetch it again") from error
        raise
    if not is_ended:
        raise tarfile.ReadError("no end mark")


class _Inflating:
    """What comes out of a compressed file: counted, only forwards, and broken for good once it is."""

    def __init__(self, source: Any, inflated: Callable[[int], None]) -> None:
        self._source = source
        self._inflated = inflated
        self._position = 0
        self._damage: BaseException | None = None
        self.is_corrupt = False
        """Whether it is broken otherwise than by being cut short: a checksum tells it only behind what is wrong."""
        self.last = b""
        """What was read last."""

    def tell(self) -> int:
        return self._position

    def read(self, size: int, /) -> bytes:
        if self._damage:
            raise tarfile.ReadError("damaged before") from self._damage
        if size > _HEADER_BYTES:
            raise Bomb("declares a header of more than 16 MiB")
        try:
            self.last = self._source.read(size)
        except Exception as error:
            self._damage = error
            self.is_corrupt = not isinstance(error, EOFError)
            if isinstance(error, OSError) and error.errno is None:  # bzip2 says no more
                raise tarfile.ReadError(str(error)) from error
            raise
        self._position += len(self.last)
        self._inflated(len(self.last))
        return self.last

    def seek(self, position: int, /) -> None:
        if position < self._position:
            raise tarfile.ReadError("leads backwards")
        while self._position < position and self.read(min(position - self._position, HEAD_BYTES)):
            pass


class Names:
    """The names that the files of one archive have taken."""

    def __init__(self) -> None:
        self._taken: dict[str, bool] = {}  # name without case and composition -> whether it is a folder

    def claim(self, name: str) -> str:
        """The path, '/' between its parts, under which a file may lie below its folder; '' if it is hidden.

        Raises:
            ScanError: the name leads elsewhere, is taken, or is none that a file system would bear; the reason.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name):
            raise ScanError("has an absolute path")
        if ".." in parts:
            raise ScanError("has a path that leads out of the archive")
        try:
            sizes = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            raise ScanError("has a name that is not UTF-8") from None
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
            raise ScanError("has a control character in its name")
        if not parts:
            raise ScanError("has no name")
        if max(sizes) > PART_BYTES or sum(sizes) + len(sizes) > NAME_BYTES:
            raise ScanError("has too long a name")
        if any(part.startswith(".") for part in parts):
            return ""
        path = "/".join(parts)
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if key in self._taken:
            raise ScanError("has the name of another file or folder of the archive, if case and accents do not count")
        folders = [key[:i] for i, letter in enumerate(key) if letter == "/"]
        if any(self._taken.get(folder) is False for folder in folders):
            raise ScanError("lies in a folder that has the name of a file of the archive")
        self._taken.update(dict.fromkeys(folders, True))
        self._taken[key] = False
        return path


def printable(name: str) -> str:
    """A name out of an archive as a table can hold it."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)[:NAME_BYTES]
