"""Folders -> manifest: find the scans, read their headers once, and say what could not be used.

Each file is read a single time, for its header and its hash together. What the headers say is turned into pseudonyms
at once (``Entry``); labels, masks and the options come on top. A later run on the same ``--out`` takes the entries of
unchanged files from the manifest instead of the files; what was rejected is looked at again, because a missing slice
may have arrived, or an option that was missing.
"""

import hashlib
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from medclr import files
from medclr.data.annotations import Label, Mask, Names, assign, read_labels, read_masks
from medclr.data.manifest import (
    FileRow,
    Manifest,
    Rejected,
    ScanRow,
    files_path,
    parse_split,
    read_manifest,
    read_rejected,
    rejected_path,
    split_of,
    write_manifest,
)
from medclr.errors import MedclrError, ScanError
from medclr.progress import progress
from medclr.scans import HEAD_BYTES, NO_SCAN, Reader, bids, reader_of
from medclr.scans.modality import modality_of
from medclr.scans.privacy import Pseudonyms, default_key_file, load_key

if TYPE_CHECKING:  # it imports numpy, which `medclr index --help` can do without
    from medclr.scans.scan import Found

WHOLE_FILE_BYTES = 64 * 2**20
"""Up to this size a file is held in memory, so that header and hash come from one reading."""


@dataclass(frozen=True)
class IndexSummary:
    """What stands in a manifest."""

    manifest: Path
    scans: int
    patients: int
    slices: int
    added: int
    """Scans that were not in it before."""
    rejected: int
    """Files that could not be used."""
    shared_copies: int
    """Scans whose bytes also stand under another patient."""

    def __str__(self) -> str:
        text = (
            f"{self.manifest}: {_count(self.scans, 'scan')} of {_count(self.patients, 'patient')},"
            f" {_count(self.slices, 'slice')}; {self.added:,} new"
        )
        if self.rejected:
            text += f"\n{rejected_path(self.manifest)}: {_count(self.rejected, 'file')} could not be used, and why"
        if self.shared_copies:
            text += (
                f"\n{_count(self.shared_copies, 'scan')} byte for byte the same as one of another patient; whose is it?"
            )
        return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class File:
    """A file found on the way through a root."""

    root: str
    path: str
    """Relative to ``root``, '/' between its parts."""
    size: int
    mtime_ns: int

    def absolute(self) -> Path:
        """Where it lies."""
        return Path(self.root, self.path)


@dataclass(frozen=True)
class Entry:
    """A scan as its files alone describe it, without any identity."""

    files: tuple[File, ...]
    """In the order of the slices."""
    path: str
    """As in ``ScanRow``."""
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
    sha256: str
    is_picture: bool = False
    """A PNG, JPEG or TIFF: a patient has many, so one of an unknown patient is not taken for a patient of its own."""
    before: ScanRow | None = None
    """Its row in the manifest of an earlier run, if no file has changed."""


def index(
    roots: list[Path],
    out: Path,
    *,
    labels: Path | None = None,
    masks: Path | None = None,
    modality: str | None = None,
    patient_pattern: str | None = None,
    split: str | None = None,
    allow_unmatched: bool = False,
    key_file: Path | None = None,
) -> IndexSummary:
    """Find the scans in folders and write a manifest.

    Running it again with the same ``out`` adds what is new; rows of unchanged files stay as they are. Names that begin
    with a dot are passed over.

    Args:
        roots: Folders with DICOM, NIfTI, PNG, JPEG or TIFF files, told apart by content.
        out: The manifest to write or to add to, NAME.csv; NAME.files.csv and NAME.rejected.csv stand beside it.
        labels: CSV with a column label, and a column file or patient_id or both (then it says whose the file is).
        masks: Folder of NIfTI segmentations named like their scans, or a Decathlon or MONAI dataset.json.
        modality: What files show that do not say it themselves: CT, MR, XR, US, PT, NM or OT.
        patient_pattern: Regular expression with one group that finds the patient in a file's path under its root;
            overrules DICOM's PatientID where it matches.
        split: Splits and their shares, such as train=0.7,test=0.3; a hash of the patient decides.
        allow_unmatched: Go on although labels or masks have no scan, or scans no label.
        key_file: Secret key of the pseudonyms, made on first use; if not given, ~/.config/medclr/key.

    Raises:
        MedclrError: a folder or table is missing or wrong, no scan can be used, or ``out`` was made from other input.
    """
    out = Path(out)
    labels, masks = (None if path is None else Path(path) for path in (labels, masks))
    folders = _folders(roots if isinstance(roots, list | tuple) else [roots])  # one text is no list of letters
    if out.suffix != ".csv":
        raise MedclrError(f"--out {out}: the name of a manifest ends in .csv")
    given_modality = modality_of(modality).name if modality else None
    pattern = _pattern(patient_pattern) if patient_pattern else None
    fractions = parse_split(split) if split else None
    label_table = read_labels(labels) if labels else []
    mask_files, told_modality = read_masks(masks) if masks else ([], None)
    key = Pseudonyms(load_key(Path(key_file) if key_file else default_key_file()))
    old = _earlier(out, folders, key) if out.exists() else None

    if masks and any(Path(folder).resolve().is_relative_to(masks.resolve()) for folder in folders):
        raise MedclrError(f"--masks {masks}: holds the folder that is indexed; put the masks into one of their own")
    tables = (out, files_path(out), rejected_path(out))
    skip = _identities([*tables, labels, masks, *(mask.root / mask.path for mask in mask_files)])
    found_files, rejected = _walk_all(folders, skip)
    entries = _entries(found_files, old, out, key, rejected)

    names = _names(entries, rejected, folders) if label_table or mask_files else Names()
    told = _told(entries, names, labels, label_table, allow_unmatched)
    mask_of = _mask_of(entries, names, masks, mask_files, allow_unmatched)

    patients: dict[int, str] = {}
    modalities: dict[int, str] = {}
    for i, entry in enumerate(entries):
        try:
            patients[i] = _patient(entry, told.get(i), pattern, key)
            modalities[i] = _modality(entry, given_modality or told_modality)
        except ScanError as error:
            if entry.before:
                raise MedclrError(f"{out}: {entry.path} {error}; it was given when the manifest was made") from None
            rejected += [Rejected(str(file.absolute()), str(error)) for file in entry.files]
    usable = [i for i in range(len(entries)) if i in patients and i in modalities]
    if not usable:
        raise MedclrError(_nothing(folders, rejected))
    label_of = _label_of(entries, usable, patients, told, key, labels, label_table, allow_unmatched)

    rows: dict[str, ScanRow] = {}
    file_rows: list[FileRow] = []
    for i in usable:
        entry, mask = entries[i], mask_of.get(i)
        row = ScanRow(
            scan_id=key("scan", entry.path, entry.sha256),
            patient_id=patients[i],
            study_id=entry.study_id,
            modality=modalities[i],
            body_part=entry.body_part,
            plane=entry.plane,
            path=entry.path,
            n_slices=entry.shape[0],
            rows=entry.shape[1],
            columns=entry.shape[2],
            spacing_z_mm=entry.spacing_mm[0],
            spacing_y_mm=entry.spacing_mm[1],
            spacing_x_mm=entry.spacing_mm[2],
            sha256=entry.sha256,
            label=label_of.get(i, ""),
            mask_path=mask.path if mask else "",
            split=split_of(patients[i], fractions) if fractions else "",
        )
        if entry.before:
            _refuse_change(out, entry.before, row)
        if row.scan_id in rows:
            same = "the same bytes stand at the same path under another root"
            rejected += [Rejected(str(file.absolute()), same) for file in entry.files]
            continue
        rows[row.scan_id] = row
        file_rows += _file_rows(row.scan_id, entry, mask)

    if old:  # what an earlier run found in other folders stays
        kept = {file.scan_id for file in old.file_rows if file.kind == "image" and file.root not in folders}
        rows |= {row.scan_id: row for row in old.rows if row.scan_id in kept}
        file_rows += [file for file in old.file_rows if file.scan_id in kept]
        rejected += [r for r in read_rejected(out) if not any(Path(r.path).is_relative_to(root) for root in folders)]
    manifest = write_manifest(out, rows.values(), file_rows, rejected)
    return _summary(manifest, old, len(rejected))


# What is there


def _folders(roots: Sequence[Path]) -> list[str]:
    """Absolute, each a folder, none inside another."""
    folders = [os.path.normpath(Path(root).absolute()) for root in roots]
    for i, folder in enumerate(folders):
        if not Path(folder).is_dir():
            raise MedclrError(
                f"{folder}: " + ("is a file, not a folder" if Path(folder).exists() else "no such folder")
            )
        for other in folders[:i]:
            _refuse_nested(folder, other)
    return folders


def _refuse_nested(folder: str, other: str) -> None:
    a, b = Path(folder).resolve(), Path(other).resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise MedclrError(f"{folder} and {other}: one folder lies in the other; index the same one each time")


def _earlier(out: Path, folders: Sequence[str], key: Pseudonyms) -> Manifest:
    """The manifest that is added to."""
    for table in (files_path(out), rejected_path(out)):
        if not table.exists():
            raise MedclrError(f"--out {out}: exists, but without {table.name} it cannot be added to; choose another")
    old = read_manifest(out)
    for row in old.rows[:1]:
        if key("scan", row.path, row.sha256) != row.scan_id:
            raise MedclrError(f"--out {out}: was made with another key; give its --key_file, or choose another --out")
    for root in {file.root for file in old.file_rows if file.kind == "image"} - set(folders):
        for folder in folders:
            _refuse_nested(folder, root)
    return old


def _identities(paths: Iterable[Path | None]) -> set[tuple[int, int]]:
    """Device and inode of those that exist: also found under another name or through a link."""
    identities = set()
    for path in paths:
        if path is not None and path.exists():
            status = path.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities


def _walk_all(folders: Sequence[str], skip: set[tuple[int, int]]) -> tuple[list[File], list[Rejected]]:
    found: list[File] = []
    rejected: list[Rejected] = []
    for folder in folders:
        found += sorted(_walk(folder, skip, rejected), key=lambda file: file.path)
    if not found and not rejected:
        raise MedclrError(f"{', '.join(folders)}: holds no files")
    return found, rejected


def _walk(root: str, skip: set[tuple[int, int]], rejected: list[Rejected]) -> Iterator[File]:
    """All files under a root, links followed; a folder that is reached twice is entered once."""
    seen = skip | _identities([Path(root)])
    pending = [""]
    while pending:
        folder = pending.pop()
        here = f"{root}/{folder}" if folder else root
        try:
            children = sorted(os.scandir(here), key=lambda child: child.name)
        except OSError as error:
            rejected.append(Rejected(here, f"cannot be opened ({error.strerror})"))
            continue
        for child in children:
            if child.name.startswith("."):
                continue
            path = f"{folder}/{child.name}" if folder else child.name
            try:
                path.encode()
                status = child.stat()
            except UnicodeEncodeError:
                shown = os.fsencode(child.path).decode("utf-8", "backslashreplace")
                rejected.append(Rejected(shown, "has a name that is not UTF-8; rename it"))
                continue
            except OSError as error:
                rejected.append(Rejected(child.path, f"cannot be opened ({error.strerror})"))
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            if stat.S_ISDIR(status.st_mode):
                seen.add(identity)
                pending.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield File(root, path, status.st_size, status.st_mtime_ns)


# What the files say


def _entries(
    found: Sequence[File], old: Manifest | None, out: Path, key: Pseudonyms, rejected: list[Rejected]
) -> list[Entry]:
    """One entry a scan, from the old manifest where its files have not changed; files of none go to ``rejected``."""
    cached = _cached(found, old, out) if old else []
    known = {file for entry in cached for file in entry.files}
    to_read = [file for file in found if file not in known]
    readings = Readings(key, rejected)
    readings.read(to_read)
    # A new slice may belong to a series that is known: then the whole series is grouped anew.
    grown = set(readings.series)
    readings.read([file for entry in cached if entry.series in grown for file in entry.files])
    return [entry for entry in cached if entry.series not in grown] + readings.entries()


def _cached(found: Sequence[File], old: Manifest, out: Path) -> list[Entry]:
    """Entries of the old manifest whose files are all as they were."""
    there = {(file.root, file.path): file for file in found}
    roots = {file.root for file in found}
    rows = {row.scan_id: row for row in old.rows}
    images: defaultdict[str, list[FileRow]] = defaultdict(list)
    for file_row in old.file_rows:
        if file_row.kind == "image" and file_row.root in roots:
            images[file_row.scan_id].append(file_row)
    gone = [row for group in images.values() for row in group if (row.root, row.path) not in there]
    if gone:
        raise MedclrError(
            f"{out}: {len(gone)} of its files are no longer there, the first is {gone[0].absolute()};"
            " bring them back, or choose another --out"
        )
    entries = []
    for scan_id, group in images.items():
        now = tuple(there[row.root, row.path] for row in group)
        if all((a.size, a.mtime_ns) == (b.size, b.mtime_ns) for a, b in zip(now, group, strict=True)):
            row, first = rows[scan_id], group[0]
            entries.append(
                Entry(
                    files=now,
                    path=row.path,
                    series=first.series,
                    patient=first.patient,
                    study_id=row.study_id,
                    modality=row.modality if first.series else bids.modality(row.path),
                    body_part=row.body_part,
                    plane=row.plane,
                    shape=(row.n_slices, row.rows, row.columns),
                    spacing_mm=(row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm),
                    sha256=row.sha256,
                    before=row,
                )
            )
    return entries


class Readings:
    """The headers and hashes of files, and the scans that they make."""

    def __init__(self, key: Pseudonyms, rejected: list[Rejected]) -> None:
        self._key = key
        self._rejected = rejected
        self._headers: dict[str, tuple[Reader, list[Any]]] = {}
        self._files: dict[Path, tuple[File, str, str]] = {}  # path -> file, sha256, series
        self.series: set[str] = set()
        """Pseudonyms of all series met."""

    def read(self, found: Sequence[File]) -> None:
        """Read the header and the hash of each file, or reject it."""
        if not found:
            return
        with progress("index", len(found), "files") as advance:
            for file in found:
                try:
                    self._read(file)
                except ScanError as error:
                    self._reject(file, str(error))
                except OSError as error:
                    self._reject(file, f"cannot be read ({error.strerror or type(error).__name__})")
                except Exception as error:  # one odd file among a million must not end the run, and may quote a name
                    self._reject(file, f"cannot be read (unexpected {type(error).__name__})")
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

    def _reject(self, file: File, reason: str) -> None:
        self._rejected.append(Rejected(str(file.absolute()), reason))

    def entries(self) -> list[Entry]:
        """Group what was read into scans."""
        entries = []
        for name, (reader, headers) in self._headers.items():
            found, rejects = reader.find(headers)
            entries += [self._entry(scan, is_picture=name == "image") for scan in found]
            self._rejected += [Rejected(str(path), reason) for path, reason in rejects]
        return entries

    def _entry(self, scan: "Found", is_picture: bool) -> Entry:
        records = [self._files[path] for path in scan.files]
        first, digest, series = records[0]
        path = first.path
        if len(records) > 1:
            here = [file.path for file, _, _ in records if file.root == first.root]
            path = os.path.commonpath([PurePosixPath(path).parent for path in here]) or "."
            digest = hashlib.sha256("".join(digest for _, digest, _ in records).encode()).hexdigest()
        d, h, w = (float(f"{s:.7g}") for s in scan.spacing_mm)  # all that float32, NIfTI's, holds
        unknown = not scan.plane and (d, h, w) == (1, 1, 1)
        return Entry(
            files=tuple(file for file, _, _ in records),
            path=path,
            series=series,
            patient=self._key("patient", scan.patient) if scan.patient else "",
            study_id=self._key("study", scan.study) if scan.study else "",
            modality=scan.modality,
            body_part=scan.body_part,
            plane=scan.plane,
            shape=scan.shape,
            spacing_mm=(None, None, None) if unknown else (d, h, w),
            sha256=digest,
            is_picture=is_picture,
        )


# What labels, masks and options add


def _names(entries: Sequence[Entry], rejected: Sequence[Rejected], folders: Sequence[str]) -> Names:
    """Scans are numbered as they come, rejected files after them."""
    names = Names()
    for i, entry in enumerate(entries):
        names.add(i, entry.files[0].root, {entry.path, *(file.path for file in entry.files)})
    for i, reject in enumerate(rejected, start=len(entries)):
        root = next(folder for folder in folders if reject.path.startswith(folder))
        names.add(i, root, [reject.path[len(root) + 1 :]])
    return names


def _told(
    entries: Sequence[Entry], names: Names, path: Path | None, table: Sequence[Label], allow_unmatched: bool
) -> dict[int, Label]:
    """The line of the labels table that names each entry's file."""
    lines = [label for label in table if label.file]
    if not lines or path is None:
        return {}
    wanted = [label.file for label in lines]
    numbers = assign(f"--labels {path}", wanted, names, len(entries), Path(path).parent, allow_unmatched)
    told: dict[int, Label] = {}
    for number, line in zip(numbers, lines, strict=True):
        # Several slices of one series may be listed, if they all say the same.
        if number is not None and replace(told.setdefault(number, line), file=line.file) != line:
            both = f"{told[number].file!r} and {line.file!r}"
            raise MedclrError(f"--labels {path}: says two things of one scan, called {both}; keep one")
    return told


def _mask_of(
    entries: Sequence[Entry], names: Names, path: Path | None, masks: Sequence[Mask], allow_unmatched: bool
) -> dict[int, Mask]:
    """The mask of each entry."""
    if path is None:
        return {}
    beside = Path(path) if Path(path).is_dir() else Path(path).parent
    numbers = assign(f"--masks {path}", [m.scan for m in masks], names, len(entries), beside, allow_unmatched)
    mask_of: dict[int, Mask] = {}
    for number, mask in zip(numbers, masks, strict=True):
        if number is not None and mask_of.setdefault(number, mask) is not mask:
            raise MedclrError(f"--masks {path}: {mask_of[number].path} and {mask.path} are of one scan; keep one")
    return mask_of


def _label_of(
    entries: Sequence[Entry],
    usable: Sequence[int],
    patients: Mapping[int, str],
    told: Mapping[int, Label],
    key: Pseudonyms,
    path: Path | None,
    table: Sequence[Label],
    allow_unmatched: bool,
) -> dict[int, str]:
    """The label of each usable entry, by file or else by patient."""
    by_patient = {key("patient", line.patient): line for line in table if not line.file}
    strangers = by_patient.keys() - {patients[i] for i in usable}
    if strangers and not allow_unmatched:
        first = min(by_patient[stranger].line for stranger in strangers)
        raise MedclrError(
            f"--labels {path}: {len(strangers)} of its {len(by_patient)} patients have no usable scan, the first is"
            f" that of line {first}; take them out, or pass --allow_unmatched true"
        )
    lines = {i: told.get(i) or by_patient.get(patients[i]) for i in usable}
    label_of = {i: line.label for i, line in lines.items() if line and line.label}
    bare = [i for i in usable if i not in label_of]
    if bare and any(line.label for line in table) and not allow_unmatched:
        raise MedclrError(
            f"--labels {path}: {len(bare)} of {len(usable)} scans have no label, the first is {entries[bare[0]].path};"
            " add them, or pass --allow_unmatched true"
        )
    return label_of


def _patient(entry: Entry, line: Label | None, pattern: re.Pattern[str] | None, key: Pseudonyms) -> str:
    """What a person says goes before what the file says, and that before what its name suggests."""
    if line and line.patient:
        return key("patient", line.patient)
    if pattern and (match := pattern.search(entry.path)) and match[1]:
        return key("patient", match[1])
    if entry.patient:
        return entry.patient
    if pattern:
        raise ScanError("is not matched by --patient_pattern, so nobody knows whose it is")
    if subject := bids.subject(entry.path):
        return key("patient", subject)
    if entry.is_picture:
        raise ScanError("does not say whose it is; give --labels with a column patient_id, or --patient_pattern")
    return key("patient", "", entry.sha256)  # a volume of its own; its copies are the same person


def _modality(entry: Entry, given: str | None) -> str:
    modality = entry.modality or given
    if modality is None:
        raise ScanError("does not say its modality; give it with --modality")
    return modality


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise MedclrError(f"--patient_pattern {text!r}: is not a regular expression ({error})") from error
    if pattern.groups != 1:
        raise MedclrError(f"--patient_pattern {text!r}: needs exactly one group in parentheses, the patient")
    return pattern


# What is written


def _refuse_change(out: Path, before: ScanRow, now: ScanRow) -> None:
    """Raise if the row of unchanged files would change, but for a label, mask or split that it had none of."""
    for name in (field.name for field in fields(ScanRow)):
        was, becomes = getattr(before, name), getattr(now, name)
        if was != becomes and not (name in ("label", "mask_path", "split") and was == ""):
            raise MedclrError(
                f"--out {out}: {name} of {now.path} is {was!r} there and would become {becomes!r};"
                " give the options of then, or choose another --out"
            )


def _file_rows(scan_id: str, entry: Entry, mask: Mask | None) -> Iterator[FileRow]:
    for file in entry.files:
        yield FileRow(scan_id, "image", file.root, file.path, file.size, file.mtime_ns, entry.series, entry.patient)
    if mask:
        status = (mask.root / mask.path).stat()
        yield FileRow(scan_id, "mask", str(mask.root), mask.path, status.st_size, status.st_mtime_ns, "", "")


def _nothing(folders: Sequence[str], rejected: Sequence[Rejected]) -> str:
    (reason, count), *_ = Counter(r.reason for r in rejected).most_common(1)
    example = next(r.path for r in rejected if r.reason == reason)
    return f"{', '.join(folders)}: no usable scan; {count} of {len(rejected)} files are like {example}, which {reason}"


def _summary(manifest: Manifest, old: Manifest | None, n_rejected: int) -> IndexSummary:
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for row in manifest.rows:
        owners[row.sha256].add(row.patient_id)
    before = {row.scan_id for row in old.rows} if old else set()
    return IndexSummary(
        manifest=manifest.path,
        scans=len(manifest.rows),
        patients=len({row.patient_id for row in manifest.rows}),
        slices=sum(row.n_slices for row in manifest.rows),
        added=sum(row.scan_id not in before for row in manifest.rows),
        rejected=n_rejected,
        shared_copies=sum(len(owners[row.sha256]) > 1 for row in manifest.rows),
    )
