"""What to do with scans that are not plain: one decision a trap, taken when scans are found, always reported.

``medclr index --policy.missing refuse`` sets one of them. What was let in although it is not plain says so in the
manifest's column ``irregular``; what was not stands among the rejects with the reason.
"""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from medclr.errors import MedclrError

Plane = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True)
class Policy:
    """The defaults lose nothing that can be read exactly: a stack is divided where it stops being a regular grid."""

    missing: Literal["refuse", "split", "allow"] = "split"
    """Slices missing from an even stack: refuse it, split it at the gaps, or allow it as if they were neighbours."""

    spacing: Literal["refuse", "split", "allow"] = "split"
    """Slices unevenly spaced: refuse the stack, split it into even ones, or allow it with the usual spacing."""

    tilt: Literal["refuse", "allow"] = "allow"
    """Slices stacked off their normal (gantry tilt): refuse, or allow them with an affine that is sheared, exactly."""

    sizes: Literal["refuse", "split"] = "split"
    """Slices of several sizes in what would be one scan: refuse all, or split them into scans of one size each."""

    volumes: Literal["refuse", "first", "all"] = "all"
    """A file with several volumes (4D NIfTI, enhanced DICOM): refuse it, read the first, or all, each as a scan."""

    burned_in: Literal["refuse", "allow"] = "refuse"
    """Burned In Annotation (0028,0301) is YES: a name may stand in the picture. Refuse the file, or allow it."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Policy).items():
            if (choice := getattr(self, name)) not in get_args(kind):
                raise MedclrError(f"policy.{name} {choice!r}: is none of {', '.join(get_args(kind))}")


DEFAULT = Policy()

ACCEPTED = Policy("allow", "allow", "allow", "split", "all", "allow")
"""For the files of one scan that was accepted before: nothing is decided twice."""
