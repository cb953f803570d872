"""Slices that training passes over: a table of them, read against a store."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medclr import files
from medclr.config import DataConfig
from medclr.data.store import Store
from medclr.errors import MedclrError

COLUMNS = ("scan_id", "slice_index")
"""What a table must have; ``medclr dedup`` writes these and more. So it holds for any store of the same scans."""


def pinned(data: DataConfig) -> DataConfig:
    """The same settings with the hash of their table, so that a later run notices another one under the same name.

    Raises:
        MedclrError: the table cannot be read, or is not the one whose hash was given.
    """
    if data.leave_out is None:
        return data
    try:
        digest = files.sha256(data.leave_out)
    except OSError as error:
        raise MedclrError(
            f"data.leave_out: {data.leave_out} cannot be read ({error.strerror}); medclr dedup makes such a table"
        ) from error
    if data.leave_out_sha256 not in (None, digest):
        raise MedclrError(
            f"data.leave_out: {data.leave_out} has changed (SHA-256 {digest[:12]}, expected"
            f" {str(data.leave_out_sha256)[:12]}); bring the old table back, or take leave_out_sha256 out"
        )
    return replace(data, leave_out_sha256=digest)


def left_out(store: Store, table: Path) -> NDArray[np.int64]:
    """Which slices of the store the table names: ascending [n].

    Raises:
        MedclrError: it is no such table, or names a slice that the store does not have.
    """
    number = {scan.scan_id: i for i, scan in enumerate(store.scans)}
    named = set()
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise MedclrError(f"{table}: column {', '.join(missing)} is missing; medclr dedup writes such a table")
            for row in rows:
                if row["scan_id"] not in number:
                    raise MedclrError(
                        f"{table}: line {rows.line_num}: scan {row['scan_id']} is not in {store.path}; make the table"
                        " from this store"
                    )
                named.add((number[row["scan_id"]], int(row["slice_index"])))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise MedclrError(f"{table}: cannot be read as a table ({error}); medclr dedup writes one") from error
    wanted = np.array(sorted(named), dtype=np.int64).reshape(-1, 2)  # [n,2]: scan, slice_index
    # Slices of a scan stand one after another, by their index: a pair becomes one number, and those ascend.
    step = int(store.column("slice_index").max(initial=0)) + 1
    keys = store.column("scan").astype(np.int64) * step + store.column("slice_index")  # [N]
    key = wanted[:, 0] * step + wanted[:, 1]  # [n]
    found = np.searchsorted(keys, key)  # [n]
    there = (wanted[:, 1] >= 0) & (wanted[:, 1] < step) & (keys[np.minimum(found, len(keys) - 1)] == key)
    if not there.all():
        scan, index = wanted[~there][0]
        raise MedclrError(
            f"{table}: scan {store.scans[scan].scan_id} has no slice {index} in {store.path}; make the table from this"
            " store"
        )
    return found
