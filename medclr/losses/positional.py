"""Contrast by position: slices at the same relative height of different patients' volumes attract each other.

The global loss of Chaitanya et al. (arXiv 2006.10511, section 3.1, G^D) with the distance of positional contrastive
learning (Zeng et al., arXiv 2106.09157), made soft, in place of a partition of the volumes.

Letters: B pairs on this process, N pairs on all processes, K components of an embedding, R rows, C columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from medclr.errors import MedclrError
from medclr.losses.nt_xent import TILE, Form, contrast, hide_itself
from medclr.losses.relations import Gather


class Places(Protocol):
    """What the loss needs of a batch, [B] each; ``medclr.data.loader.Batch`` has them."""

    @property
    def patient(self) -> Tensor: ...

    @property
    def group(self) -> Tensor: ...

    @property
    def position(self) -> Tensor: ...


def positional_nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    gather: Gather | None = None,
    *,
    places: Places | None,
    reach: float,
    form: Form = "auto",
) -> Tensor:
    """Mean over the 2B views i, with s the cosine of two views over the temperature and w their weights, of::

        L(i) = log sum over j in A(i) of exp s(i,j)  -  sum over j of w(i,j) s(i,j) / sum over j of w(i,j)

    w(i,j) is 1 for the view's twin; for a slice of another patient, of the same group (modality, plane and body part),
    at a distance d of relative positions it is 1 - d / reach, and 0 from ``reach`` on; for the patient's own slices and
    for other groups it is 0. A single image has no height: a group of its own leaves it its twin, and it is a negative
    like any other. A(i) are all views but i itself and the patient's other slices nearer than ``reach``: they look
    alike, and are neither positives nor negatives. With all embeddings equal L is log |A(i)|.

    Args:
        a: embeddings of the first views [B,K], of any norm.
        b: embeddings of the second views [B,K]: row i is the twin of row i of ``a``.
        temperature: divides the cosines.
        gather: as in ``nt_xent``.
        places: patient, group and position in [0,1] of the B slices.
        reach: distance from which slices no longer attract each other.
        form: as in ``nt_xent``.

    Returns:
        The loss [], in float32 at least.

    Raises:
        MedclrError: there are no places or not B of them, or all slices are at one position.
    """
    if places is None or len(places.position) != len(a):
        got = "none" if places is None else f"those of {len(places.position)}"
        raise MedclrError(f"contrast by position: needs the patient and the position of {len(a)} slices, and got {got}")
    columns = torch.stack([places.patient, places.group], 1).to(a.device).repeat(2, 1)  # [2B,2]
    position = places.position.to(a.device).repeat(2)  # [2B]
    if gather is not None:
        columns, position = gather.all_gather(columns), gather.all_gather(position)  # [2N,2], [2N]
    if len(position) > 2 and bool((position == position[0]).all()):
        raise MedclrError(
            "contrast by position: all slices of a batch are at one place of their volumes; it needs volumes of "
            "several slices, for single images choose method simclr"
        )
    view = torch.arange(len(position), device=a.device)  # [2N]
    image = view // (2 * len(a)) * len(a) + view % len(a)  # [2N]
    tile = TILE.get(a.device.type, TILE["cpu"])
    related = Positional(image, columns[:, 0].contiguous(), columns[:, 1].contiguous(), position, reach, tile)
    return contrast(a, b, temperature, gather, related, form)


@dataclass(frozen=True)
class Positional:
    """The relation of ``positional_nt_xent``; no matrix of all pairs is ever kept."""

    image: Tensor
    """int64 [2N]: the slice of each view."""

    patient: Tensor
    """int64 [2N]."""

    group: Tensor
    """int64 [2N]: slices of other groups show nothing alike."""

    position: Tensor
    """[2N], in [0,1]."""

    reach: float
    tile: int
    """Side of the blocks in which weights are made."""

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Set to -inf, in place, what row views are not compared with: themselves, and near slices of the patient."""
        kin = self.patient[rows, None] == self.patient[columns]  # [R,C]
        kin &= (self.position[rows, None] - self.position[columns]).abs_() < self.reach
        kin &= self.image[rows, None] != self.image[columns]
        return hide_itself(logits.masked_fill_(kin, -torch.inf), rows, columns)

    def weights(self, rows: slice, columns: slice) -> Tensor:
        """w [R,C] of ``positional_nt_xent``, with 0 for the view itself."""
        distance = (self.position[rows, None] - self.position[columns]).abs_()  # [R,C]
        w = distance.div_(-self.reach).add_(1).clamp_(min=0)
        w *= (self.patient[rows, None] != self.patient[columns]) & (self.group[rows, None] == self.group[columns])
        w += self.image[rows, None] == self.image[columns]
        w.diagonal(rows.start - columns.start).zero_()
        return w

    def positive_mean(self, views: Tensor, rows: slice) -> Tensor:
        """Weighted mean embedding [R,K] of the positives of each of the ``rows``."""
        sums: Tensor = _WeightedSum.apply(views, self, rows, False)  # [R,K]
        with torch.no_grad():
            total: Tensor = _WeightedSum.apply(views.new_ones(len(views), 1), self, rows, False)  # [R,1], 1 at least
        return sums / total


class _WeightedSum(torch.autograd.Function):
    """The weights [R,2N] times x [2N,K], or transposed times x [R,K], block by block; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, related: Positional, rows: slice, transposed: bool) -> Tensor:
        ctx.related, ctx.rows, ctx.transposed = related, rows, transposed
        total = len(related.position)
        out = x.new_zeros(total if transposed else rows.stop - rows.start, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for part in _cut(rows.start, rows.stop, related.tile):
                own = slice(part.start - rows.start, part.stop - rows.start)
                for columns in _cut(0, total, related.tile):
                    w = related.weights(part, columns).to(x.dtype)  # [R,C]
                    if transposed:
                        out[columns].addmm_(w.T, x[own])
                    else:
                        out[own].addmm_(w, x[columns])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _WeightedSum.apply(grad, ctx.related, ctx.rows, not ctx.transposed), None, None, None


def _cut(start: int, stop: int, side: int) -> Iterator[slice]:
    return (slice(i, min(i + side, stop)) for i in range(start, stop, side))
