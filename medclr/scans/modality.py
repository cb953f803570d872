"""One row a modality: what its numbers mean, how it is shown, and which augmentations leave it plausible.

A new modality is a new row here; readers, the slice store, the views and the figures all ask this table.
"""

from dataclasses import dataclass
from typing import Literal

from medclr.errors import MedclrError


@dataclass(frozen=True)
class Window:
    """A display window (DICOM PS3.3 C.11.2.1.2), in the modality's physical units."""

    name: str
    center: float
    width: float


@dataclass(frozen=True)
class Modality:
    """How medclr treats scans of one modality."""

    name: str
    """The key, and the value of the manifest's ``modality`` column."""

    dicom: tuple[str, ...]
    """Values of DICOM Modality (0008,0060), PS3.3 C.7.3.1.1.1, that belong to this row."""

    aliases: tuple[str, ...]
    """What NIfTI side files (BIDS suffixes, Decathlon's dataset.json) call it, lower case."""

    scaling: Literal["window", "percentile"]
    """How physical values become [0,1]: a display window in absolute units, or robust percentiles of the scan."""

    air: float | None
    """Physical value of nothing, used to pad; None: the scan's own minimum."""

    windows: tuple[Window, ...] = ()
    """Clinical windows around which the augmentation draws (``scaling="window"``)."""

    display: Window | None = None
    """The window of pictures and of evaluation (``scaling="window"``)."""

    flip_lr: bool = False
    """Whether a mirrored image is still a plausible scan: not where the side of the heart or liver carries meaning."""

    flip_ud: bool = False
    """Whether an upside-down image is still a plausible scan."""

    rotation_deg: float = 10.0
    """Largest plausible rotation, either way."""


_CT_WINDOWS = (
    Window("soft tissue", 40, 400),
    Window("lung", -600, 1500),
    Window("bone", 500, 2000),
    Window("liver", 60, 160),
    Window("brain", 40, 80),
    Window("mediastinum", 50, 350),
)

MODALITIES: dict[str, Modality] = {
    row.name: row
    for row in (
        Modality(
            "CT", dicom=("CT",), aliases=("ct",), scaling="window", air=-1024.0, windows=_CT_WINDOWS,
            display=Window("abdomen wide", 0, 1000), rotation_deg=10,
        ),
        Modality(
            "MR", dicom=("MR",), aliases=("mr", "mri", "t1w", "t2w", "flair", "t1", "t2", "pd", "pdw", "dwi", "adc",
                                          "t2star", "t2starw", "bold", "swi", "inplanet1", "inplanet2"),
            scaling="percentile", air=0.0, flip_lr=True, rotation_deg=15,
        ),
        Modality(
            "XR", dicom=("CR", "DX", "RG", "RF", "XA", "MG", "IO", "PX"),
            aliases=("xr", "cxr", "dx", "cr", "x-ray", "xray"), scaling="percentile", air=0.0, rotation_deg=10,
        ),
        Modality("US", dicom=("US", "IVUS"), aliases=("us", "ultrasound"), scaling="percentile", air=0.0, flip_lr=True,
                 rotation_deg=10),
        Modality("PT", dicom=("PT",), aliases=("pet", "pt"), scaling="percentile", air=0.0, rotation_deg=10),
        Modality("NM", dicom=("NM",), aliases=("nm", "spect"), scaling="percentile", air=0.0, rotation_deg=10),
        Modality("OT", dicom=("OT", "SC", "ES", "XC", "OP", "GM", "SM"), aliases=("ot", "other"), scaling="percentile",
                 air=0.0),
    )
}  # fmt: skip


def modality_of(text: str) -> Modality:
    """The row for a DICOM code or any alias, case-insensitively.

    Raises:
        MedclrError: no row knows the word.
    """
    word = text.strip()
    for row in MODALITIES.values():
        if word.upper() == row.name or word.upper() in row.dicom or word.lower() in row.aliases:
            return row
    known = ", ".join(MODALITIES)
    raise MedclrError(f"modality {text!r} is unknown; choose one of {known}, or add a row to medclr/scans/modality.py")
