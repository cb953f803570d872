"""NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709, equation 1).

Letters: B pairs on this process, N pairs on all processes, K components of an embedding.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Gather(Protocol):
    """What the loss needs of a process group; ``medclr.distributed.Group`` is one."""

    @property
    def rank(self) -> int: ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each process -> [n * processes, ...] in the order of ranks, carrying gradient."""
        ...


def nt_xent(a: Tensor, b: Tensor, temperature: float, gather: Gather | None = None) -> Tensor:
    """Mean over the 2B views of -log softmax(cosine / temperature) at the view's twin; the other 2N-2 are negatives.

    ``a`` and ``b`` [B,K] are the two views' embeddings, of any norm: row i of one is the twin of row i of the other.
    A view is never compared with itself. Computed in float32 at least, also under autocast. With all embeddings equal
    the loss is log(2N-1). The paper's algorithm 1 takes the mean over all views, as here; the reference code adds the
    means of the two halves, which is twice that.

    With ``gather`` the negatives come from all processes and the result is this process's share of the loss: its mean
    over the processes is the loss of the whole batch, and the mean of its gradients that loss's gradient.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected two embeddings of one shape [B,K], got {list(a.shape)} and {list(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        views = torch.cat([a, b]).to(torch.promote_types(a.dtype, torch.float32))  # [2B,K]
        views = F.normalize(views, dim=1)  # [2B,K]
        n = len(views)
        others, start = (views, 0) if gather is None else (gather.all_gather(views), gather.rank * n)  # [2N,K]
        logits = views @ others.T / temperature  # [2B,2N]
        index = torch.arange(n, device=a.device)  # [2B]
        logits[index, start + index] = -torch.inf  # itself
        twins = start + (index + n // 2) % n  # [2B]: columns
        return F.cross_entropy(logits, twins)
