"""Gradient caching against the plain step: the same gradient, what it costs in time, and the memory of a large batch.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/chunks.py [--device cpu] [--store STORE]

Every step is that of the pretraining loop: slices of a store in pieces, read ahead, views, network, LARS. Time: plain
steps and steps in chunks in turns; the median over the rounds of the ratio within a round. Memory: the peak of a batch
of 4096 in chunks against that of a plain batch as large as one chunk, plus the embeddings: on a GPU of all tensors; on
a CPU of a fresh process above its state once the network is built, mapped files not counted.
Exits with status 1 if a gradient differs by more than 1e-12, a step takes more than 1.4 times as long as the plain one,
or the memory is more than 1.3 times that of the chunk plus the embeddings.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from store import make_store
from torch import nn

from medclr.augment.views import Draws
from medclr.config import EncoderConfig, ViewsConfig
from medclr.data.loader import Loader
from medclr.data.store import Store
from medclr.distributed import Group
from medclr.memory import keep_freed_memory
from medclr.methods.simclr import Config, Method
from medclr.models.encoder import build_encoder
from medclr.optim.lars import build_optimizer, param_groups
from medclr.step import Result, Step, plan_of
from medclr.stop import StopRequest

TOLERANCE, LIMIT, LIMIT_MEMORY = 1e-12, 1.4, 1.3
FOREVER = 2**31
"""Epochs."""


def build(network: str, size_px: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Method:
    """SimCLR as the pretraining loop builds it."""
    torch.manual_seed(0)
    method = Method(Config(), build_encoder(EncoderConfig(network), size_px))
    return method.to(device, dtype, memory_format=torch.channels_last)


def training(
    method: Method, store: Store, batch: int, chunk: int | None = None, autocast: torch.dtype | None = None
) -> Iterator[Result]:
    """Steps without end, by the pieces of the pretraining loop; a batch may be larger than the store."""
    plan, config = plan_of(batch, chunk, Group()), ViewsConfig(size_px=method.encoder.size_px)
    optimizer = build_optimizer("lars", param_groups(method, 1e-6), lr=0.1)
    take = Step(method, optimizer, plan, Group(), autocast)
    indices = np.resize(store.indices(), max(len(store), batch))  # again from the first where they do not suffice
    on_gpu = next(method.parameters()).is_cuda
    loader = Loader(store, indices, batch, 0, plan.rows, plan.pieces, pinned=on_gpu)
    with contextlib.closing(loader.epochs(0, FOREVER)) as batches:
        for number in itertools.count():
            yield take(batches, Draws(config, batch, seed=0, step=number), StopRequest(Group()))


def without_batch_norm(module: nn.Module) -> None:
    """Put norms that see one image alone in the place of batch norm."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(8, part.num_features))
        elif isinstance(part, nn.BatchNorm1d):
            setattr(module, name, nn.LayerNorm(part.num_features))
        else:
            without_batch_norm(part)


def difference(store: Store, batch: int, chunk: int, device: str) -> float:
    """Of the gradient in chunks from the plain one, in float64, as a share of its norm."""
    gradients = []
    for way in (None, chunk):
        method = build("resnet18", 32, device, torch.float64)
        without_batch_norm(method)
        for block in method.encoder.modules():  # a residual branch that starts at 0 would have no gradient inside
            if isinstance(last := getattr(block, "bn2", None), nn.GroupNorm):
                nn.init.ones_(last.weight)
        next(training(method.to(device, torch.float64), store, batch, way))
        gradients.append(torch.cat([weight.grad.flatten() for weight in method.parameters()]))
    plain, chunked = gradients
    return float((chunked - plain).norm() / plain.norm())


def cost(
    method: Method, store: Store, batch: int, chunks: Sequence[int], rounds: int, autocast: torch.dtype | None = None
) -> dict[int | None, list[float]]:
    """Seconds of a step: plain (None) and with each chunk, in turns.

    On a CPU they are those of this process's processor time, so that other processes on the machine disturb little.
    """
    clock = time.perf_counter if next(method.parameters()).is_cuda else time.process_time
    ways = {chunk: training(method, store, batch, chunk, autocast) for chunk in (None, *chunks)}
    seconds: dict[int | None, list[float]] = {chunk: [] for chunk in ways}
    for number in range(rounds + 1):
        for chunk, steps in ways.items():
            started = clock()
            next(steps)  # ends with the loss as a number, so no device is still at work
            if number:  # the first makes the momentum, and warms
                seconds[chunk].append(clock() - started)
    for steps in ways.values():
        steps.close()
    return seconds


def ratio(seconds: dict[int | None, list[float]], chunk: int) -> float:
    """Median over the rounds of the time with the chunk over that of the plain step."""
    return statistics.median(a / b for a, b in zip(seconds[chunk], seconds[None], strict=True))


def held_bytes() -> int:
    """What this process holds of its own, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_bytes(method: Method, store: Store, batch: int, chunk: int | None, autocast: torch.dtype | None = None) -> int:
    """The most that steps take: on a GPU with the network, on a CPU above what the process holds before."""
    device = next(method.parameters()).device
    method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = 0
    else:
        keep_freed_memory()  # as the loop does; and what is not given back is the peak when all is done
        before = held_bytes()
    if chunk:  # gradients and momentum are there when the large batch comes
        next(training(method, store, 2 * chunk, chunk, autocast))
    steps = training(method, store, batch, chunk, autocast)
    for _ in range(1 if chunk else 3):
        next(steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else held_bytes() - before
    steps.close()
    return peak


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="slices of --size-px or more; None: one is made")
    parser.add_argument("--network", default="resnet18")
    for name, default in (("size-px", 64), ("batch", 256), ("large", 4096), ("chunk", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak-of", type=int, help="only the memory of this batch, in this process")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.store or make_store(Path(folder), -(-given.large // 100), 100, given.size_px)
        if given.peak_of:
            chunk = given.chunk if given.peak_of > given.chunk else None
            print(peak_bytes(build(given.network, given.size_px, given.device), Store(path), given.peak_of, chunk))
            return 0
        return measure(given, path)


def measure(given: argparse.Namespace, path: Path) -> int:
    """Measure and print; the exit status."""
    store, large, chunk = Store(path), given.large, given.chunk
    off = difference(store, 16, 4, given.device)
    print(f"gradient in chunks against the plain one, float64, group norm: {off:.1e} of its norm (at most {TOLERANCE})")

    method = build(given.network, given.size_px, given.device)
    seconds = cost(method, store, given.batch, (chunk // 2, chunk), given.rounds)
    print(f"{given.network}, {given.size_px} px, batch {given.batch}, {given.device}: median of {given.rounds} rounds")
    for way, values in seconds.items():
        name = f"chunk {way}: {ratio(seconds, way):.2f} times plain (at most {LIMIT})" if way else "plain"
        print(f"  {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})  {name}")

    def peak(batch: int) -> int:
        """In a fresh process."""
        words = ["--network", given.network, "--size-px", str(given.size_px), "--chunk", str(chunk)]
        words += ["--device", given.device, "--store", str(path), "--peak-of", str(batch)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        return int(done.stdout)

    embeddings = 2 * large * Config().out_features * 4
    of_one, of_all = peak(chunk), peak(large)
    grown = of_all / (of_one + embeddings)
    print(
        f"batch {large:,} in chunks of {chunk}: {of_all / 1e6:.0f} MB; a plain batch of {chunk}: {of_one / 1e6:.0f} MB,"
        f" and the embeddings {embeddings / 1e6:.1f} MB: {grown:.2f} times (at most {LIMIT_MEMORY})"
    )
    half = peak(chunk // 2)
    print(f"  a plain batch of {chunk // 2}, as many views at once as in a chunk of {chunk}: {half / 1e6:.0f} MB")
    return int(off > TOLERANCE or any(ratio(seconds, way) > LIMIT for way in seconds if way) or grown > LIMIT_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
