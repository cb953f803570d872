"""Labels and masks, and which scan each belongs to.

Both name scans by file: as a path relative to the scan root or to the table, as an absolute path, or by the bare name
where only one scan has it; the suffix may be left out. A DICOM series goes by its folder or any of its slices.

No message quotes a name from a table or a folder, as it may be a patient's: it says the line, or the opaque id.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medclr.errors import MedclrError
from medclr.scans.modality import modality_of

_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img", ".hdr.gz", ".img.gz", ".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Label:
    """One line of a labels table."""

    file: str
    """'' in a table that goes by patient."""
    patient: str
    """As the hospital writes it; '' where the table has no such column."""
    label: str
    """'' if the line only says who the patient is."""
    line: int = field(compare=False)
    """Where it stands in the table: messages name this, and never the patient."""


@dataclass(frozen=True)
class Mask:
    """One segmentation file."""

    root: Path
    """Absolute folder of the masks."""
    path: str
    """Relative to ``root``."""
    scan: str
    """The name of its scan, as far as is known."""
    entry: int | None = None
    """Where it stands in a ``dataset.json``, counted from 1."""


class Names:
    """Finds scans by the names of their files."""

    def __init__(self) -> None:
        self._paths: defaultdict[str, set[int]] = defaultdict(set)
        self._names: defaultdict[str, set[int]] = defaultdict(set)

    def add(self, number: int, root: str, paths: Iterable[str]) -> None:
        """Give scan ``number`` the names that follow from these paths, relative to ``root``."""
        for path in paths:
            absolute = os.path.normpath(f"{root}/{path}")
            for name in (path, absolute):
                self._paths[name].add(number)
                self._paths[stem(name)].add(number)
            name = absolute.rpartition("/")[2]
            self._names[name].add(number)
            self._names[stem(name)].add(number)

    def find(self, name: str, beside: Path) -> set[int]:
        """Numbers of the scans so called; ``beside`` is the folder that a relative name may start from.

        A path goes before a bare name, and a name as written before the same without its suffix.
        """
        name = os.path.normpath(name)
        absolute = os.path.normpath(beside.absolute() / name)
        bare = name.rpartition("/")[2]
        for table, word in (
            (self._paths, name),
            (self._paths, absolute),
            (self._names, bare),
            (self._paths, stem(name)),
            (self._names, stem(bare)),
        ):
            if hits := table.get(word):
                return hits
        return set()


def stem(name: str) -> str:
    """Without the suffix of a scan's file; a folder called by a UID keeps its dots."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if lower.endswith(suffix)), name)


def read_labels(path: Path) -> list[Label]:
    """The lines of a CSV with a ``file`` or a ``patient_id`` column, or both, and usually a ``label`` column.

    Raises:
        MedclrError: the table is missing or unreadable, has no such columns, or says two things of one scan.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets like to write a byte order mark
            table = csv.DictReader(file)
            columns = set(table.fieldnames or ())
            lines = [(table.line_num, line) for line in table]
    except OSError as error:
        raise MedclrError(f"--labels {path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MedclrError(
            f"--labels {path}: is not a comma-separated table in UTF-8 ({type(error).__name__})"
        ) from error
    if not columns & {"file", "patient_id"} or not columns & {"label", "patient_id"}:
        raise MedclrError(f"--labels {path}: needs a column label, and a column file or patient_id or both")
    if "file" not in columns and "label" not in columns:
        raise MedclrError(f"--labels {path}: a table without a column file needs a column label")

    def cell(line: dict[str, str], name: str) -> str:
        return (line.get(name) or "").strip()

    labels = [Label(cell(line, "file"), cell(line, "patient_id"), cell(line, "label"), n) for n, line in lines]
    said: dict[str, Label] = {}
    for label in labels:
        name = label.file or label.patient
        if not name or (not label.file and "file" in columns):
            what = "file" if "file" in columns else "patient"
            raise MedclrError(f"--labels {path}: line {label.line} names no {what}")
        if (other := said.setdefault(name, label)) != label:
            raise MedclrError(f"--labels {path}: lines {other.line} and {label.line} contradict each other; keep one")
    return labels


def read_masks(path: Path) -> tuple[list[Mask], str | None]:
    """The masks in a folder of NIfTI files, or in a Decathlon or MONAI ``dataset.json``, and the modality told there.

    Raises:
        MedclrError: there is no such file or folder, it holds no masks, or the JSON does not look like that.
    """
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith(".")
        )
        names = [p.relative_to(path).as_posix() for p in found]
        masks, modality = [Mask(path.absolute(), name, stem(name)) for name in names], None
    elif path.name.endswith((".nii", ".nii.gz")) and path.is_file():
        raise MedclrError(f"--masks {path}: is a single mask; give the folder that holds it, or a dataset.json")
    elif path.is_file():
        masks, modality = _read_dataset(path)
    else:
        raise MedclrError(f"--masks {path}: no such folder or dataset.json")
    if not masks:
        raise MedclrError(f"--masks {path}: holds no NIfTI masks")
    return masks, modality


def _read_dataset(path: Path) -> tuple[list[Mask], str | None]:
    try:
        dataset: Any = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(str(item["image"]), item["label"]) for item in dataset["training"]]
        words = dataset.get("modality", {})
        told = {modality_of(str(word)).name for word in (words.values() if isinstance(words, dict) else [words])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MedclrError(  # its kind alone: what it says may quote the whole file
            f'--masks {path}: is not a dataset.json with "training": [{{"image": ..., "label": ...}}, ...] '
            f"({type(error).__name__})"
        ) from error
    root = path.parent.absolute()
    masks = []
    for entry, (image, label) in enumerate(pairs, start=1):
        if not isinstance(label, str):
            raise MedclrError(f"--masks {path}: the label of entry {entry} is no file; classes belong into --labels")
        mask = Path(os.path.normpath(root / label))
        if not mask.is_file():
            raise MedclrError(f"--masks {path}: entry {entry} names a mask that is not there")
        folder = root if mask.is_relative_to(root) else mask.parent
        masks.append(Mask(folder, mask.relative_to(folder).as_posix(), image, entry))
    return masks, told.pop() if len(told) == 1 else None


def assign(
    source: str,
    wanted: Sequence[str],
    called: Callable[[int], str],
    names: Names,
    usable: int,
    beside: Path,
    allow_unmatched: bool,
) -> list[int | None]:
    """The number of the scan that each of ``wanted`` names.

    Args:
        source: the option and its file, to begin a message with.
        wanted: names of scans.
        called: index into ``wanted`` -> what to call it in a message, such as "line 3".
        names: where to look them up; numbers from ``usable`` on are rejected files, which are passed over.
        usable: how many scans there are.
        beside: folder that relative names may start from.
        allow_unmatched: pass over names of no scan.

    Raises:
        MedclrError: a name is no scan's, or two scans'.
    """
    numbers: list[int | None] = []
    missing: list[int] = []
    for i, name in enumerate(wanted):
        hits = names.find(name, beside)
        number = next(iter(hits), None)
        numbers.append(number if number is not None and number < usable else None)
        if number is None:
            missing.append(i)
        elif len(hits) > 1:
            raise MedclrError(
                f"{source}: {len(hits)} files or scans are called what {called(i)} says; write their paths in full"
            )
    if missing and not allow_unmatched:
        raise MedclrError(
            f"{source}: {len(missing)} of its {len(wanted)} names are of no scan, the first is that of"
            f" {called(missing[0])}; mend them, or pass --allow-unmatched true"
        )
    return numbers


def labels_by_file(
    path: Path, table: Sequence[Label], names: Names, usable: int, allow_unmatched: bool
) -> dict[int, Label]:
    """The line of a labels table that names each scan's file; arguments and errors as ``assign``."""
    lines = [label for label in table if label.file]
    numbers = assign(
        f"--labels {path}",
        [line.file for line in lines],
        lambda i: f"line {lines[i].line}",
        names,
        usable,
        path.parent,
        allow_unmatched,
    )
    told: dict[int, Label] = {}
    for number, line in zip(numbers, lines, strict=True):
        # Several slices of one series may be listed, if they all say the same.
        if number is not None and replace(told.setdefault(number, line), file=line.file) != line:
            both = f"{told[number].line} and {line.line}"
            raise MedclrError(f"--labels {path}: lines {both} say two things of one scan; keep one")
    return told


def masks_by_scan(
    path: Path,
    masks: Sequence[Mask],
    names: Names,
    usable: int,
    allow_unmatched: bool,
    shown: Callable[[str, str], str],
) -> dict[int, Mask]:
    """The mask of each scan.

    Args:
        path: folder or ``dataset.json`` of the masks.
        masks: what it holds.
        names: as ``assign``; so are the next two.
        usable: number of scans.
        allow_unmatched: pass over masks of no scan.
        shown: root and path of a mask -> what to call it in a message.

    Raises:
        MedclrError: as ``assign``, or two masks are of one scan.
    """

    def called(mask: Mask) -> str:
        return shown(str(mask.root), mask.path) if mask.entry is None else f"entry {mask.entry}"

    beside = path if path.is_dir() else path.parent
    numbers = assign(
        f"--masks {path}",
        [mask.scan for mask in masks],
        lambda i: called(masks[i]),
        names,
        usable,
        beside,
        allow_unmatched,
    )
    mask_of: dict[int, Mask] = {}
    for number, mask in zip(numbers, masks, strict=True):
        if number is not None and mask_of.setdefault(number, mask) is not mask:
            both = f"{called(mask_of[number])} and {called(mask)}"
            raise MedclrError(f"--masks {path}: {both} are of one scan; keep one")
    return mask_of
