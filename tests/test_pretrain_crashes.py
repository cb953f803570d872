"""A run that was killed, preempted or damaged goes on by the same command, to the same weights."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medclr import checkpoint
from medclr.track import read_metrics

SETTINGS = {
    "epochs": 5,
    "batch": 8,
    "views.size_px": 16,
    "encoder.width": 0.25,
    "encoder.stem": "imagenet",
    "device": "cpu",
    "monitor.sample": 16,
    "monitor.every_epochs": 2,
    "monitor.checkpoint_minutes": 1e-9,
}
STEPS = 30
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def command(store: Path, out: Path, launcher: Sequence[str] = (), **more: object) -> list[str]:
    words = [f"--{key}={value}" for key, value in (SETTINGS | more).items()]
    return [sys.executable, *launcher, "-m", "medclr", "pretrain", "--store", str(store), "--out", str(out), *words]


def start(words: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def finish(words: list[str]) -> str:
    process = start(words)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said[-2000:]
    return said


def step_of(out: Path) -> int:
    """The step after which the newest checkpoint was written."""
    names = [path.name for path in out.glob("checkpoints/step-*.pt.sha256")]
    return max((int(name[5:12]) for name in names), default=0)


def wait_for(out: Path, step: int, process: "subprocess.Popen[str]") -> None:
    while step_of(out) < step and process.poll() is None:
        time.sleep(0.002)


def assert_same_run(run: Path, expected: Path) -> None:
    tensors = load_file(run / "encoder" / "encoder.safetensors")
    for name, tensor in load_file(expected / "encoder" / "encoder.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
    rows, others = read_metrics(run), read_metrics(expected)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step stands once in the metrics"
    assert [(row["loss"], row["lr"]) for row in rows] == [(row["loss"], row["lr"]) for row in others]


@pytest.fixture(scope="module")
def undisturbed(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(command(image_store, out))
    return out


def kill_at(steps: Sequence[int], store: Path, out: Path) -> None:
    """Kill the same command again and again, each time a moment after another step."""
    for step in steps:
        process = start(command(store, out))
        wait_for(out, step, process)
        time.sleep(random.Random(step).uniform(0, 0.05))
        process.kill()
        process.communicate()
    finish(command(store, out))


@pytest.mark.timeout(280)
def test_killed_runs_go_on_to_the_same_weights(undisturbed: Path, image_store: Path, tmp_path: Path) -> None:
    kill_at([13], image_store, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_steps(undisturbed: Path, image_store: Path, tmp_path: Path) -> None:
    steps = sorted(random.Random(0).sample(range(STEPS), 20))
    kill_at(steps, image_store, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_two_processes_is_killed_and_torchrun_starts_both_again(image_store: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(command(image_store, whole, TORCHRUN))
    process = start(command(image_store, out, (*TORCHRUN, "--max-restarts=3")))
    wait_for(out, 9, process)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunk", ["null", "2"])
def test_sigterm_saves_and_leaves_with_status_0_within_ten_seconds(
    chunk: str, image_store: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(command(image_store, whole, chunk=chunk))
    process = start(command(image_store, out, chunk=chunk, **{"monitor.checkpoint_minutes": 10}))
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 8:
        assert process.poll() is None
        time.sleep(0.002)
    asked = time.monotonic()
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 0
    assert "saved step" in said
    assert "the same command again goes on" in said
    finish(command(image_store, out, chunk=chunk))
    assert_same_run(out, whole)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(
    undisturbed: Path, image_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before, last = sorted(out.glob("checkpoints/step-*.pt"))
    last.write_bytes(last.read_bytes()[:-100])
    said = finish(command(image_store, out))
    assert f"{last} does not match its checksum" in said
    assert "looking for the checkpoint before it" in said
    assert_same_run(out, undisturbed)
    assert step_of(out) == STEPS
    assert before.exists()


def test_the_best_checkpoint_stays(undisturbed: Path) -> None:
    watched = {row["step"]: row["knn"] for row in read_metrics(undisturbed) if "knn" in row}
    best = checkpoint.load(undisturbed / "checkpoints" / "best.pt")
    assert watched[best["step"]] == max(watched.values()) == best["best"]
    assert len(list(undisturbed.glob("checkpoints/step-*.pt"))) == 2
