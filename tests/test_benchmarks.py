"""The benchmarks of large batches run, at a size at which only what is exact can be judged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_the_gpu_benchmark_runs_on_a_cpu_and_writes_its_table(tmp_path: Path) -> None:
    printed = run("gpu.py", "--small", "--out", str(tmp_path / "gpu.md"))
    assert (tmp_path / "gpu.md").read_text() == printed
    title, _, *table = printed.splitlines()
    assert title.startswith("CPU")
    cells = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in table}
    assert {row.count("|") for row in table} == {4}
    assert float(cells["gradient in chunks, float64"]) < 1e-12
    assert float(cells["step in chunks of 4 / plain, batch 8"]) > 0
    assert cells["largest batch, plain"] == cells["largest batch, in chunks of 4"] == "16"
    for what in ("end to end, batch 8", "model alone, batch 8"):
        assert float(cells[what].removesuffix(" images/s").replace(",", "")) > 0
