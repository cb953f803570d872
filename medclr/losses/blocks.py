"""Row-wise log-sum-exp of a matrix of cosines that is never held: tiles of it are made, used and forgotten.

Letters: M views of all processes, n of them of this process, K components of an embedding, T side of a tile.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from medclr.errors import MedclrError


class Hide(Protocol):
    """Sets logits [R,C] of the row and column views to -inf, in place, where they do not count."""

    def __call__(self, logits: Tensor, rows: slice, columns: slice) -> Tensor: ...


def logsumexp_blocks(views: Tensor, own: slice, temperature: float, hide: Hide, tile: int) -> Tensor:
    """For each view of ``own``: log of the sum of exp(view . other / temperature) over the others that ``hide`` leaves.

    ``views`` [M,K] -> [n], with M x K numbers and a few tiles [T,T] of memory in either pass. The backward pass makes
    the tiles again from the log-sum-exp that the forward pass kept. Where both sides of a tile are of ``own`` it serves
    the tile across the diagonal too (the cosine is symmetric, and ``hide`` must be): half of the cosines are saved.

    Raises:
        MedclrError: in a backward pass that is itself to be differentiated.
    """
    result: Tensor = _LogSumExp.apply(views, own, temperature, hide, tile)
    return result


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, views: Tensor, own: slice, temperature: float, hide: Hide, tile: int) -> Tensor:
        sums = views.new_full(views.shape[:1], -torch.inf)  # [M], of which own is filled
        for rows, columns, mirrored in _tiles(len(views), own, tile):
            logits = hide((views[rows] / temperature) @ views[columns].T, rows, columns)  # [T,T]
            sums[rows] = torch.logaddexp(sums[rows], logits.logsumexp(1))
            if mirrored:
                sums[columns] = torch.logaddexp(sums[columns], logits.logsumexp(0))
        ctx.save_for_backward(views, sums)
        ctx.own, ctx.temperature, ctx.hide, ctx.tile = own, temperature, hide, tile
        return sums[own].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable is silent where the incoming gradient is constant
            raise MedclrError("the loss in blocks cannot be differentiated twice; ask for the dense form")
        views, sums = ctx.saved_tensors  # [M,K], [M]
        weight = torch.zeros_like(sums)  # [M]: the gradient of each log-sum-exp
        weight[ctx.own] = grad / ctx.temperature
        out = torch.zeros_like(views)  # [M,K]
        with torch.autocast(views.device.type, enabled=False):
            for rows, columns, mirrored in _tiles(len(views), ctx.own, ctx.tile):
                logits = ctx.hide((views[rows] / ctx.temperature) @ views[columns].T, rows, columns)  # [T,T]
                both = (logits - sums[rows, None]).exp_().mul_(weight[rows, None])  # [T,T]
                if mirrored:
                    both += logits.sub_(sums[columns]).exp_().mul_(weight[columns])
                out[rows].addmm_(both, views[columns])
                out[columns].addmm_(both.T, views[rows])
        return out, None, None, None, None


def _tiles(total: int, own: slice, side: int) -> Iterator[tuple[slice, slice, bool]]:
    """Rows and columns of the tiles that cover own x total, and whether the tile stands for its mirror image too."""
    mine = _cut(own.start, own.stop, side)
    others = [*_cut(0, own.start, side), *_cut(own.stop, total, side)]
    for number, rows in enumerate(mine):
        yield rows, rows, False
        yield from ((rows, columns, True) for columns in mine[number + 1 :])
        yield from ((rows, columns, False) for columns in others)


def _cut(start: int, stop: int, side: int) -> list[slice]:
    return [slice(i, min(i + side, stop)) for i in range(start, stop, side)]
