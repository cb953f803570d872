"""PNG, JPEG and TIFF exports -> Scan. Grey stays grey at its full depth; colour becomes its luminance.

Such files record neither modality nor patient nor geometry: the caller says what they show, and spacing is (1,1,1).

Shape letters: D pages, H rows, W columns.
"""

import errno
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from medclr.errors import ScanError
from medclr.scans import bids
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found, Scan, naming
from medclr.scans.values import check_precision, fill_nan, luminance

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY = ("1", "L", "I", "I;16", "I;16B", "F")
_COLOUR = ("RGB", "RGBA", "LA", "P", "PA")
_EXIF_ORIENTATION = 0x0112
_COMPRESSION, _UNCOMPRESSED = 259, 1  # TIFF 6.0, section 8
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 339, 1, 2  # TIFF 6.0, section 19
_OTHER_BITS = {("TIFF", "L", _SIGNED): np.int8, ("TIFF", "I", _UNSIGNED): np.uint32}  # Pillow has no mode for these
_JPEG_SCAN = b"\xff\xda"  # marker SOS of ITU-T T.81; in the data, 0xff is followed by 0

_BAND_PIXELS = 2**20
_MOST_PAGES = 10_000
_MOST_JPEG_PIXELS = 2**30  # of all scans together: progressive files have about 10, each as much work as an image
_BOMB_PIXELS, _BOMB_RATIO = 2**26, 100  # what is larger and has fewer bytes a pixel than 1 in 100 holds nothing


@dataclass(frozen=True)
class Header:
    """What an image file says of itself, checked."""

    path: Path
    shape: tuple[int, int, int]
    """(D,H,W)."""
    series: None = None
    """Each file is a scan of its own."""


def is_image(head: bytes) -> bool:
    """Whether a file that starts like this is PNG, JPEG or TIFF."""
    return head.startswith(_MAGIC)


def read_header(path: Path, data: bytes | None = None) -> Header:
    """Read and check a header, without the pixels.

    Args:
        path: the file.
        data: its bytes, if the caller has them already.

    Raises:
        ScanError: the header is damaged, or the pixels could not be read without losing depth.
    """
    with _opened(path, data) as image:
        return Header(path, _shape(path, image))


def find(
    headers: Sequence[Header], policy: Policy = DEFAULT, plane: Plane | None = None
) -> tuple[list[Found], list[tuple[Path, str]]]:
    """Each file is one scan."""
    found = [
        Found(
            files=(header.path,),
            modality=bids.modality(header.path.name),
            patient="",
            study="",
            series="",
            body_part="",
            plane="",
            shape=header.shape,
            spacing_mm=(1.0, 1.0, 1.0),
        )
        for header in headers
    ]
    return found, []


def read(
    files: Sequence[Path],
    modality: str | None = None,
    *,
    volume: int = 0,
    plane: Plane | None = None,
    policy: Policy = DEFAULT,
) -> Scan:
    """Read one image; the pages of a TIFF are its slices. NaN, in a TIFF of real numbers, is taken for air.

    Args:
        files: exactly one file.
        modality: a key of ``MODALITIES``.

    Raises:
        ScanError: the file is damaged, its pages differ in size, its values are infinite or cannot be told apart in
            float32, or the modality was not given.
    """
    path, *others = files
    with naming(path):
        if others:
            raise ScanError(f"is a scan without the {len(others)} other files")
        if modality is None:
            raise ScanError("does not record its modality; give it with --modality")
        with _opened(path) as image:
            voxels = np.empty(_shape(path, image), dtype=np.float32)  # [D,H,W]
            for number, page in enumerate(voxels):
                image.seek(number)
                _decode(image, page)
        irregular = fill_nan(voxels, modality)
        return Scan(voxels, np.eye(4), (1.0, 1.0, 1.0), modality, voxels.shape, irregular=irregular)


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[ImageFile.ImageFile]:
    """The image; whatever Pillow makes of damage becomes a ScanError, and never quotes the texts in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if data is None else io.BytesIO(data), formats=_FORMATS) as image:
                if image.format == "JPEG":
                    _refuse_scans(path.read_bytes() if data is None else data, image.width * image.height)
                yield image
    except (ScanError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ScanError("is no PNG, JPEG or TIFF that can be read; save it as PNG") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ScanError(f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels; save it smaller") from error
    except Exception as error:  # Pillow has no class of its own for damage
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's trouble, not the file's; but EINVAL is a place that no file has
        raise ScanError("is damaged or ends early; copy it again") from error


def _refuse_scans(data: bytes, n_pixels: int) -> None:
    """Raise if a JPEG draws itself over and over, which can take hours."""
    if (n_scans := data.count(_JPEG_SCAN)) * n_pixels > _MOST_JPEG_PIXELS:
        raise ScanError(f"is a JPEG that is drawn in {n_scans} scans, one over the other; save it anew")


def _shape(path: Path, image: ImageFile.ImageFile) -> tuple[int, int, int]:
    """(D,H,W), after a look at each page; the last one is left open.

    Only a TIFF's pages are slices; the frames of an animated PNG or the previews in a JPEG are not.
    """
    _refuse(image)
    size, n_pages = image.size, 1
    while image.format == "TIFF":
        try:
            image.seek(n_pages)
        except EOFError:
            break
        _refuse(image)
        if image.size != size:
            raise ScanError("its pages differ in size; save each to a file of its own")
        n_pages += 1
        if n_pages > _MOST_PAGES:
            raise ScanError(f"has more than {_MOST_PAGES:,} pages; divide it")
    n_pixels = n_pages * size[0] * size[1]
    if n_pixels > max(_BOMB_PIXELS, _BOMB_RATIO * path.stat().st_size):
        raise ScanError(f"claims {n_pixels:,} pixels in a small file: it holds next to nothing")
    return n_pages, size[1], size[0]


def _refuse(image: ImageFile.ImageFile) -> None:
    """Raise if the pixels could not be taken as they are."""
    if image.mode not in _GREY + _COLOUR:
        raise ScanError(f"holds {image.mode} pixels; save it as grey or RGB")
    if image.mode in _COLOUR:
        arguments = image.tile[0].args
        raw_mode = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
        if ";16" in str(raw_mode):  # such as RGB;16B; the mode alone does not tell
            raise ScanError("holds 16-bit colour, which would be cut to 8; save it as 16-bit grey")
    if image.mode == "F" and _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ScanError("is WhiteIsZero with real numbers, which have no highest value to turn round")
    is_big_endian = getattr(getattr(image, "tag_v2", None), "prefix", b"") == b"MM"
    if is_big_endian and image.mode in ("I", "F") and _tag(image, _COMPRESSION) != _UNCOMPRESSED:
        # Pillow turns the bytes of these once too often.
        raise ScanError("is a compressed big-endian TIFF of signed or real numbers; save it as little-endian")
    # Asked of a PNG without EXIF, Pillow would decode it all in search of one.
    if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        raise ScanError("is turned by its EXIF orientation; save it upright, so that every program sees it alike")


def _tag(image: Image.Image, number: int) -> Any:
    """The first value of a TIFF tag; None in other formats, or if there is none."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _decode(image: ImageFile.ImageFile, page: NDArray[np.float32]) -> None:
    """Grey values as the file stores them, or the luminance of colours, into [H,W]; band by band, to save memory."""
    bits = _OTHER_BITS.get((str(image.format), image.mode, _tag(image, _SAMPLE_FORMAT) or _UNSIGNED))
    # Pillow turns WhiteIsZero round at 8 bits, but not at 16.
    is_inverted = image.mode.startswith("I;16") and _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        here = page[top : top + rows]  # [h,W]
        if image.mode in _COLOUR:
            here[...] = luminance(np.asarray(band.convert("RGBA" if band.has_transparency_data else "RGB")))
        else:
            stored = np.asarray(band)  # [h,W]
            here[...] = stored if bits is None else stored.view(bits)
        if is_inverted:
            np.subtract(65535, here, out=here)
    if image.mode == "I":
        check_precision(float(page.min()), float(page.max()))
