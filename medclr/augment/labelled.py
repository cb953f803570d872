"""Views of labelled slices for supervised training: what is drawn for the image happens to its mask too.

Letters: B images, C neighbouring slices as channels, S side of a stored slice, s side of a view, K classes.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medclr.augment.chain import moving
from medclr.augment.views import Drawn, Draws, replay
from medclr.config import ViewsConfig
from medclr.errors import MedclrError

if TYPE_CHECKING:
    from medclr.data.loader import Batch


def training_views(
    batch: "Batch", config: ViewsConfig, *, seed: int, step: int, masks: Tensor | None = None, classes: int = 0
) -> tuple[Tensor, Tensor | None]:
    """One random view of every image, a function of (seed, step, row) alone, and its mask in the same geometry.

    Args:
        batch: images [B,C,S,S] in physical units; the channels of an image share all that is drawn.
        config: sizes and strengths.
        seed: of the run.
        step: of the run.
        masks: [B,S,S] whole numbers 0..K-1, or None.
        classes: K.

    Returns:
        views [B,C,s,s] in [0,1], and masks int64 [B,s,s], or None.
    """
    rows = torch.arange(len(batch))
    drawn = Draws(config, len(batch), seed=seed, step=step).drawn(batch, 0, rows)
    with torch.autocast(batch.images.device.type, enabled=False):  # physical values need float32
        return replay(batch.images.float(), drawn), None if masks is None else mask_views(masks, drawn, classes)


def mask_views(masks: Tensor, drawn: tuple[Drawn, ...], classes: int) -> Tensor:
    """Masks [B,S,S] of ``classes`` values by the recorded geometry, the first transform of each chain: int64 [B,s,s].

    Each class is resampled as an image of its own and the largest wins, so that borders fall where linear
    interpolation puts them, between pixels too. What lies outside of the image is class 0.

    Raises:
        MedclrError: a chain of the user's own moves pixels after the crop.
    """
    if moved := [name for part in drawn for name in moving(part.chain)]:
        raise MedclrError(f"views.chain: {moved[0]} moves pixels, and masks do not follow it; leave it out")
    best: Tensor | None = None
    for k in range(1, classes):
        share = _geometry((masks == k).float()[:, None], drawn)[:, 0]  # [B,s,s], of class k
        if best is None:
            best, total, labels = share, share.clone(), torch.full_like(share, k, dtype=torch.int64)
        else:
            labels = torch.where(share > best, k, labels)
            best, total = torch.maximum(best, share), total + share
    if best is None:
        raise ValueError("masks have at least two classes, the background among them")
    return torch.where(1 - total > best, 0, labels)


def _geometry(images: Tensor, drawn: tuple[Drawn, ...]) -> Tensor:
    """[B,1,S,S] by the crop of each chain alone, with 0 outside: [B,1,s,s]."""
    crops = []
    for part in drawn:
        params = {**part.params[0], "air": torch.zeros(len(part.rows))}
        crops.append(part.chain[0].apply(images.index_select(0, part.rows.to(images.device)), params))
    order = torch.cat([part.rows for part in drawn]).argsort()
    return torch.cat(crops).index_select(0, order.to(images.device))
