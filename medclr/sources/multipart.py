"""multipart/related bodies (RFC 2046 section 5.1, RFC 2387) as they come in, without holding a part in memory."""

from collections.abc import Iterator
from email.message import Message
from typing import Protocol

BLOCK_BYTES = 2**18

_HEADER_BYTES = 2**16


class Readable(Protocol):
    """A body."""

    def read(self, size: int, /) -> bytes: ...


class BrokenBody(Exception):
    """A body that ends before its last boundary, or is none."""


def boundary_of(content_type: str) -> bytes | None:
    """The boundary of a ``multipart/related`` Content-Type; None if it is of another kind."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or not boundary:
        return None
    return boundary.encode("latin-1", "replace")


def parts(body: Readable, boundary: bytes) -> Iterator[Iterator[bytes]]:
    """The content of each part, in blocks; each is to be read to its end before the next is asked for.

    Raises:
        BrokenBody: the connection was cut; the parts that had come to their end are whole.
    """
    delimiter = b"\r\n--" + boundary
    buffer = b"\r\n"  # before the first part the line break may be missing

    def more() -> None:
        nonlocal buffer
        block = body.read(BLOCK_BYTES)
        if not block:
            raise BrokenBody("ends in the middle")
        buffer += block

    def until(mark: bytes) -> Iterator[bytes]:
        nonlocal buffer
        while (at := buffer.find(mark)) < 0:
            certain = max(len(buffer) - len(mark) + 1, 0)
            block, buffer = buffer[:certain], buffer[certain:]
            yield block
            more()
        block, buffer = buffer[:at], buffer[at + len(mark) :]
        yield block

    for _ in until(delimiter):  # the preamble
        pass
    while True:
        while len(buffer) < 2:
            more()
        if buffer.startswith(b"--"):
            return
        header_bytes = 0
        for block in until(b"\r\n\r\n"):  # what it says of the part is not needed: the part is DICOM or refused
            header_bytes += len(block)
            if header_bytes > _HEADER_BYTES:
                raise BrokenBody("has a part with an endless header")
        yield until(delimiter)
