"""What a hospital has -> Scan: readers, the modality table, the index, and pseudonyms.

A reader is one module with four functions: ``is_NAME(head)`` and those of ``Reader``. To add one, write its file and
put NAME into ``READERS``.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medclr.errors import ScanError
from medclr.scans.policy import DEFAULT, Plane, Policy

if TYPE_CHECKING:
    from medclr.scans.scan import Found, Scan

READERS = ("dicom", "nifti", "image")
"""Modules of this package, imported when first asked, in the order in which they are asked."""

NO_SCAN = "is neither DICOM, NIfTI nor a PNG, JPEG or TIFF image"

HEAD_BYTES = 4096
"""How much of a file's start a reader needs to know its own."""


class Reader(Protocol):
    """What the module of a reader has to offer, besides ``is_NAME(head: bytes) -> bool``: whether a file is its own."""

    def read_header(self, path: Path, data: bytes | None = None) -> Any:
        """What the file says of itself, checked, without its voxels; ``data`` are its bytes if known already."""

    def find(
        self, headers: Sequence[Any], policy: Policy = DEFAULT, plane: Plane | None = None
    ) -> "tuple[list[Found], list[tuple[Path, str]]]":
        """Group headers into scans; also the files that are part of none, with the reason."""

    def read(
        self,
        files: Sequence[Path],
        modality: str | None = None,
        *,
        volume: int = 0,
        plane: Plane | None = None,
        policy: Policy = DEFAULT,
    ) -> "Scan":
        """Read one scan."""


def reader_of(head: bytes) -> tuple[str, Reader] | None:
    """Name and module of the reader of files that start like this, judged by content and never by file name."""
    for name in READERS:
        module: Any = importlib.import_module(f"{__name__}.{name}")
        if getattr(module, f"is_{name}")(head):
            return name, module
    return None


def read(
    files: Sequence[Path],
    modality: str | None = None,
    *,
    volume: int = 0,
    plane: Plane | None = None,
    policy: Policy = DEFAULT,
) -> "Scan":
    """Read one scan, whatever its format.

    Args:
        files: the file, or the slices of a DICOM series.
        modality: a key of ``MODALITIES``, for formats that do not record it.
        volume: which of the volumes of the file, counted from 0 (``Found.volume``).
        plane: how a NIfTI volume is cut into slices; if not given, across its coarsest spacing. DICOM slices and
            images are as they were acquired.
        policy: what to do if the scan is not plain.

    Raises:
        ScanError: no reader knows the format, or the scan cannot be read.
    """
    if not files:
        raise ScanError("a scan without files cannot be read")
    with Path(files[0]).open("rb") as file:
        known = reader_of(file.read(HEAD_BYTES))
    if known is None:
        raise ScanError(f"{files[0]}: {NO_SCAN}")
    _, reader = known
    return reader.read(files, modality, volume=volume, plane=plane, policy=policy)
