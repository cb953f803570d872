"""Parallel slices -> regular grids (PS3.3 C.7.6.2.1.1).

Slices are ordered by ImagePositionPatient along their normal. Where the stack is no regular grid, a policy says whether
it is refused, divided, or let in as it is; a grid says what is not plain about it.

DICOM's world is LPS (x to the left, y to the back, z to the head); a Scan's is RAS, so x and y change sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.dicom_frames import Slice, Vector
from medclr.scans.policy import Policy

# Positions written with one decimal are off by up to half a tenth each; no two slices lie this close.
_ROUNDING_MM = 0.1
_SAME_MM = 0.01
_PARALLEL = 1e-3  # 1 - cosine; 2.6 degrees


@dataclass(frozen=True)
class Grid:
    """Where the slices of one scan lie."""

    order: tuple[int, ...]
    """Index of the slice that comes first along the normal, of the second, ..."""
    affine: NDArray[np.float64]
    """[4,4], index (d,h,w,1) of the ordered slices to RAS mm."""
    spacing_mm: Vector
    plane: str
    irregular: str
    """What is not plain about it; '' if nothing."""


@dataclass(frozen=True)
class Stack:
    """Slices in order, and what lies between each and the next."""

    order: NDArray[np.intp]  # [n]
    points: NDArray[np.float64]  # [n,3] LPS mm, ordered
    along: NDArray[np.float64]  # [n] mm along the normal, rising
    usual_mm: float
    """The distance along the normal that most slices have from the next; 0 for a single slice."""
    missing: NDArray[np.int64]  # [n-1] slices missing before the next
    uneven: NDArray[np.bool_]  # [n-1] whether the next is neither at the usual distance nor at a multiple of it

    def __len__(self) -> int:
        return len(self.order)

    def gap(self) -> str:
        """How many slices are missing; '' if none is."""
        count = int(self.missing.sum())
        return f"{count} of {len(self) + count} slices {'is' if count == 1 else 'are'} missing" if count else ""

    def unevenness(self) -> str:
        """How the spacing varies; '' if it does not."""
        gaps = np.diff(self.along)
        if self.uneven.any():
            worst = gaps[np.where(self.uneven, np.abs(gaps - self.usual_mm), -1).argmax()]
            return f"slices are {worst:.4g} mm apart where {self.usual_mm:.4g} mm is usual"
        if len(self) > 2 and not self.missing.any():
            steps = self.along - np.linspace(self.along[0], self.along[-1], len(self))
            if np.abs(steps).max() > _tolerance(self.usual_mm) + _ROUNDING_MM:
                return f"slices drift by up to {np.abs(steps).max():.3g} mm from an even spacing"
        return ""


def axes(slices: Sequence[Slice]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row, along a column, and along the normal. Slices may differ in the last digits."""
    across, down = np.median([slice_.orientation for slice_ in slices], axis=0).reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(across @ down) > 1e-2:
        raise ScanError("has an Image Orientation (Patient) that is not two perpendicular unit vectors")
    across, down = across / lengths[0], down / lengths[1]
    return across, down, np.cross(across, down)


def shared(slices: Sequence[Slice]) -> int:
    """The largest number of slices at one position along the normal."""
    along = np.sort(np.array([slice_.position for slice_ in slices]) @ axes(slices)[2])
    return int(np.bincount(levels(along)).max())


def levels(along: NDArray[np.float64]) -> NDArray[np.intp]:
    """Number of the position of each of the rising ``along``, the same where two share it."""
    return np.cumsum(np.diff(along, prepend=along[0]) >= _SAME_MM)


def stack(slices: Sequence[Slice]) -> Stack:
    """Order parallel slices along their normal.

    Raises:
        ScanError: several lie at one position.
    """
    points = np.array([slice_.position for slice_ in slices])  # [n,3]
    along = points @ axes(slices)[2]
    order = np.argsort(along, kind="stable")
    points, along = points[order], along[order]
    gaps = np.diff(along)
    if not len(gaps):
        return Stack(order, points, along, 0.0, np.zeros(0, np.int64), np.zeros(0, bool))
    if gaps.min() < _SAME_MM:
        count = int((gaps < _SAME_MM).sum())
        raise ScanError(f"{count} of {len(points)} slices lie where another does; nothing tells volumes apart")
    usual = _usual(gaps)
    times = np.rint(gaps / usual).astype(np.int64)
    even = np.abs(gaps - np.maximum(times, 1) * usual) <= _tolerance(usual)
    return Stack(order, points, along, usual, np.where(even, np.maximum(times, 1) - 1, 0), ~even)


def _tolerance(usual: float) -> float:
    """Spacings may differ by 1 %, or by the rounding of positions to 0.1 mm if that is less than a quarter slice."""
    return max(0.01 * usual, min(_ROUNDING_MM, usual / 4) + 1e-6)


def _usual(gaps: NDArray[np.float64]) -> float:
    """The mean of those gaps that are alike and most; of two equally many, the smaller."""
    values, counts = np.unique(np.round(gaps, 4), return_counts=True)
    alike = [int(counts[np.abs(values - value) <= _tolerance(value)].sum()) for value in values]
    value = float(values[int(np.argmax(alike))])
    return float(gaps[np.abs(gaps - value) <= _tolerance(value) + 1e-4].mean())


def pieces(whole: Stack, policy: Policy) -> list[NDArray[np.intp]]:
    """Divide a stack as ``policy`` says: indices into the ordered stack, rising. One piece: it is not divided.

    Each piece is a longest run of even slices among those that are left.

    Raises:
        ScanError: the policy refuses the stack.
    """
    gap, unevenness = whole.gap(), whole.unevenness()
    for found, name, choice in ((gap, "missing", policy.missing), (unevenness, "spacing", policy.spacing)):
        if found and choice == "refuse":
            raise ScanError(f"{found}, which --policy.{name} refuse keeps out")
    cut = np.zeros(len(whole.along) - 1, bool)
    if policy.missing == "split":
        cut |= whole.missing > 0
    if policy.spacing == "split" and whole.uneven.any():
        steps = np.diff(whole.along) / (1 + whole.missing * (policy.missing == "allow"))
        return _longest_runs(steps, _tolerance(whole.usual_mm))
    if policy.spacing == "split" and unevenness and not cut.any():
        raise ScanError(f"{unevenness}, which no division mends; --policy.spacing allow lets it in")
    return np.split(np.arange(len(whole)), np.flatnonzero(cut) + 1)


def _longest_runs(steps: NDArray[np.float64], tolerance: float) -> list[NDArray[np.intp]]:
    """Divide n slices, ``steps`` [n-1] apart, into runs of even steps, the longest first, then in order of place."""
    runs = []
    pending = [(0, len(steps))]  # first and last slice
    while pending:
        low, high = pending.pop()
        best = start = low
        end = low
        for i in range(low + 1, high + 1):
            if abs(steps[i - 1] - steps[start]) > tolerance:
                start = i - 1
            if i - start > end - best:
                best, end = start, i
        runs.append(np.arange(best, end + 1))
        pending += [(low, best - 1)] * (best > low) + [(end + 1, high)] * (end < high)
    return sorted(runs, key=lambda run: int(run[0]))


def grid(slices: Sequence[Slice], policy: Policy) -> Grid:
    """The grid of slices that make one scan; where they are unevenly spaced, with the usual spacing.

    A stack that is tilted has an affine that is sheared, exactly.

    Raises:
        ScanError: slices at the same position, shifted against each other, or tilted although the policy refuses it.
    """
    across, down, normal = axes(slices)
    whole = stack(slices)
    first, points = slices[0], whole.points
    irregular = [whole.gap(), whole.unevenness()]
    step = normal * first.thickness_mm
    if len(whole) > 1:
        along = whole.along - whole.along[0]
        direction = (points[-1] - points[0]) / along[-1]  # its component along the normal is 1
        shift = float(np.linalg.norm(points - points[0] - along[:, None] * direction, axis=1).max())
        if shift > max(0.01 * whole.usual_mm, _ROUNDING_MM):
            raise ScanError(f"slices are shifted sideways against each other by up to {shift:.3g} mm")
        cosine = 1 / float(np.linalg.norm(direction))
        if 1 - cosine > _PARALLEL:
            tilt = f"gantry tilt of {np.degrees(np.arccos(cosine)):.1f} degrees"
            if policy.tilt == "refuse":
                raise ScanError(f"{tilt}, which --policy.tilt refuse keeps out")
            irregular.append(tilt)
        step = direction * (whole.usual_mm if any(irregular[:2]) else along[-1] / (len(whole) - 1))

    affine = np.eye(4)
    between_rows, between_columns = first.spacing_mm
    affine[:3] = np.stack([step, down * between_rows, across * between_columns, points[0]], axis=1)
    affine[:2] *= -1  # LPS to RAS
    spacing = (float(np.linalg.norm(step)), between_rows, between_columns)
    return Grid(tuple(whole.order.tolist()), affine, spacing, _plane(normal), "; ".join(filter(None, irregular)))


def _plane(normal: NDArray[np.float64]) -> str:
    axis = int(np.abs(normal).argmax())
    return ("sagittal", "coronal", "axial")[axis] if abs(normal[axis]) > 0.8 else "oblique"
