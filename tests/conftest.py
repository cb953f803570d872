"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MEDCLR_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """A folder of real scans, or skip: they are licensed data that do not travel with medclr."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real scans {name!r} are not present; set MEDCLR_SHARED_DATA to their folder")
    return path
