"""1 process with batch B, 2 with B/2, 4 with B/4: the same losses and weights, through the real loop."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import medclr
from medclr import checkpoint
from medclr.track import read_metrics

SMALL = {"batch": 8, "views.size_px": 16, "encoder.stem": "imagenet", "device": "cpu", "monitor.sample": 8}
"""An epoch has six steps."""

CHOICES: dict[str, list[dict[str, Any]]] = {
    "head": [{"simclr.head_layers": 2}, {"simclr.head_layers": 3}],
    "loss": [{"simclr.loss": "dense"}, {"simclr.loss": "blocks"}],
    "pairs": [
        {},
        {"simclr.negatives": "other_patients"},
        {"simclr.negatives": "other_scans", "simclr.positives": "same_patient"},
    ],
    "chunk": [{}, {"chunk": 4}],
    "optimizer": [{"optim.name": "lars"}, {"optim.name": "adamw"}],
}
GRID = [dict(itertools.chain.from_iterable(c.items() for c in combo)) for combo in itertools.product(*CHOICES.values())]
QUICK = [GRID[0], GRID[-2]]
"""The plain one; and 3 layers, blocks, masks, positives of the same patient, gradient cache, LARS."""


def run_all(store: Path, out: Path, grid: Sequence[dict[str, Any]]) -> None:
    """Train each combination; what each process does."""
    for number, settings in enumerate(grid):
        medclr.pretrain(store, out / str(number), settings={**SMALL, "monitor.every_epochs": 4, **settings})


def launch(processes: int, store: Path, out: Path, grid: Sequence[dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [__file__, str(store), str(out), json.dumps(list(grid))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]


def outcome(run: Path) -> tuple[list[float], torch.Tensor]:
    """Losses, and all weights and statistics in one vector."""
    newest = checkpoint.latest(run)
    assert newest is not None
    state = checkpoint.load(newest)["method"]
    losses = [row["loss"] for row in read_metrics(run)]
    return losses, torch.cat([t.double().flatten() for name, t in state.items() if "num_batches" not in name])


def compare(one: Path, many: Path, tolerance: float) -> None:
    losses, weights = outcome(one)
    other_losses, other_weights = outcome(many)
    assert len(losses) in (6, 24)
    assert other_losses == pytest.approx(losses, rel=tolerance)
    assert (other_weights - weights).norm() <= tolerance * weights.norm()


def check(store: Path, folder: Path, grid: Sequence[dict[str, Any]], counts: Sequence[int], tolerance: float) -> None:
    run_all(store, folder / "1", grid)
    for processes in counts:
        launch(processes, store, folder / str(processes), grid)
        for number, settings in enumerate(grid):
            print(processes, settings)  # pytest shows it where it fails
            compare(folder / "1" / str(number), folder / str(processes) / str(number), tolerance)


@pytest.mark.timeout(300)
def test_two_processes_train_as_one(image_store: Path, tmp_path: Path) -> None:
    check(image_store, tmp_path, [{**settings, "epochs": 1, "precision": "float64"} for settings in QUICK], [2], 1e-10)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_any_number_of_processes_train_as_one(
    image_store: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    grid = [{**settings, "epochs": 4, "precision": precision} for settings in GRID]
    check(image_store, tmp_path, grid, [2, 4], tolerance)


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    dist.destroy_process_group()
