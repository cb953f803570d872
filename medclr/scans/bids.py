"""What names say in the Brain Imaging Data Structure (BIDS 1.10, "Common principles"): the subject and the suffix."""

import re

from medclr.errors import MedclrError
from medclr.scans.modality import modality_of

SEGMENTATIONS = ("dseg", "probseg", "mask")
"""Suffixes of derivatives that are masks, not scans."""

_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[_/])")
_SUFFIX = re.compile(r"(?:^|/)sub-[A-Za-z0-9]+_(?:[^/]*_)?([A-Za-z0-9]+)\.[^/]+$")


def subject(path: str) -> str:
    """``sub-01/anat/sub-01_T1w.nii.gz`` -> ``sub-01``; '' where no part of the path names one."""
    match = _SUBJECT.search(path)
    return match[1] if match else ""


def suffix(path: str) -> str:
    """``sub-01_ses-2_T1w.nii.gz`` -> ``T1w``; '' for other names."""
    match = _SUFFIX.search(path)
    return match[1] if match else ""


def modality(path: str) -> str | None:
    """``sub-01_T1w.nii.gz`` -> ``MR``; None where the suffix is no modality's (``MODALITIES``, aliases)."""
    try:
        return modality_of(suffix(path)).name
    except MedclrError:
        return None
