"""PNG, JPEG and TIFF: grey values as stored, colour as luminance, damage refused."""

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, TiffImagePlugin

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


# TIFF, written by another library

# Pillow knows no way to these, or a wrong one.
UNREADABLE = {("deflated", ">i2"), ("deflated", ">i4"), ("deflated", ">f4"), ("big", ">"), ("", ">u4"), ("", "f8")}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("layout", ["strips", "tiles", "deflated", "big"])
def test_tiff_of_any_type_order_and_layout(tmp_path: Path, dtype: str, order: str, layout: str) -> None:
    kind = np.dtype(order + dtype)
    pages = RNG.randint(-100, 100, (3, 40, 50)) + (0.5 if kind.kind == "f" else 100 if kind.kind == "u" else 0)
    pages = pages.astype(kind)
    if kind.kind != "f":
        pages[0, 0, :2] = np.iinfo(kind).min, np.iinfo(kind).max
    options: dict[str, Any] = {
        "tiles": {"tile": (16, 32)},
        "deflated": {"compression": "zlib"},
        "big": {"bigtiff": True},
    }
    path, more = tmp_path / "a.tif", options.get(layout, {})
    tifffile.imwrite(path, pages, byteorder=order, photometric="minisblack", predictor=False, **more)
    if {(layout, order + dtype), (layout, order), ("", order + dtype), ("", dtype)} & UNREADABLE:
        with pytest.raises(ScanError, match=r"save it as (PNG|little-endian)"):
            image.read_header(path)
    else:
        assert np.array_equal(read(path), pages.astype(np.float32))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    page = GREY8 > 127 if compression == "group4" else GREY16
    Image.fromarray(page).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(read(tmp_path / "a.tif")[0], page.astype(np.float32))


def test_real_numbers_in_tiff(tmp_path: Path) -> None:
    real = RNG.standard_normal((5, 7)).astype(np.float32)
    real[0, :2] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", real)
    scan = image.read([tmp_path / "a.tif"], "OT")
    assert scan.irregular == "2 of its 35 voxels are NaN, taken as air"
    assert np.array_equal(scan.voxels[0], np.nan_to_num(real))
    real[0, 0] = np.inf
    tifffile.imwrite(tmp_path / "a.tif", real)
    with pytest.raises(ScanError, match="infinite"):
        image.read([tmp_path / "a.tif"], "OT")
    tifffile.imwrite(tmp_path / "a.tif", real, photometric="miniswhite")
    with pytest.raises(ScanError, match="WhiteIsZero with real numbers"):
        image.read_header(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", GREY8.astype(np.uint32) + 2**31)
    with pytest.raises(ScanError, match="too fine for float32"):
        image.read([tmp_path / "a.tif"], "OT")


def test_colour_tiff_is_told_by_its_depth_and_not_by_its_offsets(tmp_path: Path) -> None:
    for width in (7, 16, 160):  # a line of 160 pixels has 16 in its number of bytes
        rgb = RNG.randint(0, 256, (16, width, 3)).astype(np.uint8)
        for compression in (None, "zlib"):
            tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", compression=compression)
            np.testing.assert_allclose(read(tmp_path / "a.tif")[0], rgb @ [0.299, 0.587, 0.114], rtol=1e-6)
    tifffile.imwrite(tmp_path / "a.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    with pytest.raises(ScanError, match="16-bit colour"):
        image.read_header(tmp_path / "a.tif")


def test_large_images_are_read_in_bands(tmp_path: Path) -> None:
    grey = RNG.randint(0, 256, (1500, 1600)).astype(np.uint8)  # of more than one band
    Image.fromarray(grey).save(tmp_path / "grey.png", compress_level=1)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "rgb.png", compress_level=1)
    for name in ("grey", "rgb"):
        assert np.array_equal(read(tmp_path / f"{name}.png")[0], grey.astype(np.float32))


def test_cmyk_is_refused(tmp_path: Path) -> None:
    Image.new("CMYK", (7, 5)).save(tmp_path / "a.jpg")
    with pytest.raises(ScanError, match="CMYK"):
        image.read_header(tmp_path / "a.jpg")


def test_each_page_is_looked_at(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY16, photometric="minisblack")
        file.write(RGB.astype(np.uint16), photometric="rgb")
    with pytest.raises(ScanError, match="16-bit colour"):
        image.read_header(tmp_path / "a.tif")


# Hostile


def test_pages_in_a_circle_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([GREY8, GREY8 // 2]), photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        first, second = (page.offset for page in file.pages)
    whole = bytearray(path.read_bytes())
    n_tags = struct.unpack_from("<H", whole, second)[0]
    struct.pack_into("<I", whole, second + 2 + 12 * n_tags, first)
    path.write_bytes(whole)
    assert np.array_equal(read(path), np.stack([GREY8, GREY8 // 2]).astype(np.float32))


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((5, 400, 400), np.uint8), compression="zlib", photometric="minisblack")
    assert image.read_header(path).shape == (5, 400, 400)
    monkeypatch.setattr(image, "_BOMB_PIXELS", 2**18)
    with pytest.raises(ScanError, match="800,000 pixels in a small file"):
        image.read_header(path)
    monkeypatch.setattr(image, "_MOST_PAGES", 4)
    with pytest.raises(ScanError, match="more than 4 pages"):
        image.read_header(path)
    Image.new("L", (2000, 2000)).save(tmp_path / "a.jpg", progressive=True)
    monkeypatch.undo()
    whole = (tmp_path / "a.jpg").read_bytes()
    last = whole.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(whole[:last] + whole[last:-2] * 300 + whole[-2:])
    with pytest.raises(ScanError, match=r"drawn in 30\d scans"):
        image.read_header(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.png", "palette.png", "a.jpg", "a.tif", "lzw.tif", "pages.tif"])
def test_every_damaged_file_is_refused_or_read(tmp_path: Path, name: str) -> None:
    """Whatever the bytes, nothing but a ScanError comes out."""
    path = tmp_path / name
    grey = Image.fromarray(RNG.randint(0, 256, (20, 30)).astype(np.uint8))
    picture = grey.quantize(16) if name == "palette.png" else grey
    options = {"lzw.tif": {"compression": "tiff_lzw"}, "pages.tif": {"save_all": True, "append_images": [grey]}}
    picture.save(path, **options.get(name, {}))
    whole = path.read_bytes()
    outcomes = []
    for number in range(120):
        broken = bytearray(whole)
        for position in RNG.randint(0, len(whole), 3):
            broken[position] = RNG.randint(256)
        if name.endswith("png") and number % 2:  # with the checksums mended, the damage is looked at
            broken = mended(broken)
        path.write_bytes(broken[: RNG.randint(1, len(whole))] if number % 10 == 0 else broken)
        try:
            image.read_header(path, path.read_bytes())
            image.read([path], "XR")
            outcomes.append("read")
        except ScanError:
            outcomes.append("refused")
    assert set(outcomes) == {"read", "refused"}


def mended(broken: bytearray) -> bytearray:
    """A PNG whose chunks have their right checksums, as far as its chunks can be told."""
    start = 8
    while start + 12 <= len(broken):
        end = start + 8 + int.from_bytes(broken[start : start + 4], "big")
        if end + 4 > len(broken):
            break
        broken[end : end + 4] = zlib.crc32(broken[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return broken


def test_no_text_of_a_file_comes_out(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    marker = "MarkerDoe"
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", marker)
    info.add_text("Comment", marker, zip=True)
    info.add_itxt("Title", marker)
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = marker  # ImageDescription, Artist
    picture = Image.fromarray(GREY8)
    picture.save(tmp_path / "a.png", pnginfo=info, exif=exif)
    picture.save(tmp_path / "a.jpg", exif=exif, comment=marker)
    picture.save(tmp_path / "a.tif", exif=exif)
    picture.save(tmp_path / "lzw.tif", exif=exif, compression="tiff_lzw")
    said = []
    with caplog.at_level(logging.INFO):
        for name in ("a.png", "a.jpg", "a.tif", "lzw.tif"):
            whole = (tmp_path / name).read_bytes()
            assert marker.encode() in whole
            for position in range(0, len(whole), 3):
                broken = bytearray(whole)
                broken[position : position + 2] = b"\xff\x7f"
                (tmp_path / "b").write_bytes(mended(broken) if name == "a.png" else broken)
                try:
                    said.append(repr(image.read_header(tmp_path / "b")))
                    said.append(image.read([tmp_path / "b"], "XR").irregular)
                except ScanError as error:
                    said.append(str(error))
    assert len(set(said)) > 5
    assert not any(marker in text for text in (*said, *capfd.readouterr(), caplog.text))
