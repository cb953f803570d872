"""SimCLR (Chen et al., arXiv 2002.05709) and the pretraining of SimCLRv2 (arXiv 2006.10029: a 3-layer head).

Letters: B images, F features of the encoder, K components of the embedding, S the image side, C neighbouring slices as
channels.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses.nt_xent import Form, nt_xent
from medclr.losses.relations import Negatives, Positives
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

    negatives: Negatives = "all"
    """Views that a view is told from: all others; only those of other_scans; or only those of other_patients, so that
    two slices that look alike because they are of one body are not pushed apart."""

    positives: Positives = "augmentation"
    """What is pulled together, beside the two views of a slice. augmentation: nothing; neighbouring_slice: slices of
    the same scan at most reach apart; same_patient: all slices of the same patient (MICLe). Only what meets in a batch
    counts."""

    reach: int = 1
    """Largest distance in slices at which slices are neighbours, for positives neighbouring_slice."""

    loss: Form = "auto"
    """dense holds the cosines of all pairs of views; blocks makes them piece by piece in little memory; auto is dense
    for small batches. The result is the same to rounding."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        if not self.temperature > 0:
            raise MedclrError(f"temperature: {self.temperature} is not above 0; 0.1 to 0.5 is usual")
        if self.reach < 1:
            raise MedclrError(f"reach: {self.reach} is below 1, at which no slice has a neighbour")
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
        """Images [B,C,S,S] -> features [B,F] and embedding [B,K]."""
        features = self.encoder(x)
        return features, self.head(features)

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings [B,K] of the two views -> NT-Xent, and the mean cosine of the twins.

        ``facts`` are looked at for ids if the settings ask for them; ``group`` brings the views of all processes.

        Raises:
            MedclrError: the settings ask for ids, and there are none.
        """
        config = self.config
        loss = nt_xent(
            a,
            b,
            config.temperature,
            group,
            ids=facts,
            negatives=config.negatives,
            positives=config.positives,
            reach=config.reach,
            form=config.loss,
        )
        with torch.no_grad():
            positive = F.cosine_similarity(a.float(), b.float()).mean()  # []
        return loss, {"positive_cosine": positive}
