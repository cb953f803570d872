"""The whole pipeline, from files on disk to the training step: images a second of medclr and of its peers.

    python benchmarks/pipeline.py [--threads 2] [--images FOLDER] [--out pipeline.md]
    python benchmarks/pipeline.py --device cuda --network resnet50 --size-px 224 --source-px 256 \\
        --precision bfloat16 --threads 16

Every side takes the same step: the same network, SimCLR, LARS; only what feeds it differs.

    model alone  the same two tensors for ever
    medclr       the slice store, read ahead, and two views of each slice made in batches: as ``medclr pretrain``
    MONAI        CacheDataset (every image decoded once and kept in memory), its random transforms, DataLoader
    lightly      LightlyDataset (images are decoded each time), SimCLRTransform, DataLoader

The peers get the images at the size of the store (96 px), not at that of the scanner, a favour: less to decode. They
live in an environment of their own (``peers.py``), and so does each side, in a process that takes its turn: the rounds
go round, and what was made ahead between turns is thrown away. ``--threads`` are those of torch, and the workers of the
peers' DataLoader; confine the whole to so many cores (``taskset -c 0,1``). On a CPU processor time is measured too,
workers and readers included: where all cores are busy it decides, and what else runs on the machine disturbs it little.

Exits with status 1 if medclr is below 0.97 of the model alone (0.95 on a GPU), or behind a peer.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("model alone", "medclr", "MONAI", "lightly")
GOAL = {"cpu": 0.97, "cuda": 0.95}
AHEAD = 2
"""Batches that each worker of a DataLoader makes ahead: torch's own default."""


def make_images(folder: Path, n: int, size_px: int) -> Path:
    """Clouds and stripes as grey PNG files, in one folder."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(n):
        clouds = gaussian_filter(rng.normal(0, 1, (size_px, size_px)), 4, mode="wrap")
        pixels = 120 + 50 * clouds / clouds.std() + rng.normal(0, 5, (size_px, size_px))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")
    return folder


def make_store(images: Path, folder: Path, size_px: int) -> Path:
    """The same files as a slice store."""
    from medclr.data.index import index
    from medclr.data.prepare import prepare

    index([images], folder / "images.csv", modality="XR", patient_pattern=r"(\d+)", key_file=folder / "key")
    prepare(folder / "images.csv", folder / "store", size_px=size_px, key_file=folder / "key")
    return folder / "store"


class Given:
    """In place of ``medclr.augment.views.Draws``: views that somebody else has made."""

    def __init__(self, a: Any, b: Any) -> None:
        self._views = (a, b)

    def view(self, batch: Any, view: int, rows: Any, device: Any = None) -> Any:
        """[B,1,s,s], on the device."""
        return self._views[view].to(device, non_blocking=True)


def pairs_of_monai(given: Any) -> Iterator[tuple[Any, Any]]:
    """A plain MONAI script: images decoded once, two random views of each by workers."""
    from monai.data import CacheDataset, DataLoader, set_track_meta
    from monai.transforms import (
        Compose,
        LoadImage,
        RandAdjustContrast,
        RandFlip,
        RandGaussianNoise,
        RandGaussianSmooth,
        RandomizableTransform,
        RandSpatialCrop,
        Resize,
        ScaleIntensityRange,
    )

    set_track_meta(False)
    size = (given.size_px, given.size_px)
    one = Compose([
        RandSpatialCrop(int(0.45 * given.source_px), max_roi_size=given.source_px, random_size=True),
        Resize(size, mode="bilinear"),
        RandFlip(0.5, spatial_axis=1),
        RandAdjustContrast(0.8, gamma=(0.6, 1.65)),
        RandGaussianSmooth((0.1, 1.0), (0.1, 1.0), prob=0.5),
        RandGaussianNoise(0.5, std=0.05),
    ])  # fmt: skip

    class Two(RandomizableTransform):
        def __init__(self) -> None:
            super().__init__()
            self.view = one  # an attribute, for MONAI to seed it in each worker

        def __call__(self, image: Any) -> tuple[Any, Any]:
            return self.view(image), self.view(image)

    chain = Compose([LoadImage(image_only=True, ensure_channel_first=True), ScaleIntensityRange(0, 255, 0, 1), Two()])
    data = CacheDataset(sorted(map(str, Path(given.images).glob("*.png"))), chain, progress=False)
    return endless(DataLoader, data, given, lambda batch: batch)


def pairs_of_lightly(given: Any) -> Iterator[tuple[Any, Any]]:
    """lightly's own dataset and transform, as its tutorial has them."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform
    from torch.utils.data import DataLoader

    data = LightlyDataset(given.images, transform=SimCLRTransform(input_size=given.size_px))
    return endless(DataLoader, data, given, lambda batch: [view[:, :1] for view in batch[0]])  # RGB that was grey


def endless(kind: Any, data: Any, given: Any, views: Any) -> Iterator[tuple[Any, Any]]:
    """Batches of a DataLoader, epoch after epoch."""
    loader = kind(
        data,
        batch_size=given.batch,
        shuffle=True,
        drop_last=True,
        num_workers=given.threads,
        prefetch_factor=AHEAD,
        persistent_workers=True,
        pin_memory=given.device == "cuda",
    )
    for _ in itertools.count():
        for batch in loader:
            a, b = views(batch)
            yield a, b


def side(given: Any) -> None:
    """One side, in its own process: takes so many steps for each line of standard input, and says what they took."""
    import torch

    from medclr.augment.views import Draws
    from medclr.config import EncoderConfig, ViewsConfig
    from medclr.data.loader import READ_AHEAD, Batch, Loader
    from medclr.data.store import Store
    from medclr.distributed import Group
    from medclr.memory import keep_freed_memory
    from medclr.methods.simclr import Config, Method
    from medclr.models.encoder import build_encoder
    from medclr.optim.lars import build_optimizer, param_groups
    from medclr.step import Step, plan_of
    from medclr.stop import StopRequest

    torch.set_num_threads(given.threads)
    keep_freed_memory()
    n, size_px = given.batch, given.size_px
    torch.manual_seed(0)
    method = Method(Config(), build_encoder(EncoderConfig(given.network), size_px))
    method = method.to(given.device, memory_format=torch.channels_last)
    optimizer, plan = build_optimizer("lars", param_groups(method, 1e-6), lr=0.1), plan_of(n, None, Group())
    take = Step(method, optimizer, plan, Group(), torch.bfloat16 if given.precision == "bfloat16" else None)
    stop = StopRequest(Group())
    zeros, whole = torch.zeros(n), torch.arange(n)
    nothing = Batch(
        index=whole, images=zeros[:, None, None, None], low=zeros, high=zeros + 1, air=zeros, content=zeros[:, None],
        modality=whole * 0, scan=whole, patient=whole, slice_index=whole, position=zeros, label=whole * 0 - 1,
        modalities=("XR",),
    )  # fmt: skip

    if given.side == "medclr":
        store = Store(Path(given.store))
        batches = Loader(store, store.indices(), n, 0, pinned=given.device == "cuda").epochs(0, 10**6)
        ahead, number = READ_AHEAD, itertools.count()

        def step() -> float:
            return take(batches, Draws(ViewsConfig(size_px), n, seed=0, step=next(number)), stop).loss

        def skip() -> None:
            next(batches)

    else:
        if given.side == "model alone":
            pair = [torch.rand(n, 1, size_px, size_px, device=given.device) for _ in range(2)]
            pairs: Iterator[Any] = itertools.repeat(pair)
            ahead = 0
        else:
            pairs = {"MONAI": pairs_of_monai, "lightly": pairs_of_lightly}[given.side](given)
            ahead = AHEAD * given.threads

        def step() -> float:
            # The wait for the pair belongs to the step, and comes first, as with the others.
            return take(iter([nothing]), Given(*next(pairs)), stop).loss  # type: ignore[arg-type]

        def skip() -> None:
            next(pairs)

    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(ahead):  # what was made while the others had their turn
            skip()
        if given.device == "cuda":
            torch.cuda.synchronize()
        started, before = time.perf_counter(), processor_time()
        for _ in range(int(line)):
            step()
        if given.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - started, processor_time() - before]), flush=True)


def processor_time() -> float:
    """Seconds of this process and of its workers."""
    ticks = 0
    for child in [os.getpid(), *workers()]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def workers() -> list[int]:
    """Processes that this one has started."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--network", default="resnet18")
    for name, default in (("size-px", 64), ("source-px", 96), ("batch", 256), ("n", 2048), ("steps", 6), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--images", type=Path, help="grey images of --source-px in one folder; None: some are made")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environment; None: with temporary files")
    parser.add_argument("--out", type=Path, help="also write the table there")
    for name in ("--side", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side(given)
        return 0

    from peers import peers

    python = peers(given.peers)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:
        folder = Path(name)
        images = given.images or make_images(folder / "images", given.n, given.source_px)
        store = make_store(images, folder, given.source_px)
        words = [f"--{key.replace('_', '-')}={getattr(given, key)}" for key in (
            "threads", "device", "precision", "network", "size_px", "source_px", "batch")]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        sides = {}
        for which in given.sides:
            command = [python, __file__, *words, f"--images={images}", f"--store={store}", f"--side={which}"]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            running.callback(process.wait)
            running.callback(process.stdin.close)  # the end of its input ends it
            sides[which] = process
            while (line := process.stdout.readline()) != "ready\n":
                if not line:
                    raise SystemExit(f"{which}: did not begin")
        wall: dict[str, list[float]] = {which: [] for which in sides}
        processor: dict[str, list[float]] = {which: [] for which in sides}
        for _ in range(given.rounds):
            for which, process in sides.items():
                process.stdin.write(f"{given.steps}\n")
                process.stdin.flush()
                seconds, busy = json.loads(process.stdout.readline())
                wall[which].append(given.steps * given.batch / seconds)
                processor[which].append(given.steps * given.batch / max(busy, 1e-9))
    text, is_good = table(given, wall, processor)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return int(not is_good)


def table(given: Any, wall: dict[str, list[float]], processor: dict[str, list[float]]) -> tuple[str, bool]:
    """Markdown, and whether the goals are reached."""
    rates = processor if given.device == "cpu" else wall
    where = f"{given.threads} threads" if given.device == "cpu" else "one GPU"
    lines = [
        f"{given.network}, {given.source_px} to {given.size_px} px, batch {given.batch}, {given.precision}, {where}",
        "",
        "| side | images/s | of the model alone | images per second of processor time | of the model alone |",
        "|---|---|---|---|---|",
    ]
    shares = {}
    for which in wall:
        cells = [which]
        for values in (wall, processor):
            ratios = [x / y for x, y in zip(values[which], values[given.sides[0]], strict=True)]
            ratio = statistics.median(ratios)
            cells += [f"{statistics.median(values[which]):.1f}", f"{ratio:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"]
            if values is rates:
                shares[which] = ratio
        lines.append(f"| {' | '.join(cells)} |")
    ours = shares.get("medclr", 1.0)
    others = [share for which, share in shares.items() if which not in ("medclr", "model alone")]
    return "\n".join(lines), ours >= GOAL[given.device] and all(ours > share for share in others)


if __name__ == "__main__":
    sys.exit(main())
