"""How much memory there is, and how much this process has held."""

import os
from pathlib import Path

import numpy as np

from medclr.memory import machine_bytes, peak_bytes


def test_a_container_has_the_memory_that_it_may_use(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("5000000\n")
    assert machine_bytes(tmp_path) == 5_000_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine_bytes(tmp_path) == whole


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    before = peak_bytes()
    held = np.ones(before + 50_000_000, dtype=np.uint8)
    assert peak_bytes() >= len(held)
    del held
    assert before + 50_000_000 <= peak_bytes() < 3 * before + 50_000_000
