"""NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709, equation 1), with patients taken into account.

Letters: B pairs on this process, N pairs on all processes, K components of an embedding.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.losses.blocks import Hide, logsumexp_blocks
from medclr.losses.relations import Gather, Ids, Negatives, Positives, relations

Form = Literal["auto", "dense", "blocks"]

DENSE_VIEWS = 1024
"""Up to so many views of all processes 'auto' takes the dense form."""

TILE = {"cpu": 512, "cuda": 4096}
"""Views along a side of a block: it should stay in the processor's cache, and keep a GPU busy."""

SHORTEST = 1e-12
"""An embedding with no larger component has no direction: it counts as zero, at cosine 0 from all others."""


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    gather: Gather | None = None,
    *,
    ids: Ids | None = None,
    negatives: Negatives = "all",
    positives: Positives = "augmentation",
    reach: int = 1,
    form: Form = "auto",
) -> Tensor:
    """Mean over the 2B views i, with s the cosine of two views over the temperature, of::

        L(i) = log sum over j in A(i) of exp s(i,j)  -  mean over p in P(i) of s(i,p)

    This is L_out of supervised contrastive learning (Khosla et al., arXiv 2004.11362, equation 2). P(i), the positives,
    are always the view's twin, and with ``positives``

    - ``augmentation``: nothing else, which is NT-Xent;
    - ``neighbouring_slice``: the views of slices of the same scan at most ``reach`` slices away;
    - ``same_patient``: all other views of the same patient. This is multi-instance contrastive learning (MICLe, Azizi
      et al., arXiv 2101.05224, section 3.2), with the mean over all pairs of the patient's images in the batch, and
      the twin among them, where MICLe draws one pair of different images; a patient with one image keeps the twin.

    A(i), what i is compared with, is P(i) and, never i itself, with ``negatives``

    - ``all``: every other view;
    - ``other_scans``: every view of another scan;
    - ``other_patients``: every view of another patient. A view that is left with its twin alone has L(i) = 0 and no
      gradient. With ``same_patient`` the three are one, because positives stay in the denominator.

    With all embeddings equal L is log |A(i)|: log(2N-1) where nothing is left out. The paper's algorithm 1 takes the
    mean over all views, as here; SimCLR's reference code adds the means of the two halves, which is twice that.

    Args:
        a: embeddings of the first views [B,K], of any norm.
        b: embeddings of the second views [B,K]: row i is the twin of row i of ``a``.
        temperature: divides the cosines.
        gather: brings the views of the other processes, each of which has B pairs too. The result is then this
            process's share of the loss: its mean over the processes is the loss of the whole batch, and the mean of
            its gradients that loss's gradient.
        ids: patient, scan and slice of the B images; needed unless negatives are all and positives augmentation.
        negatives: see above.
        positives: see above.
        reach: see above.
        form: ``dense`` holds the 2B x 2N cosines; ``blocks`` makes them in blocks, twice, in memory linear in N, and
            cannot be differentiated twice; ``auto`` is dense up to ``DENSE_VIEWS`` views. They agree to rounding.

    Returns:
        The loss [], in float32 at least, also under autocast.

    Raises:
        MedclrError: ids are needed, and there are none or not B of them.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected two embeddings of one shape [B,K], got {list(a.shape)} and {list(b.shape)}")
    related = relations(ids, negatives, positives, reach, len(a), gather, a.device) or Twins()
    return contrast(a, b, temperature, gather, related, form)


class Related(Protocol):
    """Which views attract each other, and which are compared; both in the order of ranks, as ``relations`` says."""

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """As ``medclr.losses.blocks.Hide``; must be symmetric, and leave each row some column."""
        ...

    def positive_mean(self, views: Tensor, rows: slice) -> Tensor:
        """Mean embedding [R,K] of the positives of each of the ``rows``, from all views [2N,K]."""
        ...


class Twins:
    """Every view attracts its twin alone, and is compared with all others."""

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """Only the view itself is not compared with."""
        return hide_itself(logits, rows, columns)

    def positive_mean(self, views: Tensor, rows: slice) -> Tensor:
        """The twins."""
        own = views[rows]
        return own.roll(len(own) // 2, 0)


def contrast(
    a: Tensor,
    b: Tensor,
    temperature: float,
    gather: Gather | None,
    related: Related,
    form: Form = "auto",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over the 2B views of L(i), as in ``nt_xent``, for any relation of the views.

    Args:
        a: embeddings of the first views [B,K].
        b: of the second [B,K].
        temperature: divides the cosines.
        gather: as in ``nt_xent``.
        related: of all views.
        form: as in ``nt_xent``.
        weight: [2N], of each view of all processes in the mean, not all 0; None: all alike.

    Returns:
        The loss [], or this process's share of it.
    """
    with torch.autocast(a.device.type, enabled=False):
        own = unit(torch.cat([a, b]).to(torch.promote_types(a.dtype, torch.float32)))  # [2B,K]
        n = len(own)
        views, start = (own, 0) if gather is None else (gather.all_gather(own), gather.rank * n)  # [2N,K]
        rows = slice(start, start + n)
        if form == "dense" or (form == "auto" and len(views) <= DENSE_VIEWS):
            sums = logsumexp_dense(views, rows, temperature, related.hide)  # [2B]
        else:
            sums = logsumexp_blocks(views, rows, temperature, related.hide, TILE.get(a.device.type, TILE["cpu"]))
        attracting = related.positive_mean(views, rows)  # [2B,K]
        losses = sums - torch.linalg.vecdot(own, attracting) / temperature  # [2B]
        if weight is not None:
            losses = losses * (weight[rows] / weight.mean())
        loss: Tensor = losses.mean()
        return loss


def unit(x: Tensor) -> Tensor:
    """Rows [n,K] of length 1, finite for any finite row: the squares neither overflow nor vanish."""
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=1, keepdim=True)  # [n,1]
    x = x / torch.where(largest > SHORTEST, largest, 1)  # [n,K]: a scale has no influence, so no gradient either
    return F.normalize(x, dim=1, eps=1)  # the norm is now 1 at least, or that of a row that counts as zero


def logsumexp_dense(views: Tensor, own: slice, temperature: float, hide: Hide) -> Tensor:
    """The same as ``logsumexp_blocks``, with all the cosines at once: [M,K] -> [n]."""
    logits = views[own] @ views.T / temperature  # [n,M]
    return hide(logits, own, slice(0, len(views))).logsumexp(1)


def hide_itself(logits: Tensor, rows: slice, columns: slice) -> Tensor:
    """Set to -inf, in place, the logit [R,C] of each view with itself."""
    logits.diagonal(rows.start - columns.start).fill_(-torch.inf)
    return logits
