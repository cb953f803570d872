"""PNG, JPEG and TIFF: grey values as stored, colour as luminance, damage refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from medclr import scans
from medclr.errors import ScanError
from medclr.scans import image

RNG = np.random.RandomState(0)
GREY8 = RNG.randint(0, 256, (5, 7)).astype(np.uint8)
GREY16 = RNG.randint(0, 65536, (5, 7)).astype(np.uint16)
RGB = RNG.randint(0, 256, (5, 7, 3)).astype(np.uint8)


def png(path: Path, depth: int, colour: int, rows: bytes, width: int, height: int) -> Path:
    """A PNG byte by byte (ISO/IEC 15948), for depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def read(path: Path) -> NDArray[np.float32]:
    header = image.read_header(path)
    assert header == image.read_header(path, path.read_bytes())
    scan = scans.read([path], "XR")  # through the dispatch by content
    assert header.shape == scan.voxels.shape == scan.source_shape
    assert (scan.spacing_mm, scan.modality) == ((1, 1, 1), "XR")
    assert np.array_equal(scan.affine, np.eye(4))
    return scan.voxels


@pytest.mark.parametrize("grey", [GREY8, GREY16, GREY8 > 127])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_is_exact_at_every_depth(tmp_path: Path, grey: NDArray[np.generic], suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    assert np.array_equal(read(path)[0], grey.astype(np.float32))


def test_grey_jpeg_is_what_the_decoder_gives(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.jpg", quality=95)
    assert np.array_equal(read(tmp_path / "a.jpg")[0], np.asarray(Image.open(tmp_path / "a.jpg"), dtype=np.float32))


def test_float_and_compressed_tiff(tmp_path: Path) -> None:
    real = RNG.standard_normal((5, 7)).astype(np.float32)
    Image.fromarray(real).save(tmp_path / "a.tif")
    assert np.array_equal(read(tmp_path / "a.tif")[0], real)
    Image.fromarray(GREY16).save(tmp_path / "b.tif", compression="tiff_lzw")
    assert np.array_equal(read(tmp_path / "b.tif")[0], GREY16.astype(np.float32))


def test_pages_are_slices(tmp_path: Path) -> None:
    pages = [GREY16, GREY16 // 2, GREY16 // 3]
    Image.fromarray(pages[0]).save(
        tmp_path / "a.tif", save_all=True, append_images=list(map(Image.fromarray, pages[1:]))
    )
    assert np.array_equal(read(tmp_path / "a.tif"), np.stack(pages).astype(np.float32))


def test_pages_of_different_size_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(GREY8[:3])])
    with pytest.raises(ScanError, match=r"a\.tif: its pages differ in size"):
        scans.read([tmp_path / "a.tif"], "XR")


@pytest.mark.parametrize("grey", [GREY8, GREY16])
def test_white_is_zero_is_turned_round(tmp_path: Path, grey: NDArray[np.generic]) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0  # PhotometricInterpretation: WhiteIsZero
    Image.fromarray(grey).save(tmp_path / "a.tif", tiffinfo=tags)
    with Image.open(tmp_path / "a.tif") as written:
        assert isinstance(written, TiffImagePlugin.TiffImageFile)
        if written.tag_v2[262] != 0:
            pytest.skip("this Pillow does not write WhiteIsZero")
        stored = np.frombuffer((tmp_path / "a.tif").read_bytes()[written.tag_v2[273][0] :][: grey.nbytes], grey.dtype)
    largest = np.iinfo(grey.dtype).max
    assert np.array_equal(read(tmp_path / "a.tif")[0], (largest - stored.reshape(grey.shape)).astype(np.float32))


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    r, g, b = (RGB[..., i].astype(float) for i in range(3))
    np.testing.assert_allclose(read(tmp_path / "a.png")[0], 0.299 * r + 0.587 * g + 0.114 * b, rtol=1e-6)


def test_grey_saved_as_colour_keeps_its_values(tmp_path: Path) -> None:
    Image.fromarray(np.stack([GREY8] * 3, axis=-1)).save(tmp_path / "rgb.png")
    Image.fromarray(GREY8).quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(np.stack([GREY8, np.full_like(GREY8, 255)], axis=-1)).save(tmp_path / "alpha.png")
    for name in ("rgb", "palette", "alpha"):
        assert np.array_equal(read(tmp_path / f"{name}.png")[0], GREY8.astype(np.float32)), name


def test_transparent_parts_lie_on_black(tmp_path: Path) -> None:
    alpha = np.where(GREY8 > 127, 255, 0).astype(np.uint8)
    Image.fromarray(np.stack([GREY8, alpha], axis=-1)).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png")[0], np.where(alpha > 0, GREY8, 0).astype(np.float32))


def test_16_bit_colour_is_refused_because_pillow_would_cut_it(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", depth=16, colour=2, rows=b"\0" + bytes(range(12)), width=2, height=1)
    with pytest.raises(ScanError, match="16-bit colour"):
        image.read_header(path)


def test_exif_orientation_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY8).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ScanError, match="EXIF"):
        image.read_header(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RNG.randint(0, 256, (64, 64)).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ScanError, match=rf"a\.{suffix}: "):
            image.read([path], "XR")


def test_a_forged_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", depth=8, colour=0, rows=b"\0", width=60_000, height=60_000)
    with pytest.raises(ScanError, match="pixels"):
        image.read_header(path)


def test_the_modality_must_be_told(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.png")
    with pytest.raises(ScanError, match="--modality"):
        image.read([tmp_path / "a.png"])


def test_a_bids_suffix_tells_the_modality(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "sub-01_dx.png")
    found, rejected = image.find([image.read_header(tmp_path / "sub-01_dx.png")])
    assert (found[0].modality, found[0].shape, rejected) == ("XR", (1, 5, 7), [])
