"""Contrast by position: Chaitanya et al. (arXiv 2006.10511, loss G^D) and Zeng et al. (arXiv 2106.09157).

Volumes of the same body part show the same anatomy at the same relative height, so their slices there are positives of
each other, without any label: those of the same modality, plane and body part, as far as the scans record them. It asks
for volumes that begin and end at like places. Single images among them have no height, and attract their twins alone.

Letters: B images, K components of the embedding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr.data.store import Store
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses.nt_xent import Form
from medclr.losses.positional import positional_nt_xent
from medclr.methods import simclr


@dataclass(frozen=True)
class Config:
    """Settings of the contrast by position."""

    reach: float = 0.1
    """Share of the height of a volume from which slices of different patients no longer attract each other; nearer ones
    do so with a weight that falls from 1 to 0. As near slices of the same patient are not told apart."""

    temperature: float = 0.2
    """Divides the cosines."""

    head_layers: Literal[2, 3] = 2
    """Layers of the projection head: 2 in SimCLR, 3 in SimCLRv2."""

    out_features: int = 128
    """Components of the embedding in which the loss is taken."""

    loss: Form = "auto"
    """dense holds the cosines of all pairs of views; blocks makes them piece by piece in little memory; auto is dense
    for small batches. The result is the same to rounding."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        if not 0 < self.reach <= 1:
            raise MedclrError(f"reach: {self.reach} is no share of a volume's height above 0; 0.05 to 0.25 is usual")
        if not self.temperature > 0:
            raise MedclrError(f"temperature: {self.temperature} is not above 0; 0.1 to 0.5 is usual")
        if self.out_features < 1:
            raise MedclrError(f"out_features: {self.out_features} is below 1; 128 is usual")


def check_places(store: Store, indices: NDArray[np.int64]) -> None:
    """Raise MedclrError if the slices are all at one place, as single images are."""
    if np.ptp(store.column("position")[indices]) == 0:
        raise MedclrError(
            f"{store.path}: all slices are at one place of their volumes, and contrast by position needs volumes of "
            "several slices; for single images choose method simclr"
        )


class Method(simclr.Method):
    """Encoder and projection head, as in SimCLR; what attracts each other is another matter."""

    config: Config  # type: ignore[assignment]  # head and features are asked for alike

    def __init__(self, config: Config, encoder: nn.Module) -> None:
        super().__init__(config, encoder)  # type: ignore[arg-type]

    def check(self, store: Store, indices: NDArray[np.int64]) -> None:
        """As ``check_places``."""
        check_places(store, indices)

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings [B,K] of the two views -> the loss by the places in ``facts``, and the mean cosine of the twins.

        Raises:
            MedclrError: there are no facts, or all slices are at one position.
        """
        config = self.config
        loss = positional_nt_xent(a, b, config.temperature, group, places=facts, reach=config.reach, form=config.loss)
        with torch.no_grad():
            positive = F.cosine_similarity(a.float(), b.float()).mean()  # []
        return loss, {"positive_cosine": positive}
