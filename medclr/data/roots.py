"""What `index` is given -> the files in it that may be scans: folders, DICOMDIRs, archives, a PACS."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medclr.data.manifest import Manifest
from medclr.data.places import File
from medclr.data.walk import Refused, absolute_folders, files_below, refuse_nested
from medclr.errors import MedclrError, ScanError
from medclr.sources import Brought, archive, bring, place, place_of


@dataclass(frozen=True)
class Roots:
    """What was given, brought into folders."""

    brought: list[Brought]
    copies: Path
    """Absolute folder of what had to be copied: it belongs to no other root, though it may lie in one."""

    @property
    def folders(self) -> list[str]:
        """The roots of all their files: each folder, and that of the members of its archives."""
        given = [str(one.folder) for one in self.brought]
        return given + [str(place_of(self.copies, folder)) for folder in given]

    def refuse_nested(self, others: Iterable[str]) -> None:
        """Raise if one of the folders lies in another that was indexed before, or the other way round."""
        for other in others:
            for folder in self.folders:
                if not (Path(folder).is_relative_to(self.copies) or Path(other).is_relative_to(self.copies)):
                    refuse_nested(folder, other)


def copies_path(manifest: Path) -> Path:
    """``NAME.copies`` beside ``NAME.csv``."""
    return manifest.with_suffix(".copies")


def bring_all(roots: Sequence[Path], copies: Path) -> Roots:
    """Make a folder of each root; archives are unpacked and a PACS is asked here.

    Raises:
        MedclrError: there is no such root, it cannot be brought, or one lies in another.
    """
    copies = copies.absolute()
    brought = [bring(root, copies) for root in roots]
    inside = [one.folder.is_relative_to(copies) for one in brought]
    absolute_folders([one.folder for one, copied in zip(brought, inside, strict=True) if not copied])
    return Roots(brought, copies)


def files_of(roots: Roots, skip: Collection[Path | None], old: Manifest | None) -> tuple[list[File], list[Refused]]:
    """All files of the roots, those of the archives that lie in folders included; and what cannot be used.

    The members of an archive come under a root of their own, one for all archives of a folder, and with the path of
    the archive before theirs: ``patient7/study.zip/series/1.dcm``.

    Args:
        roots: as ``bring_all`` gives them.
        skip: files and folders to leave out.
        old: files that are unchanged in it are known to be no archives.

    Raises:
        MedclrError: there is no file at all, or the archives do not fit on the disk.
    """
    known = {file for _, file in old.located} if old else set()
    found: list[File] = []
    refused: list[Refused] = []
    for one in roots.brought:
        folder = str(one.folder)
        refused += [Refused(folder, name or ".", reason) for name, reason in one.refused]
        if one.files is not None:
            for path in sorted(one.files):
                status = Path(folder, path).stat()
                found.append(File(folder, path, status.st_size, status.st_mtime_ns))
            continue
        here, strange = files_below(folder, [*skip, roots.copies])
        refused += strange
        for file in here:
            if file not in known and not one.folder.is_relative_to(roots.copies) and _is_archive(file):
                inside, strange = _unpacked(file, roots.copies)
                found += inside
                refused += strange
            else:
                found.append(file)
    if not found and not refused:
        raise MedclrError(f"{', '.join(str(one.folder) for one in roots.brought)}: holds no files")
    return found, refused


def _is_archive(file: File) -> bool:
    try:
        return archive.is_archive(file.absolute())
    except OSError:  # it will be refused when it is read
        return False


def _unpacked(file: File, copies: Path) -> tuple[list[File], list[Refused]]:
    """The members of an archive that lies in a folder, and what of it was refused."""
    root = place(copies, file.root)
    folder = root / file.path
    try:
        problems = archive.unpack(file.absolute(), folder, copies)
    except ScanError as error:
        return [], [Refused(file.root, file.path, str(error))]
    refused = [
        Refused(str(root), f"{file.path}/{name}", reason) if name else Refused(file.root, file.path, reason)
        for name, reason in problems
    ]
    found, strange = files_below(str(folder), [])
    if not found and not problems:
        refused.append(Refused(file.root, file.path, "is an archive without files"))
    refused += [Refused(str(root), f"{file.path}/{one.path}", one.reason) for one in strange]
    return [File(str(root), f"{file.path}/{one.path}", one.size, one.mtime_ns) for one in found], refused
