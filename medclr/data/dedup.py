"""The copies in a slice store: a table of them, to be left out of training, and a page of pictures.

What a copy is, and how it is found, stands in ``copies``.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medclr import files
from medclr.data.copies import DISTANCE, Copies, find_copies, hash_slices
from medclr.data.store import Store
from medclr.errors import MedclrError

COLUMNS = (
    "scan_id", "slice_index", "patient_id", "kept_scan_id", "kept_slice_index", "kept_patient_id", "kind", "distance",
    "same_patient", "slice", "kept_slice",
)  # fmt: skip
"""Of the table: the slice to leave out, the slice that is kept instead, and how far apart their hashes are."""


@dataclass(frozen=True)
class DedupSummary:
    """What ``medclr dedup`` found."""

    table: Path
    page: Path
    slices: int
    exact: int
    near: int
    across_patients: int
    """Copies whose kept slice is of another patient."""
    across_splits: int
    """Copies whose kept slice is in another split."""
    flat: int

    def __str__(self) -> str:
        share = (self.exact + self.near) / self.slices
        text = (
            f"{self.table}: {self.exact + self.near:,} of {self.slices:,} slices ({share:.2%}) are copies,"
            f" {self.exact:,} exact and {self.near:,} near; pictures in {self.page}"
        )
        if self.flat:
            text += f"\n{self.flat:,} slices are flat and were only compared byte for byte"
        if self.across_patients:
            text += f"\nWARNING: {self.across_patients:,} copies are of ANOTHER PATIENT than the slice they repeat"
            text += f", {self.across_splits:,} of them in ANOTHER SPLIT: a leak" if self.across_splits else ""
        if self.exact + self.near:
            text += f"\nleave them out with: medclr pretrain --data.leave_out {self.table}"
        return text


def dedup(store: Path, *, out: Path | None = None, distance: int = DISTANCE, within: bool = False) -> DedupSummary:
    """Find the slices of a store that repeat others, and write which to leave out.

    Of equal slices, one outside the split train is kept before one inside, so that nothing is trained on that is tested
    on; then one of a labelled or segmented scan; then the first in the store.

    Args:
        store: Folder that medclr prepare wrote.
        out: Table to write; by default STORE.dedup.csv, beside the store. Its page of pictures ends in .html.
        distance: Two pictures are near copies if at most so many of the 256 bits of their hashes differ, 0 to 64.
        within: Also compare slices of one scan with each other, and look for near copies inside a study.

    Raises:
        MedclrError: there is no store, or the table cannot be written.
    """
    if not 0 <= distance <= 64:
        raise MedclrError(f"--distance {distance}: is a number of bits from 0 to 64 (of 256)")
    opened = Store(store)
    out = Path(out) if out else opened.path.with_name(f"{opened.path.name}.dedup.csv")
    if out.suffix != ".csv":
        raise MedclrError(f"--out {out}: the name of a table ends in .csv")
    hashes = hash_slices(opened)
    copies = find_copies(opened, hashes, distance, within)
    _write(opened, copies, out)
    page = out.with_suffix(".html")
    from medclr.data.dedup_page import write_page  # matplotlib, late

    write_page(opened, copies, distance, page)
    return _summary(opened, copies, out, page, int(hashes.flat.sum()))


def _write(store: Store, copies: Copies, out: Path) -> None:
    scan, index, scans = store.column("scan"), store.column("slice_index"), store.scans
    with files.writing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for a, b, apart, exact in zip(copies.slices, copies.kept, copies.distance, copies.exact, strict=True):
            left, kept = scans[scan[a]], scans[scan[b]]
            writer.writerow(
                (left.scan_id, index[a], left.patient_id, kept.scan_id, index[b], kept.patient_id,
                 "exact" if exact else "near", apart, "yes" if left.patient_id == kept.patient_id else "no", a, b)
            )  # fmt: skip


def _summary(store: Store, copies: Copies, table: Path, page: Path, flat: int) -> DedupSummary:
    patient = store.column("patient")
    strange = patient[copies.slices] != patient[copies.kept]  # [m]
    split = np.array([scan.split for scan in store.scans])[store.column("scan")]  # [N]
    exact = int(copies.exact.sum())
    return DedupSummary(
        table=table,
        page=page,
        slices=len(store),
        exact=exact,
        near=len(copies.slices) - exact,
        across_patients=int(strange.sum()),
        across_splits=int((split[copies.slices] != split[copies.kept]).sum()),
        flat=flat,
    )
