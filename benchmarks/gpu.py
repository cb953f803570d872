"""What one GPU reaches: a table for docs/results.md, measured in one call.

    python benchmarks/gpu.py --out gpu.md
    python benchmarks/gpu.py --small        # the same on a CPU, at a size at which the figures say nothing

ResNet-50 at 224 px in bf16. End to end is the step of the pretraining loop: slices of a store, read ahead, views made
on the GPU, network, NT-Xent, LARS. The model alone is the same network, loss and optimizer on ready-made tensors, and
nothing waits for the GPU between its steps. The two take turns; the ratio is the median over the rounds.
"""

import argparse
import contextlib
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from chunks import build, cost, difference, peak_bytes, ratio, training
from lars import times as optimizer_times
from store import make_store
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from medclr.data.store import Store
from medclr.files import write_text
from medclr.losses.nt_xent import nt_xent
from medclr.memory import keep_freed_memory
from medclr.methods.simclr import Config, Method
from medclr.optim.lars import build_optimizer, param_groups


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    device: str
    network: str
    size_px: int
    batch: int
    """Of the speed, and of the cost of chunks."""
    chunk: int
    large: int
    """Batch whose memory is measured."""
    largest: int
    """No larger batch is tried."""
    views: tuple[int, ...]
    """Of the loss in blocks."""
    matrix: int
    """Side of the matrices whose product gives the rate of the chip."""
    scans: int
    """Of 100 slices each, in the store."""
    steps: int
    rounds: int


GPU = Size("cuda", "resnet50", 224, 256, 64, 4096, 2**15, (65_536, 262_144), 8192, 41, 10, 5)
SMALL = Size("cpu", "resnet18", 16, 8, 4, 16, 16, (1024, 2048), 256, 1, 1, 1)
AUTOCAST = torch.bfloat16
Row = tuple[str, str, str]
"""What, how much, and the goal or a remark."""


def wait(device: str) -> None:
    """Until the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], size: Size) -> float:
    """Median time of a call, the first one not counted."""
    values = []
    for number in range(size.rounds + 1):
        wait(size.device)
        started = time.perf_counter()
        function()
        wait(size.device)
        if number:
            values.append(time.perf_counter() - started)
    return statistics.median(values)


def model_alone(method: Method, size: Size) -> Iterator[Tensor]:
    """Steps without end on one batch of ready-made views [2B,1,s,s]: the network, the loss and the optimizer."""
    views = torch.rand(2 * size.batch, 1, size.size_px, size.size_px, device=size.device)
    views = views.to(memory_format=torch.channels_last)
    optimizer = build_optimizer("lars", param_groups(method, 1e-6), lr=0.1)
    method.train()
    while True:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(size.device, AUTOCAST):
            za, zb = method(views).chunk(2)  # [B,K] each
        loss, _ = method.objective(za, zb)
        loss.backward()
        optimizer.step()
        yield loss


def flops_of_a_step(method: Method, size: Size) -> int:
    """Multiplications and additions of the network, forward and backward, for a batch of two views each."""
    views = torch.rand(2, 1, size.size_px, size.size_px, device=size.device)  # those of one image
    with FlopCounterMode(display=False) as counter:
        method(views).sum().backward()
    method.zero_grad(set_to_none=True)
    return counter.get_total_flops() * size.batch


def speed(store: Store, size: Size) -> Iterator[Row]:
    """Images a second, and the share of the chip's rate."""
    method = build(size.network, size.size_px, size.device)
    flops = flops_of_a_step(method, size)
    sides: dict[str, Iterator[object]] = {
        "end to end": training(method, store, size.batch, autocast=AUTOCAST),
        "model alone": model_alone(method, size),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(size.rounds + 1):
        for name, steps in sides.items():
            wait(size.device)
            started = time.perf_counter()
            for _ in itertools.islice(steps, size.steps):
                pass
            wait(size.device)
            if number:  # the first is to warm
                rates[name].append(size.steps * size.batch / (time.perf_counter() - started))
    for steps in sides.values():
        steps.close()  # type: ignore[attr-defined]
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        yield f"{name}, batch {size.batch}", f"{statistics.median(values):,.0f} images/s", f"two views each; {spread}"
    share = statistics.median(a / b for a, b in zip(rates["end to end"], rates["model alone"], strict=True))
    yield "end to end / model alone", f"{share:.1%}", "goal: at least 95 %"

    a, b = (torch.randn(size.matrix, size.matrix, device=size.device, dtype=AUTOCAST) for _ in range(2))
    rate = 2 * size.matrix**3 / seconds_of(lambda: a @ b, size)
    reached = flops * statistics.median(rates["model alone"]) / size.batch
    yield f"bf16 matrix product of {size.matrix:,}", f"{rate / 1e12:.3g} TFLOP/s", "the chip's measured rate"
    yield "model alone", f"{reached / 1e12:.3g} TFLOP/s", f"{reached / rate:.1%} of that rate"


def fits(method: Method, store: Store, batch: int, chunk: int | None) -> bool:
    """Whether a batch has room on the GPU."""
    steps = training(method, store, batch, chunk, AUTOCAST)
    try:
        next(steps)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        steps.close()
        method.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def largest(store: Store, size: Size) -> Iterator[Row]:
    """The largest batch, doubled until it does not fit."""
    method = build(size.network, size.size_px, size.device)
    for chunk in (None, size.chunk):
        batch = size.chunk
        while 2 * batch <= size.largest and fits(method, store, 2 * batch, chunk):
            batch *= 2
        name = f"largest batch, {f'in chunks of {chunk}' if chunk else 'plain'}"
        yield name, f"{batch:,}", "no larger one was tried" if 2 * batch > size.largest else "twice as many do not fit"


def loss(size: Size) -> Iterator[Row]:
    """NT-Xent in blocks, forward and backward."""
    for views in size.views:
        a, b = (torch.randn(views // 2, 128, device=size.device).requires_grad_() for _ in range(2))

        def both_passes(a: Tensor = a, b: Tensor = b) -> None:
            torch.autograd.grad(nt_xent(a, b, 0.1, form="blocks"), (a, b))

        memory = ""
        seconds = seconds_of(both_passes, size)
        if size.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both_passes()
            memory = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f} MB above its inputs"
        yield f"loss in blocks, {views:,} views, float32", f"{seconds * 1e3:,.1f} ms", memory


def optimizers(size: Size) -> Iterator[Row]:
    """LARS against torch's SGD."""
    median = {
        name: statistics.median(values)
        for name, values in optimizer_times(build(size.network, size.size_px, size.device), 4 * size.rounds).items()
    }
    for name in ("LARS", "SGD fused", "SGD foreach"):
        times = median["LARS"] / median[name]
        goal = "; goal: at most 1.50" if name == "SGD foreach" else ""
        yield f"{name}, a step", f"{median[name]:.2f} ms", "" if name == "LARS" else f"LARS / it: {times:.2f}{goal}"


def caching(store: Store, size: Size) -> Iterator[Row]:
    """Gradient caching: exactness, cost and memory."""
    off = difference(store, 2 * size.chunk, size.chunk, size.device)
    yield "gradient in chunks, float64", f"{off:.1e}", "difference from the plain one; goal: at most 1e-12"
    method = build(size.network, size.size_px, size.device)
    seconds = cost(method, store, size.batch, [size.chunk], size.rounds, AUTOCAST)
    yield (
        f"step in chunks of {size.chunk} / plain, batch {size.batch}",
        f"{ratio(seconds, size.chunk):.2f}",
        "goal: at most 1.40",
    )
    of_one = peak_bytes(method, store, size.chunk, None, AUTOCAST)
    of_all = peak_bytes(method, store, size.large, size.chunk, AUTOCAST)
    if size.device == "cuda":  # on a CPU only a fresh process shows it: chunks.py
        times = of_all / (of_one + 2 * size.large * Config().out_features * 4)
        yield f"memory, plain batch of {size.chunk}", f"{of_one / 1e6:,.0f} MB", "with weights and momentum"
        name = f"memory, batch {size.large:,} in chunks of {size.chunk}"
        yield name, f"{of_all / 1e6:,.0f} MB", f"{times:.2f} times that and the embeddings; goal: at most 1.30"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, in seconds")
    parser.add_argument("--store", type=Path, help="slices of 224 px or more; None: a store is made")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args()
    size = SMALL if given.small else GPU
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --small runs on the CPU")
    if size.device == "cpu":
        keep_freed_memory()
    name = torch.cuda.get_device_name() if size.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    network = f"{size.network} at {size.size_px} px, bf16"
    lines = [f"{name}, torch {torch.__version__}, {os.cpu_count()} cores: {network}", "", "| | | |", "|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(given.store or make_store(Path(folder), size.scans, 100, size.size_px))
        parts = [lambda: speed(store, size), lambda: caching(store, size), lambda: optimizers(size),
                 lambda: loss(size), lambda: largest(store, size)]  # fmt: skip
        for part in parts:
            for row in part():
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
            gc.collect()
            with contextlib.suppress(AssertionError):
                torch.cuda.empty_cache()
    if given.out:
        write_text(given.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
