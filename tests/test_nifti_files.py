"""NIfTI files: number types, scaling, pairs, compression, damage, bombs; and that none of their texts comes out."""

import gzip
import logging
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray

from medclr import scans
from medclr.data.index import index
from medclr.data.manifest import read_manifest, read_rejected
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.errors import ScanError
from medclr.scans import nifti
from medclr.scans.policy import Policy

RNG = np.random.RandomState(0)
VOLUME = RNG.randint(-1000, 3000, (4, 5, 6)).astype(np.int16)  # R, A, S
RAS = np.diag([1.0, 1.5, 2.0, 1.0])
SQUARE = np.diag([1.5, 1.5, 2.0, 1.0])


def save(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = RAS, **fields: Any) -> Path:
    """Byte by byte, so that header fields stay as they are given, whatever nibabel thinks of them."""
    header = nib.Nifti1Image(array, affine, dtype=array.dtype).header
    header["magic"], header["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        header[name] = value
    data = header.binaryblock + bytes(4) + array.tobytes(order="F")
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ScanError, match=message):
        nifti.read([path], "MR")


def as_axial(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.float32)


# Numbers


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("order", "<>")
def test_signed_and_real_numbers_of_either_byte_order(tmp_path: Path, dtype: type[np.generic], order: str) -> None:
    values = (VOLUME // 32).astype(np.dtype(dtype).newbyteorder(order))
    image = nib.Nifti1Image(values, RAS, nib.Nifti1Header(endianness=order), dtype=dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(nifti.read([tmp_path / "a.nii.gz"], "MR").voxels, as_axial(values))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_numbers(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    values = (VOLUME.astype(np.int64) % 256).astype(dtype)
    values[0, 0, 0] = np.iinfo(dtype).max
    assert np.array_equal(nifti.read([save(tmp_path / "a.nii", values)], "MR").voxels, as_axial(values))


def test_scaling_is_as_nibabel_does_it(tmp_path: Path) -> None:
    for array in (VOLUME, VOLUME.astype(np.float32) / 7):
        for slope, inter in ((0.25, -100), (-2, 3), (0, 7), (np.nan, np.nan), (np.inf, 1), (1, 0)):
            path = save(tmp_path / "a.nii", array, scl_slope=slope, scl_inter=inter)
            expected = as_axial(nib.load(path).get_fdata())
            np.testing.assert_array_equal(nifti.read([path], "MR").voxels, expected, err_msg=f"{slope} {inter}")
    refused(save(tmp_path / "b.nii", VOLUME, scl_slope=2, scl_inter=np.nan), "header is damaged")


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colours_become_luminance(tmp_path: Path, channels: str) -> None:
    values = RNG.randint(0, 256, (4, 5, 6, len(channels))).astype(np.uint8)
    structured = np.ascontiguousarray(values).view([(name, "u1") for name in channels])[..., 0]
    r, g, b = (values[..., i].astype(float) for i in range(3))
    alpha = values[..., 3] / 255 if channels == "RGBA" else 1
    scan = nifti.read([save(tmp_path / "a.nii.gz", structured, scl_slope=9, scl_inter=9)], "US")
    np.testing.assert_allclose(scan.voxels, as_axial((0.299 * r + 0.587 * g + 0.114 * b) * alpha), rtol=1e-6)


def test_what_is_no_grey_number_is_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii", VOLUME.astype(np.complex64)), "complex voxels; save their magnitude")
    refused(save(tmp_path / "b.nii", VOLUME, datatype=1, bitpix=1), "damaged|one bit")
    refused(save(tmp_path / "c.nii", VOLUME, datatype=1536, bitpix=128), "damaged|128")
    refused(save(tmp_path / "d.nii", VOLUME, datatype=99), "damaged")


def test_nan_is_air_and_counted(tmp_path: Path) -> None:
    """SPM's custom; and so does a store, which holds whole numbers."""
    holed = VOLUME.astype(np.float32)
    holed[0, 0, :2] = np.nan
    path = save(tmp_path / "a.nii.gz", holed, scl_slope=2, scl_inter=1)
    for modality, air in (("CT", -1024), ("MR", 0)):
        scan = nifti.read([path], modality)
        assert scan.irregular == "2 of its 120 voxels are NaN, taken as air"
        assert np.array_equal(scan.voxels, as_axial(np.where(np.isnan(holed), air, holed * 2 + 1)))
    refused(save(tmp_path / "b.nii", np.full_like(holed, np.nan)), "nothing but NaN")


def test_infinity_and_what_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in (np.inf, -np.inf):
        holed = VOLUME.astype(np.float32)
        holed[1, 2, 3] = value
        refused(save(tmp_path / "a.nii", holed), "infinite")
    refused(save(tmp_path / "b.nii", VOLUME.astype(np.float64) * 1e300), "float32 cannot hold")
    refused(save(tmp_path / "c.nii", VOLUME.astype(np.float64) * 1e-300), "too fine for float32")
    refused(save(tmp_path / "d.nii", VOLUME.astype(np.int64) + 2**40), "too fine for float32")
    refused(save(tmp_path / "e.nii", VOLUME, scl_slope=1e-3, scl_inter=1e6), "too fine for float32")
    far = VOLUME.astype(np.float64) + 2**20  # float32 still tells whole numbers apart
    assert np.array_equal(nifti.read([save(tmp_path / "f.nii", far)], "MR").voxels, as_axial(far))


def test_label_maps_vectors_and_surfaces_are_no_scans(tmp_path: Path) -> None:
    labels = save(tmp_path / "a.nii", VOLUME % 7, intent_code=1002)
    refused(labels, "is a segmentation")
    found, ((path, reason),) = nifti.find([nifti.read_header(labels)])
    assert (found, path, reason) == ([], labels, "is a segmentation (its intent is labels), not a scan; see --masks")
    scan = nifti.read([save(tmp_path / "b.nii", VOLUME)], "MR")
    assert np.array_equal(nifti.read_mask(labels, scan), as_axial(VOLUME % 7))
    refused(save(tmp_path / "c.nii", np.stack([VOLUME] * 3, -1)[:, :, :, None], intent_code=1007), "holds vectors")
    refused(save(tmp_path / "d.nii", VOLUME, intent_code=3002), "surface")


# Files


def test_nifti2_and_other_units(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(VOLUME, RAS), tmp_path / "two.nii.gz")
    metres = nib.Nifti1Image(VOLUME, np.diag([0.001, 0.0015, 0.002, 1]))
    metres.header.set_xyzt_units("meter")
    nib.save(metres, tmp_path / "metres.nii")
    expected = nifti.read([save(tmp_path / "a.nii", VOLUME)], "CT")
    for name in ("two.nii.gz", "metres.nii"):
        scan = scans.read([tmp_path / name], "CT")
        assert np.array_equal(scan.voxels, expected.voxels), name
        np.testing.assert_allclose(scan.affine, expected.affine, rtol=1e-6, err_msg=name)


def test_the_header_alone_needs_only_its_first_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOLUME)
    whole, start = nifti.read_header(path), nifti.read_header(path, path.read_bytes()[:4096])
    assert (whole.shape, whole.n_bytes) == (start.shape, start.n_bytes) == ((4, 5, 6), 352 + 2 * VOLUME.size)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_pair_is_one_scan_of_two_files(tmp_path: Path, kind: Any, ending: str) -> None:
    nib.save(kind(np.stack([VOLUME, VOLUME // 2], -1), RAS), tmp_path / f"a.img{ending}")
    header, voxels = tmp_path / f"a.hdr{ending}", tmp_path / f"a.img{ending}"
    assert nifti.is_nifti(header.read_bytes()[:4096])
    found, rejected = nifti.find([nifti.read_header(header)])
    assert ([scan.files for scan in found], rejected) == ([(header, voxels)] * 2, [])
    for files in ([header], [header, voxels]):
        assert np.array_equal(scans.read(files, "CT", volume=1).voxels, as_axial(VOLUME // 2))
    assert nib.load(voxels).shape == (4, 5, 6, 2)  # as nibabel has it


def test_pairs_that_are_not_whole(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(VOLUME, RAS), tmp_path / "a.img")
    (tmp_path / "a.img").rename(tmp_path / "B.IMG")
    refused(tmp_path / "a.hdr", r"half of a NIfTI pair, .* ends in \.img is not there")
    (tmp_path / "a.hdr").rename(tmp_path / "B.HDR")
    assert np.array_equal(nifti.read([tmp_path / "B.HDR"], "CT").voxels, as_axial(VOLUME))
    (tmp_path / "c.img.gz").write_bytes(gzip.compress((tmp_path / "B.IMG").read_bytes()))
    (tmp_path / "B.HDR").rename(tmp_path / "c.hdr")
    assert np.array_equal(nifti.read([tmp_path / "c.hdr"], "CT").voxels, as_axial(VOLUME))
    with pytest.raises(ScanError, match=r"only a \.hdr has one, its \.img"):
        nifti.read([tmp_path / "c.hdr", tmp_path / "B.IMG"], "CT")
    (tmp_path / "c.hdr").rename(tmp_path / "d")
    refused(tmp_path / "d", r"call it NAME\.hdr")


def test_analyze_is_refused_because_it_loses_the_sides(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(VOLUME, RAS), tmp_path / "a.img")
    assert nifti.is_nifti((tmp_path / "a.hdr").read_bytes())
    refused(tmp_path / "a.hdr", r"Analyze 7\.5.*which side is left")


def test_a_lost_orientation_is_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii", VOLUME, srow_x=0, sform_code=1), "affine")
    refused(save(tmp_path / "b.nii", VOLUME, srow_x=np.nan, sform_code=1), "affine")
    refused(save(tmp_path / "c.nii", VOLUME, srow_y=1e30, sform_code=1), "affine")


def test_damage_is_refused(tmp_path: Path) -> None:
    volume = RNG.randint(0, 30000, (20, 20, 20)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz"):
        whole = save(tmp_path / name, volume).read_bytes()
        for share in (0.001, 0.01, 0.5, 0.999):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            refused(tmp_path / name, rf"{name}: ")
    for position in (len(whole) // 2, -6):  # in the voxels, in the checksum
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        (tmp_path / "a.nii.gz").write_bytes(flipped)
        refused(tmp_path / "a.nii.gz", "damaged")


def test_the_checksum_is_compared_for_each_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.stack([VOLUME] * 3, -1))
    flipped = bytearray(path.read_bytes())
    flipped[-6] ^= 0xFF
    path.write_bytes(flipped)
    refused(path, "damaged")


def test_gzip_in_several_members_and_with_trailing_bytes(tmp_path: Path) -> None:
    volume = RNG.randint(0, 30000, (30, 20, 20, 2)).astype(np.int16)
    data = gzip.decompress(save(tmp_path / "a.nii.gz", volume).read_bytes())
    members = b"".join(gzip.compress(data[i : i + 1000]) for i in range(0, len(data), 1000))  # as bgzip writes them
    for name, content in (
        ("members", members),
        ("zeros", gzip.compress(data) + bytes(512)),  # of a tape or a disk block
        ("garbage", gzip.compress(data) + b"garbage"),
    ):
        (tmp_path / name).write_bytes(content)
        for number in range(2):
            scan = scans.read([tmp_path / name], "CT", volume=number)
            assert np.array_equal(scan.voxels, as_axial(volume[..., number])), name
    (tmp_path / "b").write_bytes(members[: len(members) // 4])
    refused(tmp_path / "b", r"b: ")


def test_bytes_after_the_last_voxel_are_told(tmp_path: Path) -> None:
    told = "its file goes on for 240 bytes after its last voxel"
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, np.stack([VOLUME] * 2, -1), dim=[3, 4, 5, 6, 1, 1, 1, 1])
        assert nifti.read([path], "CT").irregular == told
    (found,), _ = nifti.find([nifti.read_header(tmp_path / "a.nii")])
    assert found.irregular == told


# Hostile


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "larger than any scan"),
        ({"dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "too short"),
        ({"dim": [7, 1, 1, 1, 32767, 32767, 32767, 1]}, "divide it"),
        ({"dim": [4, 4, 5, 6, 9999, 1, 1, 1]}, "too short"),
        ({"dim": [3, -1, 5, 6, 1, 1, 1, 1]}, "not a volume"),
        ({"dim": [3, 4, 0, 6, 1, 1, 1, 1]}, "not a volume"),
        ({"dim": [0, 4, 5, 6, 1, 1, 1, 1]}, "not a volume"),
        ({"vox_offset": 2e9}, "too short"),
        ({"vox_offset": 3e38}, "too short"),
        ({"vox_offset": -352}, "damaged|too short"),
        ({"vox_offset": np.nan}, "damaged"),
        ({"vox_offset": np.inf}, "damaged"),
    ],
)
def test_a_forged_size_is_refused_before_memory_is_taken(
    tmp_path: Path, suffix: str, fields: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / f"a{suffix}", VOLUME, **fields)
    with pytest.raises(ScanError, match=message):
        nifti.read_header(path)


def test_huge_dimensions_of_nifti2(tmp_path: Path) -> None:
    for dims in ([3, 2**62, 2**62, 2**62], [3, 65535, 65535, 1], [3, 2**31, 1, 1], [4, 4, 5, 6, 2**40], [-3, 4, 5, 6]):
        header = nib.Nifti2Image(VOLUME, RAS).header
        header["magic"], header["vox_offset"] = b"n+2", 544
        header["dim"][: len(dims)] = dims
        (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + VOLUME.tobytes())
        refused(tmp_path / "a.nii", "has shape|too short")


def zeros(path: Path, header: bytes, n_bytes: int) -> Path:
    """A gzip file of ``header`` and so many zeros, made piece by piece."""
    deflate = zlib.compressobj(9, wbits=31)
    pieces = [deflate.compress(header)]
    for start in range(0, n_bytes, 2**20):
        pieces.append(deflate.compress(bytes(min(2**20, n_bytes - start))))
    path.write_bytes(b"".join([*pieces, deflate.flush()]))
    return path


def test_bombs_are_refused(tmp_path: Path) -> None:
    small = save(tmp_path / "a.nii", VOLUME).read_bytes()
    bomb = zeros(tmp_path / "after.nii.gz", small, 2**27)
    save(tmp_path / "a.nii", VOLUME, dim=[3, 1000, 900, 700, 1, 1, 1, 1])
    claimed = zeros(tmp_path / "claimed.nii.gz", (tmp_path / "a.nii").read_bytes()[:352], 2**20)
    claimed.write_bytes(claimed.read_bytes() + bytes(2_000_000))  # large enough for the claim to be possible
    started = time.perf_counter()
    tracemalloc.start()
    try:
        refused(bomb, "goes on long after its last voxel")
        refused(claimed, "compressed 6..-fold")
        found, ((path, reason),) = nifti.find([nifti.read_header(claimed)])
        assert (found, path) == ([], claimed)
        assert "holds next to nothing" in reason
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 10


def test_a_volume_is_decoded_in_its_own_memory(tmp_path: Path) -> None:
    """Beside the float32 voxels, only pieces are held; here, of one volume in three."""
    shape = (160, 160, 60, 3)
    path = save(tmp_path / "a.nii.gz", (np.arange(np.prod(shape)) % 9.0).reshape(shape, order="F"))
    nifti.read([path], "MR")  # imports and caches
    tracemalloc.start()
    try:
        nifti.read([path], "MR", volume=1)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 4 * np.prod(shape[:3]) + 2**24
    finally:
        tracemalloc.stop()


def _flip_header(whole: bytearray) -> None:
    for position in RNG.randint(0, min(352, len(whole)), 4):
        whole[position] = RNG.randint(256)


def _flip_anywhere(whole: bytearray) -> None:
    for position in RNG.randint(0, len(whole), 3):
        whole[position] ^= 1 << RNG.randint(8)


def _cut(whole: bytearray) -> None:
    del whole[RNG.randint(len(whole)) :]


def _repeat(whole: bytearray) -> None:
    start = RNG.randint(len(whole))
    whole[start:start] = whole[start // 2 : start]


@pytest.mark.parametrize("mutate", [_flip_header, _flip_anywhere, _cut, _repeat])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "two.nii", "a.hdr", "rgb.nii.gz"])
def test_every_damaged_file_is_refused_or_read(tmp_path: Path, name: str, mutate: Callable[[bytearray], None]) -> None:
    """Whatever the bytes, nothing but a ScanError comes out, and nothing is said but by it."""
    volume = np.stack([VOLUME, VOLUME], -1)
    image = {"two.nii": nib.Nifti2Image, "a.hdr": nib.Nifti1Pair}.get(name, nib.Nifti1Image)
    if name == "rgb.nii.gz":
        volume = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(image(volume, RAS), tmp_path / name)
    path = tmp_path / name
    whole = path.read_bytes()
    outcomes = []
    for _ in range(40):
        broken = bytearray(whole)
        mutate(broken)
        path.write_bytes(broken)
        try:
            for scan in nifti.find([nifti.read_header(path)])[0][:2]:
                nifti.read(scan.files, "CT", volume=scan.volume)
            outcomes.append("read")
        except ScanError:
            outcomes.append("refused")
    assert "refused" in outcomes


def test_nothing_is_printed(tmp_path: Path) -> None:
    """Not even what nibabel mends; in a process of its own, as pytest has handlers for whatever is logged."""
    path = save(tmp_path / "a.nii", VOLUME, sizeof_hdr=347, qform_code=77)
    code = f"from pathlib import Path; from medclr.scans import nifti; nifti.read([Path({str(path)!r})], 'CT')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_text_of_a_file_comes_out(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    marker = "MarkerDoe"
    image = nib.Nifti1Image(VOLUME, RAS)
    image.header.extensions.append(Nifti1Extension("comment", marker.encode()))
    for name in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[name] = marker.encode()
    nib.save(image, tmp_path / "a.nii")
    whole = (tmp_path / "a.nii").read_bytes()
    assert whole.count(marker.encode()) == 5
    said = []
    with caplog.at_level(logging.DEBUG):
        for position in range(0, 352, 2):  # whichever field is damaged
            broken = bytearray(whole)
            broken[position : position + 2] = b"\xff\x7f"
            (tmp_path / "b.nii").write_bytes(broken)
            try:
                said.append(repr(nifti.read_header(tmp_path / "b.nii")))
                said.append(repr(nifti.find([nifti.read_header(tmp_path / "b.nii")], Policy(volumes="refuse"))))
                said.append(nifti.read([tmp_path / "b.nii"], "CT").irregular)
            except ScanError as error:
                said.append(str(error))
    assert len(set(said)) > 10
    captured = capfd.readouterr()
    assert not any(marker in text for text in (*said, captured.out, captured.err, caplog.text))
    assert captured.err == ""


# Through the index


def test_index_takes_both_halves_of_a_pair_and_every_volume(tmp_path: Path) -> None:
    """The .img, which nobody could recognise, is part of its scan, hashed and watched; its names lead to it."""
    root, masks, key = tmp_path / "scans", tmp_path / "masks", tmp_path / "key"
    for folder in (root / "p1", root / "p2", masks):
        folder.mkdir(parents=True)
    nib.save(nib.Nifti1Pair(VOLUME, SQUARE), root / "p1" / "one.img")
    nib.save(nib.Nifti1Pair(VOLUME // 2, SQUARE), root / "p1" / "two.img.gz")
    nib.save(nib.Nifti1Image(np.stack([VOLUME, VOLUME // 3, VOLUME // 4], -1), SQUARE), root / "p2" / "series.nii.gz")
    for name in ("one", "two", "series"):
        nib.save(nib.Nifti1Image((VOLUME > 0).astype(np.uint8), SQUARE), masks / f"{name}.nii.gz")
    (root / "p2" / "lone.img").write_bytes(bytes(100))
    key.touch(mode=0o600)
    key.write_text("00" * 32)

    def run() -> tuple[Any, Any, list[str]]:
        index([root], tmp_path / "m.csv", masks=masks, modality="MR", patient_pattern=r"(p\d)", key_file=key)
        table = read_manifest(tmp_path / "m.csv", key)
        return table.rows, table.file_rows, [row.reason for row in read_rejected(tmp_path / "m.csv")]

    rows, file_rows, reasons = run()
    assert sorted((row.n_slices, row.volume) for row in rows) == [(6, 0), (6, 0), (6, 0), (6, 1), (6, 2)]
    assert len({row.scan_id for row in rows}) == 5
    assert reasons == [scans.NO_SCAN]
    files = [row for row in file_rows if row.kind == "image"]
    assert len(files) == 2 + 2 + 3
    assert run() == (rows, file_rows, reasons)  # from the manifest
    prepare(tmp_path / "m.csv", tmp_path / "store", size_px=8, keep_blank=True, key_file=key)
    store = Store(tmp_path / "store")
    assert (store.info.n_scans, store.info.n_rejected) == (5, 0)
    seen = set()
    for number, scan in enumerate(store.scans):
        rows = np.flatnonzero(store.column("scan") == number)
        content = np.s_[:, scan.content_top : scan.content_top + 5, scan.content_left : scan.content_left + 4]
        shown = store.physical(rows)[content]
        seen |= {(n, scan.volume) for n in (1, 2, 3, 4) if abs(shown - as_axial(VOLUME // n)).max() < 1}
        assert np.array_equal(store.masks(rows)[content], as_axial(VOLUME > 0))
    assert seen == {(1, 0), (2, 0), (3, 1), (4, 2)}
