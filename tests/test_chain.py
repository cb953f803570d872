"""Chains of the user's own: transforms of medclr and of MONAI by name, checked first, the same views anywhere."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_obj import get_track_meta
from monai.transforms import RandFlip, RandGaussianNoise
from test_augment_views import a_batch
from test_pretrain import assert_same_run, stopped

import medclr
from medclr.augment import single
from medclr.augment.chain import check, custom_chain, moving, resolved
from medclr.augment.intensity import RandomGamma, RandomWindow
from medclr.augment.labelled import training_views
from medclr.augment.single import MonaiTransforms
from medclr.augment.views import describe, replay, two_views
from medclr.cli import main
from medclr.config import ViewsConfig, read_yaml
from medclr.errors import MedclrError
from medclr.methods.simclr import Method
from medclr.scans.modality import MODALITIES

MIXED: list[dict[str, Any]] = [
    {"name": "RandomGamma", "log_gamma": 0.4, "prob": 0.8},
    {"name": "RandGaussianNoise", "prob": 0.5, "std": 0.1},
    {"name": "RandBiasField", "prob": 0.5},
    {"name": "RandomBlur", "sigma_px": [0.1, 1.0]},
    {"name": "RandAdjustContrast", "prob": 1.0, "gamma": [0.7, 1.4]},
]


def views_config(*entries: dict[str, Any], **other: Any) -> ViewsConfig:
    return ViewsConfig(size_px=32, chain=list(entries), **other)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """``processes.setattr(single, "workers", ...)``, and no process is left."""
    yield monkeypatch
    single.close()


def test_a_chain_is_the_crop_the_scaling_and_what_is_named() -> None:
    config = views_config(*MIXED)
    for name, scale in (("CT", "RandomWindow"), ("MR", "PercentileScale")):
        keys = [step.key for step in custom_chain(MODALITIES[name], config)]
        monai = ["RandGaussianNoise+RandBiasField", "RandAdjustContrast"]
        assert keys == ["RandomResizedCrop", scale, "RandomGamma", monai[0], "RandomBlur", monai[1]]
    gamma = custom_chain(MODALITIES["MR"], config)[2]
    assert isinstance(gamma, RandomGamma)
    assert (gamma.log_gamma, gamma.prob) == (0.4, 0.8)


def test_crop_and_scaling_by_name() -> None:
    config = views_config(
        {"name": "RandomResizedCrop", "area": [0.5, 0.6], "rotation_deg": 0},
        {"name": "RandomQuantumNoise", "std": 20},
        {"name": "RandomWindow", "windows": [[40, 400], [-600, 1500]]},
        {"name": "RandShiftIntensity", "offsets": 0.1},
    )
    crop, noise, window, shift = custom_chain(MODALITIES["CT"], resolved(config))
    assert (crop.area, crop.rotation_deg, crop.size_px, crop.flip_lr) == ((0.5, 0.6), 0, 32, False)
    assert noise.std == 20
    assert isinstance(window, RandomWindow)
    assert [(w.center, w.width) for w in window.windows] == [(40, 400), (-600, 1500)]
    assert isinstance(shift, MonaiTransforms)
    assert shift.is_scaled


@pytest.mark.parametrize("names", [("MR",), ("CT", "XR")])
def test_views_follow_from_seed_step_and_row_alone(names: tuple[str, ...]) -> None:
    batch, config = a_batch(names), views_config(*MIXED)
    whole = two_views(batch, config, seed=1, step=5)
    for view in (whole.a, whole.b):
        assert view.shape == (12, 1, 32, 32)
        assert 0 <= float(view.min()) < float(view.max()) <= 1
    two_views(batch, config, seed=2, step=9)  # history
    for rank in range(3):
        rows = slice(4 * rank, 4 * rank + 4)
        part = two_views(batch.select(rows), config, seed=1, step=5, rows=rows, global_batch=12)
        assert torch.equal(part.a, whole.a[rows])
        assert torch.equal(part.b, whole.b[rows])
    assert torch.equal(replay(batch.images, whole.drawn[0]), whole.a)
    for other in (whole.b, two_views(batch, config, seed=1, step=6).a, two_views(batch, config, seed=2, step=5).a):
        assert (other != whole.a).flatten(1).any(1).all()
    assert "RandGaussianNoise" in describe(whole, 0, 3)


@pytest.mark.parametrize("names", [("MR",), ("CT", "XR")])
def test_neighbouring_slices_are_seen_as_each_would_be_alone(names: tuple[str, ...]) -> None:
    batch, config = a_batch(names), replace(views_config(), chain=None)
    several = replace(batch, images=torch.cat([batch.images.roll(by, 0) for by in range(3)], dim=1))  # [B,3,S,S]
    views = two_views(several, config, seed=1, step=5)
    for channel in range(3):
        alone = two_views(replace(batch, images=several.images[:, channel : channel + 1]), config, seed=1, step=5)
        assert torch.equal(views.a[:, channel : channel + 1], alone.a)
        assert torch.equal(views.b[:, channel : channel + 1], alone.b)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_gives_the_same_views(processes: pytest.MonkeyPatch, count: int) -> None:
    batch, config = a_batch(("MR", "US"), size_px=96), replace(views_config(*MIXED), size_px=67)
    processes.setattr(single, "workers", lambda: 0)
    alone = two_views(batch, config, seed=0, step=0)
    processes.setattr(single, "workers", lambda: count)
    together = two_views(batch, config, seed=0, step=0)
    assert [pool.count for pool in single._pools] == [count]
    assert torch.equal(alone.a, together.a)
    assert torch.equal(alone.b, together.b)


def test_processes_end_with_their_pool(processes: pytest.MonkeyPatch) -> None:
    processes.setattr(single, "workers", lambda: 2)
    two_views(a_batch(("MR",)), views_config(*MIXED), seed=0, step=0)
    (pool,) = single._pools
    assert all(process.is_alive() for process in pool._processes)
    single.close()
    assert not any(process.is_alive() for process in pool._processes)
    assert not single._pools


def test_a_killed_process_is_one_sentence(processes: pytest.MonkeyPatch) -> None:
    processes.setattr(single, "workers", lambda: 2)
    batch, config = a_batch(("MR",)), views_config(*MIXED)
    before = two_views(batch, config, seed=0, step=0)
    single._pools[0]._processes[1].kill()
    single._pools[0]._processes[1].join()
    with pytest.raises(MedclrError, match="a process that applies MONAI's transforms was killed"):
        two_views(batch, config, seed=0, step=0)
    assert torch.equal(two_views(batch, config, seed=0, step=0).a, before.a), "and new ones are made"


def test_what_goes_wrong_in_a_process_is_said(processes: pytest.MonkeyPatch) -> None:
    config = views_config({"name": "RandSpatialCrop", "roi_size": 5, "random_size": False})
    for count in (0, 2):
        processes.setattr(single, "workers", lambda count=count: count)
        with pytest.raises(MedclrError, match=r"an image of \[1, 32, 32\] became \[1, 5, 5\]; views keep their size"):
            two_views(a_batch(("MR",)), config, seed=0, step=0)


def test_it_is_what_monai_does_with_these_seeds() -> None:
    images = a_batch(("MR",)).images.clamp(0, 1)[:5]
    step = MonaiTransforms(
        [{"name": "RandFlip", "prob": 0.5}, {"name": "RandGaussianNoise", "prob": 0.7}], is_scaled=False
    )
    params = step.draw(5, np.random.RandomState(3))
    out, track = step.apply(images, params), get_track_meta()
    for i in range(5):
        flip, noise = RandFlip(prob=0.5), RandGaussianNoise(prob=0.7)
        flip.set_random_state(seed=int(params["seed"][i, 0]))
        noise.set_random_state(seed=int(params["seed"][i, 1]))
        expected = noise(flip(images[i]))
        torch.testing.assert_close(out[i], torch.as_tensor(np.asarray(expected)), atol=0, rtol=0)
    assert get_track_meta() == track, "a setting of the whole process is as it was"
    clipped = MonaiTransforms([{"name": "RandGaussianNoise", "prob": 1.0, "std": 3.0}], is_scaled=True)
    assert float(clipped.apply(images, clipped.draw(5, np.random.RandomState(0))).max()) == 1


def test_a_transform_given_twice_draws_twice() -> None:
    twice = views_config({"name": "RandomGamma", "prob": 1.0}, {"name": "RandomGamma", "prob": 1.0})
    params = two_views(a_batch(("MR",)), twice, seed=0, step=0).drawn[0][0].params
    assert not torch.equal(params[2]["gamma"], params[3]["gamma"])
    once = views_config({"name": "RandomGamma", "prob": 1.0})
    first = two_views(a_batch(("MR",)), once, seed=0, step=0).drawn[0][0].params
    assert torch.equal(params[2]["gamma"], first[2]["gamma"])


def test_defaults_are_written_out() -> None:
    config = resolved(views_config(*MIXED))
    assert config.chain is not None
    gamma, noise, bias, blur, _ = config.chain
    assert gamma == {"name": "RandomGamma", "log_gamma": 0.4, "prob": 0.8, "invertible": False}
    assert noise == {"name": "RandGaussianNoise", "prob": 0.5, "std": 0.1, "mean": 0.0, "sample_std": True}
    assert bias == {"name": "RandBiasField", "prob": 0.5, "degree": 3, "coeff_range": [0.0, 0.1]}
    assert blur == {"name": "RandomBlur", "sigma_px": [0.1, 1.0], "prob": 0.5}
    assert resolved(config) == config
    batch = a_batch(("MR",))
    assert torch.equal(
        two_views(batch, config, seed=0, step=0).a, two_views(batch, views_config(*MIXED), seed=0, step=0).a
    )
    assert resolved(ViewsConfig()) == ViewsConfig()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"name": "RandGausianNoise"}], "RandGausianNoise is neither .* the nearest known one is 'RandGaussianNoise'"),
        ([{"name": "RandomGama"}], "RandomGama is neither .* the nearest known one is 'RandomGamma'"),
        ([{"name": "GaussianSmooth"}], "GaussianSmooth is not random; the nearest known one is 'RandGaussianSmooth'"),
        ([{"name": "RandFlipd"}], "RandFlipd takes dictionaries, .* the nearest known one is 'RandFlip'"),
        ([{"name": "OneOf"}], "OneOf is made of other transforms"),
        ([{"name": "os"}], "os is neither a transform of medclr nor a random one of MONAI"),
        ([{"name": "RandomGamma", "log_gama": 1}], "RandomGamma has no argument 'log_gama'.*'log_gamma'"),
        ([{"name": "RandGaussianNoise", "sdt": 1}], "RandGaussianNoise has no argument 'sdt'.*'std'"),
        ([{"name": "RandomResizedCrop", "size_px": 8}], "RandomResizedCrop has no argument 'size_px'"),
        ([{"name": "RandShiftIntensity"}], "RandShiftIntensity needs offsets"),
        ([{"name": "RandomGamma"}, {"name": "RandomResizedCrop"}], "RandomResizedCrop comes first, and once"),
        ([{"name": "PercentileScale"}, {"name": "RandomWindow"}], "an image is scaled to .* once"),
        ([{"name": "RandomQuantumNoise"}], "RandomQuantumNoise is noise of physical values"),
        ([{"name": "RandomWindow"}], "RandomWindow: MR has no windows of its own; give its windows"),
        ([{"name": "RandomGamma", "log_gamma": "much"}], "RandomGamma does not work with these arguments"),
        ([{"name": "RandomGamma", "prob": "often"}], "an argument is of the wrong kind"),
        ([{"name": "RandomWindow", "windows": [40, 400]}], "an argument is of the wrong kind"),
        ([{"name": "RandomBlur", "sigma_px": 1}], "RandomBlur does not work with these arguments"),
        ([{"name": "RandGaussianNoise", "std": "much"}], "RandGaussianNoise does not work with these arguments"),
        ([{"name": "RandAdjustContrast", "gamma": -1}], "RandAdjustContrast does not work with these arguments"),
        ([{"name": "RandSpatialCrop", "roi_size": 5, "random_size": False}], r"became \[1, 5, 5\].*RandSpatialCrop"),
        ([{"name": "RandCropByPosNegLabel", "spatial_size": 8}], "RandCropByPosNegLabel"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(entries: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(MedclrError, match=words) as caught:
        check(views_config(*entries), ["MR"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("views.chain: ")


def test_a_chain_without_names_is_refused() -> None:
    with pytest.raises(MedclrError, match=r"views.chain must be a list of \{name: NAME, argument: value\}, or null"):
        views_config({"prob": 0.5})


def test_good_chains_pass() -> None:
    check(views_config(*MIXED), ["MR", "CT", "XR"])
    check(ViewsConfig(), ["MR"])
    check(views_config(), ["MR"])


def test_masks_do_not_follow_what_moves_pixels() -> None:
    batch = a_batch(("MR",))
    masks = (batch.images[:, 0] > batch.images.mean()).long()
    still = views_config({"name": "RandGaussianNoise", "prob": 0.5})
    views, moved = training_views(batch, still, seed=0, step=0, masks=masks, classes=2)
    assert moved is not None
    assert views.shape[2:] == moved.shape[1:]
    turned = views_config({"name": "RandRotate", "range_x": 0.5}, {"name": "RandGaussianNoise"})
    assert moving(custom_chain(MODALITIES["MR"], turned)) == ["RandRotate"]
    with pytest.raises(MedclrError, match="RandRotate moves pixels, and masks do not follow it"):
        training_views(batch, turned, seed=0, step=0, masks=masks, classes=2)
    training_views(batch, turned, seed=0, step=0)


def test_a_run_keeps_its_chain_and_ends_with_the_same_weights_stopped_or_not_on_any_number_of_processes(
    tmp_path: Path, image_store: Path, processes: pytest.MonkeyPatch
) -> None:
    config, whole, halves = tmp_path / "settings.yaml", tmp_path / "whole", tmp_path / "halves"
    config.write_text(
        "batch: 8\nepochs: 1\ndevice: cpu\nmonitor: {sample: 8}\nviews:\n  size_px: 16\n  chain:\n"
        "  - {name: RandomGamma, log_gamma: 0.4}\n  - {name: RandGaussianNoise, prob: 0.5, std: 0.1}\n"
    )
    processes.setattr(single, "workers", lambda: 0)
    medclr.pretrain(image_store, whole, config=config)
    processes.setattr(single, "workers", lambda: 2)
    words = ["pretrain", "--store", str(image_store), "--out", str(halves), "--config", str(config)]
    stopped(words, Method, "objective", 3)
    assert main(words) == 0
    assert_same_run(halves, whole)
    chain = read_yaml(halves / "config.yaml")["views"]["chain"]
    assert chain[1] == {"name": "RandGaussianNoise", "prob": 0.5, "std": 0.1, "mean": 0.0, "sample_std": True}
    assert (whole / "figures" / "views.png").exists()
    with pytest.raises(MedclrError, match=r"views\.chain"):
        medclr.pretrain(image_store, whole, config=config, settings={"views.chain": [{"name": "RandomGamma"}]})


def test_a_wrong_chain_leaves_no_run(tmp_path: Path, image_store: Path) -> None:
    chain = [{"name": "RandGaussianNoise", "std": "much"}]
    with pytest.raises(MedclrError, match="RandGaussianNoise does not work with these arguments"):
        medclr.pretrain(image_store, tmp_path / "run", settings={"views.chain": chain, "batch": 4, "views.size_px": 16})
    assert not (tmp_path / "run").exists()


def test_one_process_a_core_and_none_for_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert single.workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert single.workers() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert single.workers() == 0
