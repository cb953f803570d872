"""SimCLR (Chen et al., arXiv 2002.05709) and the pretraining of SimCLRv2 (arXiv 2006.10029: a 3-layer head).

Letters: B images, F features of the encoder, K components of the embedding, S the image side.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses.nt_xent import nt_xent
from medclr.methods import PretrainingMethod
from medclr.models.heads import ProjectionHead


@dataclass(frozen=True)
class Config:
    """Settings of SimCLR."""

    temperature: float = 0.2
    """Divides the cosines: 0.1 for ImageNet with large batches, 0.5 for CIFAR-10, 0.2 for small batches."""

    head_layers: Literal[2, 3] = 2
    """Layers of the projection head: 2 in SimCLR, 3 in SimCLRv2."""

    out_features: int = 128
    """Components of the embedding in which the loss is taken."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        if not self.temperature > 0:
            raise MedclrError(f"temperature: {self.temperature} is not above 0; 0.1 to 0.5 is usual")
        if self.out_features < 1:
            raise MedclrError(f"out_features: {self.out_features} is below 1; 128 is usual")


class Method(PretrainingMethod):
    """Encoder and projection head, trained to tell each image's two views from those of all other images.

    Attributes:
        encoder: what is kept after pretraining; has ``features`` F.
        head: projection head, thrown away after it (SimCLRv2 keeps its first layer).
    """

    def __init__(self, config: Config, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        features: int = encoder.features  # type: ignore[assignment]
        self.head = ProjectionHead(features, config.head_layers, config.out_features)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,1,S,S] -> features [B,F] and embedding [B,K]."""
        features = self.encoder(x)
        return features, self.head(features)

    def loss(
        self, a: Tensor, b: Tensor, batch: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views [B,1,S,S] of one batch -> NT-Xent, and what else to log (0-d tensors, detached, of this process).

        Both views go through the network in one pass, as in the reference, so that the batch-norm statistics are those
        of all 2B views. ``batch`` is what the views came from; SimCLR does not look at it. ``group`` brings the
        negatives of all processes.
        """
        features = self.encoder(torch.cat([a, b]))  # [2B,F]
        za, zb = self.head(features).chunk(2)  # [B,K] each
        loss = nt_xent(za, zb, self.config.temperature, group)
        with torch.no_grad():
            positive = F.cosine_similarity(za.float(), zb.float()).mean()  # []
        return loss, {"positive_cosine": positive}

    def forward(
        self, a: Tensor, b: Tensor, batch: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same as ``loss``: DistributedDataParallel runs modules by calling them."""
        return self.loss(a, b, batch, group)
