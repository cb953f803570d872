"""A torso and a head, each a function of what varies between patients, painted on a block of space.

Anatomy is painted in millimetres of a standard body. Torso: x to the patient's left, y to the back, z to the head
(DICOM's axes), z = 0 at the dome of the right diaphragm. Head: x to the right, y to the front, z up (NIfTI's axes).
Shape letters: D slices, H rows, W columns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.floating[Any]]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

AIR, FAT, MUSCLE, LIVER = -1000.0, -100.0, 50.0, 62.0  # HU


class Canvas:
    """A block of space, [D,H,W], on which shapes are painted one over another with soft edges.

    Args:
        z_mm, y_mm, x_mm: ascending positions of the voxel centres.
        background: value before anything is painted.
        edge_mm: width over which one tissue passes into the next: about a voxel, so that a boundary does not alias.
    """

    def __init__(self, z_mm: Floats, y_mm: Floats, x_mm: Floats, background: float, edge_mm: float) -> None:
        self.z = z_mm.astype(np.float32).reshape(-1, 1, 1)
        self.y = y_mm.astype(np.float32).reshape(1, -1, 1)
        self.x = x_mm.astype(np.float32).reshape(1, 1, -1)
        self.edge_mm = np.float32(edge_mm)
        self.values = np.full((self.z.size, self.y.size, self.x.size), background, np.float32)

    def blank(self) -> "Canvas":
        """An empty canvas over the same space, on which to build a weight."""
        return Canvas(self.z, self.y, self.x, 0.0, float(self.edge_mm))

    def inside(self, distance_mm: Floats) -> Floats:
        """Weight in [0,1] of points at a signed distance from a surface (negative: inside)."""
        weight: Floats = np.clip(0.5 - distance_mm / self.edge_mm, 0.0, 1.0)
        return weight

    def paint(self, weight: Floats, value: float | Floats, box: Box = (slice(None),) * 3) -> None:
        """Blend ``value`` over what is there."""
        target = self.values[box]
        target += weight * (value - target)

    def ellipsoid(
        self, center: Point, radii: Point, value: float, *, turn_deg: float = 0.0, within: Floats | None = None
    ) -> None:
        """Paint an ellipsoid, turned about z by ``turn_deg``, only where the weight ``within`` allows."""
        reach = (max(radii[:2]),) * 2 + (radii[2],) if turn_deg else radii
        box = self._box(center, center, reach)
        if box is None:
            return
        z, y, x = self.z[box[0]] - center[2], self.y[:, box[1]] - center[1], self.x[:, :, box[2]] - center[0]
        if turn_deg:
            cos, sin = np.float32(np.cos(np.radians(turn_deg))), np.float32(np.sin(np.radians(turn_deg)))
            x, y = cos * x + sin * y, cos * y - sin * x
        a, b, c = (np.float32(1 / r) for r in radii)
        # First-order distance to an implicit surface: rho * (rho - 1) / |gradient|.
        rho = np.sqrt((x * a) ** 2 + (y * b) ** 2 + (z * c) ** 2)
        slope = np.sqrt((x * a * a) ** 2 + (y * b * b) ** 2 + (z * c * c) ** 2) + np.float32(1e-6)
        self._paint_box(rho * (rho - 1) / slope, value, box, within)

    def tube(self, points: Sequence[Point], radius: float, value: float, *, within: Floats | None = None) -> None:
        """Paint a tube of constant radius along a polyline."""
        for start, end in itertools.pairwise(points):
            box = self._box(start, end, (radius,) * 3)
            if box is None:
                continue
            z, y, x = self.z[box[0]] - start[2], self.y[:, box[1]] - start[1], self.x[:, :, box[2]] - start[0]
            dx, dy, dz = (np.float32(e - s) for s, e in zip(start, end, strict=True))
            along = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
            distance = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2 + (z - along * dz) ** 2)
            self._paint_box(distance - np.float32(radius), value, box, within)

    def _paint_box(self, distance_mm: Floats, value: float, box: Box, within: Floats | None) -> None:
        weight = self.inside(distance_mm)
        self.paint(weight if within is None else weight * within[box], value, box)

    def _box(self, start: Point, end: Point, reach: Point) -> Box | None:
        """Index ranges of the points that a shape from ``start`` to ``end``, so far around them, can touch."""
        ranges = []
        for axis, a, b, r in zip((self.z, self.y, self.x), start[::-1], end[::-1], reach[::-1], strict=True):
            low, high = axis.ravel().searchsorted((min(a, b) - r - self.edge_mm, max(a, b) + r + self.edge_mm))
            if low == high:
                return None
            ranges.append(slice(low, high))
        return ranges[0], ranges[1], ranges[2]


# The torso ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torso:
    """One patient's chest and abdomen: everything that varies, drawn once, seen by the CT and by the X-ray.

    Where nothing else is said, a number scales the organ of that name.
    """

    size: Point
    """Scale of the whole body along x, y, z."""
    fat_mm: float
    muscle_mm: float
    heart: float
    liver: float
    domes_mm: tuple[float, float]
    """Height of the right and left diaphragm."""
    rib_pitch_mm: float
    rib_phase_mm: float
    vessels: tuple[tuple[Point, Point, float], ...]
    """Branches in the lungs: start, end, radius."""
    bowel: tuple[tuple[Point, float, float], ...]
    """Loops: center, radius, Hounsfield units of the contents."""
    nodules: tuple[tuple[Point, float], ...]
    """Metastases of the lung: center and radius; empty in the healthy."""
    metastases: tuple[tuple[Point, float], ...]
    """Metastases of the liver."""


def draw_torso(rng: np.random.Generator, lesion: bool) -> Torso:
    """A patient's torso."""
    height = rng.normal(1, 0.035)
    vessels = []
    for k in range(80):  # lung vessels: from the hilum outwards, tapering, each with a fork
        side = (-1) ** k
        hilum = np.array([side * 32, 8, 70]) + rng.normal(0, 6, 3)
        reach = np.array([side * rng.uniform(35, 105), rng.uniform(-65, 75), rng.uniform(-30, 165)])
        middle = hilum + (reach - hilum) * rng.uniform(0.35, 0.6) + rng.normal(0, 6, 3)
        radius = rng.uniform(1.8, 3.6)
        vessels += [(hilum, middle, radius), (middle, reach, radius * 0.6),
                    (middle, reach + rng.normal(0, 18, 3), radius * 0.5)]  # fmt: skip
    bowel, nodules, metastases = [], [], []
    for _ in range(34):
        center = (rng.uniform(-85, 85), rng.uniform(-60, 5), rng.uniform(-170, -88))
        bowel.append((center, rng.uniform(13, 21), rng.choice([-850.0, 20, 30, 60])))
    for k in range(rng.integers(2, 5) if lesion else 0):
        side = rng.choice([-1.0, 1.0])
        center = (side * rng.uniform(62, 92), rng.uniform(-35, 45), rng.uniform(58, 128))
        nodules.append((center, rng.uniform(13, 18) - 2.5 * k))
    for _ in range(rng.integers(2, 5) if lesion else 0):
        center = (rng.uniform(-95, -35), rng.uniform(-35, 35), rng.uniform(-75, -25))
        metastases.append((center, rng.uniform(9, 17)))
    return Torso(
        size=(height * rng.normal(1, 0.04), height * rng.normal(1, 0.04), height),
        fat_mm=rng.uniform(5, 24), muscle_mm=rng.uniform(10, 15),
        heart=rng.uniform(0.9, 1.15), liver=rng.uniform(0.92, 1.08),
        domes_mm=(rng.uniform(-6, 8), rng.uniform(-20, -4)),
        rib_pitch_mm=rng.uniform(24, 28), rib_phase_mm=rng.uniform(0, 24),
        vessels=tuple((tuple(a), tuple(b), r) for a, b, r in vessels), bowel=tuple(bowel),
        nodules=tuple(nodules), metastases=tuple(metastases),
    )  # fmt: skip


def paint_torso(canvas: Canvas, torso: Torso) -> None:
    """Paint a torso in Hounsfield units over air, from the skin inwards."""
    wall_mm = _beyond_cage(canvas)
    _paint_wall(canvas, torso, wall_mm)
    cavity = canvas.inside(wall_mm)
    below_dome = canvas.inside(canvas.z - _diaphragm(canvas, torso))
    lungs = cavity * (1 - below_dome) * canvas.inside(wall_mm + 3)
    canvas.paint(lungs, -860 + 0.5 * canvas.y)  # the back of the lung of a lying patient is denser
    for start, end, radius in torso.vessels:
        canvas.tube((start, end), radius, 20, within=lungs)
    for center, radius in torso.nodules:
        canvas.ellipsoid(center, (radius, radius, radius), 45, within=lungs)
    _paint_mediastinum(canvas, torso, cavity)
    _paint_abdomen(canvas, torso, canvas.inside(wall_mm + 4) * below_dome)
    _paint_skeleton(canvas, torso, wall_mm)


def _beyond_cage(canvas: Canvas) -> Floats:
    """Distance [D,H,W] outside the inner chest and abdominal wall: a dome towards the apex of the lungs at z = 205."""
    up = np.clip((canvas.z - 30) / 175, 0, 0.995)
    half_width, half_depth = 132 * np.sqrt(1 - up**2.6) + 1, 84 * np.sqrt(1 - up**2.2) + 1
    y = canvas.y - _lean(canvas.z)
    y = np.where(y < 0, y, y * np.float32(0.9))  # deeper behind: the lungs reach back on either side of the spine
    rho = np.sqrt((canvas.x / half_width) ** 2 + (y / half_depth) ** 2)
    beyond_mm: Floats = (rho - 1) * np.minimum(half_width, half_depth)
    return beyond_mm


def _lean(z: Floats) -> Floats:
    """The apex of the chest lies further back than its base, in mm."""
    return 22 * np.clip((z - 60) / 145, 0, 1) ** 2


def _diaphragm(canvas: Canvas, torso: Torso) -> Floats:
    """Height [1,H,W] of the diaphragm: two domes falling away to the wall, deepest at the back."""
    right, left = torso.domes_mm
    towards_left = np.clip(0.5 + canvas.x / 60, 0, 1)  # the central tendon joins the domes
    top = right + (left - right) * towards_left
    aside = np.abs(canvas.x) - 58
    return top - np.where(aside > 0, 44 * (aside / 66) ** 2, 14 * (aside / 58) ** 2) - 46 * ((canvas.y + 18) / 90) ** 2


def _paint_wall(canvas: Canvas, torso: Torso, wall_mm: Floats) -> None:
    """Skin, fat and muscle around the cage; shoulders above, neck on top."""
    shoulder = np.clip((canvas.z - 150) / 40, 0, 1) * np.clip((238 - canvas.z) / 30, 0, 1)
    neck = np.clip((canvas.z - 205) / 40, 0, 1)
    half_width = (146 + torso.muscle_mm) * (1 - neck) + 62 * neck + 70 * shoulder
    half_depth = (97 + torso.muscle_mm) * (1 - neck) + 60 * neck - 12 * shoulder
    y = canvas.y - 4 - _lean(canvas.z) * 0.5
    # A superellipse: flatter in front and behind than an ellipse.
    rho = (np.abs(canvas.x / half_width) ** 2.4 + np.abs(y / half_depth) ** 2.4) ** np.float32(1 / 2.4)
    muscle_mm = (rho - 1) * half_depth
    canvas.paint(canvas.inside(muscle_mm - torso.fat_mm), 0)
    canvas.paint(canvas.inside(muscle_mm - torso.fat_mm + 2), FAT)
    canvas.paint(canvas.inside(muscle_mm), MUSCLE)
    canvas.paint(canvas.inside(np.abs(wall_mm - 13) - 1.5) * (canvas.y < 40), FAT)  # fat planes between the layers
    canvas.paint(canvas.inside(wall_mm), FAT)


def _paint_mediastinum(canvas: Canvas, torso: Torso, cavity: Floats) -> None:
    """Mediastinal fat, heart, great vessels, airways: over the lungs."""
    h = torso.heart
    canvas.ellipsoid((0, 0, 110), (30, 66, 118), -70, within=cavity)
    canvas.ellipsoid((-8, -10, 34), (48 * h, 46 * h, 58), -60, within=cavity)
    canvas.ellipsoid((24, -22, 20), (62 * h, 46 * h, 50), 45, turn_deg=35, within=cavity)  # heart muscle
    canvas.ellipsoid((-18, -8, 42), (30 * h, 30, 40), 120, within=cavity)  # right atrium
    canvas.ellipsoid((34, -18, 14), (40 * h, 26 * h, 34), 130, turn_deg=35, within=cavity)  # left ventricle
    canvas.tube(((-24, -8, 40), (-26, -6, 165)), 9, 110)  # superior vena cava
    canvas.tube(((4, -18, 60), (-10, -22, 100), (-2, -10, 128), (18, 22, 130), (24, 42, 112)), 14, 140)  # aortic arch
    canvas.tube(((24, 42, 112), (20, 44, 0), (6, 38, -60), (4, 36, -260)), 11, 140)
    canvas.tube(((-20, 28, 10), (-18, 30, -60), (-18, 34, -260)), 11, 110)  # inferior vena cava
    canvas.tube(((18, -30, 72), (6, -14, 92), (-34, 4, 84)), 11, 130)  # pulmonary arteries
    canvas.tube(((6, -14, 92), (38, 14, 88)), 10, 130)
    canvas.tube(((0, 18, 250), (0, 16, 106), (-36, 18, 84)), 7.5, -980)  # trachea and main bronchi
    canvas.tube(((0, 16, 106), (40, 20, 80)), 6.5, -980)


def _paint_abdomen(canvas: Canvas, torso: Torso, abdomen: Floats) -> None:
    """Organs below the diaphragm, in the portal venous phase."""
    k = torso.liver
    canvas.ellipsoid((98, 28, -52), (32, 46, 48), 95, turn_deg=20, within=abdomen)  # spleen
    canvas.ellipsoid((58, -30, -48), (44, 38, 40), 55, within=abdomen)  # stomach: wall, contents, gas in front
    canvas.ellipsoid((58, -30, -48), (39, 33, 35), 20, within=abdomen)
    canvas.ellipsoid((58, -48, -44), (31, 14, 26), -950, within=abdomen)
    for center, radius, content in torso.bowel:
        canvas.ellipsoid(center, (radius, radius, radius), 45, within=abdomen)
        canvas.ellipsoid(center, (radius - 4,) * 3, content, within=abdomen)
    canvas.tube(((-20, 2, -92), (20, -6, -84), (78, 22, -66)), 9, 75, within=abdomen)  # pancreas
    for side in (-1, 1):
        kidney = (side * 58, 42.0, -112.0 if side < 0 else -100.0)
        canvas.ellipsoid(kidney, (35, 33, 62), FAT, within=abdomen)
        canvas.ellipsoid(kidney, (25, 23, 52), 165, turn_deg=side * 35, within=abdomen)
        pelvis = (side * 53, 38.0, kidney[2])
        canvas.ellipsoid(pelvis, (13, 9, 32), -40, turn_deg=side * 35, within=abdomen)
    liver = canvas.blank()
    liver.ellipsoid((-66, 4, -46), (82 * k, 92, 74 * k), 1, within=abdomen)
    liver.ellipsoid((2, -40, -30), (62 * k, 38, 34), 1, turn_deg=-8, within=abdomen)
    liver.ellipsoid((-40, 74, -110), (60, 46, 70), 0)  # the hollow in which the right kidney lies
    canvas.paint(liver.values, LIVER)
    portal_vein = ((-16, 0, -80), (-34, 0, -58), (-66, 4, -46), (-92, 24, -40))
    canvas.tube(portal_vein, 5, 105, within=liver.values)
    canvas.tube((portal_vein[1], (-62, -38, -42)), 4, 105, within=liver.values)
    for tip in ((-95.0, -20.0, -40.0), (-50.0, -55.0, -35.0), (-100.0, 40.0, -30.0)):  # hepatic veins
        canvas.tube(((-20, 26, -12), tip), 3.5, 105, within=liver.values)
    for center, radius in torso.metastases:
        canvas.ellipsoid(center, (radius, radius, radius), 8, within=liver.values)
    canvas.ellipsoid((-48, -46, -86), (15, 19, 24), 60, within=abdomen)  # gall bladder: wall and bile
    canvas.ellipsoid((-48, -46, -86), (13, 17, 22), 8, within=abdomen)


def _paint_skeleton(canvas: Canvas, torso: Torso, wall_mm: Floats) -> None:
    """Back muscles, spine, ribs, sternum, clavicles and shoulder blades."""
    lean = 10 * np.clip(canvas.z / 200, 0, 1)
    for side in (-1, 1):
        canvas.tube(((side * 34, 90, -260), (side * 30, 92, 100), (side * 26, 98, 250)), 19, MUSCLE)  # erector spinae
        canvas.tube(((side * 30, 58, -60), (side * 46, 52, -260)), 17, MUSCLE)  # psoas
    x, y = canvas.x, canvas.y - lean
    disc = canvas.inside(np.abs((canvas.z + 400) % 27 - 13.5) - 4.0)
    body = np.sqrt(x**2 + ((y - 62) * 1.25) ** 2)
    canvas.paint(canvas.inside(body - 21), 520 * (1 - disc) + 90 * disc)
    canvas.paint(canvas.inside(body - 18), 230 * (1 - disc) + 90 * disc)
    arch = np.sqrt(x**2 + (y - 85) ** 2)
    canvas.paint(canvas.inside(np.abs(arch - 12) - 3) * (0.35 + 0.65 * (1 - disc)), 600)
    canvas.paint(canvas.inside(arch - 8), 30)
    process = canvas.inside(np.maximum(np.abs(x) - 3, np.abs(y - 104) - 9))
    wings = canvas.inside(np.maximum(np.abs(y - 84 - 0.15 * np.abs(x)) - 4, np.abs(np.abs(x) - 24) - 14))
    canvas.paint(np.maximum(process, wings) * (1 - disc), 480)
    # Ribs run along the wall and fall forwards, in front faster than behind; one every pitch.
    height = canvas.z - np.where(canvas.y > 0, 0.35, 0.8).astype(np.float32) * canvas.y
    offset = (height + torso.rib_phase_mm + 400) % torso.rib_pitch_mm - torso.rib_pitch_mm / 2
    ring = np.maximum(np.abs(wall_mm - 5) - 4.0, np.abs(offset) - 5.0)
    front = np.maximum(38, 60 - 1.6 * canvas.z)  # lower ribs end earlier
    there = (np.abs(canvas.x) > np.where(canvas.y < 0, front, 22)) & (canvas.z < 190) & (height > -120)
    canvas.paint(canvas.inside(ring) * there, 620)
    canvas.paint(canvas.inside(ring + 2.5) * there, 300)
    canvas.ellipsoid((0, -90, 85), (17, 6, 75), 380)  # sternum
    for side in (-1, 1):
        canvas.tube(((side * 18, -52, 172), (side * 70, -48, 184), (side * 150, -4, 202)), 6.5, 560)
        canvas.ellipsoid((side * 118, 82, 138), (48, 4.5, 62), 420, turn_deg=side * -32)
        canvas.ellipsoid((side * 172, 10, 186), (25, 25, 26), 420)


# The head -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """One patient's head."""

    size: Point
    ventricle: float
    """Width of the ventricles: grows with age."""
    cortex_mm: float
    metastases: tuple[tuple[Point, float], ...]


def draw_head(rng: np.random.Generator, lesion: bool) -> Head:
    """A patient's head."""
    size = rng.normal(1, 0.03)
    metastases = []
    for _ in range(rng.integers(1, 4) if lesion else 0):
        side = rng.choice([-1.0, 1.0])
        metastases.append(((side * rng.uniform(26, 42), rng.uniform(-45, 40), rng.uniform(4, 40)), rng.uniform(7, 12)))
    return Head(
        size=(size * rng.normal(1, 0.03), size * rng.normal(1, 0.03), size),
        ventricle=rng.uniform(0.7, 1.5), cortex_mm=rng.uniform(2.6, 3.6), metastases=tuple(metastases),
    )  # fmt: skip


def paint_head(canvas: Canvas, head: Head, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint a T1-weighted head, white matter = 1, over nothing; return its mask [D,H,W]: 1 ventricles, 2 metastases."""
    grey, white, csf, bone, fat = 0.62, 1.0, 0.22, 0.10, 1.1
    shells = ((0, 0.45), (2, fat), (6, bone), (9, 0.45), (10.5, bone), (13, csf))  # skin, fat, skull with marrow, fluid
    for shrink, value in shells:
        canvas.ellipsoid((0, 0, -18), (80 - shrink, 99 - shrink, 100 - shrink), value)
    _paint_face(canvas)
    brain = canvas.blank()
    brain.ellipsoid((0, 0, 0), (64.5, 83, 68), 1)
    brain.ellipsoid((0, -56, -52), (62, 40, 32), 0)  # the cerebellum's place
    brain.ellipsoid((0, 14, -66), (26, 30, 34), 0)
    _paint_cortex(canvas, brain, head, rng, grey, white, csf)
    _paint_cerebellum(canvas, grey, white, csf)
    for side in (-1, 1):
        canvas.ellipsoid((side * 11, -12, 4), (9, 15, 11), 0.74)  # thalamus
        canvas.ellipsoid((side * 26, 4, 3), (7, 21, 13), 0.70, turn_deg=side * 14)  # lentiform nucleus
        canvas.ellipsoid((side * 14, 20, 12), (5.5, 13, 11), 0.66)  # caudate nucleus
        canvas.tube(((side * 24, -4, -20), (side * 27, -22, -16), (side * 21, -36, -4)), 5.5, grey)  # hippocampus
    ventricles = canvas.blank()
    for side in (-1, 1):
        horn = ((side * 9, 32, 10), (side * 7, 18, 16), (side * 11, -6, 21), (side * 19, -32, 16), (side * 23, -48, 8))
        ventricles.tube(horn, 4.6 * head.ventricle, 1)
        ventricles.tube((horn[3], (side * 31, -24, -8), (side * 32, -6, -18)), 2.6 * head.ventricle, 1)
    ventricles.ellipsoid((0, -8, 2), (2.0 * head.ventricle, 14, 11), 1)
    canvas.paint(ventricles.values, csf)
    lesions = canvas.blank()
    for center, radius in head.metastases:
        canvas.ellipsoid(center, (radius * 1.7,) * 3, 0.74, within=brain.values)  # oedema
        lesions.ellipsoid(center, (radius,) * 3, 1, within=brain.values)
        canvas.ellipsoid(center, (radius,) * 3, 1.35, within=brain.values)  # the rim takes up contrast
        canvas.ellipsoid(center, (radius * 0.66,) * 3, 0.34, within=brain.values)
    mask = (ventricles.values > 0.5).astype(np.uint8)
    mask[lesions.values > 0.5] = 2
    return mask


def _paint_face(canvas: Canvas) -> None:
    """Eyes in their fat, the nasal cavity, the muscles of the temple and neck."""
    canvas.ellipsoid((0, 82, -62), (16, 24, 26), 0.05)
    for side in (-1, 1):
        canvas.ellipsoid((side * 33, 58, -46), (19, 24, 17), 1.05)
        canvas.ellipsoid((side * 33, 69, -46), (12, 12, 12), 0.25)
        canvas.ellipsoid((side * 68, 30, -52), (9, 30, 34), 0.5)
        canvas.ellipsoid((side * 24, -84, -76), (24, 12, 24), 0.5)


def _paint_cortex(
    canvas: Canvas, brain: Canvas, head: Head, rng: np.random.Generator, grey: float, white: float, csf: float
) -> None:
    """Cerebral hemispheres; sulci are the zero level of a smooth random field, lined by cortex of one thickness."""
    step = [float(np.diff(axis.ravel()).mean()) for axis in (canvas.z, canvas.y, canvas.x)]
    scale_mm = 6.0
    field = gaussian_filter(rng.standard_normal(canvas.values.shape, np.float32), [scale_mm / s for s in step])
    slope = np.sqrt(sum(np.gradient(field, s, axis=k) ** 2 for k, s in enumerate(step)))
    sheet_mm = np.abs(field) / (slope + 0.3 * slope.mean())  # distance to the nearest sulcus
    rho = np.sqrt((canvas.x / 64.5) ** 2 + (canvas.y / 83) ** 2 + (canvas.z / 68) ** 2)
    depth_mm = (1 - rho) * 70
    falx_mm = np.abs(canvas.x) + 60 * canvas.inside(rho * 70 - 34 - 0.2 * canvas.z)  # no fissure through the middle
    sulcus_mm = np.minimum(np.maximum(sheet_mm, (depth_mm - 21) / 2), falx_mm)
    canvas.paint(brain.values, white)
    canvas.paint(brain.values * canvas.inside(np.minimum(sulcus_mm - 0.9, depth_mm) - head.cortex_mm), grey)
    canvas.paint(brain.values * canvas.inside(sulcus_mm - 0.9), csf)


def _paint_cerebellum(canvas: Canvas, grey: float, white: float, csf: float) -> None:
    """Cerebellum with its folia, and the brain stem."""
    canvas.ellipsoid((0, -54, -52), (56, 36, 29), csf)
    folia = canvas.blank()
    folia.ellipsoid((0, -54, -52), (53, 33, 26), 1)
    from_stem_mm = np.sqrt((canvas.y + 30) ** 2 + (1.3 * (canvas.z + 44)) ** 2)
    ripple = 0.5 + 0.5 * np.cos(from_stem_mm * np.float32(2 * np.pi / 8))
    canvas.paint(folia.values, grey + 0.2 * (white - grey) - 0.25 * ripple * (grey - csf))
    for side in (-1, 1):
        canvas.ellipsoid((side * 20, -50, -50), (22, 15, 9), 0.95, turn_deg=side * 20)
    canvas.tube(((0, -14, -14), (0, -18, -40), (0, -26, -110)), 12.5, 0.9)
    canvas.ellipsoid((0, -32, -42), (7, 4, 9), csf)  # fourth ventricle
