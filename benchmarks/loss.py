"""NT-Xent in blocks against its dense form and against the textbook one, in time and in memory.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/loss.py [--views 16384] [--rounds 3] [--large 65536]

Forward and backward in float32 at 128 dimensions, all ways in turns in one process; the medians are compared. The
textbook is a matrix product and a cross-entropy. Memory is the peak of a fresh process above its inputs.
Exits with status 1 if blocks take more than 1.15 times as long as dense, or 300 MB at the large size.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.losses.nt_xent import nt_xent

LIMIT, LIMIT_MB = 1.15, 300.0
DIMENSIONS, TEMPERATURE = 128, 0.1
RULES: dict[str, dict[str, Any]] = {
    "all, augmentation": {},
    "other_patients, augmentation": {"negatives": "other_patients"},
    "other_scans, neighbouring_slice": {"negatives": "other_scans", "positives": "neighbouring_slice"},
    "all, same_patient": {"positives": "same_patient"},
}


def inputs(views: int) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Embeddings, and ids of patients of two scans of 8 slices each."""
    a, b = (torch.randn(views // 2, DIMENSIONS).requires_grad_() for _ in range(2))
    image = torch.arange(views // 2)
    return a, b, SimpleNamespace(patient=image // 16, scan=image // 8, slice_index=image % 8)


def textbook(a: Tensor, b: Tensor) -> Tensor:
    """NT-Xent as it is usually written."""
    views = F.normalize(torch.cat([a, b]), dim=1)
    logits = views @ views.T / TEMPERATURE
    index = torch.arange(len(views))
    logits[index, index] = -torch.inf
    return F.cross_entropy(logits, (index + len(a)) % len(views))


def times(views: int, rounds: int) -> float:
    """Print the seconds of each way; the ratio of blocks to dense."""
    a, b, ids = inputs(views)
    ways: dict[str, Callable[[], Tensor]] = {"textbook": lambda: textbook(a, b)}
    for name, rule in RULES.items():
        for form in ("dense", "blocks"):
            ways[f"{form}: {name}"] = lambda rule=rule, form=form: nt_xent(
                a, b, TEMPERATURE, ids=ids, form=form, **rule
            )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            torch.autograd.grad(way(), (a, b))
            seconds[name].append(time.perf_counter() - started)
    print(f"{views:,} views, median of {rounds} rounds (fastest to slowest)")
    for name, values in seconds.items():
        print(f"  {name:42} {statistics.median(values):7.2f} s ({min(values):.2f} to {max(values):.2f})")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name in RULES:
        print(f"  blocks / dense: {median[f'blocks: {name}'] / median[f'dense: {name}']:.2f}  {name}")
    first = next(iter(RULES))
    print(f"  blocks / textbook: {median[f'blocks: {first}'] / median['textbook']:.2f}")
    return median[f"blocks: {first}"] / median[f"dense: {first}"]


def kilobytes(what: str) -> int:
    """A line of this process's status: VmRSS, what it holds, or VmHWM, the most it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def memory(views: int, name: str) -> None:
    """In a fresh process: print what one forward and backward pass in blocks takes above its inputs, in MB."""
    for n in (256, views):  # the first is what torch takes at its first use
        a, b, ids = inputs(n)
        before, started = kilobytes("VmRSS"), time.perf_counter()
        nt_xent(a, b, TEMPERATURE, ids=ids, form="blocks", **RULES[name]).backward()
    print((kilobytes("VmHWM") - before) * 1024 / 1e6, time.perf_counter() - started)


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=65536)
    parser.add_argument("--memory-of", choices=RULES, help="only this measurement, in this process")
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory(arguments.large, arguments.memory_of)
        return 0
    ratio = times(arguments.views, arguments.rounds)
    most = 0.0
    for name in RULES:
        command = [sys.executable, __file__, "--large", str(arguments.large), "--memory-of", name]
        megabytes, seconds = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        print(f"{arguments.large:,} views in blocks: {megabytes:.0f} MB above the inputs, {seconds:.1f} s  {name}")
        most = max(most, megabytes)
    print(f"limits: {LIMIT} times dense, {LIMIT_MB:.0f} MB")
    return int(ratio > LIMIT or most > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
