"""What a view costs, a modality's whole chain of transforms included.

    python benchmarks/views.py [--threads 1] [--batch 64]

Per view, in microseconds of this process's processor time (the median over the rounds, so that other processes on the
machine disturb little):

    resampling  torch alone: affine_grid and grid_sample on the batch, no crop drawn, no other transform
    CT ... US   two_views of a batch of that modality, drawing of the parameters included
    MONAI       the MR chain of MONAI's own transforms, one image at a time, metadata tracking off

Aim: at 64 px well under 150 us on two threads, so that a ResNet-18, at some 5 ms a view, never waits for its views.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandBiasField,
    RandFlip,
    RandGaussianSmooth,
    RandRicianNoise,
    RandRotate,
    RandSpatialCrop,
    Resize,
    ScaleIntensityRangePercentiles,
)

from medclr.augment.views import two_views
from medclr.config import ViewsConfig
from medclr.data.loader import Batch

SIZES = ((96, 64), (256, 224))
"""Pixels of a slice, pixels of a view."""

MODALITIES = ("CT", "MR", "XR", "US")


def random_batch(modality: str, n: int, size_px: int) -> Batch:
    """Noise in a range like Hounsfield units: no transform takes longer for it than for a scan."""
    images = torch.randn(n, 1, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 300
    whole, ones = torch.arange(n), torch.ones(n)
    return Batch(
        index=whole,
        images=images,
        low=-800 * ones,
        high=800 * ones,
        air=-1024 * ones,
        content=torch.tensor([[0.0, 0.0, size_px, size_px]]).expand(n, 4),
        modality=whole * 0,
        scan=whole,
        patient=whole,
        slice_index=whole,
        position=0.5 * ones,
        label=whole * 0 - 1,
        modalities=(modality,),
    )


def monai_chain(source_px: int, size_px: int) -> Compose:
    """The nearest that MONAI's transforms come to the MR chain."""
    return Compose(
        [
            RandSpatialCrop(int(source_px * 0.45), max_roi_size=source_px, random_size=True),
            RandFlip(0.5, spatial_axis=1),
            RandRotate(range_x=0.26, prob=1.0, keep_size=True, padding_mode="zeros"),
            Resize((size_px, size_px), mode="bilinear"),
            ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True),
            RandAdjustContrast(0.8, gamma=(0.6, 1.65)),
            RandBiasField(prob=0.3),
            RandGaussianSmooth((0.1, 1.0), (0.1, 1.0), prob=0.5),
            RandRicianNoise(0.5, std=0.08),
        ]
    ).set_random_state(seed=0)


def cost_us(call: Callable[[], object], views: int, rounds: int) -> float:
    """Median processor time of ``call`` over the rounds, a view."""
    call()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return statistics.median(times) / views * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_track_meta(False)
    n, rounds = arguments.batch, arguments.rounds
    print(f"microseconds of processor time a view; batch {n}, {arguments.threads} thread(s), median of {rounds}")
    for source_px, size_px in SIZES:
        images = random_batch("MR", n, source_px).images
        turn = torch.tensor([[0.8, 0.1, 0.0], [-0.1, 0.8, 0.0]]).expand(n, 2, 3)

        def resampling(
            images: torch.Tensor = images, turn: torch.Tensor = turn, size_px: int = size_px
        ) -> torch.Tensor:
            grid = torch.nn.functional.affine_grid(turn, [n, 1, size_px, size_px], align_corners=False)
            return torch.nn.functional.grid_sample(images, grid, align_corners=False)

        columns = {"resampling": cost_us(resampling, n, rounds)}
        config = ViewsConfig(size_px=size_px)
        for modality in MODALITIES:
            batch = random_batch(modality, n, source_px)
            columns[modality] = cost_us(lambda b=batch, c=config: two_views(b, c, seed=0, step=0), 2 * n, rounds)
        chain = monai_chain(source_px, size_px)
        columns["MONAI"] = cost_us(lambda c=chain, x=images: [c(image) for image in x], n, max(3, rounds // 5))
        print(f"{source_px} -> {size_px} px  " + "  ".join(f"{name} {value:.0f}" for name, value in columns.items()))


if __name__ == "__main__":
    main()
