"""What a step of LARS over a ResNet-50 costs, against torch's SGD with momentum and the same weight decay.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/lars.py [--rounds 20] [--device cpu]

Each optimizer has its own weights and gradients; they take turns, and the medians over the rounds are compared.
Exits with status 1 if LARS takes more than 1.5 times as long as SGD(foreach=True).
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medclr.config import EncoderConfig
from medclr.models.encoder import build_encoder
from medclr.optim.lars import LARS, param_groups

LIMIT = 1.5


def times(network: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each optimizer over the network's weights, where they are."""
    device = next(network.parameters()).device

    def ready(build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        own = copy.deepcopy(network)
        for weight in own.parameters():
            weight.grad = torch.randn_like(weight) * 1e-3
        return build(param_groups(own, 1e-6))

    optimizers = {
        "LARS": ready(lambda groups: LARS(groups, lr=0.1)),
        "SGD foreach": ready(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True)),
        "SGD fused": ready(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)),
        "SGD one by one": ready(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)),
    }

    def milliseconds(optimizer: torch.optim.Optimizer) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        optimizer.step()
        wait()
        return (time.perf_counter() - started) * 1e3

    for optimizer in optimizers.values():
        milliseconds(optimizer)  # the first step makes the momentum
    measured: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            measured[name].append(milliseconds(optimizer))
    return measured


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    network = build_encoder(EncoderConfig(name="resnet50"), 224).to(arguments.device)
    measured = times(network, arguments.rounds)
    median = {name: statistics.median(values) for name, values in measured.items()}
    n = sum(weight.numel() for weight in network.parameters())
    print(f"ResNet-50, {n:,} weights, {arguments.device}; median of {arguments.rounds} steps (fastest to slowest)")
    for name, values in measured.items():
        ratio = median["LARS"] / median[name]
        print(f"  {name:15} {median[name]:6.2f} ms ({min(values):.2f} to {max(values):.2f}); LARS / it: {ratio:.2f}")
    print(f"limit: {LIMIT} times SGD foreach")
    return int(median["LARS"] > LIMIT * median["SGD foreach"])


if __name__ == "__main__":
    sys.exit(main())
