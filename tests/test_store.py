"""Reading a slice store, and noticing when it is not what was written."""

import gc
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from cohort import mixed_cohort

from medclr import files
from medclr.data import blobs, tables
from medclr.data import prepare as preparing
from medclr.data.blobs import Folder
from medclr.data.encode import nearest
from medclr.data.prepare import prepare
from medclr.data.store import Store, to_source_grid, verify
from medclr.data.tables import TABLE, StoredScan
from medclr.errors import MedclrError
from medclr.scans import read
from medclr.scans.nifti import read_mask


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the manifest of ``mixed_cohort`` and its store; and ``small``, in which masks are shrunk."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "SHARD_SLICES", 16)  # several shards
        prepare(mixed_cohort(folder), folder / "store", size_px=48)
        prepare(folder / "mixed.csv", folder / "small", size_px=24)
    return folder


@pytest.fixture(params=["store"])
def copy(made, tmp_path, request) -> Path:
    """The store, to be damaged."""
    for path in (made / request.param).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


small_too = pytest.mark.parametrize("copy", ["store", "small"], indirect=True)
only_small = pytest.mark.parametrize("copy", ["small"], indirect=True)


def test_reads_any_slices_in_any_order(made):
    store = Store(made / "store")
    wanted = [54, 3, 3, 0, 31, 12]
    scans = store.column("scan")
    for i, index in enumerate(wanted):
        scan = store.scans[scans[index]]
        name = "xr" if scan.modality == "XR" else scan.modality.lower()
        number = [s.scan_id for s in store.scans if s.modality == scan.modality].index(scan.scan_id)
        suffix = ".png" if name == "xr" else ".nii.gz"
        source = read([made / f"{name}{number}{suffix}"], scan.modality)
        d = store.column("slice_index")[index]
        box = np.s_[
            scan.content_top : scan.content_top + scan.content_height,
            scan.content_left : scan.content_left + scan.content_width,
        ]
        np.testing.assert_allclose(store.physical(wanted)[i][box], source.voxels[d], atol=scan.scale * 0.51)
        if scan.has_mask:
            mask = read_mask(made / "masks" / f"{name}{number}.nii.gz", source)
            np.testing.assert_array_equal(store.masks(wanted)[i][box], mask[d])
        else:
            assert not store.masks(wanted)[i].any()
    assert store.read([]).shape == (0, 48, 48)


def test_masks_come_back_as_their_files_have_them(made):
    for name, kept in (("store", 0), ("small", 2)):
        store = Store(made / name)
        members = []
        for path in store.path.glob("truth-*.npz"):
            with zipfile.ZipFile(path) as archive:
                members += archive.infolist()
        assert len(members) == kept
        assert {member.date_time for member in members} <= {(1980, 1, 1, 0, 0, 0)}, "the same bytes at any time"
        number = 0
        for i, scan in enumerate(store.scans):
            found = store.source_mask(i)
            assert (found.shape, found.dtype) == (scan.source_shape, np.uint16)
            if scan.has_mask:
                mask = np.asarray(nib.load(made / "masks" / f"mr{number}.nii.gz").dataobj)
                np.testing.assert_array_equal(found, mask)
                number += 1
            else:
                assert not found.any()
        assert number == 2


def test_what_it_says_of_itself(made):
    store = Store(made / "store", manifest=made / "mixed.csv")
    assert len(store) == store.info.n_slices == 55
    assert store.info.modalities == ("CT", "MR", "XR")
    assert store.info.labels == ("sick", "well")
    assert store.info.masks
    assert store.patients == [f"p{i}" for i in range(8)]
    assert {name: store.column(name).dtype for name in TABLE} == {name: np.dtype(kind) for name, kind in TABLE.items()}
    patient = np.array([scan.patient_id for scan in store.scans])[store.column("scan")]
    np.testing.assert_array_equal(np.array(store.patients)[store.column("patient")], patient)
    xr = store.column("modality") == 2
    assert sorted(store.column("label")[xr]) == [-1, 0, 0, 1]
    assert (store.column("label")[~xr] == -1).all()
    assert (store.column("position")[xr] == 0.5).all()
    assert set(store.column("air")[store.column("modality") == 0]) == {-1024}
    assert not store.column("scan").flags.writeable


def test_indices_of_a_split(made):
    store = Store(made / "store")
    train, test = store.indices("train"), store.indices("test")
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), store.indices())
    assert {store.scans[scan].modality for scan in store.column("scan")[test]} == {"XR"}
    with pytest.raises(MedclrError, match="no scan is in split 'tset'; its splits: test, train"):
        store.indices("tset")


def test_threads_may_share_it(made):
    store = Store(made / "store")
    alone = Store(made / "store").read(range(55))
    with ThreadPoolExecutor(8) as pool:
        for together in pool.map(store.read, [range(55)] * 32):
            np.testing.assert_array_equal(together, alone)


class TwoDisks:
    """Shards of even number in one folder, the others in another; counts what it is asked for."""

    def __init__(self, even: Path, odd: Path) -> None:
        self.folders, self.reads = (Folder(even), Folder(odd)), 0

    def folder(self, name: str) -> Folder:
        return self.folders[int(Path(name).stem[-5:]) % 2]

    def size(self, name: str) -> int:
        return self.folder(name).size(name)

    def read(self, name: str, offset: int, into: memoryview) -> int:
        self.reads += 1
        return self.folder(name).read(name, offset, into)


@small_too
def test_shards_may_lie_anywhere(copy, made, tmp_path, monkeypatch, request):
    name = request.node.callspec.params["copy"]
    other = tmp_path / "disk"
    other.mkdir()
    for path in copy.glob("*-*[13579].np[yz]"):
        path.rename(other / path.name)
    with pytest.raises(MedclrError, match=r"-0000\d\.np[yz]: is missing from the store"):
        Store(copy)
    whole, order = Store(made / name), [40, 3, 54, 4, 5, 17]
    monkeypatch.setattr(blobs, "SHARDS", lambda folder: TwoDisks(folder, other))
    store = Store(copy)
    assert verify(copy).startswith(f"{copy} is whole")
    np.testing.assert_array_equal(store.read(order), whole.read(order))
    np.testing.assert_array_equal(store.masks(order), whole.masks(order))
    for i in range(10):
        np.testing.assert_array_equal(store.source_mask(i), whole.source_mask(i))
    (copy / "slices-00000.npy").unlink()
    with pytest.raises(MedclrError, match=r"slices-00000\.npy: is missing from the store"):
        Store(copy)


def test_neighbours_are_read_at_once(made, monkeypatch):
    disks = TwoDisks(made / "store", made / "store")
    monkeypatch.setattr(blobs, "SHARDS", lambda folder: disks)
    store = Store(made / "store")
    shard = store.column("shard")
    store.read(range(len(store)))
    n = len(np.unique(shard))
    assert disks.reads == 2 * n, "the header and the slices of each shard"
    store.read([3, 4, 5, 5, 7, 6])
    assert disks.reads == 2 * n + 4
    begun = sum(1 for _ in store.read_through(0))
    assert begun == 1, "it is small"
    assert disks.reads == 2 * n + 5


def test_what_cannot_be_read_is_one_sentence(made, monkeypatch):
    class Broken(TwoDisks):
        def read(self, name: str, offset: int, into: memoryview) -> int:
            if offset and name.startswith("masks"):
                raise OSError(5, "Input/output error")
            return super().read(name, offset, into) - (1 if offset else 0)

    monkeypatch.setattr(blobs, "SHARDS", lambda folder: Broken(folder, folder))
    store = Store(made / "store")
    with pytest.raises(MedclrError, match=r"slices-0000\d\.npy: cannot be read \(it ends at [\d,]+ bytes\); delete"):
        store.read([20])
    with pytest.raises(MedclrError, match=r"masks-0000\d\.npy: cannot be read \(Input/output error\); delete"):
        store.masks(range(55))


def test_few_files_stay_open(made, monkeypatch):
    monkeypatch.setattr(blobs, "OPEN_FILES", 2)
    store, whole = Store(made / "store"), Store(made / "store").read(range(55))
    gc.collect()  # files that other tests left to it
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as pool:
        for together in pool.map(store.read, [range(55)] * 32):
            np.testing.assert_array_equal(together, whole)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    del store
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_table_of_scans_survives_the_text(made):
    scans = Store(made / "store").scans
    odd = replace(
        scans[0], scan_id='a,"b', affine=(0.1, 1 / 3, -1e-300, 7.0), source_flips=(True, False, True), label="",
        blank=(0, 7), irregular="2 of 22 slices are missing; b", window_center=0.0, window_width=1 / 3, volume=3,
    )  # fmt: skip
    path = made / "odd.csv"
    path.write_text(tables.scans_csv([*scans, odd]))
    assert tables.read_scans(path) == [*scans, odd]
    path.write_text(tables.scans_csv([]))
    assert tables.read_scans(path) == []
    for cells in (",", "7" + (len(fields(odd)) - 1) * ",", "7" * len(fields(odd))):
        path.write_text(tables.scans_csv([odd]) + cells + "\n")
        with pytest.raises(MedclrError, match=r"odd\.csv: cannot be read"):
            tables.read_scans(path)


def test_no_worker_of_arrow_holds_bytes_of_python(made, monkeypatch):
    """A worker that lets go of them while the process ends needs Python, which is gone: the process would abort."""
    text, scans = (made / "store" / "scans.csv").read_bytes(), Store(made / "store").scans
    addresses, read_csv = [], pyarrow.csv.read_csv

    def address(source: pa.BufferReader) -> int:
        return source.read_buffer().address

    def noted(source, **options):
        addresses.append(address(source))
        source.seek(0)
        return read_csv(source, **options)

    monkeypatch.setattr(pyarrow.csv, "read_csv", noted)
    assert tables.parse_scans(text) == scans
    assert len(addresses) == 1
    assert addresses[0] != address(pa.BufferReader(text))


def test_way_back_undoes_axes_flips_and_shrinking():
    rng = np.random.default_rng(0)
    source = rng.integers(0, 9, (7, 12, 10))  # source axes run along (h,w,d)
    axes, flips = (2, 0, 1), (True, False, True)
    volume = np.flip(source.transpose(axes), (0, 2))  # [D,H,W]
    square = np.zeros((10, 20, 20), dtype=int)
    square[:, 6:13, 4:16] = volume
    scan = StoredScan(
        "", "", "", "MR", "", "", "", "", "", 0, "", 10, 7, 12, (), 6, 4, 7, 12, (1, 1, 1), (), (7, 12, 10), axes,
        flips, 1, 0, 0, 1, 0, None, None, False, 0, 0,
    )  # fmt: skip
    np.testing.assert_array_equal(to_source_grid(square, scan), source)

    without = source.copy()
    without[..., [9, 1]] = 0  # the first axis of the volume runs against the last of the source
    stored = square[[1, 2, 3, 4, 5, 6, 7, 9]]
    np.testing.assert_array_equal(to_source_grid(stored, replace(scan, blank=(0, 8))), without)

    doubled = np.repeat(np.repeat(square[:, 6:13, 4:16], 2, 1), 2, 2)  # as if the source had been twice as fine
    fine = to_source_grid(square, replace(scan, height=14, width=24, source_shape=(14, 24, 10)))
    np.testing.assert_array_equal(fine, np.flip(doubled, (0, 2)).transpose(np.argsort(axes)))


@pytest.mark.parametrize(("n_from", "n_to"), [(5, 5), (512, 224), (224, 512), (3, 1), (1, 3), (101, 64)])
def test_nearest_takes_the_pixel_under_the_centre(n_from, n_to):
    centres = (np.arange(n_to) + 0.5) * (n_from / n_to)
    found = nearest(n_from, n_to)
    assert ((found <= centres + 1e-9) & (centres - 1e-9 <= found + 1)).all()
    if n_from == n_to:
        np.testing.assert_array_equal(found, np.arange(n_from))


# Bad stores


def edit_info(store: Path, **changes: object) -> None:
    values = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(values | changes))


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            MedclrError, match=r"is not a slice store \(it has no store.json\); medclr prepare makes one"
        ):
            Store(path)


def test_another_version(copy):
    edit_info(copy, format_version=3, medclr_version="9.1")
    with pytest.raises(MedclrError, match=r"is of store format 3 \(medclr 9\.1\), this medclr reads format 2; prepare"):
        Store(copy)


def test_another_manifest(made):
    with pytest.raises(MedclrError, match=r"was made from another manifest \(mixed\.csv, .* than .*mixed\.files\.csv"):
        Store(made / "store", manifest=made / "mixed.files.csv")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}'])
def test_damaged_json(copy, text):
    (copy / "store.json").write_text(text)
    with pytest.raises(
        MedclrError, match=r"store\.json: cannot be read .* delete the store and run medclr prepare again"
    ):
        Store(copy)


@pytest.mark.parametrize(
    ("copy", "name"),
    [
        *[("store", f) for f in ("slices-00001.npy", "masks-00002.npy", "slices.arrow", "scans.csv", "rejected.csv")],
        ("small", "truth-00002.npz"),
    ],
    indirect=["copy"],
)
def test_missing_truncated_or_altered_files(copy, name):
    path = copy / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(MedclrError, match=rf"{name}: its bytes changed since it was written"):
        verify(copy)
    path.write_bytes(whole[:-1])
    with pytest.raises(MedclrError, match=rf"{name}: holds [\d,]+ bytes where [\d,]+ were written"):
        Store(copy)
    path.unlink()
    with pytest.raises(MedclrError, match=rf"{name}: is missing from the store"):
        Store(copy)


def test_damage_that_keeps_its_size_is_noticed_on_reading(copy):
    path = copy / "slices-00000.npy"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(MedclrError, match=r"slices-00000\.npy: cannot be read"):
        Store(copy).read([0])
    table = copy / "slices.arrow"
    table.write_bytes(b"x" * table.stat().st_size)
    with pytest.raises(MedclrError, match=r"slices\.arrow: is not a slice table"):
        Store(copy)


@only_small
def test_a_damaged_mask_is_the_same_or_one_sentence(copy):
    """Any byte of the file may be another: some are read by nobody."""
    scan = next(i for i, scan in enumerate(Store(copy).scans) if scan.has_mask)
    path = copy / f"truth-{Store(copy).scans[scan].shard:05d}.npz"
    whole, mask = path.read_bytes(), Store(copy).source_mask(scan)
    told = same = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            np.testing.assert_array_equal(Store(copy).source_mask(scan), mask)
        except MedclrError as error:
            told += str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            same += 1
    assert told + same == len(whole)
    assert told > 0.8 * len(whole)
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(MedclrError, match=r"npz: cannot be read \(File is not a zip file\); delete the store"):
        Store(copy).source_mask(scan)


@only_small
def test_verify_holds_kept_masks_against_the_scans(copy):
    path = copy / "truth-00002.npz"
    with np.load(path) as archive:
        (scan_id,) = archive.files
        mask = archive[scan_id]
    written = json.loads((copy / "store.json").read_text())["files"]
    for held, message in (
        ({"another": mask}, "holds the masks of other scans than scans.csv; delete"),
        ({scan_id: mask[1:]}, r"holds uint16 \(6, 30, 14\), expected uint16 \(7, 30, 14\)"),
    ):
        np.savez_compressed(path, **held)
        written[path.name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
        edit_info(copy, files=written)
        with pytest.raises(MedclrError, match=message):
            verify(copy)


def test_verify_holds_the_tables_against_each_other(copy):
    """Tables that are whole, but not of each other: as after a careless repair."""
    store = Store(copy)
    columns = {name: store.column(name).copy() for name in TABLE}
    columns["offset"][7] += 1
    tables.write_table(copy / "slices.arrow", columns)
    written = json.loads((copy / "store.json").read_text())["files"]
    written["slices.arrow"] = {
        "size": (copy / "slices.arrow").stat().st_size,
        "sha256": files.sha256(copy / "slices.arrow"),
    }
    edit_info(copy, files=written)
    with pytest.raises(MedclrError, match=r"column offset contradicts scans\.csv"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content_left": 40}, r"scans\.csv: the row of scan\d+ contradicts itself"),
        ({"first_row": 1}, r"scans\.csv: the row of scan\d+ contradicts itself"),
        ({"blank": (1,)}, r"store\.json: n_blank contradicts scans\.csv"),
        ({"blank": (11,)}, r"scans\.csv: the row of scan\d+ contradicts itself"),
        ({"window_width": 3.0}, r"scans\.csv: the row of scan\d+ contradicts itself"),
        ({"source_shape": (20, 18, 12)}, r"scans\.csv: the row of scan\d+ contradicts itself"),
        ({"patient_id": "p9"}, r"store\.json: n_patients contradicts scans\.csv"),
    ],
)
def test_verify_holds_the_scans_against_themselves(copy, change, message):
    scans = Store(copy).scans
    scans[2] = replace(scans[2], **change)
    (copy / "scans.csv").write_text(tables.scans_csv(scans))
    written = json.loads((copy / "store.json").read_text())["files"]
    written["scans.csv"] = {
        "size": (copy / "scans.csv").stat().st_size,
        "sha256": files.sha256(copy / "scans.csv"),
    }
    edit_info(copy, files=written)
    with pytest.raises(MedclrError, match=message):
        verify(copy)


def test_shards_of_another_shape_are_refused(copy):
    edit_info(copy, size_px=24)
    with pytest.raises(MedclrError, match=r"slices-00000\.npy: holds uint16 .*48, 48\), expected uint16 .*24, 24\)"):
        Store(copy).read([0])
