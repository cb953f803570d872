"""DICOM -> Scan.

``dicom_header.py`` says what a file is and ``dicom_frames.py`` where its frames lie, ``dicom_series.py`` which of them
make a scan and ``dicom_geometry.py`` on which grid; ``dicom_syntax.py`` checks what a file announces against what it
holds, and ``dicom_pixels.py`` brings its pixels to physical values. What cannot be read with certainty is refused.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medclr.errors import ScanError
from medclr.scans.dicom_header import Header, read_header, read_whole
from medclr.scans.dicom_pixels import physical
from medclr.scans.dicom_series import Volume, candidates, find, volumes_of
from medclr.scans.dicom_values import unheard
from medclr.scans.modality import MODALITIES, Modality, Window
from medclr.scans.policy import ACCEPTED, DEFAULT, Plane, Policy
from medclr.scans.scan import Scan, naming
from medclr.scans.values import fill_nan

__all__ = ["Header", "find", "is_dicom", "read", "read_header", "volume_of"]

_VRS = (b"UL", b"UI", b"CS", b"OB", b"SH", b"DA", b"TM", b"LO", b"US", b"ST", b"PN", b"SQ", b"DT", b"AE", b"UN")


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (132 bytes or more) looks like DICOM, also without its preamble."""
    if head[128:132] == b"DICM":
        return True
    for order in ("little", "big"):
        group, element = (int.from_bytes(head[i : i + 2], order) for i in (0, 2))
        if group in (0x0002, 0x0008) and element <= 0x0060 and len(head) >= 8:
            implicit = order == "little" and int.from_bytes(head[4:8], "little") <= 64
            if head[4:6] in _VRS or implicit:
                return True
    return False


def read(
    files: Sequence[Path],
    modality: str | None = None,
    *,
    volume: int = 0,
    plane: Plane | None = None,
    policy: Policy = DEFAULT,
) -> Scan:
    """Decode the files of one scan, in any order.

    Args:
        files: the slices of one volume, or one image or multi-frame file, as ``find`` gives them.
        modality: a key of MODALITIES; only needed where the files do not say.
        volume: which volume of a multi-frame file (``Found.volume``); only its frames are decoded.
        plane: not used; slices are as they were acquired.
        policy: what to do if the files are not plain, as for ``find``.

    Returns:
        voxels [D,H,W]: rows and columns as stored, slices along the normal; after the modality LUT, so CT is in exact
        Hounsfield units. MONOCHROME1 is turned round (x -> lowest + highest representable value - x), but not where
        grey levels are measurements (CT, PT, NM). Colour becomes luminance. Padding, and NaN in floating-point pixels,
        become the modality's air. PET and nuclear medicine keep the units that the file records; standardised uptake
        values are left to the user. Frames that the file does not put into space, such as those of a cine loop, are
        slices in the order of the file, with their pixel spacing if it is known. ``window`` is that of the middle
        slice.

    Raises:
        ScanError: the files are not exactly one scan, or their pixels cannot be read with certainty.
    """
    files = [Path(file) for file in files]
    if not files:
        raise ScanError("no DICOM files were given")
    with unheard():
        datasets, headers = {}, []
        for file in files:
            with naming(file):
                datasets[file], header = read_whole(file)
            headers.append(header)
        chosen = volume_of(files, headers, volume, policy)
        row = _modality(files[0], chosen.found.modality, modality)

        voxels = np.empty(chosen.found.shape, dtype=np.float32)  # [D,H,W]
        window: Window | None = None
        slots: dict[Path, dict[int, int]] = defaultdict(dict)  # frame of a file -> place along the normal
        for slot, frame in enumerate(chosen.frames):
            slots[frame.header.path][frame.number] = slot
        for file, header in zip(files, headers, strict=True):
            dataset = datasets.pop(file)  # memory holds the files still to come, not all of them
            indices = sorted(slots[file])
            with naming(file):
                for index, (values, shown) in zip(indices, physical(dataset, header, row, indices), strict=True):
                    slot = slots[file][index]
                    voxels[slot] = values
                    window = shown if slot == len(voxels) // 2 else window
        is_finite = np.isfinite([voxels.min(), voxels.max()]).all()  # both would be NaN if a voxel were
    with naming(files[0]):
        notes = filter(None, [chosen.found.irregular, "" if is_finite else fill_nan(voxels, row.name)])
        return Scan(
            voxels,
            chosen.grid.affine,
            chosen.grid.spacing_mm,
            row.name,
            source_shape=voxels.shape,
            irregular="; ".join(notes),
            window=window,
        )


def volume_of(files: Sequence[Path], headers: Sequence[Header], volume: int, policy: Policy) -> Volume:
    """The volume that the files hold, or that was asked for.

    Raises:
        ScanError: they are not exactly one scan, or have no such volume.
    """
    volumes, rejects = volumes_of(headers, policy)
    if policy == ACCEPTED and len(files) == 1 and (known := candidates(headers[0])):
        volumes, rejects = known, []  # one of these was accepted, under whatever policy
    if rejects:
        raise ScanError(f"{rejects[0][0]}: {rejects[0][1]}")
    if len(files) > 1:
        if len(volumes) != 1 or volume:
            raise ScanError(f"{files[0]}: the {len(files)} files hold {len(volumes)} scans; give those of one")
        return volumes[0]
    numbers = {each.found.volume: each for each in volumes}
    if volume not in numbers:
        there = ", ".join(map(str, sorted(numbers)))
        raise ScanError(f"{files[0]}: has no volume {volume}; there are {there}")
    return numbers[volume]


def _modality(file: Path, recorded: str | None, given: str | None) -> Modality:
    if given and recorded and given != recorded:
        raise ScanError(f"{file}: was announced as {given} and says that it is {recorded}")
    name = given or recorded
    if name is None:
        raise ScanError(f"{file}: does not say its modality; give one of {', '.join(MODALITIES)}")
    if name not in MODALITIES:
        raise ScanError(f"{file}: modality {name!r} is unknown; give one of {', '.join(MODALITIES)}")
    return MODALITIES[name]
