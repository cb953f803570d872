"""Classification of slices, images or whole scans: one label a scan, or several.

Letters: n slices, C neighbouring slices as channels, s side of a view, F features, m scans, K classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr import figures, tasks
from medclr.augment.labelled import training_views
from medclr.augment.views import plain_view
from medclr.config import ViewsConfig
from medclr.data.loader import Batch, load_batch
from medclr.data.splits import patient_labels
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder
from medclr.models.heads import LinearHead
from medclr.models.projection import load_first_layer
from medclr.outcomes import Classified, Outcome
from medclr.scans.modality import modality_of
from medclr.tasks import Ints

PIECE = 64
"""Slices that go through the network at once when nothing is learnt."""

MOST_WEIGHT = 20
"""Of a class in the loss, however rare it is: more would make steps without it and with it too different."""


@dataclass(frozen=True)
class Config:
    """Settings of classification."""

    pool: Literal["mean", "attention", "slices"] = "mean"
    """How the slices of a scan become one answer. mean: of their features; attention: weighted by what the network
    finds telling (gated attention, Ilse et al. 2018); slices: each is classified alone, and probabilities averaged."""

    slices_per_scan: int = 8
    """Slices drawn of a scan at each training step, for mean and attention; all of them count in the end."""

    layer: Literal["encoder", "projection"] = "encoder"
    """Where the classifier sits: on the encoder, or on the first layer of the projection head (SimCLRv2)."""

    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: each class counts alike in the loss, but no item more than 20 times as much as without."""

    multi_label: bool = False
    """Labels are lists parted by '|', and each class is a question of its own. A lone '|' says that there is none."""

    def __post_init__(self) -> None:
        if self.slices_per_scan < 1:
            raise MedclrError("classify.slices_per_scan must be at least 1")


class GatedAttention(nn.Module):
    """Weights of the slices of a scan (Ilse et al. 2018, arXiv 1802.04712, eq. 9)."""

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.w = nn.Linear(hidden, 1)
        nn.init.zeros_(self.w.weight)  # starts as the mean
        nn.init.zeros_(self.w.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n,F] -> logits [n] of the weights."""
        scores: Tensor = self.w(torch.tanh(self.v(x)) * torch.sigmoid(self.u(x)))  # [n,1]
        return scores[:, 0]


class Model(tasks.TaskModel):
    """Encoder, perhaps the first layer of the projection head, pooling over a scan, and a linear classifier."""

    def __init__(self, config: Config, encoder: Encoder, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.encoder, self.classes = config, encoder, classes
        features = encoder.features
        self.first: nn.Module = nn.Identity()
        if config.layer == "projection":
            self.first = nn.Sequential(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())
        self.attention = GatedAttention(features) if config.pool == "attention" else None
        self.classifier = LinearHead(features, len(classes))

        self._first_is_pretrained = False

    def start_from(self, run: Path) -> list[str]:
        """The first layer of the projection head from a run of pretraining; names of the tensors."""
        if self.config.layer != "projection":
            return []
        self._first_is_pretrained = True
        return load_first_layer(self.first, run)

    def stages(self) -> list[list[nn.Module]]:
        """Those of the encoder; the first layer of the projection head, if it came with it, belongs to the last."""
        *before, last = self.encoder.stages()
        return [*before, [*last, self.first] if self._first_is_pretrained else last]

    def features(self, x: Tensor) -> Tensor:
        """Images [n,C,s,s] in [0,1] -> features [n,F]."""
        features: Tensor = self.first(self.encoder(x))
        return features

    def pooled(self, features: Tensor, scan: Tensor) -> Tensor:
        """Features [n,F] of slices, and which scan 0..m-1 each is of [n] -> features of scans [m,F]."""
        with torch.autocast(features.device.type, enabled=False):  # a mean of many needs float32
            features = features.float()
            logits = features.new_zeros(len(features)) if self.attention is None else self.attention(features)  # [n]
            is_of = scan == torch.arange(int(scan.max()) + 1, device=scan.device)[:, None]  # [m,n]
            # A product, not a sum by index: that adds in another order each time on a GPU.
            return torch.where(is_of, logits, -torch.inf).softmax(1) @ features

    def forward(self, x: Tensor, scan: Tensor) -> Tensor:
        """Images [n,C,s,s] in [0,1], and which scan 0..m-1 each is of [n] -> logits [m,K]."""
        logits: Tensor = self.classifier(self.pooled(self.features(x), scan))
        return logits

    def slice_logits(self, x: Tensor) -> Tensor:
        """Images [n,C,s,s] in [0,1] -> logits [n,K] of each alone."""
        return self(x, torch.arange(len(x), device=x.device))  # type: ignore[no-any-return]

    def infer(self, batch: Batch) -> Tensor:
        """Slices of whole scans -> probabilities [m,K], scans in ascending order."""
        pieces = (batch.select(slice(start, start + PIECE)) for start in range(0, len(batch), PIECE))
        return self.answer(torch.cat([self.seen(piece) for piece in pieces]), batch.scan)

    def seen(self, batch: Batch) -> Tensor:
        """Slices in physical units -> features [n,F], nothing random."""
        return self.features(plain_view(batch, self.encoder.size_px))

    def answer(self, features: Tensor, scan: Tensor) -> Tensor:
        """Features [n,F] of the slices of whole scans, and which scan each is of [n] -> as ``infer``."""
        row = scan.unique(return_inverse=True)[1]  # [n], 0..m-1
        if self.config.pool == "slices":
            return self.pooled(self._probabilities(self.classifier(features)), row)
        return self._probabilities(self.classifier(self.pooled(features, row)))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if self.config.multi_label else logits.float().softmax(1)


class Task(tasks.Task):
    """The labelled scans of a store.

    Raises:
        MedclrError: fewer than two classes are labelled, or the store has none of the modality.
    """

    def __init__(self, config: Config, store: Store, modality: str | None = None) -> None:
        self.config, self.store = config, store
        wanted = modality_of(modality).name if modality else None
        rows = [i for i, s in enumerate(store.scans) if s.label and wanted in (None, s.modality)]
        self.scans: Ints = np.array(rows, dtype=np.int64)
        labels = [store.scans[i].label for i in rows]
        named = [_parts(label) if config.multi_label else (label,) for label in labels]
        self.classes = tuple(sorted({name for each in named for name in each}))
        if len(self.classes) < (1 if config.multi_label else 2):
            of = f" of modality {wanted}" if wanted else ""
            raise MedclrError(
                f"{store.path}: classification needs labelled scans{of} of two classes at least; give `medclr index` "
                "--labels"
            )
        self._truth = {i: [int(c in each) for c in self.classes] for i, each in zip(rows, named, strict=True)}
        patients = [store.scans[i].patient_id for i in rows]
        if config.multi_label:  # of the classes of a patient the rarest, so that a budget has some of it
            count = Counter(name for each in named for name in each)
            named = [(min(each, key=lambda name: (count[name], name)),) if each else ("",) for each in named]
        self.strata = patient_labels(zip(patients, (each[0] or "none" for each in named), strict=True))
        scan = store.column("scan")
        self._first = np.searchsorted(scan, np.arange(len(store.scans) + 1))  # [scans + 1], where each scan begins
        self._weight = torch.ones(len(self.classes))

    def truth(self, scans: Ints) -> NDArray[np.int64]:
        """[m,K], 1 where a scan is of a class."""
        return np.array([self._truth[int(i)] for i in scans], dtype=np.int64).reshape(len(scans), len(self.classes))

    def check(self, scans: Ints, what: str) -> None:
        """Raise MedclrError if some class has no case among ``scans``."""
        count = self.truth(scans).sum(0)
        if (count == 0).any():
            absent = self.classes[int(count.argmin())]
            raise MedclrError(f"{self.store.path}: none of {what} has label {absent!r}; take more cases or label some")

    def items(self, scans: Ints) -> Sequence[Any]:
        """Scans; with pool 'slices' their slices, as (scan, index). Their classes are weighed from now on."""
        items: list[Any] = [int(i) for i in scans]
        if self.config.pool == "slices":
            items = [(i, n) for i in items for n in range(self._first[i], self._first[i + 1])]
            scans = np.array([i for i, _ in items], dtype=np.int64)
        if self.config.class_weights == "balanced":
            truth = self.truth(scans)
            count = np.maximum(truth.sum(0), 1)
            odds = (len(truth) - count) / count if self.config.multi_label else len(truth) / (len(count) * count)
            self._weight = torch.from_numpy(odds).float().clamp(1 / MOST_WEIGHT, MOST_WEIGHT)
        return items

    def loss(self, model: Model, items: Sequence[Any], views: ViewsConfig, *, seed: int, step: int) -> Tensor:
        """Cross-entropy of scans, or of slices; binary, if there are several labels."""
        if self.config.pool == "slices":
            scans, indices = (np.array(column) for column in zip(*items, strict=True))
            bag = np.arange(len(items))
        else:
            rng = np.random.default_rng([seed, step, 3])
            scans, drawn = np.array(items), [self._draw(i, rng) for i in items]
            bag, indices = np.repeat(np.arange(len(items)), [len(d) for d in drawn]), np.concatenate(drawn)
        device = next(model.parameters()).device
        batch = load_batch(self.store, indices, model.encoder.config.slices).to(device)
        x, _ = training_views(batch, views, seed=seed, step=step)
        logits = model(x, torch.from_numpy(bag).to(device)).float()  # [m,K]
        truth = torch.from_numpy(self.truth(scans)).to(device)  # [m,K]
        weight = self._weight.to(device)
        if self.config.multi_label:
            return F.binary_cross_entropy_with_logits(logits, truth.float(), pos_weight=weight)
        return F.cross_entropy(logits, truth.argmax(1), weight=weight)

    def _draw(self, scan: int, rng: np.random.Generator) -> Ints:
        """Some slices of a scan: one of each of equally long parts of it."""
        first, last = int(self._first[scan]), int(self._first[scan + 1])
        n = min(self.config.slices_per_scan, last - first)
        edges = np.linspace(first, last, n + 1).astype(np.int64)
        chosen: Ints = rng.integers(edges[:-1], edges[1:])
        return chosen

    def judge(self, model: Model, scans: Ints) -> Outcome:
        """Probabilities of whole scans against their labels; memory is for ``PIECE`` slices, however long a scan is."""
        scans = np.sort(scans)
        device = next(model.parameters()).device
        parts = []
        with torch.inference_mode():
            for some in self._groups(scans):
                indices = np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in some])
                features = []
                for start in range(0, len(indices), PIECE):
                    piece = indices[start : start + PIECE]
                    features.append(model.seen(load_batch(self.store, piece, model.encoder.config.slices).to(device)))
                scan = torch.from_numpy(self.store.column("scan")[indices]).to(device)
                parts.append(model.answer(torch.cat(features), scan).cpu().numpy().astype(np.float64))
        probability = np.concatenate(parts)
        stored = [self.store.scans[int(i)] for i in scans]
        return Classified(
            [s.scan_id for s in stored], [s.patient_id for s in stored], self.classes, self.truth(scans), probability,
            self.config.multi_label,
        )  # fmt: skip

    def _groups(self, scans: Ints, most: int = 256) -> list[list[int]]:
        """Whole scans, at most so many slices at once unless one scan alone has more."""
        groups: list[list[int]] = []
        size = most + 1
        for i in map(int, scans):
            n = int(self._first[i + 1] - self._first[i])
            if size + n > most:
                groups.append([])
                size = 0
            groups[-1].append(i)
            size += n
        return groups

    def draw(self, model: Model, outcome: Outcome, folder: Path, stamp: str = "") -> None:
        """``confusion.png``: which class is taken for which."""
        if isinstance(outcome, Classified) and not outcome.multi_label:
            figures.confusion(folder / "confusion.png", outcome.truth, outcome.probability, outcome.classes, stamp)


def _parts(label: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in label.split("|") if part.strip())
