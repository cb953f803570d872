"""Copies: every one that is planted is found, nothing else is, and what is kept does not depend on luck."""

import csv
import hashlib
import io
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

import medclr
from medclr.augment.views import plain_view
from medclr.data import copies as module
from medclr.data.copies import COARSE, _choices, exact_copies, find_copies, hash_slices, near_copies, near_pairs
from medclr.data.leave_out import left_out
from medclr.data.loader import load_batch
from medclr.data.shown import shown
from medclr.data.store import Store
from medclr.errors import MedclrError
from tests.cohort import mixed_cohort, save_manifest, save_nifti
from tests.conftest import shared_data


def picture(rng: np.random.Generator, side: int = 128) -> NDArray[np.uint8]:
    """[side,side] with detail at every scale, as scans have."""
    scales = [gaussian_filter(rng.normal(size=(side, side)), sigma) * sigma for sigma in (2, 5, 12, 30)]
    values = sum(scales) / np.std(sum(scales))
    return (128 + 45 * values).clip(0, 255).astype(np.uint8)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


CHANGES = {
    "strong compression": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
    "another grey curve": lambda image: image.point([round(255 * (v / 255) ** 0.7) for v in range(256)]),
    "a rim cut off": lambda image: image.crop((1, 1, 127, 127)),
}


def store_of(folder: Path, images: dict[str, Image.Image], size_px: int = 64, **facts: dict[str, str]) -> Path:
    """A store of radiographs, a patient each unless ``patient`` says otherwise; facts are name -> column -> value."""
    folder.mkdir(exist_ok=True)
    scans = []
    for name, image in images.items():
        image.save(folder / f"{name}.png")
        own = {column: values[name] for column, values in facts.items() if name in values}
        scans.append({"path": folder / f"{name}.png", "modality": "XR", "patient": name, **own})
    medclr.prepare(save_manifest(folder / "some.csv", scans), folder / "store", size_px=size_px)
    return folder / "store"


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


# Hashes


def test_slices_are_shown_as_evaluation_sees_them(tmp_path):
    medclr.prepare(mixed_cohort(tmp_path), tmp_path / "store", size_px=24)
    store = Store(tmp_path / "store")
    indices = np.random.default_rng(0).permutation(len(store))
    seen = plain_view(load_batch(store, indices), 24)[:, 0].numpy()
    np.testing.assert_allclose(shown(store, indices), seen, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (35, 51), (17, 200)])
def test_the_hash_is_that_of_an_independent_cosine_transform(shape):
    picture = np.random.default_rng(1).random(shape).astype(np.float32)
    coarse, fine = module.perceptual_hashes(picture[None])
    waves = dctn(picture.astype(np.float64), type=2)
    for k, found in ((8, coarse[:, None]), (16, fine)):
        lowest = waves[1 : k + 1, 1 : k + 1]
        expected = np.packbits(lowest > np.median(lowest))
        assert np.bitwise_count(found.view(np.uint8)[0] ^ expected).sum() <= 2  # float32 at the median


# Search, against brute force


def family(rng: np.random.Generator, n: int, spread: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes [n] and [n,4] in clusters: each is one of few with up to ``spread`` bits flipped."""
    bits = rng.integers(0, 2, (max(n // 12, 1), 320), dtype=np.uint8)[rng.integers(0, max(n // 12, 1), n)]
    for row in bits:
        row[rng.integers(0, 320, rng.integers(0, spread + 1))] ^= 1
    words = np.packbits(bits, axis=1).view(np.uint64)  # [n,5]
    return words[:, 0].copy(), words[:, 1:].copy()


def brute_pairs(coarse, fine, unit, distance, first=0):
    pairs = []
    for j in range(first, len(coarse)):
        for i in range(first or j):
            apart = sum(int(a ^ b).bit_count() for a, b in zip(fine[i], fine[j], strict=True))
            if unit[i] != unit[j] and int(coarse[i] ^ coarse[j]).bit_count() <= COARSE and apart <= distance:
                pairs.append((j, apart, i))
    return [(i, j) for j, _, i in sorted(pairs)]


@pytest.mark.parametrize("distance", [0, 9, 32])
@pytest.mark.parametrize("first", [0, 150])
def test_all_pairs_are_found_and_each_once(distance, first):
    rng = np.random.default_rng(distance)
    coarse, fine = family(rng, 300, 30)
    unit = rng.integers(0, 60, 300)
    expected = brute_pairs(coarse, fine, unit, distance, first)
    i, j = near_pairs(coarse, fine, unit, distance, first, most=10**6)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert distance == 0 or len(expected) > 20


def test_any_six_flipped_bits_leave_some_choice_of_bands_whole():
    rng = np.random.default_rng(2)
    flips = np.array([sum(1 << int(b) for b in rng.choice(64, COARSE, replace=False)) for _ in range(3000)], np.uint64)
    assert np.any([(flips & mask) == 0 for mask, _ in _choices()], axis=0).all()


def greedy(coarse, fine, unit, distance):
    """The definition: slice by slice, left out if near a slice that is kept; of these the nearest, then the first."""
    instead = []
    near = defaultdict(list)
    for i, j in brute_pairs(coarse, fine, unit, distance):
        near[j].append(i)  # the nearest first
    for j in range(len(coarse)):
        instead.append(next((i for i in near[j] if instead[i] < 0), -1))
    return instead


def test_a_slice_is_left_out_exactly_if_it_is_near_a_kept_one_however_little_fits():
    rng = np.random.default_rng(3)
    coarse, fine = family(rng, 240, 24)
    unit = rng.integers(0, 50, 240)
    expected = np.array(greedy(coarse, fine, unit, 32))
    assert near_copies(coarse, fine, unit, 32).tolist() == expected.tolist()
    for most in (200, 3):
        found = near_copies(coarse, fine, unit, 32, most)
        out = found >= 0
        assert (out == (expected >= 0)).all()
        assert (found[found[out]] < 0).all(), "what is kept instead is kept"
        assert (np.bitwise_count(fine[out] ^ fine[found[out]]).sum(1) <= 32).all()


def test_a_crowd_of_equal_pictures_needs_no_list_of_all_pairs():
    n = 3000
    found = near_copies(np.zeros(n, np.uint64), np.zeros((n, 4), np.uint64), np.arange(n), 32, most=10_000)
    assert found.tolist() == [-1] + [0] * (n - 1)


def test_the_first_of_equal_bytes_is_kept_and_a_unit_is_not_compared():
    digests = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [3, 4], [1, 3]], np.uint64)
    assert exact_copies(digests, np.array([0, 0, 0, 1, 2, 3])).tolist() == [-1, -1, -1, 0, 1, -1]


# Stores


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """40 pictures, and four of them again in each way of changing them, of other patients."""
    rng = np.random.default_rng(4)
    images = {f"p{i:02d}": Image.fromarray(picture(rng)) for i in range(40)}
    for way, change in CHANGES.items():
        images |= {f"q {way} {i}": change(images[f"p{i:02d}"]) for i in range(4)}
    images |= {f"q the same {i}": images[f"p{i:02d}"] for i in range(4)}
    return store_of(tmp_path_factory.mktemp("changed"), images)


def test_changed_copies_are_found_and_nothing_else(changed):
    summary = medclr.dedup(changed)
    found = {row["patient_id"]: (row["kept_patient_id"], row["kind"]) for row in rows_of(summary.table)}
    expected = {f"q {way} {i}": (f"p{i:02d}", "near") for way in CHANGES for i in range(4)}
    expected |= {f"q the same {i}": (f"p{i:02d}", "exact") for i in range(4)}
    assert found == expected
    assert (summary.slices, summary.exact, summary.near, summary.across_patients) == (60, 4, 16, 20)
    assert "ANOTHER PATIENT" in str(summary)
    assert "ANOTHER SPLIT" not in str(summary)


def test_the_distance_decides(changed, tmp_path):
    summary = medclr.dedup(changed, out=tmp_path / "equal.csv", distance=0)
    near = [int(row["distance"]) for row in rows_of(summary.table) if row["kind"] == "near"]
    assert len(near) < 16
    assert set(near) <= {0}
    wide = [int(row["distance"]) for row in rows_of(medclr.dedup(changed, out=tmp_path / "wide.csv").table)]
    assert max(wide) > 0


def test_the_same_store_gives_the_same_bytes_and_a_page_that_asks_for_nothing(changed, tmp_path):
    first, second = (medclr.dedup(changed, out=tmp_path / name) for name in ("a.csv", "b.csv"))
    assert first.table.read_bytes() == second.table.read_bytes()
    assert first.page.read_bytes() == second.page.read_bytes()
    html = first.page.read_text()
    assert str(changed.parent) not in html
    assert "<script" not in html
    assert "http" not in html
    assert html.count("<img") == 3


def test_the_table_is_what_pretraining_leaves_out(changed):
    table = medclr.dedup(changed).table
    store = Store(changed)
    slices = left_out(store, table)
    assert slices.tolist() == sorted(int(row["slice"]) for row in rows_of(table))
    assert {store.scans[i].patient_id[0] for i in slices} == {"q"}


def test_what_is_tested_is_kept_before_what_is_trained_on(tmp_path):
    rng = np.random.default_rng(5)
    images = {name: Image.fromarray(picture(rng)) for name in "acx"}
    images |= {"b": images["a"], "d": images["c"], "y": jpeg(images["x"], 50)}
    split = {"a": "train", "b": "test", "c": "train", "d": "train", "x": "train", "y": "test"}
    summary = medclr.dedup(store_of(tmp_path / "s", images, split=split, label={"d": "sick"}))
    assert [(row["patient_id"], row["kept_patient_id"]) for row in rows_of(summary.table)] == [
        ("a", "b"), ("c", "d"), ("x", "y"),
    ]  # fmt: skip
    assert summary.across_splits == 2
    assert "ANOTHER SPLIT" in str(summary)


def test_neighbours_in_a_scan_and_series_of_a_study_are_compared_only_when_asked(tmp_path):
    rng = np.random.default_rng(6)
    slab = np.stack([gaussian_filter(rng.normal(size=(60, 60)), 2) for _ in range(2)])
    thick = np.stack([slab[0], slab[0] * 1.01, slab[1]], axis=2).astype(np.float32)  # [60,60,3]: two neighbours alike
    paths = [save_nifti(tmp_path / f"{i}.nii.gz", volume) for i, volume in enumerate((thick, thick**3, thick**3))]
    scans = [{"path": path, "modality": "MR", "patient": "p"} for path in paths]
    medclr.prepare(save_manifest(tmp_path / "three.csv", scans), tmp_path / "store", size_px=60)
    store = Store(tmp_path / "store")
    assert len(store) == 9
    hashes = hash_slices(store)

    def copies(within=False):
        found = find_copies(store, hashes, within=within)
        return list(zip(found.slices.tolist(), found.kept.tolist(), found.exact.tolist(), strict=True))

    exact = [(6, 3, True), (7, 4, True), (8, 5, True)]
    assert (1, 0) not in [pair[:2] for pair in copies()]
    assert (1, 0, False) in copies(within=True)
    store.__dict__["scans"] = [replace(scan, study_id="one") for scan in store.scans]
    assert copies() == exact, "the third series repeats the second, byte for byte; the first only looks alike"
    store.__dict__["scans"] = [replace(scan, study_id=f"study {i}") for i, scan in enumerate(store.scans)]
    assert len(copies()) >= len(exact)


def test_flat_slices_are_compared_byte_for_byte_only(tmp_path):
    image = Image.fromarray(picture(np.random.default_rng(7)))
    store = Store(store_of(tmp_path / "s", {"p": image, "q": image, "r": jpeg(image, 80)}))
    hashes = hash_slices(store)
    assert find_copies(store, hashes).slices.tolist() == [1, 2]
    found = find_copies(store, replace(hashes, flat=np.array([True] * 3)))
    assert (found.slices.tolist(), found.exact.tolist()) == ([1], [True])


@pytest.mark.parametrize(("spread", "flat"), [(0.004, True), (0.02, False)])
def test_a_picture_is_flat_if_its_greys_hardly_differ(tmp_path, monkeypatch, spread, flat):
    image = Image.fromarray(picture(np.random.default_rng(8)))
    store = Store(store_of(tmp_path / "s", {"p": image}))
    pictures = np.random.default_rng(9).normal(0.5, spread, (1, 64, 64)).astype(np.float32)
    monkeypatch.setattr(module, "shown", lambda *_: pictures)
    assert hash_slices(store).flat.tolist() == [flat]


def test_an_interruption_leaves_nothing(changed, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "perceptual_hashes", stopped)
    with pytest.raises(KeyboardInterrupt):
        medclr.dedup(changed, out=tmp_path / "never.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"), [({"distance": 65}, "--distance 65"), ({"out": Path("copies.txt")}, "ends in .csv")]
)
def test_what_cannot_work_is_one_sentence(changed, options, sentence):
    with pytest.raises(MedclrError, match=sentence):
        medclr.dedup(changed, **options)


@pytest.mark.slow
def test_real_radiographs_have_the_copies_that_their_bytes_and_their_pixels_say(tmp_path):
    folder = shared_data("cxr_pediatric")
    medclr.index([folder], tmp_path / "cxr.csv", labels=folder / "labels.csv", modality="XR", key_file=tmp_path / "key")
    medclr.prepare(tmp_path / "cxr.csv", tmp_path / "cxr", size_px=96, key_file=tmp_path / "key")
    summary = medclr.dedup(tmp_path / "cxr")
    of_files, of_pixels = defaultdict(list), defaultdict(list)
    for path in sorted((folder / "images").iterdir()):
        of_files[hashlib.sha256(path.read_bytes()).digest()].append(path)
        pixels = np.asarray(Image.open(path))
        of_pixels[hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()].append(path)
    copies = sum(len(paths) - 1 for paths in of_files.values())
    assert summary.exact == copies == sum(len(paths) - 1 for paths in of_pixels.values())
    sha = {scan.scan_id: scan.sha256 for scan in Store(tmp_path / "cxr").scans}
    for row in rows_of(summary.table):
        assert sha[row["scan_id"]] == sha[row["kept_scan_id"]]
    assert summary.near == 0
