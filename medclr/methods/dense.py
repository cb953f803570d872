"""Dense contrast: the same point of a slice in two views, told from other places, in the features of a U-Net decoder.

The local loss of Chaitanya et al. (arXiv 2006.10511, section 3.2), perhaps together with a loss on whole slices. The
views have recorded what was drawn for them, so that corresponding points are known exactly. Encoder and decoder are
trained together; or one after the other, with ``init`` and ``frozen``.

Letters: B images, m of them in a chunk, F features of the encoder, S the image side, C neighbouring slices as
channels, P points of an image, E components of a point's embedding, G of an image's; K = P * (E + 3) + G.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr.augment.points import shared_points
from medclr.augment.views import Draws
from medclr.data.loader import Batch
from medclr.data.store import Store
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses.nt_xent import Form, nt_xent
from medclr.losses.points import Others, point_nt_xent
from medclr.losses.positional import positional_nt_xent
from medclr.methods import PretrainingMethod
from medclr.methods.positional import check_places
from medclr.models.encoder import Encoder
from medclr.models.heads import ProjectionHead
from medclr.models.unet import UNetDecoder

LOOKED_AT = ((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5))
"""(u, v) of the points of an image whose embeddings the monitor sees."""


@dataclass(frozen=True)
class Config:
    """Settings of the dense contrast."""

    points: int = 32
    """Points drawn of each slice: they and those of the rest of the batch are what a point is told from."""

    distance: float = 4.0
    """Least distance of two points of a slice, in pixels of the store. Points of neighbouring slices that are nearer
    are not told apart."""

    reach: int = 1
    """Up to so many slices apart, slices of a scan are neighbours in that sense."""

    negatives: Others = "all"
    """What a point is told from. all: the other points of all slices of the batch; same_slice: those of its own."""

    temperature: float = 0.2
    """Divides the cosines."""

    width: int = 16
    """Channels of the decoder at the full size; they double from one size to the next coarser one. Segmentation that
    starts from the run has the same."""

    level: int = 0
    """Where the points are looked up. 0: in the decoder's map of the full size; 1: in the coarser one before it, and so
    on; what is finer is then not trained."""

    out_features: int = 64
    """Components of the embedding of a point."""

    frozen: bool = False
    """Leave the encoder as init gave it, and train the decoder alone."""

    global_weight: float = 0.0
    """Weight of a loss on whole slices, beside that on points; 0: none. The encoder learns from both."""

    global_positives: Literal["augmentation", "position"] = "augmentation"
    """The loss on whole slices: augmentation: as in simclr; position: as in positional."""

    global_reach: float = 0.1
    """As reach of positional."""

    global_features: int = 128
    """Components of the embedding of a slice."""

    loss: Form = "auto"
    """dense holds the cosines of all pairs of points; blocks makes them piece by piece in little memory; auto is dense
    for small batches. The result is the same to rounding."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        rules = {
            "points": (self.points >= 2, "at least 2; 16 to 64 is usual"),
            "distance": (self.distance > 0, "above 0 pixels"),
            "reach": (self.reach >= 0, "at least 0"),
            "temperature": (self.temperature > 0, "above 0; 0.1 to 0.5 is usual"),
            "width": (self.width >= 1, "at least 1; 8 to 32 is usual"),
            "level": (0 <= self.level <= 4, "0 to 4"),
            "out_features": (self.out_features >= 1, "at least 1"),
            "frozen": (
                not (self.frozen and self.global_weight),
                "false with a global_weight, which is for the encoder",
            ),
            "global_weight": (self.global_weight >= 0, "at least 0"),
            "global_reach": (0 < self.global_reach <= 1, "a share of a volume's height, above 0"),
            "global_features": (self.global_features >= 1, "at least 1"),
        }
        if wrong := [f"dense.{name} must be {rule}" for name, (holds, rule) in rules.items() if not holds]:
            raise MedclrError("; ".join(wrong))


class Method(PretrainingMethod):
    """Encoder, decoder, and what embeds a point.

    Attributes:
        encoder: what is kept after pretraining.
        decoder: kept too.
        local: embeds a point from the decoder's map, thrown away.
        head: projection head of whole slices, where these are learnt from too.
    """

    encoder: Encoder

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.decoder = UNetDecoder(encoder.channels, encoder.config.slices, 0, config.width, level=config.level)
        channels, hidden = self.decoder.made[config.level], 2 * config.out_features
        self.local = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, config.out_features),
        )
        self.head = ProjectionHead(encoder.features, 2, config.global_features) if config.global_weight else None
        if config.frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Method":
        """As torch's; a frozen encoder keeps the statistics of its batch norm too."""
        super().train(mode)
        if self.config.frozen:
            self.encoder.eval()
        return self

    def inputs(self, batch: Batch, draws: Draws, view: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Points that both views show, [m,P,5]: (u, v) in this view, (x, y) in the slice, and 1 where there is one."""
        points = shared_points(batch, draws, rows, self.config.points, self.config.distance)
        return (torch.cat([points.at[view], points.source, points.exists[:, :, None]], 2).float(),)

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Images [m,C,S,S] and points [m,P,5] -> [m,K]: of each point its embedding, (x, y) and 1; then the image's."""
        (points,) = inputs
        features, local = self._local(x, points[:, :, :2])
        out = torch.cat([local, points[:, :, 2:].to(local.dtype)], 2).flatten(1)  # [m,P*(E+3)]
        return out if self.head is None else torch.cat([out, self.head(features).to(out.dtype)], 1)

    def _local(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Images [m,C,S,S] and (u, v) of points [m,P,2] -> features [m,F], and embeddings of the points [m,P,E]."""
        maps = self.encoder.pyramid(x)
        dense = self.decoder.features(x, maps)  # [m,C,h,w]
        sampled = F.grid_sample(dense.to(at.dtype), at[:, :, None], padding_mode="border", align_corners=False)
        flat = sampled[:, :, :, 0].mT.flatten(0, 1)  # [m*P,C]
        local: Tensor = self.local(flat)  # [m*P,E]
        return maps[-1].mean((2, 3)), local.to(at.dtype).view(*at.shape[:2], -1)

    def check(self, store: Store, indices: NDArray[np.int64]) -> None:
        """As ``check_places``, where places count."""
        if self.config.global_weight and self.config.global_positives == "position":
            check_places(store, indices)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,C,S,S] -> features [B,F]; embeddings of four points of each [4B,E], or its own [B,G] if learnt."""
        at = x.new_tensor(LOOKED_AT).expand(len(x), -1, -1)  # [B,4,2]
        features, local = self._local(x, at)
        return features, local.flatten(0, 1) if self.head is None else self.head(features)

    def objective(
        self, a: Tensor, b: Tensor, facts: Any = None, group: Group | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` gave for the two views -> the loss on points, perhaps with that on slices.

        Raises:
            MedclrError: there are no facts.
        """
        config = self.config
        size = config.points * (config.out_features + 3)
        za, zb = (z[:, :size].view(len(z), config.points, -1) for z in (a, b))  # [B,P,E+3] each
        (pa, known), (pb, _) = (z.split([config.out_features, 3], 2) for z in (za, zb))
        source, exists = known[:, :, :2].detach(), known[:, :, 2].detach() > 0  # [B,P,2], [B,P]
        loss = point_nt_xent(
            pa,
            pb,
            config.temperature,
            group,
            source=source,
            exists=exists,
            slices=facts,
            negatives=config.negatives,
            distance=config.distance,
            reach=config.reach,
            form=config.loss,
        )
        with torch.no_grad():
            cosines = F.cosine_similarity(pa.float(), pb.float(), dim=2)  # [B,P]
            logs = {
                "point_cosine": (cosines * exists).sum() / exists.sum().clamp(min=1),
                "points": exists.float().sum(1).mean(),
            }
        if self.head is not None:
            ga, gb = a[:, size:], b[:, size:]  # [B,G] each
            form = config.loss
            if config.global_positives == "position":
                whole = positional_nt_xent(
                    ga, gb, config.temperature, group, places=facts, reach=config.global_reach, form=form
                )
            else:
                whole = nt_xent(ga, gb, config.temperature, group, form=form)
            logs |= {"local_loss": loss.detach(), "global_loss": whole.detach()}
            loss = loss + config.global_weight * whole
        return loss, logs
