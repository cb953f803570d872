"""Folders -> manifest: find the scans, read their headers once, and say what could not be used.

``data/walk.py`` finds the files and ``data/readings.py`` turns what they say into pseudonyms at once (``Entry``);
labels, masks and the options come on top. A later run on the same ``--out`` takes the entries of unchanged files from
the manifest instead of the files; what was rejected is looked at again, because a missing slice may have arrived, or an
option that was missing.
"""

import contextlib
import gc
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from medclr import files
from medclr.config import differences
from medclr.data.annotations import Label, Mask, Names, labels_by_file, masks_by_scan, read_labels, read_masks
from medclr.data.kinds import kinds
from medclr.data.manifest import (
    FileRow,
    Manifest,
    Rejected,
    ScanRow,
    Settings,
    read_manifest,
    read_rejected,
    read_settings,
    rejected_path,
    settings_path,
    table_paths,
    write_manifest,
)
from medclr.data.places import Namer, find_places, places_path
from medclr.data.readings import Entry, entries_of
from medclr.data.roots import Roots, bring_all, copies_path, files_of
from medclr.data.splits import parse_split, split_of
from medclr.data.walk import Refused
from medclr.errors import MedclrError, ScanError
from medclr.scans import bids
from medclr.scans.modality import modality_of
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.privacy import Pseudonyms, default_key_file, load_key

MOST = 5
"""So many reasons the summary counts; the others stand in the table."""

COLLECT_AFTER = 1_000_000
"""New objects, of which each file makes a handful, until garbage in cycles is looked for."""


@dataclass(frozen=True)
class IndexSummary:
    """What stands in a manifest."""

    manifest: Path
    scans: int
    patients: int
    slices: int
    added: int
    """Scans that were not in it before."""
    irregular: Counter[str]
    """Scans that are not plain: in what (``medclr.data.kinds``) -> how many, the commonest first."""
    rejected: int
    """Files that could not be used."""
    reasons: Counter[str]
    """Why -> how many, as ``irregular``."""
    shared_copies: int
    """Scans whose bytes also stand under another patient."""

    def __str__(self) -> str:
        text = (
            f"{self.manifest}: {_count(self.scans, 'scan')} of {_count(self.patients, 'patient')},"
            f" {_count(self.slices, 'slice')}; {self.added:,} new"
        )
        if self.irregular:
            text += "\nnot plain, see its column irregular:" + _listed(self.irregular)
        if self.rejected:
            text += f"\n{rejected_path(self.manifest)}: {_count(self.rejected, 'file')} could not be used, and why"
            text += _listed(self.reasons)
        if self.shared_copies:
            text += (
                f"\n{_count(self.shared_copies, 'scan')} byte for byte the same as one of another patient; whose is it?"
            )
        return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(counts: Mapping[str, int]) -> str:
    lines = [f"\n  {count:,}: {what}" for what, count in counts.items()]
    return "".join(lines[:MOST]) + (f"\n  and {len(lines) - MOST} other reasons" if len(lines) > MOST else "")


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
    policy: Policy = DEFAULT,
    plane: Plane | None = None,
    keep_paths: bool = False,
    key_file: Path | None = None,
    copies: Path | None = None,
) -> IndexSummary:
    """Find the scans in folders, archives or a PACS and write a manifest.

    Running it again with the same ``out`` adds what is new; rows of unchanged files stay as they are. Names that begin
    with a dot are passed over.

    Args:
        roots: Folders with DICOM, NIfTI, PNG, JPEG or TIFF files, told apart by content; zip and tar archives of them,
            also inside folders; DICOMDIR files; and DICOMweb servers, dicomweb+https://host:port/path, with the search
            behind a question mark, such as ?ModalitiesInStudy=CT.
        out: The manifest to write or to add to, NAME.csv; NAME.files.csv, NAME.rejected.csv and NAME.index.json stand
            beside it.
        labels: CSV with a column label, and a column file or patient_id or both (then it says whose the file is).
        masks: Folder of NIfTI segmentations named like their scans, or a Decathlon or MONAI dataset.json.
        modality: What files show that do not say it themselves: CT, MR, XR, US, PT, NM or OT.
        patient_pattern: Regular expression with one group that finds the patient in a file's path under its root;
            overrules DICOM's PatientID where it matches.
        split: Splits and their shares, such as train=0.7,test=0.3; a hash of the patient decides, once and for all.
        allow_unmatched: Go on although labels or masks have no scan, or scans no label.
        policy: What to do with scans that are not plain; what is let in says so in the column irregular.
        plane: How NIfTI volumes are cut into slices; if not given, across their coarsest spacing.
        keep_paths: Write paths into the tables and messages. If not, files are called by opaque ids, because a name may
            be a patient's; what they stand for is kept beside the key, and medclr whereis tells it.
        key_file: Secret key of the pseudonyms, made on first use; if not given, ~/.config/medclr/key.
        copies: Where archives are unpacked and fetched scans are kept, for the owner alone; if not given, NAME.copies
            beside the manifest.

    Raises:
        MedclrError: a folder or table is missing or wrong, no scan can be used, ``out`` was made from other input or is
            being written by another process, or the disk is full.
    """
    out = Path(out)
    labels, masks = (None if path is None else Path(path) for path in (labels, masks))
    given = roots if isinstance(roots, list | tuple) else [roots]  # one text is no list of letters
    if out.suffix != ".csv":
        raise MedclrError(f"--out {out}: the name of a manifest ends in .csv")
    given_modality = modality_of(modality).name if modality else None
    pattern = _pattern(patient_pattern) if patient_pattern else None
    fractions = parse_split(split) if split else None
    label_table = read_labels(labels) if labels else []
    mask_files, told_modality = read_masks(masks) if masks else ([], None)
    brought = bring_all(given, Path(copies) if copies else copies_path(out))
    folders = brought.folders
    if masks and any(Path(folder).resolve().is_relative_to(masks.resolve()) for folder in folders):
        raise MedclrError(f"--masks {masks}: holds the folder that is indexed; put the masks into one of their own")
    key_file = Path(key_file) if key_file else default_key_file()
    tables = table_paths(out)
    grows = out.exists() or files.is_pending(out)
    for table in tables:
        if out.exists() and not table.exists():
            raise MedclrError(f"--out {out}: exists, but without {table.name} it cannot be added to; choose another")
    key = Pseudonyms(load_key(key_file, create=not grows))
    namer = Namer(key, key_file, keep_paths)
    shares = ",".join(f"{name}={share:g}" for name, share in fractions.items()) if fractions else ""
    settings = Settings(key.name, keep_paths, plane, policy, shares)

    with files.alone(out.parent, f".{out.name}.lock"), _seldom_collected():
        files.finish(tables)
        old = _earlier(out, brought, settings, key_file) if out.exists() else None
        ours = [*tables, key_file, places_path(key_file)]
        skip = [*ours, labels, masks, *(mask.root / mask.path for mask in mask_files)]
        found, refused = files_of(brought, skip, old)
        entries, unreadable = entries_of(found, folders, old, namer, key, policy, plane)
        refused += unreadable

        sources = _sources(entries)
        names = _names(entries, sources, refused) if label_table or mask_files else Names()
        n, told, mask_of = len(entries), dict[int, Label](), dict[int, Mask]()
        if labels:
            told = labels_by_file(labels, label_table, names, n, allow_unmatched)
        if masks:
            mask_of = masks_by_scan(masks, mask_files, names, n, allow_unmatched, namer.shown)
        scans: list[Scan] = []
        for entry, source in zip(entries, sources, strict=True):
            line = told.get(source)
            try:
                patient, shows = _patient(entry, line, pattern, key), _modality(entry, given_modality or told_modality)
                scans.append(Scan(entry, patient, shows, line, mask_of.get(source)))
            except ScanError as error:
                if entry.before:
                    name = namer.shown(entry.root, entry.path)
                    raise MedclrError(f"{out}: {name} {error}; it was given when the manifest was made") from None
                refused += [Refused(file.root, file.path, str(error)) for file in entry.files]
        if not scans:
            raise MedclrError(_nothing([str(root) for root in given], refused, namer))
        if labels:
            scans = _labelled(labels, label_table, scans, key, namer, allow_unmatched)

        split_before = {row.patient_id: row.split for row in old.rows if row.split} if old else {}

        def split_now(patient_id: str) -> str:
            return split_before.get(patient_id) or (split_of(patient_id, fractions) if fractions else "")

        located = old.located if old else []  # what an earlier run found in other folders stays
        kept = {row.scan_id for row, file in located if row.kind == "image" and file.root not in folders}
        rows: dict[str, ScanRow] = {}
        file_rows: list[FileRow] = []
        for scan in scans:
            row = row_of(scan, split_now(scan.patient_id), key, namer)
            if scan.entry.before:
                _refuse_change(out, scan.entry.before, row)
            if row.scan_id in rows or row.scan_id in kept:
                same = "the same bytes stand at the same path under another root"
                refused += [Refused(file.root, file.path, same) for file in scan.entry.files]
                continue
            rows[row.scan_id] = row
            file_rows += _file_rows(row.scan_id, scan, namer)
        rejected = [Rejected(rejected_name(namer, refusal), refusal.reason) for refusal in dict.fromkeys(refused)]
        if old:
            rows |= {r.scan_id: replace(r, split=split_now(r.patient_id)) for r in old.rows if r.scan_id in kept}
            file_rows += [row for row in old.file_rows if row.scan_id in kept]
            rejected += _rejected_elsewhere(out, folders, namer, key_file)
        namer.save()
        manifest = write_manifest(out, rows.values(), file_rows, rejected, settings)
    return _summary(manifest, old, rejected)


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Rows by the million hold no cycles, yet Python's collector would look through all of them time and again."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _earlier(out: Path, roots: Roots, settings: Settings, key_file: Path) -> Manifest:
    """The manifest that is added to; MedclrError unless it was made with the same key and settings."""
    then = read_settings(out)
    if then.key != settings.key:
        raise MedclrError(f"--out {out}: was made with another key; give its --key-file, or choose another --out")
    then = replace(then, split=then.split or settings.split)  # splits may be asked for later
    if other := differences(asdict(then), asdict(settings)):
        raise MedclrError(
            f"--out {out}: was made with other {', '.join(other)} (see {settings_path(out).name}); give the options of"
            " then, or choose another --out"
        )
    old = read_manifest(out, key_file)
    roots.refuse_nested({place.root for row, place in old.located if row.kind == "image"} - set(roots.folders))
    return old


# What labels, masks and options add


@dataclass(frozen=True)
class Scan:
    """An entry, and what else is known of it."""

    entry: Entry
    patient_id: str
    modality: str
    line: Label | None
    """Of the labels table."""
    mask: Mask | None


def _sources(entries: Sequence[Entry]) -> list[int]:
    """For each entry the first that a label or a mask cannot tell from it: volumes of a file, parts of a series."""
    first: dict[tuple[str, str, str], int] = {}
    return [first.setdefault((entry.root, entry.path, entry.series), i) for i, entry in enumerate(entries)]


def _names(entries: Sequence[Entry], sources: Sequence[int], refused: Sequence[Refused]) -> Names:
    """Scans are numbered as they come, refused files after them."""
    names = Names()
    for entry, source in zip(entries, sources, strict=True):
        names.add(source, entry.root, {entry.path, *(file.path for file in entry.files)})
    for i, refusal in enumerate(refused, start=len(entries)):
        names.add(i, refusal.root, [refusal.path])
    return names


def _labelled(
    path: Path, table: Sequence[Label], scans: Sequence[Scan], key: Pseudonyms, namer: Namer, allow_unmatched: bool
) -> list[Scan]:
    """The scans with the lines of the table that name their patients, where none names their files."""
    by_patient = {key("patient", line.patient): line for line in table if not line.file}
    strangers = by_patient.keys() - {scan.patient_id for scan in scans}
    if strangers and not allow_unmatched:
        first = min(by_patient[stranger].line for stranger in strangers)
        raise MedclrError(
            f"--labels {path}: {len(strangers)} of its {len(by_patient)} patients have no usable scan, the first is"
            f" that of line {first}; take them out, or pass --allow-unmatched true"
        )
    scans = [replace(scan, line=scan.line or by_patient.get(scan.patient_id)) for scan in scans]
    bare = [scan.entry for scan in scans if not (scan.line and scan.line.label)]
    if bare and any(line.label for line in table) and not allow_unmatched:
        raise MedclrError(
            f"--labels {path}: {len(bare)} of {len(scans)} scans have no label, the first is"
            f" {namer.shown(bare[0].root, bare[0].path)}; add them, or pass --allow-unmatched true"
        )
    return scans


def _patient(entry: Entry, line: Label | None, pattern: re.Pattern[str] | None, key: Pseudonyms) -> str:
    """What a person says goes before what the file says, and that before what its name suggests."""
    if line and line.patient:
        return key("patient", line.patient)
    if pattern and (match := pattern.search(entry.path)) and match[1]:
        return key("patient", match[1])
    if entry.patient:
        return entry.patient
    if pattern:
        raise ScanError("is not matched by --patient-pattern, so nobody knows whose it is")
    if subject := bids.subject(entry.path):
        return key("patient", subject)
    if entry.is_picture:
        raise ScanError("does not say whose it is; give --labels with a column patient_id, or --patient-pattern")
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
        raise MedclrError(f"--patient-pattern {text!r}: is not a regular expression ({error})") from error
    if pattern.groups != 1:
        raise MedclrError(f"--patient-pattern {text!r}: needs exactly one group in parentheses, the patient")
    return pattern


# What is written


def row_of(scan: Scan, split: str, key: Pseudonyms, namer: Namer) -> ScanRow:
    """Its row of the manifest."""
    entry = scan.entry
    volume = [str(entry.volume)] if entry.volume else []
    return ScanRow(
        scan_id=key("scan", entry.path, entry.sha256, *volume),
        patient_id=scan.patient_id,
        study_id=entry.study_id,
        modality=scan.modality,
        body_part=entry.body_part,
        plane=entry.plane,
        path=namer(entry.root, entry.path),
        n_slices=entry.shape[0],
        rows=entry.shape[1],
        columns=entry.shape[2],
        spacing_z_mm=entry.spacing_mm[0],
        spacing_y_mm=entry.spacing_mm[1],
        spacing_x_mm=entry.spacing_mm[2],
        sha256=key.content(entry.sha256),
        volume=entry.volume,
        irregular=entry.irregular,
        label=scan.line.label if scan.line else "",
        mask_path=namer(str(scan.mask.root), scan.mask.path) if scan.mask else "",
        split=split,
    )


def _file_rows(scan_id: str, scan: Scan, namer: Namer) -> Iterator[FileRow]:
    def name(root: str, path: str) -> tuple[str, str]:
        return (root if namer.keep_paths else "", namer(root, path))

    entry = scan.entry
    yield from entry.file_rows
    for file, digest in [] if entry.file_rows else zip(entry.files, entry.digests, strict=True):
        place = name(file.root, file.path)
        yield FileRow(scan_id, "image", *place, file.size, file.mtime_ns, entry.series, entry.patient, digest)
    if scan.mask:
        try:
            status = (scan.mask.root / scan.mask.path).stat()
        except OSError as error:
            shown = namer.shown(str(scan.mask.root), scan.mask.path)
            raise MedclrError(f"--masks: {shown} cannot be read ({error.strerror}); bring it back") from None
        place = name(str(scan.mask.root), scan.mask.path)
        yield FileRow(scan_id, "mask", *place, status.st_size, status.st_mtime_ns, "", "")


def rejected_name(namer: Namer, refused: Refused) -> str:
    """As in ``Rejected``. A path that is not UTF-8 is written so that it can be read."""
    name = namer(refused.root, refused.path)
    if not namer.keep_paths:
        return name
    return os.fsencode(f"{refused.root}/{name}").decode("utf-8", "backslashreplace")


def _rejected_elsewhere(out: Path, folders: Sequence[str], namer: Namer, key_file: Path) -> list[Rejected]:
    """What an earlier run rejected in other folders."""
    before = read_rejected(out)
    if namer.keep_paths:
        return [r for r in before if not any(Path(r.path).is_relative_to(root) for root in folders)]
    places = find_places(key_file, {r.path for r in before})
    return [r for r in before if places[r.path].root not in folders]


def _refuse_change(out: Path, before: ScanRow, now: ScanRow) -> None:
    """Raise if the row of unchanged files would change, but for a label, mask or split that it had none of."""
    if before == now:
        return
    for name in (field.name for field in fields(ScanRow)):
        was, becomes = getattr(before, name), getattr(now, name)
        if was != becomes and not (name in ("label", "mask_path", "split") and was == ""):
            raise MedclrError(
                f"--out {out}: {name} of {now.path} is {was!r} there and would become {becomes!r};"
                " give the options of then, or choose another --out"
            )


def _nothing(folders: Sequence[str], refused: Sequence[Refused], namer: Namer) -> str:
    (reason, count), *_ = Counter(r.reason for r in refused).most_common(1)
    example = next(r for r in refused if r.reason == reason)
    return (
        f"{', '.join(folders)}: no usable scan; {count} of {len(refused)} files are like"
        f" {namer.shown(example.root, example.path)}: {reason}"
    )


def _summary(manifest: Manifest, old: Manifest | None, rejected: Sequence[Rejected]) -> IndexSummary:
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
        irregular=kinds((text, 1) for row in manifest.rows if row.irregular for text in row.irregular.split("; ")),
        rejected=len(rejected),
        reasons=kinds((r.reason, 1) for r in rejected),
        shared_copies=sum(len(owners[row.sha256]) > 1 for row in manifest.rows),
    )
