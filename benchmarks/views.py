"""What a view costs on a processor: medclr against MONAI, kornia and lightly, the same recipe, all in one run.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/views.py [--batch 64] [--rounds 15] [--env FOLDER]

The recipe: a crop of 20 to 100 % of the area resized to the view, mirrored in half of the views; gamma in 80 %,
contrast in 80 %, Gaussian blur in 50 % (sigma up to 2 px at 224, up to 1 px at 64), Gaussian noise in 50 %. Slices lie
decoded in memory, a batch of views comes out as one tensor; nothing is read, nothing trained. Each side in its own way:

    medclr   two_views of a batch of float32, the drawing of its parameters and the scaling to [0,1] included
    MONAI    its transforms on one float32 tensor after the other, metadata tracking off
    kornia   its augmentations on the whole batch of float32; the faster of its two ways to crop
    lightly  its SimCLR transform on one 8-bit PIL image after the other. It has neither gamma nor noise: brightness and
             contrast (its colour jitter without saturation and hue) stand for gamma and contrast, noise is left out;
             so it does less, and in 8 bits

Freed memory is kept, as in medclr's training loop, which helps all sides. Processor time of this process. The sides
take turns in every round; median over the rounds, and in brackets the least and the greatest. The peers come from an
environment of their own (peers.py), made by the first run.
Exits with status 1 if medclr takes more than 0.6 of the fastest peer, or more than a fifth of MONAI.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medclr.augment.views import two_views
from medclr.config import ViewsConfig
from medclr.data.loader import Batch
from medclr.memory import keep_freed_memory
from medclr.scans.modality import MODALITIES, Modality

SIZES = ((256, 224), (96, 64))
"""Pixels of a slice, pixels of a view."""

LIMIT, LIMIT_MONAI = 0.6, 0.2

RECIPE = Modality("recipe", dicom=(), aliases=(), scaling="percentile", air=0.0, flip_lr=True, rotation_deg=0)

Side = tuple[Callable[[], object], int]
"""A call, and how many views it makes."""


def pictures(n: int, size_px: int) -> Tensor:
    """Smooth structures with some noise, [n,1,S,S] in [0,1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 1, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size_px, size_px), mode="bicubic")
    return (smooth + 0.03 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def batch_of(images: Tensor, modality: str) -> Batch:
    """As the loader hands it out; CT in Hounsfield units."""
    n, size_px = len(images), images.shape[-1]
    whole, ones = torch.arange(n), torch.ones(n)
    air = -1024.0 if modality == "CT" else 0.0
    images = images * 2000 + air
    return Batch(
        index=whole,
        images=images,
        low=air * ones,
        high=(air + 2000) * ones,
        air=air * ones,
        content=torch.tensor([[0.0, 0.0, size_px, size_px]]).expand(n, 4),
        modality=whole * 0,
        scan=whole,
        patient=whole,
        slice_index=whole,
        position=0.5 * ones,
        label=whole * 0 - 1,
        modalities=(modality,),
    )


def medclr_side(images: Tensor, size_px: int, modality: str = RECIPE.name) -> Side:
    """Two views of the batch."""
    batch, steps = batch_of(images, modality), iter(range(10**9))
    config = ViewsConfig(size_px=size_px, cutout=0.0 if modality == RECIPE.name else 0.2)
    return lambda: two_views(batch, config, seed=0, step=next(steps)), 2 * len(images)


def monai_side(images: Tensor, size_px: int) -> Side:
    """The nearest that MONAI's transforms come to the recipe; its crop draws the two sides, not area and aspect."""
    from monai.data import set_track_meta
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandFlip,
        RandGaussianNoise,
        RandGaussianSmooth,
        RandScaleIntensityFixedMean,
        RandSpatialCrop,
        Resize,
    )

    set_track_meta(False)
    source_px, sigma = images.shape[-1], max(1.0, size_px / 112)
    chain = Compose(
        [
            RandSpatialCrop(int(source_px * 0.45), max_roi_size=source_px, random_size=True),
            RandFlip(0.5, spatial_axis=1),
            Resize((size_px, size_px), mode="bilinear"),
            RandAdjustContrast(0.8, gamma=(0.6, 1.65)),
            RandScaleIntensityFixedMean(0.8, factors=0.4),
            RandGaussianSmooth((0.1, sigma), (0.1, sigma), prob=0.5),
            RandGaussianNoise(0.5, std=0.05),
        ]
    ).set_random_state(seed=0)
    return lambda: torch.stack([chain(image) for image in images]), len(images)


def kornia_side(images: Tensor, size_px: int, cropping: str) -> Side:
    """A batch through kornia's augmentations; the kernel of the blur has medclr's size."""
    from kornia import augmentation as K

    taps, sigma = 2 * max(size_px // 20, 1) + 1, max(1.0, size_px / 112)
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((size_px, size_px), scale=(0.2, 1.0), cropping_mode=cropping),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomGamma(gamma=(0.6, 1.65), p=0.8),
        K.RandomContrast(contrast=(0.67, 1.5), p=0.8),
        K.RandomGaussianBlur((taps, taps), (0.1, sigma), p=0.5),
        K.RandomGaussianNoise(std=0.05, p=0.5),
    )

    def call() -> Tensor:
        with torch.no_grad():
            views: Tensor = chain(images)
            return views

    return call, len(images)


def lightly_side(images: Tensor, size_px: int) -> Side:
    """lightly's view of SimCLR for grey images."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform
    from PIL import Image

    view = SimCLRViewTransform(
        input_size=size_px,
        cj_prob=0.8,
        cj_bright=0.4,
        cj_contrast=0.4,
        cj_sat=0.0,
        cj_hue=0.0,
        min_scale=0.2,
        random_gray_scale=0.0,
        gaussian_blur=0.5,
        sigmas=(0.1, max(1.0, size_px / 112)),
        normalize=None,
    )
    grey = [Image.fromarray((image[0].numpy() * 255).astype(np.uint8)) for image in images]
    return lambda: torch.stack([view(image) for image in grey]), len(grey)


def costs(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Processor time a view of each side in each round, in milliseconds."""
    for call, _ in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (call, views) in sides.items():
            started = time.process_time()
            call()
            times[name].append((time.process_time() - started) / views * 1e3)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--env", type=Path, help="folder of the peers' environment")
    arguments = parser.parse_args()
    if importlib.util.find_spec("kornia") is None:
        from peers import peers

        python = str(peers(arguments.env))
        os.execv(python, [python, *sys.argv])
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    MODALITIES[RECIPE.name] = RECIPE
    n, rounds, missed = arguments.batch, arguments.rounds, False
    print(f"milliseconds of processor time a view; batch {n}, {arguments.threads} thread(s), median of {rounds} rounds")
    for source_px, size_px in SIZES:
        images = pictures(n, source_px)
        found = costs(
            {
                "medclr": medclr_side(images, size_px),
                "MONAI": monai_side(images, size_px),
                "kornia": kornia_side(images, size_px, "resample"),
                "kornia, slices": kornia_side(images, size_px, "slice"),
                "lightly": lightly_side(images, size_px),
            },
            rounds,
        )
        medians = {name: statistics.median(times) for name, times in found.items()}
        print(f"\n{source_px} -> {size_px} px")
        for name, times in found.items():
            print(f"  {name:15s} {medians[name]:6.3f}  [{min(times):.3f}, {max(times):.3f}]")
        fastest = min((name for name in medians if name != "medclr"), key=medians.__getitem__)
        for name, limit in ((fastest, LIMIT), ("MONAI", LIMIT_MONAI)):
            pairs = [ours / theirs for ours, theirs in zip(found["medclr"], found[name], strict=True)]
            ratio = statistics.median(pairs)
            missed |= ratio > limit
            print(f"  medclr / {name}: {ratio:.2f}  [{min(pairs):.2f}, {max(pairs):.2f}]; aim: at most {limit}")
        whole = costs({name: medclr_side(images, size_px, name) for name in ("CT", "MR", "XR", "US")}, rounds)
        shown = "  ".join(f"{name} {statistics.median(times):.3f}" for name, times in whole.items())
        print(f"  medclr, the whole chain of a modality, rotation included: {shown}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
