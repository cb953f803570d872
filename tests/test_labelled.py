"""Views of labelled slices: what happens to the image happens to its mask, and to its neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, maximum_filter, minimum_filter
from torch import Tensor

from medclr.augment.labelled import mask_views, training_views
from medclr.config import ViewsConfig
from medclr.data.loader import Batch
from medclr.scans.modality import MODALITIES

SIZE = 40
PLAIN = ViewsConfig(size_px=48, crop_area=(0.3, 0.9), strength=0, noise=0, blur=0, cutout=0)
ALWAYS = ViewsConfig(size_px=24, noise=1, blur=1, cutout=1)


def a_batch(images: Tensor, names: tuple[str, ...] = ("MR",)) -> Batch:
    """Images [B,C,S,S] that span 0 to S, the modalities taking turns."""
    n, _, size, _ = images.shape
    whole = torch.arange(n)
    return Batch(
        index=whole,
        images=images,
        low=torch.zeros(n),
        high=torch.full((n,), float(size)),
        air=torch.zeros(n),
        content=torch.tensor([[0.0, 0.0, size, size]]).expand(n, 4),
        modality=whole % len(names),
        scan=whole,
        patient=whole,
        slice_index=whole,
        position=torch.full((n,), 0.5),
        label=torch.full((n,), -1),
        group=whole % len(names),
        modalities=names,
    )


def coordinates(n: int, size: int = SIZE) -> Tensor:
    """[n,3,S,S]: of every pixel x and y of its centre, and the constant S."""
    at = torch.arange(size) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, size)]).expand(n, 3, size, size)


def blobs(n: int, classes: int, size: int = SIZE) -> Tensor:
    """[n,S,S], smooth regions of several classes, 0 in a few of them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, classes, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").argmax(1)


def shares(
    mask: NDArray[np.int64], y: NDArray[np.float32], x: NDArray[np.float32], classes: int
) -> NDArray[np.float64]:
    """Share [K,...] of each class at places (y, x), by scipy's bilinear interpolation of each."""
    at = np.stack([y, x]) - 0.5  # scipy counts from the centre of the first pixel
    return np.stack([map_coordinates((mask == k).astype(float), at, order=1) for k in range(classes)])


def test_the_mask_goes_where_the_image_goes() -> None:
    n, classes = 24, 4
    masks = blobs(n, classes)
    batch = a_batch(coordinates(n), ("MR", "US"))
    views, seen = training_views(batch, PLAIN, seed=0, step=0, masks=masks, classes=classes)
    assert seen is not None
    assert (seen.shape, seen.dtype) == ((n, 48, 48), torch.int64)
    checked, mirrored, turned = 0, set(), 0.0
    for mask, view, found in zip(masks.numpy(), views.numpy() * SIZE, seen.numpy(), strict=True):
        x, y, one = view
        inside = one > SIZE * (1 - 1e-6)
        share = shares(mask, y[inside], x[inside], classes)  # [K,m]
        top = np.sort(share, axis=0)
        clear = top[-1] - top[-2] > 1e-3
        assert (found[inside] == share.argmax(0))[clear].all()
        # Away from borders every way to resample agrees: with the nearest pixel, too.
        uniform = maximum_filter(mask, 3) == minimum_filter(mask, 3)
        nearest = tuple(np.floor(axis[inside]).astype(int) for axis in (y, x))
        assert (found[inside] == mask[nearest])[uniform[nearest]].all()
        checked += int(clear.sum())
        middle = x[24, 20:28]
        mirrored.add(bool(middle[-1] > middle[0]))
        turned = max(turned, abs(float(y[24, 27] - y[24, 20])))
    assert checked > 0.8 * n * 48 * 48
    assert mirrored == {False, True}
    assert turned > 0.5, "no view was rotated"


def test_a_shrunken_mask_goes_where_the_image_goes() -> None:
    n, size = 8, 128
    masks = blobs(n, 3, size)
    config = replace(PLAIN, size_px=24)
    views, seen = training_views(a_batch(coordinates(n, size)), config, seed=1, step=0, masks=masks, classes=3)
    assert seen is not None
    checked = 0
    for mask, view, found in zip(masks.numpy(), views.numpy() * size, seen.numpy(), strict=True):
        x, y, one = view
        inside = one > size * (1 - 1e-6)
        uniform = maximum_filter(mask, 9) == minimum_filter(mask, 9)
        nearest = tuple(np.floor(axis[inside]).astype(int) for axis in (y, x))
        assert (found[inside] == mask[nearest])[uniform[nearest]].all()
        checked += int(uniform[nearest].sum())
    assert checked > 0.3 * n * 24 * 24


def test_outside_of_the_image_is_background() -> None:
    n = 16
    config = replace(PLAIN, crop_area=(1.0, 1.0), rotation_deg=45)
    masks = torch.ones(n, SIZE, SIZE, dtype=torch.int64)
    views, seen = training_views(a_batch(coordinates(n)), config, seed=0, step=0, masks=masks, classes=2)
    assert seen is not None
    share = views[:, 2]  # of the pixel that lies in the image
    assert float((share < 0.1).float().mean()) > 0.02
    assert (seen[share < 0.499] == 0).all()
    assert (seen[share > 0.501] == 1).all()


def test_a_mask_without_a_class_stays_empty_and_full_stays_full() -> None:
    batch = a_batch(coordinates(4))
    config = replace(PLAIN, rotation_deg=0)
    for value in (0, 2):
        masks = torch.full((4, SIZE, SIZE), value)
        _, seen = training_views(batch, config, seed=0, step=0, masks=masks, classes=3)
        assert seen is not None
        assert (seen == value).all()
    drawn = ()
    with pytest.raises(ValueError, match="at least two classes"):
        mask_views(masks, drawn, classes=1)


@pytest.mark.parametrize("name", MODALITIES)
def test_neighbouring_slices_share_what_is_drawn(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(6, 1, SIZE, SIZE, generator=generator) * SIZE
    views, none = training_views(a_batch(one.expand(-1, 3, -1, -1), (name,)), ALWAYS, seed=0, step=5)
    alone, _ = training_views(a_batch(one, (name,)), ALWAYS, seed=0, step=5)
    assert none is None
    assert views.shape == (6, 3, 24, 24)
    assert all(torch.equal(views[:, c : c + 1], alone) for c in range(3))


def test_views_follow_from_seed_and_step_alone() -> None:
    batch = a_batch(coordinates(4))
    masks = blobs(4, 3)

    def views(seed: int, step: int) -> tuple[Tensor, Tensor]:
        x, seen = training_views(batch, ALWAYS, seed=seed, step=step, masks=masks, classes=3)
        assert seen is not None
        return x, seen

    first = views(0, 1)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach them
        again = views(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (views(0, 2), views(1, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
