"""Contrast of places: the same point of a slice in two views attracts, other points do not.

The local loss of Chaitanya et al. (arXiv 2006.10511, section 3.2), with points in place of regions, so that what
corresponds is known exactly whatever was cropped, turned and mirrored.

Letters: B slices of this process, N of all, P points of each, E components of an embedding, R rows, C columns.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from medclr.errors import MedclrError
from medclr.losses.nt_xent import Form, contrast, hide_itself, unit
from medclr.losses.relations import Gather

Others = Literal["all", "same_slice"]


class Slices(Protocol):
    """What the loss needs of a batch, int64 [B] each; ``medclr.data.loader.Batch`` has them."""

    @property
    def scan(self) -> Tensor: ...

    @property
    def slice_index(self) -> Tensor: ...


def point_nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    gather: Gather | None = None,
    *,
    source: Tensor,
    exists: Tensor,
    slices: Slices | None = None,
    negatives: Others = "all",
    distance: float = 0.0,
    reach: int = 0,
    form: Form = "auto",
) -> Tensor:
    """Mean over the views i of all points that exist, with s the cosine of two views over the temperature, of::

        L(i) = log sum over j in A(i) of exp s(i,j)  -  s(i, the same point in the other view)

    A(i) are, with ``negatives``

    - ``all``: the views of all points of the batch, but i itself, and those of other points nearer than ``distance`` to
      it, in its slice or at most ``reach`` slices away in its scan: they show nearly the same;
    - ``same_slice``: the views of all points of the slice, but i itself.

    With all embeddings equal L is log |A(i)|.

    Args:
        a: embeddings of the points in the first views [B,P,E], of any norm.
        b: in the second views [B,P,E].
        temperature: divides the cosines.
        gather: as in ``nt_xent``.
        source: (x, y) of the points in their slices, [B,P,2] in pixels.
        exists: [B,P]; other points count nowhere. Where no process has any, the loss is 0.
        slices: scan and number of the B slices; needed for ``distance`` with ``all``.
        negatives: see above.
        distance: see above, in pixels.
        reach: see above.
        form: as in ``nt_xent``; ``same_slice`` has one form, in memory linear in B.

    Returns:
        The loss [], in float32 at least, or this process's share of it.

    Raises:
        MedclrError: slices are needed, and there are none.
    """
    n, points = exists.shape
    exists = exists.bool()
    weight = exists.flatten().repeat(2)  # [2BP]
    weight = weight if gather is None else gather.all_gather(weight.long()) > 0  # [2NP]
    share = weight.to(torch.promote_types(a.dtype, torch.float32))
    if not bool(weight.any()):
        return (a.sum() + b.sum()).to(share.dtype) * 0
    if negatives == "same_slice":
        losses = _within_slices(a, b, temperature, exists)  # [B,2P]
        loss: Tensor = (losses * torch.cat([exists, exists], 1)).mean() / share.mean()
        return loss
    if slices is None and distance > 0:
        raise MedclrError("contrast of points: needs the scan and the number of each slice, and got none")
    scan, number = (source.new_zeros(2, n).long()) if slices is None else (slices.scan, slices.slice_index)
    whole = torch.stack([scan, number], 1).to(a.device)  # [B,2]
    whole = whole[:, None].expand(n, points, 2).reshape(-1, 2).repeat(2, 1)  # [2BP,2]
    at = source.to(a.device).reshape(-1, 2).repeat(2, 1)  # [2BP,2]
    if gather is not None:
        whole, at = gather.all_gather(whole), gather.all_gather(at)  # [2NP,2] each
    view, own = torch.arange(len(at), device=a.device), n * points
    point = view // (2 * own) * own + view % own  # [2NP]
    place = whole[:, 0] * (whole[:, 1].max() + 1 + reach) + whole[:, 1]  # [2NP]: scans never meet
    related = Points(point, place, reach, at[:, 0].contiguous(), at[:, 1].contiguous(), distance, weight)
    return contrast(a.flatten(0, 1), b.flatten(0, 1), temperature, gather, related, form, share)


@dataclass(frozen=True)
class Points:
    """The relation of ``point_nt_xent`` with all negatives."""

    point: Tensor
    """int64 [2NP]: the point of each view."""

    place: Tensor
    """int64 [2NP]: one number for (scan, slice), spaced so that scans never meet."""

    reach: int

    x: Tensor
    """[2NP], in pixels."""

    y: Tensor

    distance: float

    exists: Tensor
    """bool [2NP]."""

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Set to -inf, in place, what row views are not compared with; the twin always stays."""
        away = (self.x[rows, None] - self.x[columns]).square_()  # [R,C]
        away += (self.y[rows, None] - self.y[columns]).square_()
        out = away < self.distance**2
        out &= (self.place[rows, None] - self.place[columns]).abs_() <= self.reach
        out |= ~(self.exists[rows, None] & self.exists[columns])
        out &= self.point[rows, None] != self.point[columns]
        return hide_itself(logits.masked_fill_(out, -torch.inf), rows, columns)

    def positive_mean(self, views: Tensor, rows: slice) -> Tensor:
        """The twins [R,E]."""
        own = views[rows]
        return own.roll(len(own) // 2, 0)


def _within_slices(a: Tensor, b: Tensor, temperature: float, exists: Tensor) -> Tensor:
    """L [B,2P] of the points in either view, each compared with those of its slice alone."""
    with torch.autocast(a.device.type, enabled=False):
        both = torch.cat([a, b], 1).to(torch.promote_types(a.dtype, torch.float32))  # [B,2P,E]
        z = unit(both.flatten(0, 1)).view_as(both)
        logits = z @ z.mT / temperature  # [B,2P,2P]
        points = exists.shape[1]
        here = torch.cat([exists, exists], 1)  # [B,2P]
        twin = torch.eye(points, dtype=torch.bool, device=a.device).repeat(2, 2)  # [2P,2P], and itself
        out = ~(here[:, :, None] & here[:, None]) & ~twin  # [B,2P,2P]
        out.diagonal(dim1=1, dim2=2).fill_(True)
        attraction = torch.linalg.vecdot(z, z.roll(points, 1)) / temperature  # [B,2P]
        losses: Tensor = logits.masked_fill_(out, -torch.inf).logsumexp(2) - attraction
        return losses
