"""Views: plausible, reproducible, and the same however the batch is spread."""

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medclr.augment.intensity import RandomBlur, RandomCutout, RandomQuantumNoise, RandomWindow
from medclr.augment.views import Draws, chain_for, describe, plain_view, replay, two_views
from medclr.config import ViewsConfig
from medclr.data.loader import Batch
from medclr.scans.modality import MODALITIES

NAMES = tuple(MODALITIES)
CALLS = 1100
"""Of torch, for the two views of a batch: the drawing takes 160, the crop half of the rest."""
ALWAYS = ViewsConfig(size_px=32, noise=1, blur=1, cutout=1)


def a_batch(names: tuple[str, ...], n: int = 12, size_px: int = 48) -> Batch:
    """Smooth random scans, the modalities taking turns; CT in Hounsfield units, the others on scales from 1 to 1e6."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.nn.functional.interpolate(torch.rand(n, 1, 8, 8, generator=generator), size_px, mode="bicubic")
    modality = torch.arange(n) % len(names)
    ct = torch.tensor([names[index] == "CT" for index in modality])
    scale = torch.where(ct, 2000.0, 10.0 ** (torch.arange(n) % 7))  # [n]
    images = shape * scale[:, None, None, None] - ct[:, None, None, None] * 1024.0
    ends = images.flatten(1).quantile(torch.tensor([0.005, 0.995]), dim=1)  # [2,n]
    whole = torch.arange(n)
    return Batch(
        index=whole,
        images=images,
        low=ends[0],
        high=ends[1],
        air=torch.where(ct, -1024.0, 0.0),
        content=torch.tensor([[0.0, 0.0, size_px, size_px]]).expand(n, 4),
        modality=modality,
        scan=whole,
        patient=whole,
        slice_index=whole,
        position=torch.full((n,), 0.5),
        label=torch.full((n,), -1),
        group=modality,
        modalities=names,
    )


@pytest.mark.parametrize("name", NAMES)
def test_views_are_images_in_unit_range(name: str) -> None:
    batch = a_batch((name,))
    before = batch.images.clone()
    views = two_views(batch, ALWAYS, seed=0, step=3)
    assert torch.equal(batch.images, before), "the batch was overwritten"
    for view in (views.a, views.b):
        assert view.shape == (12, 1, 32, 32)
        assert view.dtype == torch.float32
        assert view.isfinite().all()
        assert float(view.min()) >= 0
        assert float(view.max()) <= 1
        assert float(view.flatten(1).std(1).median()) > 0.05, "there is nothing to see"


def test_views_follow_from_seed_step_and_row_alone() -> None:
    batch = a_batch(("MR", "CT"))
    views = two_views(batch, ALWAYS, seed=1, step=5)
    two_views(batch, ALWAYS, seed=2, step=9)  # history
    again = two_views(batch, ALWAYS, seed=1, step=5)
    assert torch.equal(views.a, again.a)
    assert torch.equal(views.b, again.b)
    for other in (
        views.b,
        two_views(batch, ALWAYS, seed=1, step=6).a,
        two_views(batch, ALWAYS, seed=2, step=5).a,
    ):
        assert (other != views.a).flatten(1).any(1).all()
    twice = two_views(batch.select([0, 0]), ALWAYS, seed=1, step=5).a
    assert not torch.equal(twice[0], twice[1]), "rows of a batch have parameters of their own"


@pytest.mark.parametrize("names", [("CT",), ("MR",), ("XR",), ("US",), ("PT", "US", "XR", "MR", "CT")])
@pytest.mark.parametrize("processes", [2, 4, 12])
@pytest.mark.parametrize(("size_px", "rotation_deg"), [(32, None), (33, None), (32, 0.0), (33, 0.0)])
def test_any_split_of_the_global_batch_gives_the_same_bits(
    names: tuple[str, ...], processes: int, size_px: int, rotation_deg: float | None
) -> None:
    batch, config = a_batch(names), replace(ALWAYS, size_px=size_px, rotation_deg=rotation_deg)
    whole = two_views(batch, config, seed=4, step=2)
    share = len(batch) // processes
    for rank in range(processes):
        rows = slice(rank * share, (rank + 1) * share)
        part = two_views(batch.select(rows), config, seed=4, step=2, rows=rows, global_batch=len(batch))
        assert torch.equal(part.a, whole.a[rows])
        assert torch.equal(part.b, whole.b[rows])
        for i in range(share):
            assert describe(part, 1, i) == describe(whole, 1, rows.start + i)


@pytest.mark.parametrize("rotation_deg", [None, 0.0])
def test_the_number_of_threads_does_not_matter(rotation_deg: float | None) -> None:
    batch = a_batch(("MR", "CT"), n=24, size_px=96)  # large enough to be shared among threads
    config, threads = replace(ALWAYS, size_px=67, rotation_deg=rotation_deg), torch.get_num_threads()
    views = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            views.append(two_views(batch, config, seed=0, step=0).a)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(ValueError, match="is 6 rows, but the batch holds 12"):
        two_views(a_batch(("MR",)), ALWAYS, seed=0, step=0, rows=slice(0, 6), global_batch=24)


def test_other_modalities_in_the_batch_do_not_matter() -> None:
    mixed = a_batch(("MR", "CT"))
    views = two_views(mixed, ALWAYS, seed=0, step=0)
    alone = a_batch(("MR",))  # its even rows are the MR rows of the mixed batch
    even = torch.arange(0, 12, 2)
    only = replace(alone, images=mixed.images, low=mixed.low, high=mixed.high, air=mixed.air)
    assert torch.equal(two_views(only, ALWAYS, seed=0, step=0).a[even], views.a[even])


def test_a_transform_more_leaves_the_other_draws_as_they_were() -> None:
    batch = a_batch(("MR",))
    plain = two_views(batch, replace(ALWAYS, blur=0.5), seed=0, step=0).drawn[0][0]
    blurred = two_views(batch, replace(ALWAYS, blur=1.0), seed=0, step=0).drawn[0][0]
    for transform, one, other in zip(plain.chain, plain.params, blurred.params, strict=True):
        for key in one:
            assert torch.equal(one[key], other[key]) == (not isinstance(transform, RandomBlur) or key != "on")


def test_replay_of_the_recorded_parameters() -> None:
    batch = a_batch(("CT", "MR", "US"))
    views = two_views(batch, ALWAYS, seed=0, step=0)
    assert torch.equal(replay(batch.images, views.drawn[0]), views.a)
    assert torch.equal(replay(batch.images, views.drawn[1]), views.b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_views(dtype: torch.dtype) -> None:
    batch = a_batch(("MR", "CT"))
    expected, plain = two_views(batch, ALWAYS, seed=0, step=0), plain_view(batch, 32)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(two_views(batch, ALWAYS, seed=0, step=0).a, expected.a)
        assert torch.equal(plain_view(batch, 32), plain)


def test_without_any_jitter_a_view_is_the_plain_view() -> None:
    batch = a_batch(("MR", "XR", "PT"))
    nothing = ViewsConfig(
        size_px=48, crop_area=(1, 1), rotation_deg=0, flip=False, strength=0, noise=0, blur=0, cutout=0
    )
    drawn = two_views(batch, nothing, seed=0, step=0).drawn[0]
    for part in drawn:
        part.params[0]["log_aspect"].zero_()  # the one thing that has no setting
    torch.testing.assert_close(replay(batch.images, drawn), plain_view(batch, 48), atol=1e-4, rtol=0)


def test_chains_follow_the_modality() -> None:
    steps = {name: [type(step).__name__ for step in chain_for(MODALITIES[name], ALWAYS)] for name in NAMES}
    for chain in steps.values():
        assert chain[0] == "RandomResizedCrop"
        assert ("RandomWindow" in chain) != ("PercentileScale" in chain)
        assert chain[-1] == "RandomCutout"
        assert "RandomBlur" in chain
    assert steps["CT"].index("RandomQuantumNoise") < steps["CT"].index("RandomWindow")
    assert {"PercentileScale", "RandomGamma", "RandomContrast", "RandomBiasField", "RandomRicianNoise"} < set(
        steps["MR"]
    )
    assert {"RandomGamma", "RandomContrast"} < set(steps["XR"])
    assert {"RandomSpeckle", "RandomGain"} < set(steps["US"])
    xr = next(step for step in chain_for(MODALITIES["XR"], ALWAYS) if type(step).__name__ == "RandomGamma")
    assert xr.invertible
    for name, row in MODALITIES.items():
        crop = chain_for(row, ALWAYS)[0]
        assert (crop.flip_lr, crop.flip_ud, crop.rotation_deg) == (row.flip_lr, row.flip_ud, row.rotation_deg), name
        crop = chain_for(row, replace(ALWAYS, flip=False, rotation_deg=3.0))[0]
        assert (crop.flip_lr, crop.flip_ud, crop.rotation_deg) == (False, False, 3.0), name


def test_settings_reach_the_transforms() -> None:
    chain = chain_for(
        MODALITIES["CT"], ViewsConfig(size_px=224, crop_area=(0.3, 0.9), strength=0.5, noise=0.1, blur=0.2)
    )
    assert (chain[0].size_px, chain[0].area) == (224, (0.3, 0.9))
    assert next(step for step in chain if isinstance(step, RandomWindow)).jitter == pytest.approx(0.1)
    noise = next(step for step in chain if isinstance(step, RandomQuantumNoise))
    assert (noise.prob, noise.std) == (0.1, pytest.approx(7.5))
    blur = next(step for step in chain if isinstance(step, RandomBlur))
    assert (blur.prob, blur.sigma_px) == (0.2, (0.1, 2.0)), "SimCLR's range at SimCLR's size"
    assert next(step for step in chain if isinstance(step, RandomCutout)).prob == 0.2


def test_captions_say_what_was_done() -> None:
    batch = a_batch(("CT", "MR"))
    views = two_views(batch, ViewsConfig(size_px=32), seed=0, step=0)
    for i in range(12):
        caption = describe(views, 0, i)
        assert re.match(r"crop (0\.\d\d|1\.00) · rot -?\d+°", caption)
        assert bool(re.search(r"W \d+ C -?\d+", caption)) == (i % 2 == 0)
        assert ("range" in caption) == (i % 2 == 1)
    drawn = views.drawn[0][0]
    for step, params in zip(drawn.chain, drawn.params, strict=True):
        if isinstance(step, RandomCutout):
            for j, row in enumerate(drawn.rows.tolist()):
                assert ("cut" in describe(views, 0, row)) == bool(params["on"][j])
    with pytest.raises(IndexError, match="no image 12"):
        describe(views, 0, 12)


def test_a_chain_runs_in_a_monai_compose() -> None:
    image = a_batch(("MR",)).images[0]  # [1,H,W]
    chain = Compose(chain_for(MODALITIES["MR"], ALWAYS)).set_random_state(seed=0)
    out = chain(image)
    assert out.shape == (1, 32, 32)
    assert 0 <= float(out.min()) < float(out.max()) <= 1


def test_plain_view_shows_windows_and_ranges() -> None:
    batch = a_batch(("CT", "MR"))
    out = plain_view(batch, 48)
    window = MODALITIES["CT"].display
    assert window is not None
    hu = batch.images[::2]
    torch.testing.assert_close(out[::2], ((hu - window.center) / window.width + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    low, high = batch.low[1::2, None, None, None], batch.high[1::2, None, None, None]
    expected = ((batch.images[1::2] - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(out[1::2], expected, atol=1e-5, rtol=0)


def test_plain_view_resizes_as_pillow_does() -> None:
    batch = a_batch(("MR",), size_px=96)
    wide = replace(batch, low=torch.full((12,), -1e7), high=torch.full((12,), 1e7))  # nothing is clipped
    out = plain_view(wide, 32)

    def resized(image: Tensor) -> np.ndarray:
        return np.asarray(Image.fromarray(image.numpy()).resize((32, 32), Image.Resampling.BILINEAR))

    for i in range(12):
        expected = (resized(batch.images[i, 0]) + 1e7) / 2e7
        assert np.abs(out[i, 0].numpy() - expected).max() < 1e-5


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **kwargs or {})


def calls(n: int, name: str, config: ViewsConfig, size_px: int = 48) -> int:
    """Of two views of ``n`` images, at a step at which every transform that has a choice changes some of them."""
    batch = a_batch((name,), n, size_px)

    def has_all_kinds(step: int) -> bool:
        draws = Draws(config, n, seed=0, step=step)
        parts = [draws.drawn(batch, view, torch.arange(n))[0] for view in (0, 1)]
        choices = [(t.prob, p["on"]) for part in parts for t, p in zip(part.chain, part.params, strict=True)]
        return all(prob in (0, 1) or (on.any() and not on.all()) for prob, on in choices)

    step = next(step for step in itertools.count() if has_all_kinds(step))
    two_views(batch, config, seed=0, step=step)  # tables that are made once
    with Calls() as counted:
        two_views(batch, config, seed=0, step=step)
    return counted.count


@pytest.mark.parametrize("name", ["CT", "MR", "XR", "US", "PT"])
@pytest.mark.parametrize("rotation_deg", [None, 0.0])
def test_the_number_of_calls_does_not_grow_with_the_batch(name: str, rotation_deg: float | None) -> None:
    """What a view costs, in calls of torch and not in seconds: a loop over images or a chain grown slow shows here."""
    config = ViewsConfig(size_px=32, rotation_deg=rotation_deg)
    few, many = calls(8, name, config), calls(64, name, config)
    assert few == many
    assert many <= CALLS, "for two views, whatever the batch"


def test_a_batch_beyond_the_cache_takes_calls_for_each_block_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ViewsConfig(size_px=32)
    whole = calls(64, "MR", config)
    monkeypatch.setattr("medclr.augment.transform.CACHED", 16 * 48 * 48)
    assert calls(64, "MR", config) <= 4 * whole


@pytest.mark.gpu
def test_views_on_a_gpu_are_those_of_the_cpu() -> None:
    batch = a_batch(NAMES, n=28)
    here = two_views(batch, ALWAYS, seed=0, step=0)
    for there in (
        two_views(batch, ALWAYS, seed=0, step=0, device="cuda"),
        two_views(batch.to("cuda"), ALWAYS, seed=0, step=0),
    ):
        assert there.a.is_cuda
        torch.testing.assert_close(there.a.cpu(), here.a, atol=1e-3, rtol=0)
        torch.testing.assert_close(there.b.cpu(), here.b, atol=1e-3, rtol=0)
    torch.testing.assert_close(plain_view(batch.to("cuda"), 32).cpu(), plain_view(batch, 32), atol=1e-4, rtol=0)
