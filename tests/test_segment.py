"""Segmentation: what is learnt from, what comes out, and its scores in millimetres against slow references."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cohort import save_manifest, save_nifti
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from medclr import figures_masks
from medclr.augment.views import plain_view
from medclr.config import EncoderConfig, ViewsConfig
from medclr.data.loader import Batch, load_batch
from medclr.data.prepare import prepare
from medclr.data.store import Store, to_source_grid, verify
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, build_encoder
from medclr.outcomes import Segmented
from medclr.tasks import segment
from medclr.tasks.segment import Config, Model, Task, agreement, on_source
from medclr.trained import export_model, load_model

SHAPE = (30, 24, 12)
SPACING_MM = (1.0, 1.5, 4.0)
VIEWS = ViewsConfig(size_px=32, crop_area=(0.6, 1.0), strength=0.3, noise=0, blur=0, cutout=0)


def a_scan(rng: np.random.Generator, number: int) -> tuple[NDArray, NDArray]:
    """A bright bar (label 1) and, but for number 3, a dark block beside it (label 7) in noise; its last two slices show
    nothing."""
    voxels, mask = rng.normal(100, 6, SHAPE), np.zeros(SHAPE, dtype=np.uint8)
    x, y = rng.integers(4, 9), rng.integers(3, 7)
    mask[x : x + 9, y : y + 8, 2:8] = 1
    if number != 3:
        mask[x + 10 : x + 17, y + 2 : y + 12, 3:9] = 7
    voxels += 80 * (mask == 1) - 60 * (mask == 7)
    voxels[..., -2:] = 100
    return voxels.astype(np.float32), mask


def make_store(folder: Path, spacing_mm: tuple[float, float, float]) -> Store:
    """Seven MR volumes with masks of six patients, one without, and a radiograph without."""
    rng = np.random.default_rng(0)
    scans: list[dict[str, Any]] = []
    for number in range(8):
        voxels, mask = a_scan(rng, number)
        scan = {"path": save_nifti(folder / f"mr{number}.nii.gz", voxels, spacing_mm), "modality": "MR"}
        if number < 7:
            scan["mask"] = save_nifti(folder / "masks" / f"mr{number}.nii.gz", mask, spacing_mm)
        scans.append(scan | {"patient": f"p{min(number, 5)}"})
    Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / "xr.png")
    scans.append({"path": folder / "xr.png", "modality": "XR", "patient": "p9"})
    prepare(save_manifest(folder / "scans.csv", scans), folder / "store", size_px=32)
    return Store(folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The MR have oblong pixels, which are stored as squares: 30 columns become 20."""
    return make_store(tmp_path_factory.mktemp("masks"), SPACING_MM)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same of square pixels: nothing is shrunk."""
    return make_store(tmp_path_factory.mktemp("fine"), (1.5, 1.5, 4.0))


def a_model(task: Task, size_px: int = 32, **settings: Any) -> Model:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(**settings), size_px)
    return Model(task.config, encoder, task.classes)


class Oracle(nn.Module):
    """Says of every slice what it is told to."""

    def __init__(self, task: Task, change: Any = lambda labels: labels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.encoder = build_encoder(EncoderConfig(stem="small"), 32)
        self.task, self.change = task, change

    def infer(self, batch: Batch) -> Tensor:
        labels = torch.from_numpy(self.change(self.task.targets(batch.index.numpy())).astype(np.int64))
        return F.one_hot(labels, len(self.task.classes) + 1).movedim(-1, 1).float()


class Tiny(Encoder):
    """Three maps, in a millisecond."""

    def __init__(self, config: EncoderConfig, size_px: int) -> None:
        super().__init__()
        self.describe(config, size_px, (8, 16, 32))
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((1, 8), (8, 16), (16, 32))
        )

    def pyramid(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for part in self.parts:
            maps.append(part(maps[-1]))
        return maps[1:]


# What is learnt from


def test_a_task_finds_scans_classes_and_strata(store: Store) -> None:
    task = Task(Config(), store)
    assert task.classes == ("1", "7")
    assert [store.scans[i].scan_id for i in task.scans] == [f"scan{n:03d}" for n in range(7)]
    assert task.strata == {**{f"p{n}": "1+7" for n in range(6)}, "p3": "1"}
    assert set(np.unique(task.targets(np.arange(20)))) == {0, 1, 2}
    assert (task.config.labels, task.config.names) == ((1, 7), ("1", "7"))
    named = Task(Config(labels=(7, 1), names=("block", "bar")), store, "mr")
    assert named.classes == ("block", "bar")
    first = slice(0, 10)
    swapped = np.array([0, 2, 1])[task.targets(np.arange(20)[first])]
    np.testing.assert_array_equal(named.targets(np.arange(20)[first]), swapped)


def test_a_budget_without_a_class_is_refused_by_its_name(store: Store) -> None:
    task = Task(Config(labels=(1, 7), names=("bar", "block")), store)
    task.check(task.scans, "the 6 training cases")
    only_three = np.array([i for i in task.scans if store.scans[i].patient_id == "p3"])
    with pytest.raises(MedclrError, match=r"no mask of the 1 training case shows class 'block'; take more"):
        task.check(only_three, "the 1 training case")


@pytest.mark.parametrize(
    ("settings", "modality", "words"),
    [
        ({"labels": (1,)}, None, r"mask of scan scan000 holds label 7, which is not among segment.labels \(1\)"),
        ({"labels": (1, 7, 9)}, None, "no mask shows label 9 of segment.labels; those that occur: 1, 7"),
        ({}, "XR", "no scan of modality XR has a mask; give `medclr index` --masks"),
    ],
)
def test_masks_that_do_not_fit_are_refused(store: Store, settings: Any, modality: str | None, words: str) -> None:
    with pytest.raises(MedclrError, match=words):
        Task(Config(**settings), store, modality)


def test_empty_masks_are_refused(tmp_path: Path) -> None:
    voxels, mask = a_scan(np.random.default_rng(0), 0)
    image, empty = save_nifti(tmp_path / "a.nii", voxels), save_nifti(tmp_path / "masks" / "a.nii", 0 * mask)
    manifest = save_manifest(tmp_path / "a.csv", [{"path": image, "modality": "MR", "mask": empty}])
    prepare(manifest, tmp_path / "store", size_px=32)
    with pytest.raises(MedclrError, match="every mask is empty"):
        Task(Config(), Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0}, r"segment\.width: 0 is below 1"),
        ({"dropout": 1.0}, r"segment\.dropout: 1\.0"),
        ({"empty_slices": -1.0}, r"segment\.empty_slices"),
        ({"labels": (0, 1)}, "0 is the background"),
        ({"labels": (1, 1)}, "different values"),
        ({"labels": (1, 2), "names": ("a", "a")}, "different words"),
        ({"labels": (1, 2), "names": ("a",)}, "name each label"),
        ({"names": ("a",)}, "name each label"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(MedclrError, match=words):
        Config(**settings)


def test_items_are_slices_with_a_class_and_some_without(store: Store) -> None:
    scan = store.column("scan")
    for share, empty in ((0.0, 0), (0.3, 2), (1.0, 3), (5.0, 3)):  # slices 2 to 8 of the 10 stored show a class
        task = Task(Config(empty_slices=share), store)
        items = np.array(task.items(task.scans[:2]))
        shows = (task.targets(items) > 0).any((1, 2))
        assert (np.bincount(scan[items], minlength=2) == 7 + empty).all()
        assert shows.sum() == 14
        assert len(set(items.tolist())) == len(items)
    task = Task(Config(empty_slices=0.15), store)  # one of the three: the middle one
    (chosen,) = set(task.items(task.scans[:1])) - set(np.arange(2, 9).tolist())
    assert chosen == 1


def test_the_loss_is_cross_entropy_and_the_dice_of_the_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (4, 6, 6), generator=generator)
    truth[0] = 0
    logits = torch.randn(4, 3, 6, 6, generator=generator)
    monkeypatch.setattr(segment, "training_views", lambda *_, **__: (torch.zeros(4, 1, 6, 6), truth))

    class Fixed(Oracle):
        training_batch = Model.training_batch

        def forward(self, x: Tensor) -> Tensor:
            return logits + self.weight

    task = Task(Config(), store)
    loss = task.loss(Fixed(task), [0, 1, 2, 3], VIEWS, seed=0, step=0)  # type: ignore[arg-type]
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    entropy, dice = 0.0, []
    for b, r, c in np.ndindex(4, 6, 6):
        entropy -= np.log(p[b, truth[b, r, c], r, c]) / (4 * 6 * 6)
    for k in (1, 2):
        both = sum(p[b, k, r, c] for b, r, c in np.ndindex(4, 6, 6) if truth[b, r, c] == k)
        dice.append(2 * both / (p[:, k].sum() + int((truth == k).sum())))
    assert float(loss.detach()) == pytest.approx(entropy + 1 - np.mean(dice), abs=1e-5)


def test_training_sees_the_square_that_the_model_is_asked_about(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    whole = segment.training_views

    def spy(batch: Batch, *args: Any, **kwargs: Any) -> Any:
        seen.append(batch)
        return whole(batch, *args, **kwargs)

    monkeypatch.setattr(segment, "training_views", spy)
    task = Task(Config(), store)
    assert load_batch(store, [0]).content.tolist() != [[0, 0, 32, 32]]
    task.loss(a_model(task), [0, 1, 2], VIEWS, seed=0, step=0)
    assert seen[0].content.tolist() == [[0, 0, 32, 32]] * 3


@pytest.mark.parametrize("settings", [{"stem": "medium"}, {"slices": 3}, {"name": "efficientnet-lite0"}])
def test_a_step_moves_encoder_and_decoder_and_follows_from_the_seed(store: Store, settings: Any) -> None:
    task = Task(Config(width=8), store)
    items = task.items(task.scans[:1])[:6]
    model = a_model(task, 48, **settings)
    views = replace(VIEWS, size_px=48)

    def loss(seed: int, step: int) -> Tensor:
        return task.loss(model, items, views, seed=seed, step=step)

    first = loss(0, 0)
    first.backward()
    for part in (model.encoder, model.decoder):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in part.parameters())
    assert torch.equal(loss(0, 0), first)
    assert not torch.equal(loss(0, 1), first)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(0, 0)
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(first.detach()), rel=0.05)


# What comes out


@pytest.mark.parametrize(("size_px", "slices"), [(32, 1), (32, 3), (48, 1), (20, 1)])
def test_infer_is_forward_on_plain_views(
    store: Store, monkeypatch: pytest.MonkeyPatch, size_px: int, slices: int
) -> None:
    monkeypatch.setattr(segment, "PIECE", 4)
    task = Task(Config(width=8), store)
    model = a_model(task, size_px, slices=slices).eval()
    batch = load_batch(store, np.arange(10), slices)
    with torch.inference_mode():
        said = model.infer(batch)
        expected = model(plain_view(batch, size_px)).softmax(1)
    assert said.shape == (10, 3, 32, 32)
    np.testing.assert_allclose(said.sum(1), 1, atol=1e-5)
    if size_px == 32:
        np.testing.assert_allclose(said, expected, atol=1e-5)
    else:
        for b, k in ((0, 0), (7, 2)):
            resized = Image.fromarray(expected[b, k].numpy()).resize((32, 32), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(said[b, k], np.asarray(resized), atol=1e-4)


def test_neighbours_change_what_is_said(store: Store) -> None:
    task = Task(Config(width=8), store)
    model = a_model(task, slices=3).eval()
    batch = load_batch(store, [4], slices=3)
    alone = replace(batch, images=batch.images[:, 1:2].expand(-1, 3, -1, -1))
    with torch.inference_mode():
        assert not torch.allclose(model.infer(batch), model.infer(alone))


def test_a_model_is_exported_and_loaded(store: Store, tmp_path: Path) -> None:
    task = Task(Config(labels=(1, 7), names=("bar", "block"), width=8, dropout=0.1), store)
    model = a_model(task).eval()
    export_model(tmp_path / "model", "segment", task.config, model, {"modalities": ["MR"], "patients": ["p0"]})
    loaded = load_model(tmp_path)
    batch = load_batch(store, [3, 4])
    assert loaded.model.classes == ("bar", "block")
    with torch.inference_mode():
        assert torch.equal(loaded.model.infer(batch), model.infer(batch))


# Scores


def slow_scores(predicted: NDArray, truth: NDArray, spacing: tuple[float, ...], k: int) -> tuple[float, float]:
    """Dice and 95 % Hausdorff distance of one class that both have: voxel by voxel, by scipy's distance transform."""
    p, t = predicted == k, truth == k

    def surface(mask: NDArray) -> NDArray:
        edge = np.zeros_like(mask)
        for at in np.argwhere(mask):
            for axis in range(mask.ndim):
                for way in (-1, 1):
                    other = at.copy()
                    other[axis] += way
                    edge[tuple(at)] |= not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]
        return edge

    a, b = surface(p), surface(t)
    there = distance_transform_edt(~b, sampling=spacing)[a]
    back = distance_transform_edt(~a, sampling=spacing)[b]
    return 2 * (p & t).sum() / (p.sum() + t.sum()), max(np.percentile(there, 95), np.percentile(back, 95))


@pytest.mark.parametrize("shape", [(14, 11, 9), (25, 31)])
def test_scores_against_a_slow_reference(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    spacing = (0.7, 2.5, 1.2)[: len(shape)]
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    for _ in range(6):
        coarse = torch.rand(2, 3, *(4 for _ in shape), generator=generator)
        truth, predicted = F.interpolate(coarse, shape, mode=mode).argmax(1).numpy().astype(np.uint16)
        dice, hd95 = agreement(predicted, truth, spacing, 2)
        for k in (1, 2):
            expected = slow_scores(predicted, truth, spacing, k)
            assert (dice[k - 1], hd95[k - 1]) == pytest.approx(expected, rel=1e-5)


def test_distances_by_hand_in_millimetres() -> None:
    empty = np.zeros((9, 9, 9), dtype=np.uint16)
    spacing = (3.0, 0.5, 2.0)
    cube = empty.copy()
    cube[2:6, 2:6, 2:6] = 1
    for axis, mm in enumerate(spacing):
        dice, hd95 = agreement(np.roll(cube, 1, axis), cube, spacing, 1)
        assert (dice[0], hd95[0]) == pytest.approx((0.75, mm))
    points = empty.copy(), empty.copy()
    points[0][1, 2, 3] = points[1][5, 2, 6] = 1  # 12 mm and 6 mm apart
    dice, hd95 = agreement(*points, spacing, 1)
    assert (dice[0], hd95[0]) == pytest.approx((0, np.hypot(12, 6)))
    assert np.concatenate(agreement(cube, cube, spacing, 1)) == pytest.approx([1, 0])


def test_absent_classes_follow_the_conventions() -> None:
    truth = np.zeros((4, 5, 6), dtype=np.uint16)
    truth[1, 1:3, 2:4] = 2
    predicted = np.zeros_like(truth)
    predicted[0, 0, 0] = 3
    dice, hd95 = agreement(predicted, truth, (2.0, 1.0, 0.5), 3)
    diagonal = np.sqrt(8**2 + 5**2 + 3**2)
    np.testing.assert_allclose(dice, [np.nan, 0, 0])
    np.testing.assert_allclose(hd95, [np.nan, diagonal, diagonal])


def test_perfect_predictions_and_a_shift_by_a_slice(fine: Store) -> None:
    task = Task(Config(), fine)
    judged = task.judge(Oracle(task), task.scans)  # type: ignore[arg-type]
    assert (judged.kind, judged.classes) == ("segmented", ("1", "7"))
    assert list(judged.patient_id) == ["p0", "p1", "p2", "p3", "p4", "p5", "p5"]
    assert np.isnan(judged.dice[3, 1])
    assert np.nanmin(judged.dice) == 1
    assert np.nanmax(judged.hd95_mm) == 0
    one = task.scans[:1]
    along = task.judge(Oracle(task, lambda labels: np.roll(labels, 1, 0)), one)  # type: ignore[arg-type]
    np.testing.assert_allclose(along.hd95_mm, SPACING_MM[2])
    np.testing.assert_allclose(along.dice, 5 / 6)  # six slices, five of them in common


DISCS = {3: 6, 9: 3}
"""Label -> radius in voxels of 64 x 64, of which 16 x 16 are stored."""


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[NDArray]]:
    """Two discs on four of six slices, one slice blank, with the axes of the file in several orders; an image of one
    slice; and a volume in which label 9 is a single voxel that no stored pixel falls upon. And their mask files."""
    folder, rng = tmp_path_factory.mktemp("discs"), np.random.default_rng(1)
    x, y = np.mgrid[:64, :64]
    scans, masks = [], []
    for number, (axes, depth) in enumerate((("RAS", 6), ("LPI", 6), ("SLA", 6), ("AIR", 6), ("RAS", 1), ("RAS", 6))):
        mask = np.zeros((64, 64, depth), dtype=np.uint8)
        for label, radius in DISCS.items():
            cx, cy = rng.uniform(12, 24) + 28 * (label == 9), rng.uniform(12, 52)
            mask[(x - cx) ** 2 + (y - cy) ** 2 < radius**2, : 4 if depth > 1 else 1] = label
        if number == 5:
            mask[mask == 9] = 0
            mask[40, 8, 2] = 9
        voxels = (rng.normal(100, 6, mask.shape) + 50 * (mask > 0)).astype(np.float32)
        if depth > 1:
            voxels[..., -1] = 100
        scan: dict[str, Any] = {"modality": "MR", "patient": f"p{number}"}
        for kind, values in (("path", voxels), ("mask", mask)):
            image = nib.Nifti1Image(values, np.diag([1.5, 1.5, 4.0, 1.0]))
            turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
            scan[kind] = folder / kind / f"d{number}.nii.gz"
            scan[kind].parent.mkdir(exist_ok=True)
            nib.save(turned, scan[kind])
        scans.append(scan)
        masks.append(np.asarray(nib.load(scan["mask"]).dataobj))
    prepare(save_manifest(folder / "discs.csv", scans), folder / "store", size_px=16)
    return Store(folder / "store"), masks


def test_the_truth_is_the_mask_of_the_file(discs: tuple[Store, list[NDArray]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is perfect on the stored grid is as far from the file as the grid is."""
    store, masks = discs
    assert len({(scan.source_axes, scan.source_flips) for scan in store.scans}) == 4
    assert [len(scan.blank) for scan in store.scans] == [1, 1, 1, 1, 0, 1]
    task = Task(Config(labels=(9, 3), names=("small", "large")), store)
    judged = task.judge(Oracle(task), task.scans)  # type: ignore[arg-type]
    slices = store.column("scan")
    for i, (scan, mask) in enumerate(zip(store.scans, masks, strict=True)):
        said = to_source_grid(store.masks(np.flatnonzero(slices == i)), scan)  # as predict writes it
        spacing = tuple(scan.spacing_mm[axis] for axis in np.argsort(scan.source_axes))
        if scan.depth == 1:
            said, mask, spacing = said[..., 0], mask[..., 0], spacing[:2]
        for k, label in enumerate((9, 3)):
            if (i, label) == (5, 9):  # nothing of it is stored, but it is there
                expected = 0.0, float(np.linalg.norm([96, 96, 24]))
            else:
                expected = slow_scores(said, mask, spacing, label)
                assert 0.5 < expected[0] < 0.95
            assert (judged.dice[i, k], judged.hd95_mm[i, k]) == pytest.approx(expected, rel=1e-5)

    class_of = np.array([0, 0, 0, 2, 0, 0, 0, 0, 0, 1], dtype=np.uint16)
    files = iter(masks)
    monkeypatch.setattr(segment, "to_source_grid", lambda *_: class_of[next(files)])
    ideal = task.judge(Oracle(task), task.scans)  # type: ignore[arg-type]
    assert (ideal.dice == 1).all()
    assert (ideal.hd95_mm == 0).all()


def test_a_label_that_shrinking_removes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, scans = np.random.default_rng(0), []
    for number in range(3):
        mask = np.zeros((64, 64, 4), dtype=np.uint8)
        mask[8:40, 8:40] = 7
        mask[mask == 0] = 7 * (number == 1)  # one without a background
        mask[50, 50, 1 + number % 2] = 2 if number else 0  # a voxel that no stored pixel falls upon
        voxels = rng.normal(100, 6, mask.shape).astype(np.float32)
        files = {kind: save_nifti(tmp_path / kind / "v" / f"{number}.nii", values)
                 for kind, values in (("path", voxels), ("mask", mask))}  # fmt: skip
        scans.append(files | {"modality": "MR", "patient": f"p{number}"})
    manifest = save_manifest(tmp_path / "scans.csv", scans)
    for size_px, lost in ((64, False), (16, True)):
        prepare(manifest, tmp_path / f"{size_px}", size_px=size_px)
        store = Store(tmp_path / f"{size_px}")
        capsys.readouterr()
        assert Task(Config(), store).classes == (("7",) if lost else ("2", "7"))
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(told) == lost
        if lost:
            assert f"label 2 (in the mask of scan {store.scans[1].scan_id}) is too small for slices of 16 px" in told[0]


def test_what_is_not_shrunk_needs_no_second_mask(fine: Store, store: Store) -> None:
    assert not list(fine.path.glob("truth*"))
    assert len(list(store.path.glob("truth*"))) == len(store.info.shard_slices) == 2
    for some in (fine, store):
        for number in range(8):
            path = some.path.parent / "masks" / f"mr{number}.nii.gz"
            mask = np.asarray(nib.load(path).dataobj) if number < 7 else np.zeros(SHAPE)
            np.testing.assert_array_equal(some.source_mask(number), mask)
        assert some.source_mask(8).shape == some.scans[8].source_shape


def test_a_store_that_kept_no_masks_of_the_files_is_refused_at_once(store: Store, tmp_path: Path) -> None:
    """As medclr made them before it judged against the files: everything else goes on with it."""
    for path in store.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    info = json.loads((tmp_path / "store.json").read_text())
    for name in [name for name in info["files"] if name.startswith("truth")]:
        del info["files"][name]
        (tmp_path / name).unlink()
    (tmp_path / "store.json").write_text(json.dumps(info))
    old = Store(tmp_path)
    assert verify(tmp_path)
    np.testing.assert_array_equal(old.masks(range(20)), store.masks(range(20)))
    words = "its masks are coarser than those of the files, which the medclr that made it did not keep, .* delete the"
    with pytest.raises(MedclrError, match=words):
        Task(Config(), old)
    with pytest.raises(MedclrError, match=words):
        old.source_mask(0)
    assert not old.source_mask(7).any(), "it has no mask"


def test_source_axes_go_with_their_spacing(store: Store) -> None:
    """Of a scan (D,H,W) of 12 x 24 x 30 voxels whose file has the axes (W,H,D), and of one that has (H,D,W)."""
    scan = store.scans[0]
    labels = np.arange(10 * 32 * 32).reshape(10, 32, 32).astype(np.uint16)
    volume, spacing = on_source(labels, scan)
    assert (volume.shape, spacing) == (SHAPE, SPACING_MM)
    assert (scan.depth, scan.height, scan.width) == (12, 24, 30)
    turned = replace(scan, source_axes=(1, 0, 2), source_shape=(24, 12, 30))
    assert [len(axis) for axis in on_source(labels, turned)] == [24, 3]
    assert on_source(labels, turned)[1] == (1.5, 4.0, 1.0)
    image = replace(scan, depth=1, blank=(), source_axes=(2, 1, 0), source_shape=(30, 24, 1))
    flat, spacing = on_source(labels[:1], image)
    assert (flat.shape, spacing) == ((30, 24), (1.0, 1.5))


def test_it_learns(store: Store) -> None:
    task = Task(Config(width=8), store)
    torch.manual_seed(0)
    model = Model(task.config, Tiny(EncoderConfig(), 32), task.classes)
    cases = task.scans[:3]
    items = np.array(task.items(cases))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    rng = np.random.default_rng(0)
    for step in range(100):
        chosen = rng.choice(items, 12, replace=False).tolist()
        loss = task.loss(model, chosen, VIEWS, seed=0, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    judged = task.judge(model, task.scans[4:])  # which it never saw
    assert judged.score("mean Dice") > 0.9
    assert judged.score("mean HD95 mm") < 4


# Pictures


def test_overlays_show_the_best_the_median_and_the_worst(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(Config(), store)
    scans = [store.scans[i] for i in task.scans]
    values = np.array([[0.9, 0.8], [0.1, 0.3], [0.5, 0.5], [0.7, np.nan], [np.nan, np.nan], [0.2, 0.2], [0.4, 0.4]])
    outcome = Segmented([s.scan_id for s in scans], [s.patient_id for s in scans], task.classes, values, values)
    task.draw(Oracle(task), outcome, tmp_path)  # type: ignore[arg-type]
    with Image.open(tmp_path / "overlays.png") as picture:
        assert picture.width > 800
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for k in range(2):  # the lines are drawn in full colour
        wanted = [int(figures_masks.COLOURS[k][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(colours - wanted).max(1) < 8).sum() > 100

    drawn: list[figures_masks.Overlaid] = []
    monkeypatch.setattr(figures_masks, "overlays", lambda path, rows, *_: drawn.extend(rows))
    task.draw(Oracle(task), outcome, tmp_path)  # type: ignore[arg-type]
    captions = [row.caption.split("\n") for row in drawn]
    assert captions == [
        ["best of 5: Dice 0.850", "p0"],
        ["median of 5: Dice 0.500", "p2"],
        ["worst of 5: Dice 0.200", "p1"],
    ]
    for row in drawn:
        assert row.images.shape == row.truth.shape == (3, *row.predicted.shape[1:])
        np.testing.assert_array_equal(row.truth, row.predicted)
        assert (row.truth > 0).any((1, 2)).all()
    assert list(drawn[0].titles) == ["slice 4 of 12", "slice 6 of 12", "slice 8 of 12"]

    drawn.clear()
    alone = Segmented(["scan003"], ["p3"], task.classes, values[3:4], values[3:4])
    task.draw(Oracle(task), alone, tmp_path)  # type: ignore[arg-type]
    assert [row.caption for row in drawn] == ["best of 1: Dice 0.700\np3"]
    drawn.clear()
    unknown = replace(alone, dice=values[4:5])
    task.draw(Oracle(task), unknown, tmp_path)  # type: ignore[arg-type]
    assert drawn == []
