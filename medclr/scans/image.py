"""PNG, JPEG and TIFF exports -> Scan. Grey stays grey at its full depth; colour becomes its luminance.

Such files record neither modality nor patient nor geometry: the caller says what they show, and spacing is (1,1,1).

Shape letters: D pages, H rows, W columns.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageSequence, UnidentifiedImageError

from medclr.errors import ScanError
from medclr.scans import bids
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found, Scan, naming

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY = ("1", "L", "I", "I;16", "I;16B", "F")
_COLOUR = ("RGB", "RGBA", "LA", "P", "PA")
_BT601 = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, of R, G and B
_EXIF_ORIENTATION = 0x0112
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF 6.0, section 8


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
        return Header(path, (_pages(image), image.height, image.width))


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
    """Read one image; the pages of a TIFF are its slices.

    Args:
        files: exactly one file.
        modality: a key of ``MODALITIES``.

    Raises:
        ScanError: the file is damaged, its pages differ in size, or the modality was not given.
    """
    (path,) = files
    with naming(path):
        if modality is None:
            raise ScanError("does not record its modality; give it with --modality")
        with _opened(path) as image:
            if _pages(image) == 1:
                pages = [_luminance(image)]
            else:
                pages = [_luminance(page) for page in ImageSequence.Iterator(image)]
        if len({page.shape for page in pages}) > 1:
            raise ScanError("its pages differ in size; save each to a file of its own")
        voxels = np.stack(pages)  # [D,H,W]
        return Scan(voxels, np.eye(4), (1.0, 1.0, 1.0), modality, voxels.shape)


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[ImageFile.ImageFile]:
    """The image, refused if it cannot be read whole and at full depth; whatever Pillow raises becomes a ScanError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path if data is None else io.BytesIO(data), formats=_FORMATS)
        with image:
            _refuse(image)
            yield image
    except UnidentifiedImageError as error:
        raise ScanError("is no PNG, JPEG or TIFF that can be read; save it as PNG") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ScanError(f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels; save it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError) as error:  # as damage may be
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the file's
        raise ScanError(f"is damaged or ends early ({error}); copy it again") from error


def _refuse(image: ImageFile.ImageFile) -> None:
    """Raise if the pixels could not be taken as they are."""
    if image.mode not in _GREY + _COLOUR:
        raise ScanError(f"holds {image.mode} pixels; save it as grey or RGB")
    if image.mode in _COLOUR and "16" in str(image.tile[0].args):  # such as RGB;16B; the mode alone does not tell
        raise ScanError("holds 16-bit colour, which would be cut to 8; save it as 16-bit grey")
    # Asked of a PNG without EXIF, Pillow would decode it all in search of one.
    if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        raise ScanError("is turned by its EXIF orientation; save it upright, so that every program sees it alike")


def _pages(image: Image.Image) -> int:
    """A TIFF's pages are slices; the frames of an animated PNG or the previews in a JPEG are not."""
    return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1


def _luminance(image: Image.Image) -> NDArray[np.float32]:
    """[H,W] grey values as the file stores them; transparent parts lie on black."""
    if image.mode in _GREY:
        grey: NDArray[np.float32] = np.asarray(image).astype(np.float32)  # [H,W]
        is_inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        # Pillow itself turns WhiteIsZero round at 8 bits, but not at 16.
        return 65535 - grey if is_inverted and image.mode.startswith("I;16") else grey
    has_alpha = image.has_transparency_data
    channels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"), dtype=np.float64)  # [H,W,3 or 4]
    luminance = channels[..., :3] @ _BT601  # [H,W]
    if has_alpha:
        luminance *= channels[..., 3] / 255
    return np.asarray(luminance, dtype=np.float32)
