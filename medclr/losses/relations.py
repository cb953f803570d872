"""Which views attract each other and which are left out of the denominator, from the ids of the batch.

Letters: B pairs on this process, N pairs on all processes, K components of an embedding, R rows, C columns.
The 2N views stand in the order of ranks, and each process contributes its first views, then their twins.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from medclr.errors import MedclrError

Negatives = Literal["all", "other_scans", "other_patients"]
Positives = Literal["augmentation", "neighbouring_slice", "same_patient"]


class Ids(Protocol):
    """What the relations need of a batch: int64 [B] each; ``medclr.data.loader.Batch`` has them."""

    @property
    def patient(self) -> Tensor: ...

    @property
    def scan(self) -> Tensor: ...

    @property
    def slice_index(self) -> Tensor: ...


class Gather(Protocol):
    """What the loss needs of a process group; ``medclr.distributed.Group`` is one."""

    @property
    def rank(self) -> int: ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each process -> [n * processes, ...] in the order of ranks, carrying gradient."""
        ...


@dataclass(frozen=True)
class Relations:
    """Two columns of ids, from which the relations of any two views follow; no mask of all pairs is ever kept.

    Both relations are symmetric. Views i and j (i not j) are positives of each other where
    ``abs(place[i] - place[j]) <= reach``; j is left out of i's denominator where ``family[i] == family[j]`` and they
    are not positives.
    """

    place: Tensor
    """int64 [2N]: one number for (patient) or (image) alone, or for (scan, slice), spaced so that scans never meet."""

    reach: int
    """Largest distance of two places that are positives."""

    family: Tensor | None
    """int64 [2N]: the patient or the scan; None: nothing is left out."""

    has_twins_alone: bool = False
    """Whether the twin is the only positive of each view."""

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Set to -inf, in place, what row views are not compared with: themselves, and their family [R,C]."""
        if self.family is not None:
            kin = self.family[rows, None] == self.family[columns]  # [R,C]
            kin &= (self.place[rows, None] - self.place[columns]).abs_() > self.reach
            logits.masked_fill_(kin, -torch.inf)
        logits.diagonal(rows.start - columns.start).fill_(-torch.inf)
        return logits

    def positive_mean(self, views: Tensor, rows: slice) -> Tensor:
        """Mean embedding [R,K] of the positives of each row view, from all views [2N,K]; linear in their number."""
        if self.has_twins_alone:
            return views[rows].roll((rows.stop - rows.start) // 2, 0)
        places, index, counts = torch.unique(self.place, return_inverse=True, return_counts=True)  # [P], [2N], [P]
        sums = views.new_zeros(len(places), views.shape[1]).index_add(0, index, views)  # [P,K]
        if self.reach:
            low = torch.searchsorted(places, places - self.reach)  # [P]
            high = torch.searchsorted(places, places + self.reach, right=True)  # [P]
            sums, counts = _WindowSum.apply(sums, low, high), _window_sum(counts, low, high)
        mine = index[rows]  # [R]
        mean: Tensor = (sums[mine] - views[rows]) / (counts[mine] - 1)[:, None]  # the twin is there: at least 1
        return mean


def _window_sum(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sums of ``x[low[p]:high[p]]`` [P,...], as differences of prefix sums: in float64, so that little cancels."""
    prefix = x.new_zeros((len(x) + 1, *x.shape[1:]), dtype=torch.float64 if x.is_floating_point() else x.dtype)
    torch.cumsum(x, 0, dtype=prefix.dtype, out=prefix[1:])  # [P,...]
    out = torch.empty_like(x)
    for part, begin, end in zip(out.split(4096), low.split(4096), high.split(4096), strict=True):
        part.copy_(prefix[end] - prefix[begin])  # part by part: float64 takes room
    return out


class _WindowSum(torch.autograd.Function):
    """``_window_sum``; as q is in the window of p where p is in that of q, it is its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(low, high)
        return _window_sum(x, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _WindowSum.apply(grad, *ctx.saved_tensors), None, None


def relations(
    ids: Ids | None,
    negatives: Negatives,
    positives: Positives,
    reach: int,
    n: int,
    gather: Gather | None,
    device: torch.device,
) -> Relations | None:
    """The relations of all views, of which this process has the ``n`` pairs that ``ids`` describe; None: plain SimCLR.

    Raises:
        MedclrError: ids are needed, and there are none or not n of them.
    """
    wanted = [f"negatives {negatives!r}"] * (negatives != "all")
    wanted += [f"positives {positives!r}"] * (positives != "augmentation")
    if not wanted:
        return None
    if ids is None:
        raise MedclrError(f"{' and '.join(wanted)}: needs the patient, scan and slice of each image, and got none")
    columns = torch.stack([ids.patient, ids.scan, ids.slice_index], 1).to(device)  # [B,3]
    if len(columns) != n:
        raise MedclrError(f"{' and '.join(wanted)}: got {n} images, but the patient, scan and slice of {len(columns)}")
    columns = torch.cat([columns, columns])  # [2B,3]
    columns = columns if gather is None else gather.all_gather(columns)  # [2N,3]
    patient, scan, position = columns.T.contiguous()  # [2N] each
    family = {"all": None, "other_scans": scan, "other_patients": patient}[negatives]
    if positives == "same_patient":
        return Relations(patient, 0, family)
    if positives == "neighbouring_slice":
        return Relations(scan * (position.max() + 1 + reach) + position, reach, family)
    view = torch.arange(len(columns), device=device)  # [2N]
    return Relations(view // (2 * n) * n + view % n, 0, family, has_twins_alone=True)  # the number of the image
