"""DICOM headers -> scans: which frames of which files belong together.

Neither a file name nor InstanceNumber is trusted. A series (PS3.3 A.1.2.3) is divided by what its slices are, and by
whatever tells volumes apart that share positions; then ``dicom_geometry.py`` makes regular grids of them.
"""

import filecmp
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError
from medclr.scans.dicom_frames import PARAMETERS, TELLING, Slice
from medclr.scans.dicom_geometry import Grid, axes, grid, levels, pieces, shared, stack
from medclr.scans.dicom_header import Header
from medclr.scans.dicom_pixels import fingerprint
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.scan import Found

# Clocks and counters by whose order, at each position, volumes are told apart; whether volumes may overlap in time.
_ORDERED = {"TriggerTime": True, "FrameReferenceTime": False, "AcquisitionTime": False}
_DIVISIONS = (
    DEFAULT,
    replace(DEFAULT, missing="allow"),
    replace(DEFAULT, spacing="allow"),
    replace(DEFAULT, missing="allow", spacing="allow"),
)

Reject = tuple[Path, str]


class Frame(NamedTuple):
    """One frame of one file."""

    header: Header
    number: int
    """Counted from 0."""

    @property
    def slice(self) -> Slice:
        """Its place in space."""
        return self.header.slices[self.number]


@dataclass(frozen=True)
class Volume:
    """A scan that was found, and the frames that it is made of."""

    found: Found
    frames: tuple[Frame, ...]
    """In the order of the slices."""
    grid: Grid


@dataclass(frozen=True)
class _Part:
    """Frames that make one scan, or that the ``refused`` reason keeps from being one."""

    frames: list[Frame]
    label: str
    """What distinguishes it inside its series."""
    irregular: str = ""
    grid: Grid | None = None
    refused: str = ""


def find(
    headers: Iterable[Header], policy: Policy = DEFAULT, plane: Plane | None = None
) -> tuple[list[Found], list[Reject]]:
    """Group files into scans.

    A series may hold several: it is divided by orientation, image type, echo and size, and, where slices share
    positions, by whatever tells the volumes apart (b-value, time, acquisition). Radiographs, ultrasound and images
    without a place in space are one scan each. A multi-frame file stays by itself and may hold several volumes.

    Returns:
        the scans, and (file, reason) for every file that is in none. Both are in the order of the paths.
    """
    volumes, rejects = volumes_of(headers, policy)
    return [volume.found for volume in volumes], rejects


def volumes_of(headers: Iterable[Header], policy: Policy) -> tuple[list[Volume], list[Reject]]:
    """As ``find``, with the frames."""
    rejects: list[Reject] = []
    usable = []
    for header in sorted(headers, key=lambda header: header.path):
        if header.burned_in and policy.burned_in == "refuse":
            reason = "says that text is burned into its pixels, which may name the patient (Burned In Annotation is"
            rejects.append((header.path, f"{reason} YES); --policy.burned_in allow lets it in"))
        else:
            usable.append(header)
    usable, copies = _one_of_each(_with_patients(usable))
    rejects += copies

    volumes: list[Volume] = []
    series: dict[tuple[str, ...], list[Header]] = defaultdict(list)
    for header in usable:
        if header.frames == 1 and header.slices:
            unique = header.series or str(header.path.parent)
            series[header.patient, header.study, unique, header.modality or ""].append(header)
        else:
            found, refused = _of_file(header, policy)
            volumes += found
            rejects += refused
    for members in series.values():
        for part in _parts([Frame(header, 0) for header in members], policy):
            if part.grid:
                volumes.append(_volume(part, part.grid))
            else:
                rejects += [(frame.header.path, part.refused) for frame in part.frames]
    return sorted(volumes, key=lambda volume: (volume.found.files, volume.found.volume)), sorted(rejects)


def candidates(header: Header) -> list[Volume]:
    """Every volume that some policy makes of one file, in the order of their numbers.

    Counting all of them lets a number mean the same frames whatever the policy is. Those of the default come first.
    """
    volumes: dict[tuple[int, ...], Volume] = {}
    for division in _DIVISIONS if header.slices else _DIVISIONS[:1]:
        for part in _frames_of(header, division):
            if part.grid and (key := _numbers(part.frames)) not in volumes:
                volumes[key] = _volume(part, part.grid, len(volumes))
    return list(volumes.values())


def _of_file(header: Header, policy: Policy) -> tuple[list[Volume], list[Reject]]:
    """Volumes of a multi-frame file."""
    numbers = {_numbers(volume.frames): volume.found.volume for volume in candidates(header)}
    parts = _frames_of(header, policy)
    kept = [(numbers[_numbers(part.frames)], part, part.grid) for part in parts if part.grid]
    refused = sorted({part.refused for part in parts if part.refused})
    if not kept:
        return [], [(header.path, "; ".join(refused))]
    if len(kept) > 1 and policy.volumes == "refuse":
        return [], [(header.path, f"holds {len(kept)} volumes, which --policy.volumes refuse keeps out")]
    notes = [f"{len(parts) - len(kept)} of its {len(parts)} volumes cannot be used: {refused[0]}"] if refused else []
    if len(kept) > 1 and policy.volumes == "first":
        notes.append(f"the first of {len(kept)} volumes")
        kept = [min(kept, key=lambda numbered: numbered[0])]
    return [
        _volume(replace(part, irregular="; ".join(filter(None, (part.irregular, *notes)))), place, number)
        for number, part, place in kept
    ], []


def _numbers(frames: Sequence[Frame]) -> tuple[int, ...]:
    return tuple(frame.number for frame in frames)


def _frames_of(header: Header, policy: Policy) -> list[_Part]:
    if header.slices:
        return list(_parts([Frame(header, i) for i in range(header.frames)], policy))
    parts = []
    for number, frames in enumerate(header.volumes):
        order = tuple(range(len(frames)))
        place = Grid(order, np.diag([*header.spacing_mm, 1.0]), header.spacing_mm, "", "")
        parts.append(_Part([Frame(header, i) for i in frames], f"volume {number}", grid=place))
    return parts


def _volume(part: _Part, place: Grid, number: int = 0) -> Volume:
    first = part.frames[0].header
    files = tuple(dict.fromkeys(frame.header.path for frame in part.frames))
    notes = {*(frame.header.irregular for frame in part.frames), part.irregular, place.irregular}
    if first.burned_in:
        notes.add("Burned In Annotation is YES")
    found = Found(
        files=files,
        modality=first.modality,
        patient=first.patient,
        study=first.study,
        series=f"{first.series}|{first.instance if first.frames > 1 or not first.slices else ''}|{part.label}"
        if first.series or first.instance
        else "",
        body_part=first.body_part,
        plane=place.plane,
        shape=(len(part.frames), first.rows, first.columns),
        spacing_mm=place.spacing_mm,
        volume=number,
        irregular="; ".join(sorted(filter(None, notes))),
    )
    return Volume(found, tuple(part.frames), place)


# Copies and patients


def _one_of_each(headers: Sequence[Header]) -> tuple[list[Header], list[Reject]]:
    """Keep the first of the copies of an image; different ones under one SOP Instance UID are all refused.

    Only files that share a UID are looked into, and decoded only if their bytes differ.
    """
    same: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in headers:
        same[header.patient, header.instance or str(header.path)].append(header)
    kept: list[Header] = []
    rejects: list[Reject] = []
    for group in same.values():
        sound, broken, alike = _compared(group)
        rejects += broken
        if alike:
            kept += sound[:1]
            sound = sound[1:]
            reason = "is a copy of another file (same SOP Instance UID, same pixels)"
        else:
            reason = "shares its SOP Instance UID with a file that holds another image; which one is meant?"
        rejects += [(header.path, reason) for header in sound]
    return kept, rejects


def _compared(group: list[Header]) -> tuple[list[Header], list[Reject], bool]:
    """Files of one UID that can be decoded, those that cannot, and whether the former hold the same image."""
    try:
        if all(filecmp.cmp(group[0].path, other.path, shallow=False) for other in group[1:]):
            return group, [], True
    except OSError as error:
        return [], [(header.path, f"cannot be read ({error.strerror})") for header in group], True
    sound: list[Header] = []
    broken: list[Reject] = []
    prints = set()
    for header in group:
        try:
            prints.add((fingerprint(header.path), replace(header, path=Path())))
            sound.append(header)
        except ScanError as error:
            broken.append((header.path, str(error)))
    return sound, broken, len(prints) == 1


def _with_patients(headers: Sequence[Header]) -> list[Header]:
    """Slices without PatientID are of the patient that the others of their series name, if these agree."""
    named: dict[str, set[str]] = defaultdict(set)
    for header in headers:
        if header.named and header.series:
            named[header.series].add(header.patient)
    return [
        replace(header, patient=next(iter(named[header.series])))
        if not header.named and len(named.get(header.series, ())) == 1
        else header
        for header in headers
    ]


# Parts of a series


def _parts(frames: list[Frame], policy: Policy) -> Iterator[_Part]:
    """Divide the frames of one series, or of one file."""
    kinds: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        kinds[frame.slice.kind, frame.header.samples].append(frame)
    for (kind, _), alike in kinds.items():
        for orientation, parallel in _by_orientation(alike):
            sizes: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
            for frame in parallel:
                sizes[frame.header.rows, frame.header.columns, frame.slice.spacing_mm].append(frame)
            several = f"{len(sizes)} sizes of slices" if len(sizes) > 1 else ""
            if several and policy.sizes == "refuse":
                yield _Part(parallel, "", refused=f"has {several} in its series, which --policy.sizes refuse keeps out")
                continue
            for size, members in sizes.items():
                label = f"{kind}|{orientation}|{size}"
                yield from _volumes(members, policy, label, several and f"split from a series with {several}")


def _volumes(frames: list[Frame], policy: Policy, label: str, note: str) -> Iterator[_Part]:
    """Divide parallel slices of one size into volumes, and these into regular grids, until nothing divides them."""
    try:
        told = _by_telling(frames)
        if len(told) > 1:
            for value, members in told:
                yield from _volumes(members, policy, f"{label}|{value}", note)
            return
        whole = stack([frame.slice for frame in frames])
        runs = pieces(whole, policy)
        if len(runs) > 1:
            why = whole.gap() or whole.unevenness()
            for number, run in enumerate(runs):
                members = [frames[i] for i in whole.order[run]]
                split = f"split from a stack in which {why}"
                yield from _volumes(members, policy, f"{label}|{number}", note if "stack" in note else split)
            return
        place = grid([frame.slice for frame in frames], policy)
        yield _Part([frames[i] for i in place.order], label, note, place)
    except ScanError as error:
        yield _Part(frames, label, refused=str(error))


def _by_orientation(frames: Sequence[Frame]) -> list[tuple[str, list[Frame]]]:
    """Divide by orientation. Rounding could part two that differ in the last digit, so each joins the first alike."""
    groups: list[tuple[NDArray[np.float64], list[Frame]]] = []
    of: dict[tuple[float, ...], list[Frame]] = {}
    for frame in frames:
        orientation = frame.slice.orientation
        if orientation not in of:
            cosines = np.array(orientation)
            alike = next((members for axes_, members in groups if np.abs(axes_ - cosines).max() < 1e-3), None)
            if alike is None:
                alike = []
                groups.append((cosines, alike))
            of[orientation] = alike
        of[orientation].append(frame)
    return [("\\".join(f"{c:.2f}" for c in axes_), members) for axes_, members in groups]


def _by_telling(frames: list[Frame]) -> list[tuple[str, list[Frame]]]:
    """Divide slices into volumes by the first element that keeps those apart that share a position.

    An element with more values than slices share a position (a clock time, say) tells slices, not volumes. Where no
    position is shared and yet the slices form no even stack, settings of the scanner divide it if each of their values
    does: two volumes, one moved a little against the other.
    """
    slices = [frame.slice for frame in frames]
    most = shared(slices)
    if most == 1 and _is_even(frames):
        return [("", frames)]
    for i, name in enumerate(TELLING if most > 1 else PARAMETERS):
        parts: dict[bytes, list[Frame]] = defaultdict(list)
        for frame in frames:
            parts[frame.slice.telling[i]].append(frame)
        if len(parts) == 1:
            continue
        if most > 1:
            divides = len(parts) <= most and all(shared([f.slice for f in part]) < most for part in parts.values())
        else:
            divides = all(len(part) > 1 and _is_even(part) for part in parts.values())
        if divides:
            return [(f"{name}={value.decode('latin-1')}", part) for value, part in parts.items()]
    return _by_order(frames) if most > 1 else [("", frames)]


def _is_even(frames: Sequence[Frame]) -> bool:
    whole = stack([frame.slice for frame in frames])
    return not whole.gap() and not whole.unevenness()


def _by_order(frames: list[Frame]) -> list[tuple[str, list[Frame]]]:
    """Divide slices of which equally many share each position, by the order of a clock that jitters.

    The n-th trigger time at each position is the n-th phase of the heart. Other clocks tell volumes only if each volume
    ends before the next begins.
    """
    along = np.array([frame.slice.position for frame in frames]) @ axes([frame.slice for frame in frames])[2]
    order = np.argsort(along, kind="stable")
    level = np.empty(len(frames), np.intp)
    level[order] = levels(along[order])
    counts = np.bincount(level)
    if counts.min() != counts.max():
        return [("", frames)]
    for name, may_overlap in _ORDERED.items():
        i = list(TELLING).index(name)
        try:
            clock = np.array([float(frame.slice.telling[i]) for frame in frames])
        except ValueError:  # empty, or a date with a time zone
            continue
        ranked = np.lexsort((clock, level)).reshape(len(counts), counts[0])  # [positions, volumes]
        times = clock[ranked]
        if (np.diff(times, axis=1) <= 0).any() or not np.isfinite(times).all():
            continue
        if may_overlap or (times[:, :-1].max(axis=0) < times[:, 1:].min(axis=0)).all():
            return [(f"{name} {n}", [frames[j] for j in ranked[:, n]]) for n in range(counts[0])]
    return [("", frames)]
