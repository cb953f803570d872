"""Files -> entries: what each scan is by its files alone, as pseudonyms.

Each file is read a single time, for its header and its hash together. The entries of unchanged files come from the
manifest of an earlier run instead.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medclr import files
from medclr.data.manifest import FileRow, Manifest, ScanRow
from medclr.data.places import File, Namer
from medclr.data.walk import Refused
from medclr.errors import MedclrError, ScanError
from medclr.progress import progress
from medclr.scans import HEAD_BYTES, NO_SCAN, Reader, bids, reader_of
from medclr.scans.policy import Plane, Policy
from medclr.scans.privacy import Pseudonyms

if TYPE_CHECKING:  # it imports numpy, which `medclr index --help` can do without
    from medclr.scans.scan import Found

WHOLE_FILE_BYTES = 64 * 2**20
"""Up to this size a file is held in memory, so that header and hash come from one reading."""


@dataclass(frozen=True)
class Entry:
    """A scan as its files alone describe it, without any identity but its path."""

    files: tuple[File, ...]
    """In the order of the slices."""
    digests: tuple[str, ...]
    """SHA-256 of each file."""
    path: str
    """The file, or the folder of a series, relative to its root."""
    series: str
    """As in ``FileRow``."""
    patient: str
    """As in ``FileRow``."""
    study_id: str
    modality: str | None
    body_part: str
    plane: str
    shape: tuple[int, int, int]
    """(D,H,W)."""
    spacing_mm: tuple[float | None, float | None, float | None]
    volume: int = 0
    """As in ``ScanRow``, and below."""
    irregular: str = ""
    is_picture: bool = False
    """A PNG, JPEG or TIFF: a patient has many, so one of an unknown patient is not taken for a patient of its own."""
    before: ScanRow | None = None
    """Its row in the manifest of an earlier run, if no file has changed."""
    file_rows: tuple[FileRow, ...] = ()
    """Those of its files there."""

    @property
    def root(self) -> str:
        """That of its first file."""
        return self.files[0].root

    @property
    def sha256(self) -> str:
        """Of its file; of a series: of its files' digests."""
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


def entries_of(
    found: Sequence[File],
    roots: Collection[str],
    old: Manifest | None,
    namer: Namer,
    key: Pseudonyms,
    policy: Policy,
    plane: Plane | None,
) -> tuple[list[Entry], list[Refused]]:
    """One entry a scan, from the old manifest where its files have not changed; and the files of none.

    Raises:
        MedclrError: files of the old manifest are no longer there.
    """
    cached = _cached(found, roots, old, namer) if old else []
    known = {file for entry in cached for file in entry.files}
    readings = Readings(key, policy, plane)
    readings.read([file for file in found if file not in known])
    # A new slice may belong to a series that is known: then the whole series is grouped anew.
    grown = set(readings.series)
    readings.read(dict.fromkeys(file for entry in cached if entry.series in grown for file in entry.files))
    entries = [entry for entry in cached if entry.series not in grown] + readings.entries()
    return entries, readings.refused


def _cached(found: Sequence[File], roots: Collection[str], old: Manifest, namer: Namer) -> list[Entry]:
    """Entries of the old manifest whose files are all as they were."""
    there = set(found)
    groups: defaultdict[str, list[tuple[FileRow, File]]] = defaultdict(list)
    for row, file in old.located:
        if row.kind == "image" and file.root in roots:
            groups[row.scan_id].append((row, file))
    changed = [pair for group in groups.values() for pair in group if pair[1] not in there]
    places = {(file.root, file.path) for file in found} if changed else set()
    gone = [file for _, file in changed if (file.root, file.path) not in places]
    if gone:
        raise MedclrError(
            f"{old.path}: {len(gone)} of its files are no longer there, the first is"
            f" {namer.shown(gone[0].root, gone[0].path)}; bring them back, or choose another --out"
        )
    for row, _ in changed:
        groups.pop(row.scan_id, None)
    entries = []
    for scan in old.rows:
        if scan.scan_id not in groups:
            continue
        group = groups[scan.scan_id]
        now = tuple(file for _, file in group)
        first = group[0][0]
        path = _path_of(now, first.series)
        entries.append(
            Entry(
                files=now,
                digests=tuple(row.sha256 for row, _ in group),
                path=path,
                series=first.series,
                patient=first.patient,
                study_id=scan.study_id,
                modality=scan.modality if first.series else bids.modality(path),
                body_part=scan.body_part,
                plane=scan.plane,
                shape=(scan.n_slices, scan.rows, scan.columns),
                spacing_mm=(scan.spacing_z_mm, scan.spacing_y_mm, scan.spacing_x_mm),
                volume=scan.volume,
                irregular=scan.irregular,
                before=scan,
                file_rows=tuple(row for row, _ in group),
            )
        )
    return entries


def _path_of(scan: Sequence[File], series: str) -> str:
    """The first file; of a series of several, the folder that holds all those under the root of the first."""
    first = scan[0]
    if len(scan) == 1 or not series:
        return first.path
    return os.path.commonpath({file.path.rpartition("/")[0] for file in scan if file.root == first.root}) or "."


class Readings:
    """The headers and hashes of files, and the scans that they make."""

    def __init__(self, key: Pseudonyms, policy: Policy, plane: Plane | None) -> None:
        self._key = key
        self._policy = policy
        self._plane = plane
        self._headers: dict[str, tuple[Reader, list[Any]]] = {}
        self._files: dict[Path, tuple[File, str, str]] = {}  # path -> file, sha256, series
        self.series: set[str] = set()
        """Pseudonyms of all series met."""
        self.refused: list[Refused] = []

    def read(self, found: Collection[File]) -> None:
        """Read the header and the hash of each file, or refuse it."""
        if not found:
            return
        with progress("index", len(found), "files") as advance:
            for file in found:
                try:
                    self._read(file)
                except ScanError as error:
                    self._refuse(file, str(error))
                except OSError as error:
                    self._refuse(file, f"cannot be read ({error.strerror or type(error).__name__})")
                except Exception as error:  # one odd file among a million must not end the run, and may quote a name
                    self._refuse(file, f"cannot be read (unexpected {type(error).__name__})")
                advance(1)

    def _read(self, file: File) -> None:
        path = file.absolute()
        if not file.size:
            raise ScanError("is empty")
        data: bytes | None
        if file.size <= WHOLE_FILE_BYTES:
            data = head = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
        else:
            data, digest = None, files.sha256(path)
            with path.open("rb") as opened:
                head = opened.read(HEAD_BYTES)
        self._files[path] = (file, digest, "")  # also of what no reader knows: the other half of a pair is such
        known = reader_of(head)
        if known is None:
            raise ScanError(NO_SCAN)
        name, reader = known
        header = reader.read_header(path, data)
        series = ""
        if header.series is not None:
            series = self._key("series", header.series or str(path.parent))
            self.series.add(series)
        self._headers.setdefault(name, (reader, []))[1].append(header)
        self._files[path] = (file, digest, series)

    def _refuse(self, file: File, reason: str) -> None:
        path = str(file.absolute())
        self.refused.append(Refused(file.root, file.path, reason.removeprefix(f"{path}: ").replace(path, "the file")))

    def entries(self) -> list[Entry]:
        """Group what was read into scans."""
        entries = []
        for name, (reader, headers) in self._headers.items():
            found, rejects = reader.find(headers, self._policy, self._plane)
            for scan in found:
                if all(path in self._files for path in scan.files):
                    entries.append(self._entry(scan, is_picture=name == "image"))
                else:  # another half that index passes over
                    self._refuse(self._files[scan.files[0]][0], "belongs to a file that is not indexed")
            for path, reason in rejects:
                self._refuse(self._files[path][0], reason)
        used = {(file.root, file.path) for entry in entries if len(entry.files) > 1 for file in entry.files}
        self.refused = [refused for refused in self.refused if (refused.root, refused.path) not in used]
        return entries

    def _entry(self, scan: "Found", is_picture: bool) -> Entry:
        records = [self._files[path] for path in scan.files]
        found = tuple(file for file, _, _ in records)
        d, h, w = (float(f"{s:.7g}") for s in scan.spacing_mm)  # all that float32, NIfTI's, holds
        unknown = not scan.plane and (d, h, w) == (1, 1, 1)
        return Entry(
            files=found,
            digests=tuple(digest for _, digest, _ in records),
            path=_path_of(found, records[0][2]),
            series=records[0][2],
            patient=self._key("patient", scan.patient) if scan.patient else "",
            study_id=self._key("study", scan.study) if scan.study else "",
            modality=scan.modality,
            body_part=scan.body_part,
            plane=scan.plane,
            shape=scan.shape,
            spacing_mm=(None, None, None) if unknown else (d, h, w),
            volume=scan.volume,
            irregular=scan.irregular,
            is_picture=is_picture,
        )
