"""Scans whose numbers mean nothing but more and less become alike in a store, whatever their type and scale."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medclr.data.index import index
from medclr.data.prepare import prepare
from medclr.data.store import Store
from tests.conftest import shared_data


def stored(images: Path, masks: Path | None = None, *, size_px: int) -> Store:
    """The store of a folder of MR scans, beside it."""
    manifest, key = images.parent / "m.csv", images.parent / "key"
    key.touch(mode=0o600)
    key.write_text("00" * 32)
    index([images], manifest, masks=masks, modality="MR", key_file=key)
    prepare(manifest, images.parent / "store", size_px=size_px, keep_blank=True, key_file=key)
    return Store(images.parent / "store")


def normalised(store: Store) -> list[tuple[NDArray[np.float32], NDArray[np.uint16], float]]:
    """Of each scan: slices in [0,1] between its percentiles, their masks, and the upper percentile."""
    scans = []
    for number, scan in enumerate(store.scans):
        rows = np.flatnonzero(store.column("scan") == number)
        unit = np.clip((store.physical(rows) - scan.low) / (scan.high - scan.low), 0, 1)  # [D,S,S]
        scans.append((unit, store.masks(rows), scan.high))
    return scans


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same anatomy with maxima from 112 to 1.7e6, in integers, in real numbers and by scl_slope."""
    folder = tmp_path_factory.mktemp("scaled")
    (folder / "scans").mkdir()
    anatomy = gaussian_filter(np.random.RandomState(0).standard_normal((20, 24, 16)), 2)
    anatomy = (anatomy - anatomy.min()) / np.ptp(anatomy)
    for name, values, slope in (
        ("a", (anatomy * 255).astype(np.uint8), 1),
        ("b", (anatomy * 4095).astype(np.int16), 1),
        ("c", (anatomy * 1.7e6).astype(np.float32), 1),
        ("d", (anatomy * 112).astype(np.float64), 1),
        ("e", (anatomy * 30000).astype(np.uint16), 1.7e6 / 30000),
        ("f", (anatomy * 0.01).astype(np.float32), 1),
    ):
        image = nib.Nifti1Image(values, np.eye(4))
        image.header.set_slope_inter(slope, 0)
        nib.save(image, folder / "scans" / f"{name}.nii.gz")
    return stored(folder / "scans", size_px=24)


def test_one_anatomy_at_any_scale_is_one_picture(scaled: Store) -> None:
    (first, _, high), *others = normalised(scaled)
    highs = [high]
    for unit, _, high in others:
        np.testing.assert_allclose(unit, first, atol=0.01)  # a byte has steps of 0.004
        highs.append(high)
    assert len(others) == 5
    assert max(highs) / min(highs) > 1e8


def test_one_organ_looks_alike_in_a_real_cohort(tmp_path: Path) -> None:
    """Of a cohort with maxima from 112 to 1.7e6, the scans with the lowest and those with the highest."""
    source = shared_data("hippocampus")
    by_maximum = sorted(
        (source / "images").glob("*.nii.gz"), key=lambda path: float(np.max(np.asanyarray(nib.load(path).dataobj)))
    )
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for path in (*by_maximum[:8], *by_maximum[-8:]):
            (tmp_path / kind / path.name).symlink_to(source / kind / path.name)
    scans = normalised(stored(tmp_path / "images", tmp_path / "labels", size_px=64))
    medians = sorted((high, float(np.median(unit[mask > 0]))) for unit, mask, high in scans)
    assert len(medians) == 16
    assert medians[-8][0] / medians[7][0] > 1000
    organ = [median for _, median in medians]  # hippocampus, as a share of its scan's range
    assert abs(np.median(organ[:8]) - np.median(organ[-8:])) < 0.05
    assert np.ptp(organ) < 0.2
