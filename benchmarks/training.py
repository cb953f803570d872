"""What feeding costs: training from a slice store against the same step on ready-made random tensors.

    python benchmarks/training.py --store STORE [--size-px 64] [--batch 128] [--steps 10] [--rounds 5]

Both sides run in turn in one process, with the same network, loss and optimizer; the ratio is the median over rounds.
Goal: at least 0.95 of the images a second of ready-made tensors.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from medclr.augment.views import two_views
from medclr.config import EncoderConfig, ViewsConfig
from medclr.data.loader import Loader
from medclr.data.store import Store
from medclr.memory import keep_freed_memory
from medclr.methods.simclr import Config, Method
from medclr.models.encoder import build_encoder
from medclr.optim.lars import build_optimizer, param_groups

Pair = tuple[Tensor, Tensor]


def from_store(path: Path, batch: int, size_px: int, device: str) -> Iterator[Pair]:
    """Endless views [B,1,s,s] of the store's slices, as ``medclr pretrain`` makes them."""
    store = Store(path)
    loader = Loader(store, store.indices(), batch, seed=0)
    config, step = ViewsConfig(size_px=size_px), itertools.count()
    for epoch in itertools.count():
        for slices in loader.epoch(epoch):
            views = two_views(slices, config, seed=0, step=next(step), device=device)
            yield views.a, views.b


def ready_made(batch: int, size_px: int, device: str) -> Iterator[Pair]:
    """The same random tensors for ever."""
    pair = torch.rand(batch, 1, size_px, size_px, device=device), torch.rand(batch, 1, size_px, size_px, device=device)
    return itertools.repeat(pair)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    for name, default in (("size-px", 64), ("batch", 128), ("steps", 10), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep-freed-memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.keep_freed_memory:
        keep_freed_memory()

    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig("resnet18"), given.size_px)
    method = Method(Config(), encoder).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer("lars", param_groups(method, 1e-6), lr=0.1)

    def images_per_s(pairs: Iterator[Pair]) -> float:
        started = time.perf_counter()
        for a, b in itertools.islice(pairs, given.steps):
            with torch.autocast(device, torch.bfloat16, enabled=given.precision == "bfloat16"):
                loss, _ = method.loss(a, b)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return given.steps * given.batch / (time.perf_counter() - started)

    sides = {"from the store": from_store(given.store, given.batch, given.size_px, device),
             "ready-made": ready_made(given.batch, given.size_px, device)}  # fmt: skip
    for pairs in sides.values():
        images_per_s(pairs)  # warm
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, pairs in sides.items():
            rates[name].append(images_per_s(pairs))
    for name, values in rates.items():
        print(f"{name:<15} {statistics.median(values):8.1f} images/s  ({min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f}); goal at least 0.95")


if __name__ == "__main__":
    main()
