"""Is the encoder learning, or has it collapsed? Figures that need no label, and a nearest-neighbour score that does.

Shape letters: n slices, F features.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

COLLAPSED_RANK = 2.0
"""Below this effective rank all embeddings lie near one line: the loss has no directions left to separate scans."""

COLLAPSED_UNIFORMITY = -0.05
"""Uniformity is 0 when all embeddings are equal, and near -4 (for many dimensions) when they are spread evenly."""


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007) of centred features [n,F].

    Between 1 (all on one line) and min(n - 1, F); 0 for features that are all equal.
    """
    centred = features.double() - features.double().mean(0)  # [n,F]
    values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-12 * max(1.0, float(features.abs().max())):
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def uniformity(embeddings: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of L2-normalised rows [n,F] (Wang and Isola 2020, eq. 3)."""
    x = torch.nn.functional.normalize(embeddings.double(), dim=1)  # [n,F]
    return float((torch.pdist(x).square().mul(-2).logsumexp(0)) - math.log(len(x) * (len(x) - 1) / 2))


def knn_accuracy(features: Tensor, labels: Tensor, patients: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Balanced accuracy of weighted kNN (Wu et al. 2018) in which a slice's own patient is never its neighbour.

    Args:
        features: [n,F].
        labels: class of each row [n], -1 where there is none.
        patients: patient of each row [n].
        k: neighbours that vote.
        temperature: a neighbour with cosine s votes with exp(s / temperature).

    Returns:
        The mean over classes of the share of rows that are voted right; NaN with fewer than two labelled classes.
    """
    known = labels >= 0
    x = torch.nn.functional.normalize(features[known].float(), dim=1)  # [m,F]
    y, who = labels[known], patients[known]
    classes = y.unique()
    if len(classes) < 2 or len(who.unique()) < 2:
        return math.nan
    similarity = (x @ x.T).masked_fill(who[:, None] == who[None, :], -math.inf)  # [m,m]
    best, nearest = similarity.topk(min(k, len(x)), dim=1)  # [m,k]
    votes = torch.zeros(len(x), int(y.max()) + 1, device=x.device)
    votes.scatter_add_(1, y[nearest], torch.exp((best - 1) / temperature))  # exp(-inf) = 0: own patient has no vote
    right = votes.argmax(1) == y
    return float(torch.stack([right[y == c].float().mean() for c in classes]).mean())


def collapse_warning(figures: "Mapping[str, float]") -> str | None:
    """One sentence when the embeddings collapse, else None."""
    rank, spread = figures["effective_rank"], figures["uniformity"]
    if rank >= COLLAPSED_RANK and spread <= COLLAPSED_UNIFORMITY:
        return None
    return (
        f"the embeddings are collapsing (effective rank {rank:.1f}, uniformity {spread:.2f}): all slices look alike to "
        "the encoder; lower optim.lr, lengthen optim.warmup, enlarge batch, or raise the method's temperature"
    )
