"""Where the two views of a slice show the same points of it, from the parameters that the views have recorded.

Letters: m slices, P points of each, T candidates of each, s side of a view. Coordinates in a slice, (x, y) in pixels,
where pixel i covers [i, i+1]; coordinates in a view, (u, v) in [-1,1] from edge to edge, as grid_sample takes them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medclr.augment.chain import moving
from medclr.augment.geometry import RandomResizedCrop, crop_box, source_matrix
from medclr.augment.views import Draws
from medclr.errors import MedclrError

if TYPE_CHECKING:
    from medclr.data.loader import Batch

CANDIDATES = 8
"""Places drawn for each point that is wanted: those that one view does not show, or that lie too near, are left out."""


@dataclass(frozen=True)
class Points:
    """Points that both views of each slice show."""

    at: tuple[Tensor, Tensor]
    """[m,P,2] each, (u, v) in view a and in view b; 0 where there is no point."""

    source: Tensor
    """[m,P,2], (x, y) in the slice."""

    exists: Tensor
    """[m,P] bool: the views of a slice may have too little in common for P points."""


def shared_points(batch: "Batch", draws: Draws, rows: Tensor, count: int, distance: float) -> Points:
    """Points of each slice that both views show, spread evenly over what they have in common.

    They lie at least half a pixel inside each view, and so far inside the content of the slice that no pixel which is
    interpolated there is mixed with padding, or with what lies outside of the image.

    Args:
        batch: holds the ``rows`` [m] of the global batch.
        draws: of the step.
        rows: see there; the points follow from (seed, step, row) alone.
        count: P.
        distance: least distance of two points of a slice in its pixels.
    """
    size_px = draws.size_px
    first, second = (source_matrices(batch, draws, view, rows) for view in (0, 1))  # [m,2,3] each
    areas = [torch.linalg.det(matrix[:, :, :2]).abs() for matrix in (first, second)]  # [m]
    smaller = torch.where((areas[0] < areas[1])[:, None, None], first, second)  # [m,2,3]
    uniform = [torch.from_numpy(draws.generator("points", int(row)).random((CANDIDATES * count, 2))) for row in rows]
    source = to_source(smaller, torch.stack(uniform) * 2 - 1)  # [m,T,2]
    within = [to_view(matrix, source) for matrix in (first, second)]  # [m,T,2] each
    coarser = torch.maximum(*(matrix[:, :, :2].norm(dim=1).amax(1) for matrix in (first, second)))  # [m]
    margin = 0.5 + 1.5 * coarser[:, None] * 2 / size_px  # [m,1]: half a pixel, and the diagonal of one of the view
    top, left, height, width = batch.content.cpu().double()[:, :, None].unbind(1)  # [m,1] each
    x, y = source.unbind(2)  # [m,T] each
    free = (x - left).minimum(left + width - x).minimum(y - top).minimum(top + height - y) >= margin  # [m,T]
    for at in within:
        free &= at.abs().amax(2) <= 1 - 1 / size_px
    chosen, exists = [], []
    for _ in range(count):  # the first that is free, of which the near ones are then not
        exists.append(free.any(1))  # [m]
        chosen.append(free.int().argmax(1))  # [m]
        taken = source.take_along_dim(chosen[-1][:, None, None], 1)  # [m,1,2]
        free &= (source - taken).square().sum(2) >= distance**2
    found = torch.stack(exists, 1)  # [m,P]
    index = torch.stack(chosen, 1)[:, :, None]  # [m,P,1]
    a, b = (torch.where(found[:, :, None], at.take_along_dim(index, 1), 0) for at in within)  # [m,P,2] each
    return Points((a, b), source.take_along_dim(index, 1), found)


def source_matrices(batch: "Batch", draws: Draws, view: int, rows: Tensor) -> Tensor:
    """Float64 [m,2,3], from (u, v, 1) in view 0 (a) or 1 (b) to (x, y) in the slice, of each slice of ``batch``.

    Raises:
        MedclrError: a chain of the user's own moves pixels after the crop.
    """
    matrices = torch.empty(len(rows), 2, 3, dtype=torch.float64)
    for drawn in draws.drawn(batch, view, rows):
        if moved := moving(drawn.chain):
            raise MedclrError(f"views.chain: {moved[0]} moves pixels, and points do not follow it; leave it out")
        crop = drawn.chain[0]
        assert isinstance(crop, RandomResizedCrop)  # every chain begins with it
        params = drawn.params[0]
        matrices[drawn.rows] = source_matrix(crop_box(params, params["content"], crop.aspect), params).double()
    return matrices


def to_source(matrix: Tensor, at: Tensor) -> Tensor:
    """[m,2,3], and (u, v) in a view [m,P,2] -> (x, y) in the slice [m,P,2]."""
    return at @ matrix[:, :, :2].mT + matrix[:, None, :, 2]


def to_view(matrix: Tensor, source: Tensor) -> Tensor:
    """[m,2,3], and (x, y) in the slice [m,P,2] -> (u, v) in a view [m,P,2]."""
    back: Tensor = torch.linalg.inv(matrix[:, :, :2])  # [m,2,2]
    return (source - matrix[:, None, :, 2]) @ back.mT
