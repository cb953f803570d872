"""The voxels of one volume of a NIfTI file, piece by piece, so that no more than the result is held in memory."""

import math
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.nifti_header import GZIP_MAGIC, Header
from medclr.scans.values import check_precision, luminance

Box = tuple[slice, slice, slice]

_PIECE_VOXELS = 2**19
_READ_BYTES = 2**18
_GOES_ON_BYTES = 2**26  # read beyond the last voxel in search of the checksum


class Voxels:
    """One volume, in physical units."""

    def __init__(self, header: Header, volume: int) -> None:
        self._header = header
        self._volume = volume
        self.n_surplus = 0
        """Bytes that a compressed file held after its last voxel; known at the end."""

    def __iter__(self) -> Iterator[tuple[Box, NDArray[np.float32]]]:
        """Where it lies, and [x,y,z]: all of [X,Y,Z] in the file's order.

        Raises:
            ScanError: the file is damaged, or its values cannot be told apart in float32.
        """
        header = self._header
        exact = header.dtype.kind == "V" or header.dtype.itemsize <= 2 or header.dtype == np.float32
        exact &= (header.slope, header.intercept) == (1, 0)
        lows, highs = [], []
        for box, stored in self._stored():
            if header.dtype.kind == "V":  # RGB24 and RGBA32; the scaling is not for these
                yield box, luminance(_channels(stored))
                continue
            with np.errstate(all="ignore"):  # what is too large becomes infinite; some NaN "signal"
                if exact:
                    values = stored.astype(np.float32)
                else:
                    real = stored.astype(np.float64) * header.slope + header.intercept
                    lows.append(np.fmin.reduce(real, axis=None))
                    highs.append(np.fmax.reduce(real, axis=None))
                    values = real.astype(np.float32)
            yield box, values
        if lows:
            with np.errstate(invalid="ignore"):
                low, high = float(np.fmin.reduce(lows)), float(np.fmax.reduce(highs))
            check_precision(low, high)

    def _stored(self) -> Iterator[tuple[Box, NDArray[Any]]]:
        """As the file stores them."""
        header = self._header
        with header.voxels_path.open("rb") as file:
            source = _Gzip(file) if header.compressed else _Plain(file)
            source.skip(header.offset + self._volume * header.volume_bytes)
            for box in _boxes(header.shape):
                shape = [s.stop - s.start for s in box]
                data = source.read(math.prod(shape) * header.dtype.itemsize)
                yield box, np.frombuffer(data, header.dtype).reshape(shape, order="F")
            if isinstance(source, _Gzip):
                rest = (header.n_volumes - 1 - self._volume) * header.volume_bytes
                self.n_surplus = max(0, source.finish(rest + _GOES_ON_BYTES) - rest)


def _boxes(shape: tuple[int, int, int]) -> Iterator[Box]:
    """[X,Y,Z] cut into pieces that are each contiguous in the file: whole slices, or some lines of one."""
    nx, ny, nz = shape
    lines = max(1, _PIECE_VOXELS // nx)
    dy, dz = min(ny, lines), max(1, lines // ny)
    for z in range(0, nz, dz):
        for y in range(0, ny, dy):
            yield slice(0, nx), slice(y, min(y + dy, ny)), slice(z, min(z + dz, nz))


def _channels(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """[x,y,z] of RGB or RGBA -> [x,y,z,3 or 4]."""
    names = stored.dtype.names or ()
    return np.stack([stored[name] for name in names], axis=-1)


class _Plain:
    """A file as it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def skip(self, size: int) -> None:
        self._file.seek(size)

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        data = self._file.read(size)
        if len(data) < size:
            raise ScanError("ends before its last voxel; copy it again")
        return data


class _Gzip:
    """A gzip file (RFC 1952), read forwards once.

    The checksum of each member that was begun is compared when ``finish`` reaches its end. What follows the member
    with the last voxel is no part of the scan and is not looked at, as gzip itself passes over trailing garbage.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member = zlib.decompressobj(wbits=31)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self._some(min(size, _READ_BYTES)))

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        pieces = []
        while size:
            pieces.append(self._some(size))
            size -= len(pieces[-1])
        return b"".join(pieces)

    def finish(self, most: int) -> int:
        """Read on to the end of the member, at most so many bytes; how many there were."""
        size = 0
        while not self._member.eof:
            size += len(self._inflate(_READ_BYTES))
            if size > most:
                raise ScanError("goes on long after its last voxel; its header is damaged")
        return size

    def _some(self, most: int) -> bytes:
        """At least one byte and at most ``most`` of them, from the next member if this one is at its end."""
        while True:
            if self._member.eof:
                rest = self._member.unused_data
                if len(rest) < len(GZIP_MAGIC):
                    rest += self._file.read(_READ_BYTES)
                if not rest.startswith(GZIP_MAGIC):
                    raise ScanError("ends before its last voxel; copy it again")
                self._member = zlib.decompressobj(wbits=31)
                data = self._inflate(most, rest)
            else:
                data = self._inflate(most)
            if data:
                return data

    def _inflate(self, most: int, compressed: bytes = b"") -> bytes:
        """At most ``most`` bytes; maybe none, as long as there is more to read."""
        compressed = compressed or self._member.unconsumed_tail or self._file.read(_READ_BYTES)
        try:
            data = self._member.decompress(compressed, most)
        except zlib.error as error:
            raise ScanError("its compressed data are damaged; copy it again") from error
        if not data and not compressed and not self._member.eof:
            raise ScanError("its compressed data end early; copy it again")
        return data
