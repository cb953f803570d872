"""A DICOMDIR: the table of contents of a disc or of an export (DICOM PS3.3 annex F, PS3.10 section 8).

Exactly the files that it references are taken, where they lie. Nothing else of it is used: what a file is, the file
says better.
"""

from collections.abc import Iterator
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import MediaStorageDirectoryStorage

from medclr.errors import MedclrError
from medclr.scans.dicom_values import unheard
from medclr.sources import Brought


def is_dicomdir(root: str | Path) -> bool:
    """Whether ``root`` is a file that says it is a DICOMDIR, whatever its name."""
    path = Path(root)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return False
    try:
        with unheard():
            uid = read_file_meta_info(path).get("MediaStorageSOPClassUID")
    except Exception:  # whatever pydicom makes of broken bytes
        return False
    return bool(uid == MediaStorageDirectoryStorage)


def bring(root: str | Path, copies: Path) -> Brought:
    """The files that the DICOMDIR ``root`` references; those that are missing are refused. Nothing is copied.

    File IDs are upper case and of eight characters a part (PS3.10 section 8.5), but media are copied by systems that
    change the case, or that show the version of ISO 9660 (``IM1.;1``): both are found all the same.

    Raises:
        MedclrError: it cannot be read, or references nothing.
    """
    path = Path(root).absolute()
    try:
        with unheard():
            names = list(dict.fromkeys(_references(dcmread(path))))
    except Exception as error:  # whatever pydicom makes of broken bytes
        raise MedclrError(
            f"{root}: this DICOMDIR cannot be read ({type(error).__name__}); give its folder instead"
        ) from error
    if not names:
        raise MedclrError(f"{root}: this DICOMDIR references no file; give its folder instead")
    found: dict[str, None] = {}
    refused = []
    listings: dict[Path, dict[str, str]] = {}
    for parts in names:
        try:
            found[_locate(path.parent, parts, listings)] = None
        except LookupError as error:
            refused.append(("/".join(parts).encode("ascii", "backslashreplace").decode(), str(error)))
    return Brought(path.parent, list(found), tuple(refused))


def _references(directory: Dataset) -> Iterator[tuple[str, ...]]:
    """Referenced File ID (0004,1500) of every record in use; the tree of the records does not matter here."""
    for record in directory.DirectoryRecordSequence:
        file_id = record.get("ReferencedFileID")
        if file_id and record.get("RecordInUseFlag", 0xFFFF) != 0:
            yield (file_id,) if isinstance(file_id, str) else tuple(file_id)


def _locate(folder: Path, parts: tuple[str, ...], listings: dict[Path, dict[str, str]]) -> str:
    """Path of a file below ``folder`` as it is spelled there, or LookupError with the reason."""
    if any(part in ("", ".", "..") or set(part) & set("/\\\0") for part in parts):
        raise LookupError("stands in the DICOMDIR with a name that leads elsewhere")
    here = folder
    for part in parts:
        if here not in listings:
            try:
                listings[here] = {_plain(child.name): child.name for child in here.iterdir()}
            except OSError:  # missing, a file, or not to be entered
                listings[here] = {}
        spelled = part if (here / part).exists() else listings[here].get(_plain(part))
        if spelled is None:
            raise LookupError("stands in the DICOMDIR but is not there")
        here /= spelled
    if not here.is_file():
        raise LookupError("stands in the DICOMDIR but is not a file")
    return here.relative_to(folder).as_posix()


def _plain(name: str) -> str:
    """A name without case, and without the version that ISO 9660 gives it."""
    return name.casefold().removesuffix(";1").removesuffix(".").strip()
