"""From scans to the slice store: exact values, true geometry, the same bytes however it was interrupted."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from cohort import mixed_cohort, save_manifest, save_nifti
from conftest import shared_data
from numpy.typing import NDArray
from pydicom import dcmread

import medclr.data.encode as encoding
import medclr.data.prepare as preparing
import medclr.data.shard as sharding
from medclr.data.encode import blank_slices, encode, encode_mask, encoding_of
from medclr.data.index import index
from medclr.data.manifest import SourceFiles, read_manifest
from medclr.data.prepare import plan, prepare
from medclr.data.shard import Shard
from medclr.data.store import Store, to_source_grid, verify
from medclr.errors import MedclrError, ScanError
from medclr.scans.scan import Scan


def scan_of(voxels: NDArray, spacing_mm: tuple[float, float, float] = (1, 1, 1), modality: str = "MR") -> Scan:
    return Scan(voxels.astype(np.float32), np.diag([*spacing_mm, 1.0]), spacing_mm, modality, voxels.shape)


def squares_of(scan: Scan, size_px: int) -> NDArray[np.float64]:
    """[D,S,S], physical values after storing."""
    e = encoding_of(scan, size_px)
    return np.concatenate([e.offset + e.scale * squares.astype(float) for squares in encode(scan.voxels, e, size_px)])


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """One scan each."""
    monkeypatch.setattr(preparing, "SHARDS", 1000)
    monkeypatch.setattr(preparing, "SHARD_SLICES", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is stored


def test_ct_keeps_every_hounsfield_unit_and_returns_to_its_voxels(tmp_path):
    rng = np.random.default_rng(0)
    hu = rng.integers(-2048, 30000, (31, 40, 9), dtype=np.int16)  # [X,Y,Z]
    mask = rng.integers(0, 118, hu.shape, dtype=np.uint8)
    ct = {"path": save_nifti(tmp_path / "ct.nii.gz", hu, (0.8, 0.8, 5)), "modality": "CT"}
    ct["mask"] = save_nifti(tmp_path / "mask.nii.gz", mask, (0.8, 0.8, 5))
    prepare(save_manifest(tmp_path / "ct.csv", [ct]), tmp_path / "store", size_px=48)
    store = Store(tmp_path / "store")
    (scan,) = store.scans
    squares = store.physical(range(len(store)))
    assert (scan.scale, scan.content_height, scan.content_width) == (1, 40, 31)
    np.testing.assert_array_equal(to_source_grid(squares, scan), hu)
    np.testing.assert_array_equal(to_source_grid(store.masks(range(len(store))), scan), mask)
    assert (squares[:, 0] == -1024).all(), "padded with air"
    assert np.count_nonzero(squares != -1024) <= hu.size


def test_what_only_the_voxels_tell_is_kept_beside_what_the_header_told(tmp_path):
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    values[1, 1, 1] = np.nan
    save_nifti(tmp_path / "scans" / "a.nii", np.stack([values, values + 1], axis=-1), (1, 1, 1))
    index([tmp_path / "scans"], tmp_path / "a.csv", modality="MR", key_file=tmp_path / "key")
    prepare(tmp_path / "a.csv", tmp_path / "store", size_px=8, key_file=tmp_path / "key")
    notes = {scan.irregular for scan in Store(tmp_path / "store").scans}
    assert notes == {"one of 2 volumes of its file; 1 of its 24 voxels are NaN, taken as air"}


def triangle(line: NDArray, n: int) -> NDArray:
    """Shrink the last axis: the antialiased bilinear filter, in float64 and by its definition."""
    ratio = line.shape[-1] / n
    distance = (np.arange(line.shape[-1]) + 0.5)[:, None] - (np.arange(n) + 0.5) * ratio  # [n_old, n]
    weights = np.maximum(1 - np.abs(distance) / ratio, 0)
    return line.astype(np.float64) @ (weights / weights.sum(0))


@pytest.mark.parametrize(("modality", "tolerance"), [("CT", 0.501), ("MR", 0.04)])
def test_shrinking_equals_a_slow_reference(modality, tolerance):
    hu = np.random.default_rng(1).integers(-1000, 1500, (3, 100, 70))
    stored = squares_of(scan_of(hu, modality=modality), 41)
    reference = np.swapaxes(triangle(np.swapaxes(triangle(hu, 29), 1, 2), 41), 1, 2)
    content = stored[:, :, 6:35]
    assert np.abs(content - reference).max() < tolerance
    if modality == "CT":
        np.testing.assert_array_equal(stored, np.rint(stored))  # whole Hounsfield units


def test_aspect_is_kept_in_millimetres_and_nothing_is_enlarged():
    y, x = np.meshgrid((np.arange(60) + 0.5) * 2.0, (np.arange(100) + 0.5) * 1.2, indexing="ij")
    disc = ((y - 60) ** 2 + (x - 60) ** 2 < 40**2) * 100.0  # a disc of 80 mm, on voxels of 2.0 x 1.2 mm
    for size_px, pixel_mm in ((64, 2.0), (30, 4.0), (200, 2.0)):
        (square,) = squares_of(scan_of(disc[None], (1, 2.0, 1.2)), size_px)
        inside = square > 50
        height, width = np.ptp(np.flatnonzero(inside.any(1))) + 1, np.ptp(np.flatnonzero(inside.any(0))) + 1
        assert abs(height - width) <= 1
        assert abs(height * pixel_mm - 80) <= pixel_mm
        rows, columns = np.nonzero(inside)
        assert abs(rows.mean() - (size_px - 1) / 2) <= 0.5
        assert abs(columns.mean() - (size_px - 1) / 2) <= 0.5


def test_masks_stay_on_the_image():
    """An image that is its own mask, shrunk both ways: the nearest-neighbour edge is where values cross a half."""
    yy, xx = np.mgrid[:157, :203]
    mask = (((yy - 40) ** 2 + (xx - 130) ** 2) < 30**2).astype(np.uint16)[None]
    scan = scan_of(mask * 1000, (1, 0.9, 0.7))
    (image,) = squares_of(scan, 64)
    (labels,) = encode_mask(mask, encoding_of(scan, 64), 64)
    assert set(np.unique(labels)) == {0, 1}
    weights = image / image.sum()
    grid = np.mgrid[:64, :64]
    shift = (grid * weights).sum((1, 2)) - (grid * (labels / labels.sum())).sum((1, 2))
    assert np.abs(shift).max() < 0.1
    assert np.mean((image > 500) != (labels == 1)) < 0.01


@pytest.mark.parametrize(
    "voxels",
    [
        np.random.default_rng(0).gamma(1, 1e5, (2, 8, 8)),  # fractions
        np.random.default_rng(0).integers(0, 1_700_000, (2, 8, 8)),  # too many whole numbers
        np.random.default_rng(0).normal(0, 1e-6, (2, 8, 8)),
        np.random.default_rng(0).integers(3_000_000, 3_000_100, (2, 8, 8)),
    ],
)
def test_wide_ranges_err_by_half_a_step_at_most(voxels):
    scan = scan_of(voxels)
    scale = encoding_of(scan, 8).scale
    assert scale <= max((max(voxels.max(), 0) - min(voxels.min(), 0)) / 65535 * 1.000001, 0)
    np.testing.assert_allclose(squares_of(scan, 8), scan.voxels, atol=scale * 0.51, rtol=0)


def test_whole_numbers_are_exact_and_air_is_in_range():
    voxels = np.random.default_rng(0).integers(40, 255, (2, 5, 9))
    squares = squares_of(scan_of(voxels, modality="XR"), 9)
    np.testing.assert_array_equal(squares[:, 2:7], voxels)
    assert (squares[:, :2] == 0).all()
    assert (squares[:, 7:] == 0).all()


def test_percentiles_of_a_sample_agree_with_those_of_all(monkeypatch):
    """A pattern along each row, which every k-th voxel would miss if k divided the row."""
    voxels = np.random.default_rng(0).normal(0, 1, (8, 256, 256)) + 100 * (np.arange(256) % 64 == 5)
    monkeypatch.setattr(encoding, "PERCENTILE_VOXELS", 2**15)
    e = encoding_of(scan_of(voxels), 256)
    ranks = [(voxels < e.low).mean(), (voxels < e.high).mean()]
    assert ranks == pytest.approx([0.005, 0.995], abs=0.0015)


def test_nearly_empty_scans_still_have_a_range_and_empty_ones_are_refused():
    voxels = np.zeros((2, 50, 50))
    voxels[0, 3, 3] = 7
    e = encoding_of(scan_of(voxels), 64)
    assert (e.low, e.high) == (0, 7)
    with pytest.raises(ScanError, match="every voxel is 5"):
        encoding_of(scan_of(np.full((2, 5, 5), 5)), 64)


# Slices that show nothing


def empty_slices(modality: str) -> NDArray[np.float64]:
    """[3,64,64], as scanners of this kind leave them: padding, air or a dark frame, with their noise."""
    noise = np.random.default_rng(0).normal(0, 1, (2, 3, 64, 64))
    return {
        "CT": np.rint(np.where(noise[0] > 9, 0, -1000 + 10 * noise[0])),  # air; a scan spans about 2000 HU
        "MR": 12 * np.hypot(*noise),  # Rician, the scan spans about 1000
        "XR": np.full((3, 64, 64), 1000.0),  # an exposure that failed
        "US": np.zeros((3, 64, 64)),
    }[modality]


@pytest.mark.parametrize("modality", ["CT", "MR", "XR", "US"])
def test_blank_is_what_shows_nothing(modality):
    shown = np.random.default_rng(1).uniform(-1000 if modality == "CT" else 0, 1000, (3, 64, 64))
    scan = scan_of(np.concatenate([empty_slices(modality), shown]), modality=modality)
    assert blank_slices(scan, encoding_of(scan, 64)).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("size", [(64, 64), (40, 50), (9, 200), (512, 512)])
def test_whatever_is_as_large_as_a_block_keeps_its_slice(size):
    """A spot that stands out by an eighth of the range, wherever it lies, at the edges of the slice too."""
    rng = np.random.default_rng(2)
    corners = [(y, x) for y in (0, size[0] - 4) for x in (0, size[1] - 4)]
    places = corners + [(int(rng.integers(size[0] - 3)), int(rng.integers(size[1] - 3))) for _ in range(40)]
    voxels = np.zeros((len(places) + 20, *size))
    voxels[-20:] = rng.uniform(0, 1000, (20, *size))  # so that low is 0 and high about 1000
    for image, (y, x) in zip(voxels, places, strict=False):
        image[y : y + 4, x : x + 4] = 125
    scan = scan_of(voxels)
    assert not blank_slices(scan, encoding_of(scan, 64)).any()


def blank_cohort(folder: Path) -> Path:
    """A CT of 9 slices, of which 0, 4, 5 and 8 are blank, with a mask that marks something on the last; an MR."""
    rng = np.random.default_rng(3)
    hu = rng.integers(-1000, 2000, (20, 18, 9), dtype=np.int16)
    hu[..., [0, 4, 5, 8]] = -1024
    labels = np.zeros(hu.shape, np.uint8)
    labels[3:9, 2:7, [2, 8]] = 5
    mask = save_nifti(folder / "mask.nii.gz", labels)
    mr = save_nifti(folder / "mr.nii.gz", rng.gamma(2, 100, (14, 30, 7)).astype(np.float32))
    scans = [
        {"path": save_nifti(folder / "ct.nii.gz", hu), "modality": "CT", "mask": mask},
        {"path": mr, "modality": "MR"},
    ]
    return save_manifest(folder / "blank.csv", scans)


def test_blank_slices_are_left_out_and_counted(tmp_path):
    manifest = blank_cohort(tmp_path)
    summary = prepare(manifest, tmp_path / "store", size_px=32)
    assert (summary.n_slices, summary.n_blank) == (13, 3)
    assert "3 blank slices are left out (scans.csv says which)" in str(summary)
    store = Store(tmp_path / "store")
    ct, mr = store.scans
    assert (ct.depth, ct.blank, ct.n_slices, mr.blank) == (9, (0, 4, 5), 6, ())
    assert (store.info.n_blank, store.info.shard_slices) == (3, (13,))
    assert store.column("slice_index").tolist() == [1, 2, 3, 6, 7, 8, *range(7)]
    np.testing.assert_array_equal(store.column("position")[:6], np.float32([1, 2, 3, 6, 7, 8]) / np.float32(8))
    np.testing.assert_array_equal(store.column("row"), np.arange(13))
    hu, labels = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("ct.nii.gz", "mask.nii.gz"))
    np.testing.assert_array_equal(to_source_grid(store.masks(range(6)), ct), labels)
    back = to_source_grid(store.physical(range(6)), ct)
    np.testing.assert_array_equal(back[..., [1, 2, 3, 6, 7, 8]], hu[..., [1, 2, 3, 6, 7, 8]])
    assert verify(tmp_path / "store")


def test_blank_slices_are_kept_when_asked(tmp_path):
    manifest = blank_cohort(tmp_path)
    summary = prepare(manifest, tmp_path / "store", size_px=32, keep_blank=True)
    assert (summary.n_slices, summary.n_blank) == (16, 0)
    assert "blank slices" not in str(summary)
    store = Store(tmp_path / "store")
    hu = np.asarray(nib.load(tmp_path / "ct.nii.gz").dataobj)
    np.testing.assert_array_equal(to_source_grid(store.physical(range(9)), store.scans[0]), hu)
    with pytest.raises(MedclrError, match=r"at 32 px with blank slices by medclr .*, not of blank\.csv .* at 32 px by"):
        prepare(manifest, tmp_path / "store", size_px=32)


def test_a_scan_of_blank_slices_is_refused(tmp_path):
    steps = np.broadcast_to(np.arange(5.0), (20, 20, 5)).copy()
    scans = [
        {"path": save_nifti(tmp_path / "steps.nii.gz", steps), "modality": "MR"},
        {"path": save_nifti(tmp_path / "good.nii.gz", np.random.default_rng(0).random((20, 20, 5))), "modality": "MR"},
    ]
    summary = prepare(save_manifest(tmp_path / "m.csv", scans), tmp_path / "store", size_px=32)
    assert (summary.n_scans, summary.n_rejected, summary.n_blank) == (1, 1, 0)
    assert "each of its 5 slices is blank: there is nothing to see" in (tmp_path / "store/rejected.csv").read_text()


# The store as a whole


@pytest.mark.usefixtures("small_shards")
def test_bytes_do_not_depend_on_interruption(tmp_path, monkeypatch):
    manifest = mixed_cohort(tmp_path)
    shards = plan(read_manifest(manifest), 24)
    assert len(shards) == 10
    prepare(manifest, tmp_path / "plain", size_px=24)

    decoded: list[str] = []
    decode = sharding.decode

    def interrupted_decode(row, source):
        if len(decoded) == 5:
            raise KeyboardInterrupt
        decoded.append(row.scan_id)
        return decode(row, source)

    monkeypatch.setattr(sharding, "decode", interrupted_decode)
    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, tmp_path / "resumed", size_px=24)
    assert not list((tmp_path / "resumed").glob(".*"))
    with pytest.raises(MedclrError, match="unfinished; run the same medclr prepare to go on"):
        Store(tmp_path / "resumed")
    with pytest.raises(MedclrError, match=r"holds a store of mixed\.csv .*at 24 px .* choose another --out"):
        prepare(manifest, tmp_path / "resumed", size_px=16)
    decoded[:] = ["skipped"]
    monkeypatch.setattr(sharding, "decode", lambda row, source: (decoded.append(row.scan_id), decode(row, source))[1])
    prepare(manifest, tmp_path / "resumed", size_px=24)
    assert len(decoded) - 1 == 5, "what was finished is not decoded again"

    assert contents(tmp_path / "plain") == contents(tmp_path / "resumed")
    assert verify(tmp_path / "plain").endswith("is whole: 55 slices of 10 scans in 17 files")


@pytest.mark.parametrize("damaged", ["slices-00002.npy", "masks-00002.npy", "truth-00002.npz"])
@pytest.mark.usefixtures("small_shards")
def test_only_what_is_whole_is_taken_over(tmp_path, monkeypatch, damaged):
    """After a power failure a file may hold anything, and the last line of the journal may be cut short."""
    manifest = mixed_cohort(tmp_path)
    prepare(manifest, tmp_path / "plain", size_px=24)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(manifest, out, size_px=24)
    (out / damaged).write_bytes(bytes((out / damaged).stat().st_size))
    (out / damaged.replace("2", "4")).unlink()
    journal = out / "unfinished.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    decoded: list[str] = []
    decode = sharding.decode
    monkeypatch.setattr(sharding, "decode", lambda row, source: (decoded.append(row.path), decode(row, source))[1])
    prepare(manifest, out, size_px=24)
    assert decoded == ["mr0.nii.gz", "mr1.nii.gz", "xr3.png"]
    assert contents(out) == contents(tmp_path / "plain")


def test_workers_write_the_same_bytes(tmp_path, monkeypatch):
    manifest = mixed_cohort(tmp_path)
    monkeypatch.setattr(preparing, "SHARD_SLICES", 8)
    prepare(manifest, tmp_path / "one", size_px=24)
    prepare(manifest, tmp_path / "two", size_px=24, workers=2)
    assert len(list((tmp_path / "one").glob("truth-*"))) == 2
    assert len(Store(tmp_path / "two").info.shard_slices) == 7
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("size_px", "n_shards", "largest"),
    [(224, 10, 60), (2048, 20, 30)],  # 2048 px: 8 MiB a slice, so no two scans share a shard
)
def test_shards_are_several_yet_bounded(tmp_path, size_px, n_shards, largest):
    table = read_manifest(mixed_cohort(tmp_path))
    rows = [replace(table.rows[0], scan_id=f"s{i}", n_slices=30) for i in range(20)]
    file_rows = [table.file_rows[0]._replace(scan_id=f"s{i}") for i in range(20)]
    shards = plan(replace(table, rows=rows, file_rows=file_rows), size_px)
    assert [row for shard in shards for row, _ in shard.scans] == rows
    assert len(shards) == n_shards
    assert max(shard.n_slices for shard in shards) == largest


def test_the_disk_must_have_room_for_masks_that_are_kept_as_they_are(tmp_path, monkeypatch):
    table = read_manifest(mixed_cohort(tmp_path))
    row = replace(table.rows[2], n_slices=100, rows=512, columns=512)
    shards = [Shard(0, [(row, table.files[row.scan_id])])]
    needed = 100 * (4 * 64**2 + 512**2 // 16)  # slices, masks; and a 32nd of 2 bytes a voxel
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    preparing._check_space(tmp_path, shards, 64)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(MedclrError, match="the store needs 3 MB more"):
        preparing._check_space(tmp_path, shards, 64)


def test_broken_scans_are_listed_and_the_rest_is_kept(tmp_path):
    good = save_nifti(tmp_path / "good.nii.gz", np.arange(60.0).reshape(3, 4, 5))
    flat = save_nifti(tmp_path / "flat.nii.gz", np.ones((3, 4, 5)))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:-20])
    other_grid = save_nifti(tmp_path / "mask.nii.gz", np.ones((3, 4, 4), np.uint8))
    scans = [{"path": path, "modality": "MR", "n_slices": 5} for path in (cut, good, flat, good)]
    scans[3]["mask"] = other_grid
    summary = prepare(save_manifest(tmp_path / "m.csv", scans), tmp_path / "store", size_px=8)
    assert (summary.n_scans, summary.n_rejected) == (1, 3)
    first, second = str(summary).splitlines()
    assert first.endswith("is written: 5 slices of 1 scan of 1 patient")
    assert second.endswith("rejected.csv: 3 scans could not be decoded, and why")
    with (tmp_path / "store" / "rejected.csv").open() as file:
        rejected = list(csv.DictReader(file))
    assert [row["path"] for row in rejected] == ["cut.nii.gz", "flat.nii.gz", "good.nii.gz"]
    assert rejected[0]["reason"].startswith("cut.nii.gz: ")  # a store tells nothing of the ward's folders
    assert rejected[2]["reason"].startswith("mask.nii.gz: ")
    assert "copy it again" in rejected[0]["reason"]
    assert "every voxel is 1" in rejected[1]["reason"]
    assert verify(tmp_path / "store")
    np.testing.assert_array_equal(Store(tmp_path / "store").column("position"), np.linspace(0, 1, 5, dtype=np.float32))


def test_no_usable_scan_leaves_nothing(tmp_path):
    path = save_nifti(tmp_path / "flat.nii.gz", np.ones((3, 4, 5)))
    manifest = save_manifest(tmp_path / "m.csv", [{"path": path, "modality": "MR"}])
    with pytest.raises(
        MedclrError, match=r"none of its 1 scans can be decoded; the first, flat\.nii\.gz: every voxel is 1"
    ):
        prepare(manifest, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_finished_store_is_left_alone_and_another_is_refused(tmp_path):
    manifest = mixed_cohort(tmp_path)
    first = prepare(manifest, tmp_path / "store", size_px=16)
    before = contents(tmp_path / "store")
    again = prepare(manifest, tmp_path / "store", size_px=16)
    assert not first.was_complete
    assert again.was_complete
    assert "is complete already" in str(again)
    with pytest.raises(MedclrError, match=r"holds a store of mixed\.csv .*at 16 px"):
        prepare(manifest, tmp_path / "store", size_px=32)
    other = mixed_cohort(tmp_path / "other", seed=1)
    other.write_text(other.read_text().replace("sick", "ill"))
    with pytest.raises(
        MedclrError, match=r"holds a store of mixed\.csv .*at 16 px .* choose another --out or delete it"
    ):
        prepare(other, tmp_path / "store", size_px=16)
    assert contents(tmp_path / "store") == before
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    for out in (tmp_path / "papers", manifest):
        with pytest.raises(MedclrError, match="exists and is not a slice store; choose another --out"):
            prepare(manifest, out)


def test_missing_or_changed_files_stop_it_before_it_starts(tmp_path):
    manifest = mixed_cohort(tmp_path)
    (tmp_path / "mr1.nii.gz").rename(tmp_path / "gone")
    with pytest.raises(MedclrError, match=r"mr1\.nii\.gz: cannot be read \(No such file or directory\); bring it back"):
        prepare(manifest, tmp_path / "store", size_px=16)
    assert not (tmp_path / "store").exists()
    (tmp_path / "mr1.nii.gz").write_bytes(b"something else")
    with pytest.raises(MedclrError, match=r"mr1\.nii\.gz: has changed since it was indexed; run medclr index again"):
        prepare(manifest, tmp_path / "store", size_px=16)


def test_a_file_that_vanishes_meanwhile_is_no_reject(tmp_path):
    manifest = read_manifest(mixed_cohort(tmp_path))
    row = manifest.rows[0]
    with pytest.raises(MedclrError, match=r"lost\.nii: cannot be read \(No such file or directory\)"):
        sharding.decode(row, SourceFiles([tmp_path / "lost.nii"], None))


def test_a_bug_of_ours_names_the_file(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    manifest = mixed_cohort(tmp_path)
    monkeypatch.setattr(sharding, "encode_mask", broken)
    with pytest.raises(RuntimeError, match=r"mr0\.nii\.gz: oops"):
        prepare(manifest, tmp_path / "store", size_px=16)


@pytest.mark.parametrize(("size_px", "workers"), [(0, 1), (16, 0)])
def test_nonsense_settings(tmp_path, size_px, workers):
    with pytest.raises(MedclrError, match="both must be at least 1"):
        prepare(tmp_path / "m.csv", tmp_path / "store", size_px=size_px, workers=workers)


# Real scans


def test_a_real_ct_volume_keeps_its_voxels_and_labels(tmp_path):
    source = shared_data("ct_body")
    ct = {"path": source / "ct.nii.gz", "modality": "CT", "mask": source / "labels_117.nii.gz"}
    prepare(save_manifest(tmp_path / "ct.csv", [ct]), tmp_path / "store", size_px=128)
    store = Store(tmp_path / "store")
    for kind, name in ((store.physical, "ct.nii.gz"), (store.masks, "labels_117.nii.gz")):
        voxels = np.asarray(nib.load(source / name).dataobj)
        np.testing.assert_array_equal(to_source_grid(kind(store.indices()), store.scans[0]), voxels)


def test_a_real_ct_series_keeps_its_hounsfield_units(tmp_path):
    folder = shared_data("ct_abdomen_dicom")
    index([folder], tmp_path / "ct.csv", key_file=tmp_path / "key")
    prepare(tmp_path / "ct.csv", tmp_path / "store", size_px=512, key_file=tmp_path / "key")
    slices = sorted(map(dcmread, folder.iterdir()), key=lambda slice_: slice_.ImagePositionPatient[2])
    hu = [slice_.pixel_array * slice_.RescaleSlope + slice_.RescaleIntercept for slice_ in slices]
    store = Store(tmp_path / "store")
    np.testing.assert_array_equal(store.physical(store.indices()), np.array(hu, dtype=np.float32))
