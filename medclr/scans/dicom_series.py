"""DICOM headers -> scans: which files belong together, and where their slices lie in space.

Neither a file name nor InstanceNumber is trusted: slices are ordered by ImagePositionPatient along their normal
(PS3.3 C.7.6.2.1.1), and a stack that is not a regular grid is refused with the reason.

DICOM's world is LPS (x to the left, y to the back, z to the head); a Scan's is RAS, so x and y change sign.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.dicom_header import TELLING, Header, Vector
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found


@dataclass(frozen=True)
class Grid:
    """Where the slices of one scan lie."""

    order: tuple[int, ...]
    """Index of the slice that comes first along the normal, of the second, ..."""
    affine: NDArray[np.float64]
    """[4,4], index (d,h,w,1) of the ordered slices to RAS mm."""
    spacing_mm: Vector
    plane: str


# Positions written with one decimal are off by up to half a tenth each; no two slices lie this close.
_ROUNDING_MM = 0.1
_SAME_MM = 0.01
_PARALLEL = 1e-3  # 1 - cosine; 2.6 degrees


def grid(headers: Sequence[Header]) -> Grid:
    """Order slices along their normal and check that they form a regular grid.

    The checks are those of ``highdicom.spatial.get_series_volume_positions``, with the reason for a refusal; spacings
    may differ by 1 %, or by the rounding of positions to a tenth of a millimetre if that is less than a quarter slice.

    Raises:
        ScanError: slices at the same position, missing, unevenly spaced, tilted, or shifted against each other.
    """
    first = headers[0]
    between_rows, between_columns = first.pixel_spacing_mm or (1.0, 1.0)
    points = np.array([point for header in headers for point in header.positions])  # [n,3] LPS
    if not len(points):
        count = sum(header.frames for header in headers)
        spacing = (1.0, between_rows, between_columns)
        return Grid(tuple(range(count)), np.diag([*spacing, 1.0]), spacing, "")

    across, down = _axes(headers)
    normal = np.cross(across, down)
    along = points @ normal  # [n]
    order = np.argsort(along, kind="stable")
    step = normal * first.thickness_mm
    if len(points) > 1:
        points, gaps = points[order], np.diff(along[order])
        usual = float(np.median(gaps))
        if gaps.min() < _SAME_MM:
            shared = int((gaps < _SAME_MM).sum())
            raise ScanError(f"{shared} of {len(points)} slices lie where another does; nothing tells volumes apart")
        worst = float(gaps[np.abs(gaps - usual).argmax()])
        if abs(worst - usual) > max(0.01 * usual, min(_ROUNDING_MM, usual / 4) + 1e-6):
            missing = int(np.maximum(np.rint(gaps / gaps.min()) - 1, 0).sum())
            hint = f"; {missing} of {len(points) + missing} slices seem to be missing" if worst > 1.5 * usual else ""
            raise ScanError(f"slices are {worst:.4g} mm apart where {usual:.4g} mm is usual{hint}")
        step = (points[-1] - points[0]) / (len(points) - 1)
        cosine = float(step @ normal) / float(np.linalg.norm(step))
        if 1 - cosine > _PARALLEL:
            angle = np.degrees(np.arccos(cosine))
            raise ScanError(
                f"slices are stacked {angle:.1f} degrees off their normal (gantry tilt); resample them first"
            )
        off = points - (points[0] + np.arange(len(points))[:, None] * step)  # [n,3]
        shift = float(np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1).max())
        if shift > max(0.01 * usual, _ROUNDING_MM):
            raise ScanError(f"slices are shifted sideways against each other by up to {shift:.3g} mm")

    affine = np.eye(4)
    affine[:3] = np.stack([step, down * between_rows, across * between_columns, points[0]], axis=1)
    affine[:2] *= -1  # LPS to RAS
    spacing = (float(np.linalg.norm(step)), between_rows, between_columns)
    return Grid(tuple(order.tolist()), affine, spacing, _plane(normal))


def _axes(headers: Sequence[Header]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row and along a column. They may differ in the last digits from slice to slice."""
    across, down = np.median([header.orientation for header in headers], axis=0).reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(across @ down) > 1e-2:
        raise ScanError("has an Image Orientation (Patient) that is not two perpendicular unit vectors")
    return across / lengths[0], down / lengths[1]


def _plane(normal: NDArray[np.float64]) -> str:
    axis = int(np.abs(normal).argmax())
    return ("sagittal", "coronal", "axial")[axis] if abs(normal[axis]) > 0.8 else "oblique"


def find(
    headers: Iterable[Header], policy: Policy = DEFAULT, plane: Plane | None = None
) -> tuple[list[Found], list[tuple[Path, str]]]:
    """Group files into scans.

    A series (PS3.3 A.1.2.3) may hold several: it is divided by matrix, spacing, orientation, image type and echo, and,
    where slices share positions, by whatever tells the volumes apart. Radiographs, ultrasound, images without a place
    in space, and multi-frame files are one scan each.

    Returns:
        the scans, and (file, reason) for every file that is in none. Both are in the order of the paths.
    """
    scans: list[tuple[str, list[Header]]] = []
    rejects: list[tuple[Path, str]] = []
    stacks: dict[tuple[object, ...], list[Header]] = defaultdict(list)
    seen: dict[tuple[object, ...], Header] = {}
    for header in sorted(headers, key=lambda header: header.path):
        copy = seen.setdefault((header.patient, header.instance, header.positions), header)
        if header.instance and copy is not header:
            rejects.append((header.path, f"is a copy of {copy.path.name} (same SOP Instance UID and position)"))
        elif header.frames == 1 and header.positions:
            series = header.series or str(header.path.parent)
            stacks[(header.patient, header.study, series, header.modality, header.rows, header.columns, header.samples,
                    header.pixel_spacing_mm, header.image_type, header.echo)].append(header)  # fmt: skip
        else:
            scans.append((header.instance, [header]))
    for key, stack in stacks.items():
        for orientation, parallel in _by_orientation(stack):
            part = "|".join(map(str, (*key[4:], orientation)))
            scans += [(part + told, volume) for told, volume in _by_telling(parallel)]

    found = []
    for part, scan in scans:
        try:
            found.append(_found(scan, part))
        except ScanError as error:
            rejects += [(header.path, str(error)) for header in scan]
    return sorted(found, key=lambda scan: scan.files), sorted(rejects)


def _found(scan: Sequence[Header], part: str) -> Found:
    place, first = grid(scan), scan[0]
    return Found(
        files=tuple(scan[i].path for i in place.order) if len(scan) > 1 else (first.path,),
        modality=first.modality,
        patient=first.patient,
        study=first.study,
        series=f"{first.series}|{part}" if first.series or first.instance else "",
        body_part=first.body_part,
        plane=place.plane,
        shape=(len(place.order), first.rows, first.columns),
        spacing_mm=place.spacing_mm,
    )


def _by_orientation(stack: Sequence[Header]) -> list[tuple[str, list[Header]]]:
    """Divide by orientation. Rounding could part two that differ in the last digit, so each joins the first alike."""
    groups: list[tuple[NDArray[np.float64], list[Header]]] = []
    of: dict[tuple[float, ...], list[Header]] = {}
    for header in stack:
        if header.orientation not in of:
            cosines = np.array(header.orientation)
            alike = next((members for axes, members in groups if np.abs(axes - cosines).max() < 1e-3), None)
            if alike is None:
                alike = []
                groups.append((cosines, alike))
            of[header.orientation] = alike
        of[header.orientation].append(header)
    return [("\\".join(f"{c:.2f}" for c in axes), members) for axes, members in groups]


def _by_telling(stack: list[Header]) -> list[tuple[str, list[Header]]]:
    """Divide slices that share positions into volumes by the first element that keeps sharers apart.

    An element with more values than slices share a position (a clock time, say) tells slices, not volumes.
    """
    shared = _shared(stack)
    if shared > 1:
        for i, name in enumerate(TELLING):
            parts: dict[bytes, list[Header]] = defaultdict(list)
            for header in stack:
                parts[header.telling[i]].append(header)
            if 1 < len(parts) <= shared and all(_shared(part) < shared for part in parts.values()):
                return [
                    (f"|{name}={value.decode('latin-1')}{told}", volume)
                    for value, part in parts.items()
                    for told, volume in _by_telling(part)
                ]
    return [("", stack)]


def _shared(stack: Sequence[Header]) -> int:
    """The largest number of slices at one position along the normal."""
    normal = np.cross(*np.array(stack[0].orientation).reshape(2, 3))
    along = np.sort(np.array([header.positions[0] for header in stack]) @ normal)
    plane = np.cumsum(np.diff(along, prepend=along[0]) >= _SAME_MM)
    return int(np.bincount(plane).max())
