"""What a manifest or a store says of its scans, column by column, and what in it may harm training.

The tables are read as columns, so that a hundred thousand scans take a second; the checks of ``read_manifest`` are left
to the verbs that go on from there.
"""

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from medclr.data.kinds import kinds
from medclr.data.manifest import read_rejected, rejected_path
from medclr.data.store import Store
from medclr.errors import MedclrError

SPACINGS = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
TEXTS = ("scan_id", "patient_id", "modality", "body_part", "plane", "label", "split", "sha256", "irregular")


@dataclass(frozen=True)
class Cohort:
    """The scans of a manifest or of a store."""

    name: str
    scans: pa.Table
    """One row a scan: ``TEXTS`` as text, n_slices, rows, columns, ``SPACINGS`` (null: not recorded); of a store also
    low and high, physical units, and filled: which part of the square the slice takes."""
    rejected: Counter[str]
    """Reason, with N for every number -> files (of a store: scans)."""
    store: Store | None = None
    copies: Counter[str] = field(default_factory=Counter)
    """What ``medclr dedup`` wrote beside a store: slices by exact, near and patients (of another patient)."""

    def column(self, name: str) -> NDArray[Any]:
        """[m], one a scan; numbers that are not recorded are NaN."""
        column: NDArray[Any] = self.scans[name].to_numpy()
        return column

    @property
    def modalities(self) -> list[str]:
        """Those that are there, the one with most slices first."""
        rows = self.group("modality")
        return [row["modality"] for row in sorted(rows, key=lambda row: (-row["slices"], row["modality"]))]

    def group(self, *keys: str) -> list[dict[str, Any]]:
        """Patients, scans and slices for each combination of some columns, sorted by these."""
        grouped = self.scans.group_by(list(keys)).aggregate(
            [("patient_id", "count_distinct"), ("scan_id", "count"), ("n_slices", "sum")]
        )
        renamed = grouped.select([*keys, "patient_id_count_distinct", "scan_id_count", "n_slices_sum"])
        rows: list[dict[str, Any]] = renamed.rename_columns([*keys, "patients", "scans", "slices"]).to_pylist()
        return sorted(rows, key=lambda row: [row[key] for key in keys])

    def irregular(self) -> Counter[str]:
        """Kind, with N for every number -> scans."""
        texts = pc.value_counts(self.scans["irregular"]).to_pylist()
        return kinds((part, row["counts"]) for row in texts for part in row["values"].split("; ") if part)

    def shared(self, column: str) -> int:
        """Scans whose bytes also stand in a scan that differs in this column."""
        grouped = self.scans.select(["sha256", column, "scan_id"]).group_by("sha256")
        counts = grouped.aggregate([(column, "count_distinct"), ("scan_id", "count")])
        return pc.sum(counts.filter(pc.greater(counts[f"{column}_count_distinct"], 1))["scan_id_count"]).as_py() or 0


def read_cohort(path: Path) -> Cohort:
    """Open a manifest (NAME.csv) or a store (a folder).

    Raises:
        MedclrError: it is neither.
    """
    if path.is_dir():
        store = Store(path)
        return Cohort(path.name, _store_scans(store), _store_rejected(path), store, _copies(path))
    if path.suffix != ".csv":
        raise MedclrError(f"{path}: is neither a manifest (NAME.csv) nor the folder of a store")
    scans = _columns(path, (*TEXTS, "n_slices", "rows", "columns", *SPACINGS))
    reasons = kinds((row.reason, 1) for row in read_rejected(path)) if rejected_path(path).exists() else Counter()
    return Cohort(path.name, scans, reasons)


def _columns(path: Path, names: tuple[str, ...]) -> pa.Table:
    kinds = {name: pa.string() if name in TEXTS else pa.float64() for name in names}
    kinds |= {name: pa.int64() for name in ("n_slices", "rows", "columns")}
    try:
        return pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, include_columns=list(names)),
        )
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise MedclrError(f"{path}: is not a manifest that medclr index wrote ({reason})") from error


def _store_scans(store: Store) -> pa.Table:
    scans, size = store.scans, store.info.size_px
    columns: dict[str, Any] = {name: [getattr(scan, name) for scan in scans] for name in TEXTS}
    columns |= {"n_slices": [s.n_slices for s in scans], "rows": [s.height for s in scans]}
    columns |= {"columns": [s.width for s in scans]}
    # A picture without spacing counts as 1 mm; that it was not recorded is then all that is known.
    spacings = [(None,) * 3 if s.depth == 1 and s.spacing_mm == (1, 1, 1) else s.spacing_mm for s in scans]
    columns |= {name: pa.array([spacing[i] for spacing in spacings], pa.float64()) for i, name in enumerate(SPACINGS)}
    columns |= {"low": [s.low for s in scans], "high": [s.high for s in scans]}
    columns |= {"filled": [s.content_height * s.content_width / size**2 for s in scans]}
    return pa.table(columns)


def _store_rejected(path: Path) -> Counter[str]:
    with (path / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return kinds((row["reason"], 1) for row in csv.DictReader(file))


def _copies(path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    table = path.with_name(f"{path.name}.dedup.csv")
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                counts[row["kind"]] += 1
                counts["patients"] += row["same_patient"] == "no"
    return counts


# What may harm training


def warnings(cohort: Cohort) -> list[str]:
    """Plain sentences, the worst first; none if nothing is to be said."""
    return [*_leaks(cohort), *_shares(cohort), *_geometry(cohort), *_losses(cohort)]


def _leaks(cohort: Cohort) -> list[str]:
    said = []
    by_patient = cohort.scans.group_by("patient_id").aggregate([("split", "count_distinct")])
    if two := pc.sum(pc.greater(by_patient["split_count_distinct"], 1)).as_py():
        said.append(f"{_n(two, 'patient')} in more than one split: what is tested is also trained on.")
    if twice := cohort.shared("patient_id"):
        said.append(f"{_n(twice, 'scan')} byte for byte the same as one of another patient: whose is it?")
    if twice := cohort.shared("split"):
        said.append(f"{_n(twice, 'scan')} byte for byte the same as one in another split: a leak.")
    if strange := cohort.copies["patients"]:
        said.append(f"{_n(strange, 'slice')} a copy of another patient's (medclr dedup): leave them out of training.")
    return said


def _shares(cohort: Cohort) -> list[str]:
    said = []
    slices = int(cohort.column("n_slices").sum())
    by_patient = cohort.scans.group_by("patient_id").aggregate([("n_slices", "sum")])
    most = pc.max(by_patient["n_slices_sum"]).as_py() / slices
    n = len(by_patient)
    if n < 10:
        said.append(f"{n} patient{'s' * (n != 1)}: nearly all that is learnt is of few people.")
    elif most > max(0.1, 5 / n):
        said.append(f"One patient holds {most:.0%} of the slices; --data.slices_per_scan limits what a scan gives.")
    for row in cohort.group("modality"):
        if row["slices"] < 0.01 * slices:
            share = row["slices"] / slices
            said.append(f"{row['modality']} is {share:.2%} of the slices: too few to be learnt beside the others.")
    return said


def _geometry(cohort: Cohort) -> list[str]:
    said = []
    modality = cohort.column("modality")
    spacing = np.stack([cohort.column(name) for name in SPACINGS], 1)  # [m,3]
    known = ~np.isnan(spacing).any(1)
    ratio = spacing[known].max(1, initial=0) / spacing[known].min(1, initial=np.inf)
    if long := int((ratio > 10).sum()):
        said.append(
            f"{_n(long, 'scan')} over ten times coarser along one axis than another: slice them as acquired only."
        )
    volumes = np.isin(modality, ["CT", "MR", "PT"]) & (cohort.column("n_slices") > 1)
    if unknown := int((volumes & ~known).sum()):
        said.append(f"{_n(unknown, 'volume')} without a recorded spacing: a slice may be stretched.")
    if cohort.store:
        size, filled = cohort.store.info.size_px, cohort.column("filled")
        for name in cohort.modalities:
            mine = np.repeat(filled[modality == name], cohort.column("n_slices")[modality == name])
            if np.median(mine) < 0.5:
                part = f"less than {np.median(mine):.0%} of the {size} px square, and the rest is padding"
                said.append(f"Half of the {name} slices fill {part}: prepare them smaller (size_px).")
    return said


def _losses(cohort: Cohort) -> list[str]:
    said = []
    m = len(cohort.scans)
    odd = m - pc.sum(pc.equal(cohort.scans["irregular"], "")).as_py()
    if odd > 0.1 * m:
        said.append(f"{odd / m:.0%} of the scans are irregular: see below in what.")
    if (lost := cohort.rejected.total()) and cohort.store and lost > 0.05 * (m + lost):
        said.append(f"{lost / (m + lost):.0%} of the scans could not be decoded: see below why.")
    copies = cohort.copies["exact"] + cohort.copies["near"]
    if cohort.store and copies > 0.01 * len(cohort.store):
        said.append(f"{copies / len(cohort.store):.0%} of the slices are copies: --data.leave_out passes over them.")
    return said


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun} is" if number == 1 else f"{number:,} {noun}s are"
