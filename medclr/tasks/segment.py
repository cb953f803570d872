"""Segmentation of slices, judged as volumes: a U-Net decoder on the encoder's pyramid.

Letters: n slices, C neighbouring slices as channels, S side of a stored slice, s side of a view, m scans, K classes
(the background comes besides, as output 0), V voxels of a source in its own shape.
"""

import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from torch import Tensor

from medclr import figures_masks
from medclr.augment.labelled import training_views
from medclr.augment.views import plain_view
from medclr.config import ViewsConfig
from medclr.data.loader import Batch, load_batch
from medclr.data.store import Store, to_source_grid
from medclr.data.tables import StoredScan
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder
from medclr.models.unet import UNetDecoder, load_decoder
from medclr.outcomes import Outcome, Segmented
from medclr.progress import progress
from medclr.scans.modality import modality_of
from medclr.tasks import Ints, TaskModel
from medclr.tasks import Task as BaseTask

WIDTH = 16
"""Of a decoder that neither the settings nor a run has one for."""

PIECE = 64
"""Slices that go through the network at once when nothing is learnt."""

SHOWN = (0.2, 0.5, 0.8)
"""Which slices of a scan are drawn: so far from the first to the last that shows a class."""

Bools = NDArray[np.bool_]
Labels = NDArray[np.uint16]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """Settings of segmentation."""

    labels: tuple[int, ...] = ()
    """Values of the masks that are the classes, in order; none: all that occur. 0 is the background."""

    names: tuple[str, ...] = ()
    """Names of the classes; none: their values."""

    width: int | None = None
    """Channels of the decoder at the full size; they double from one size to the next coarser one. null: those of the
    decoder that the encoder was pretrained under, or 16 without one."""

    decoder: Literal["pretrained", "new"] = "pretrained"
    """What the decoder starts from. pretrained: that of the encoder's run, where it kept one; new: random weights."""

    dropout: float = 0.0
    """Share of the decoder's channels that is dropped after each convolution while training."""

    empty_slices: float = 1.0
    """Training takes at most so many slices without any class as with one, spread evenly over the scan."""

    def __post_init__(self) -> None:
        """Raise MedclrError for a setting that cannot work."""
        if self.width is not None and self.width < 1:
            raise MedclrError(f"segment.width: {self.width} is below 1; 8 to 32 is usual")
        if not 0 <= self.dropout < 1:
            raise MedclrError(f"segment.dropout: {self.dropout} is no share from 0 to below 1")
        if self.empty_slices < 0:
            raise MedclrError(f"segment.empty_slices: {self.empty_slices} is below 0")
        if len(set(self.labels)) < len(self.labels) or any(not 0 < value < 2**16 for value in self.labels):
            raise MedclrError("segment.labels must be different values from 1 to 65535; 0 is the background")
        if len(set(self.names)) < len(self.names) or "" in self.names:
            raise MedclrError("segment.names must be different words")
        if self.names and len(self.names) != len(self.labels):
            raise MedclrError(
                f"segment.names: are {len(self.names)}, but segment.labels {len(self.labels)}; name each label"
            )


class Model(TaskModel):
    """Encoder and decoder.

    Attributes:
        config: with the width that was settled.
        decoder: learns at the full rate, also where it came pretrained.
    """

    config: Config

    def __init__(self, config: Config, encoder: Encoder, classes: tuple[str, ...]) -> None:
        super().__init__()
        pretrained = encoder.decoder_width if config.decoder == "pretrained" else None
        width = config.width or pretrained or WIDTH
        self.config, self.encoder, self.classes = replace(config, width=width), encoder, classes
        self.decoder = UNetDecoder(encoder.channels, encoder.config.slices, len(classes) + 1, width, config.dropout)

    def start_from(self, run: Path) -> list[str]:
        """The decoder that the run kept; names of the tensors.

        Raises:
            MedclrError: it is of another width than the one that was asked for.
        """
        width = self.encoder.decoder_width
        if self.config.decoder == "new" or width is None:
            return []
        if width != self.config.width:
            raise MedclrError(
                f"segment.width: {self.config.width}, but the decoder of {run} has {width}; leave it out, or set "
                "segment.decoder to new"
            )
        return [f"decoder.{name}" for name in load_decoder(self.decoder, run)]

    def forward(self, x: Tensor) -> Tensor:
        """Images [n,C,s,s] in [0,1] -> logits [n,K+1,s,s], background first."""
        logits: Tensor = self.decoder(x, self.encoder.pyramid(x))
        return logits

    def training_batch(self, batch: Batch) -> Batch:
        """Crops are taken of the whole square, padding and all: that is what the model is asked about later, and with
        crops of the content alone everything would look larger in training than it is.
        """
        whole = batch.content.new_tensor([0, 0, *batch.images.shape[2:]])  # [4]
        return replace(batch, content=whole.expand(len(batch), 4))

    def slice_logits(self, x: Tensor) -> Tensor:
        """As ``forward``: every slice is segmented for itself."""
        return self(x)  # type: ignore[no-any-return]

    def infer(self, batch: Batch) -> Tensor:
        """Slices in physical units, ``batch.images`` [n,C,S,S] -> probabilities [n,K+1,S,S], background first."""
        size = batch.images.shape[2:]
        parts = []
        for start in range(0, len(batch), PIECE):
            x = plain_view(batch.select(slice(start, start + PIECE)), self.encoder.size_px)  # [b,C,s,s]
            probability = self(x).float().softmax(1)  # [b,K+1,s,s]
            if probability.shape[2:] != size:
                probability = F.interpolate(probability, size, mode="bilinear", antialias=True)
            parts.append(probability)
        return torch.cat(parts)


class Task(BaseTask):
    """The scans of a store that have a mask.

    Attributes:
        config: as given, with the labels and names that were found.
    """

    config: Config

    def __init__(self, config: Config, store: Store, modality: str | None = None) -> None:
        self.store = store
        wanted = modality_of(modality).name if modality else None
        rows = [i for i, scan in enumerate(store.scans) if scan.has_mask and wanted in (None, scan.modality)]
        if not rows:
            of = f" of modality {wanted}" if wanted else ""
            raise MedclrError(f"{store.path}: no scan{of} has a mask; give `medclr index` --masks")
        store.check_source_masks(rows)  # judging needs them, which comes after hours of training
        self.scans: Ints = np.array(rows, dtype=np.int64)
        scan = store.column("scan")  # [N]
        self._first = np.searchsorted(scan, np.arange(len(store.scans) + 1))  # [scans + 1], where each scan begins
        shown = _values_shown(store, self._slices(self.scans))  # value -> [N]
        labels = tuple(config.labels) or tuple(sorted(shown))
        _check_labels(store, labels, shown)
        _warn_of_lost(store, rows, shown)
        self.config = replace(config, labels=labels, names=tuple(config.names) or tuple(map(str, labels)))
        self.classes = self.config.names
        self._class_of = np.zeros(2**16, dtype=np.uint16)  # value -> 0..K
        self._class_of[list(labels)] = np.arange(1, len(labels) + 1)
        self._shown = np.stack([shown[value] for value in labels], axis=1)  # [N,K], which slices show which class
        self.strata = {}
        for patient in sorted({store.scans[i].patient_id for i in rows}):
            here = self.holds(np.array([i for i in rows if store.scans[i].patient_id == patient])).any(0)  # [K]
            self.strata[patient] = "+".join(np.array(self.classes)[here]) or "none"

    def _slices(self, scans: Ints) -> Ints:
        """The slices of some scans."""
        return np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in scans])

    def holds(self, scans: Ints) -> Bools:
        """[m,K], which scans show which class."""
        held: Bools = np.array([self._shown[self._first[i] : self._first[i + 1]].any(0) for i in scans])
        return held

    def check(self, scans: Ints, what: str) -> None:
        """Raise MedclrError if some class is in no mask of ``scans``; ``what`` names them."""
        held = self.holds(scans)  # [m,K]
        for k, name in enumerate(self.classes):
            if not held[:, k].any():
                raise MedclrError(
                    f"{self.store.path}: no mask of {what} shows class {name!r}; take more cases, or label some"
                )

    def items(self, scans: Ints) -> Sequence[int]:
        """The slices that show a class, and of the others as many as ``empty_slices`` allows."""
        chosen: list[int] = []
        for i in scans:
            slices = np.arange(self._first[i], self._first[i + 1])
            shows = self._shown[slices].any(1)  # [n]
            empty = slices[~shows]
            few = min(round(self.config.empty_slices * shows.sum()), len(empty))
            spread = empty[((np.arange(few) + 0.5) * len(empty) / max(few, 1)).astype(np.int64)]
            chosen += sorted([*slices[shows].tolist(), *spread.tolist()])
        return chosen

    def loss(self, model: Model, items: Sequence[int], views: ViewsConfig, *, seed: int, step: int) -> Tensor:
        """Cross-entropy, and one less the Dice of the batch, mean over the classes without the background."""
        device = next(model.parameters()).device
        batch = model.training_batch(load_batch(self.store, items, model.encoder.config.slices).to(device))
        masks = torch.from_numpy(self.targets(items).astype(np.int64)).to(device)  # [n,S,S]
        x, truth = training_views(batch, views, seed=seed, step=step, masks=masks, classes=len(self.classes) + 1)
        if truth is None:
            raise ValueError("training_views gave no masks")
        logits = model(x)  # [n,K+1,s,s]
        with torch.autocast(device.type, enabled=False):  # sums over all pixels of a batch need float32
            criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
            loss: Tensor = criterion(logits.float(), truth[:, None])
            return loss

    def targets(self, indices: Sequence[int] | Ints) -> Labels:
        """[n,S,S], the class 0..K of every pixel of some slices."""
        return self._class_of[self.store.masks(indices)]

    def predicted(self, model: Model, scan: int) -> Labels:
        """[n,S,S], the class 0..K that the model gives every pixel of a scan's stored slices."""
        device = next(model.parameters()).device
        parts = []
        with torch.inference_mode():
            for start in range(self._first[scan], self._first[scan + 1], PIECE):
                indices = np.arange(start, min(start + PIECE, self._first[scan + 1]))
                batch = load_batch(self.store, indices, model.encoder.config.slices).to(device)
                parts.append(model.infer(batch).argmax(1).cpu().numpy().astype(np.uint16))
        return np.concatenate(parts)

    def judge(self, model: Model, scans: Ints) -> Segmented:
        """Dice and 95 % Hausdorff distance of whole scans, on the voxels of their source files.

        The truth is the mask of the file, whatever shrinking made of it: what the stored grid is too coarse for counts
        against the model. A label that no stored mask shows any more is no class, and is background here; whoever
        opened the store was warned of it.
        """
        dice, hd95_mm = [], []
        with progress("judge", len(scans), "scans") as advance:
            for i in scans:
                stored = self.store.scans[i]
                predicted, spacing_mm = on_source(self.predicted(model, i), stored)  # [V]
                truth = self._class_of[self.store.source_mask(i)].reshape(predicted.shape)  # [V]
                scores = agreement(predicted, truth, spacing_mm, len(self.classes))
                dice.append(scores[0])
                hd95_mm.append(scores[1])
                advance(1)
        stored_scans = [self.store.scans[i] for i in scans]
        shape = len(scans), len(self.classes)
        return Segmented(
            [scan.scan_id for scan in stored_scans],
            [scan.patient_id for scan in stored_scans],
            self.classes,
            np.array(dice).reshape(shape),
            np.array(hd95_mm).reshape(shape),
        )

    def draw(self, model: Model, outcome: Outcome, folder: Path, stamp: str = "") -> None:
        """``overlays.png``: the best, the median and the worst patient by mean Dice; nothing where no Dice is known."""
        if not isinstance(outcome, Segmented):
            raise TypeError(f"expected segmentations, got {outcome.kind}")
        patients = np.array(outcome.patient_id)
        known = {patient: outcome.score("mean Dice", (patients == patient) * 1.0) for patient in sorted(set(patients))}
        ranked = sorted((p for p in known if not np.isnan(known[p])), key=lambda p: -known[p])
        if not ranked:
            return
        chosen = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best"}  # the best, where one is all
        row_of = {scan.scan_id: i for i, scan in enumerate(self.store.scans)}
        rows = []
        for rank, word in sorted(chosen.items()):
            scan_id = outcome.scan_id[int((patients == ranked[rank]).argmax())]  # the patient's first
            caption = f"{word} of {len(ranked)}: Dice {known[ranked[rank]]:.3f}\n{ranked[rank]}"
            rows.append(self._overlaid(model, row_of[scan_id], caption))
        figures_masks.overlays(folder / "overlays.png", rows, self.classes, stamp)

    def _overlaid(self, model: Model, scan: int, caption: str) -> figures_masks.Overlaid:
        """Some slices of a scan without padding, the mask and what the model says."""
        stored, slices = self.store.scans[scan], self._slices(np.array([scan]))
        truth, predicted = self.targets(slices), self.predicted(model, scan)  # [n,S,S]
        shows = np.flatnonzero((truth > 0).any((1, 2)))
        first, last = (shows[0], shows[-1]) if len(shows) else (0, len(slices) - 1)
        which = [round(first + share * (last - first)) for share in SHOWN]
        images = plain_view(load_batch(self.store, slices[which]), self.store.info.size_px)[:, 0].numpy()
        box = (
            slice(None),
            slice(stored.content_top, stored.content_top + stored.content_height),
            slice(stored.content_left, stored.content_left + stored.content_width),
        )
        titles = [f"slice {d + 1} of {stored.depth}" for d in stored.slice_indices()[which]]
        return figures_masks.Overlaid(caption, titles, images[box], truth[which][box], predicted[which][box])


def on_source(labels: Labels, scan: StoredScan) -> tuple[Labels, tuple[float, ...]]:
    """Labels [n,S,S] on the stored slices -> on the voxels of the source [V], and the spacing along its axes in mm.

    An image alone has two axes: every pixel of it would be the surface of a volume of one slice.
    """
    order = np.argsort(scan.source_axes)  # the axes (d,h,w) in the source's order
    if scan.depth == 1:
        order = order[order != 0]
    shape = [(scan.depth, scan.height, scan.width)[axis] for axis in order]
    return to_source_grid(labels, scan).reshape(shape), tuple(scan.spacing_mm[axis] for axis in order)


def agreement(predicted: Labels, truth: Labels, spacing_mm: Sequence[float], classes: int) -> tuple[Floats, Floats]:
    """Dice [K] and 95 % Hausdorff distance [K] in mm of classes 1..K, as ``Segmented`` says for absent ones.

    Args:
        predicted: [V], classes 0..K.
        truth: [V].
        spacing_mm: along each axis.
        classes: K.
    """
    dice, hd95_mm = np.full(classes, np.nan), np.full(classes, np.nan)
    for k in range(classes):
        pair = np.stack([predicted == k + 1, truth == k + 1])  # [2,V]
        box = _bounding_box(pair[0] | pair[1])
        if box is None:
            continue
        p, t = (torch.from_numpy(mask[box])[None, None] for mask in pair)  # [1,1,...] each
        dice[k] = float(compute_dice(p, t, ignore_empty=False))
        if p.any() and t.any():
            with warnings.catch_warnings():  # MONAI 1.6 warns of an argument that it passes itself
                warnings.filterwarnings("ignore", ".*get_mask_edges", FutureWarning)
                hd95_mm[k] = float(
                    compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing_mm))
                )
        else:
            hd95_mm[k] = np.linalg.norm(np.multiply(truth.shape, spacing_mm))
    return dice, hd95_mm


def _bounding_box(mask: Bools) -> tuple[slice, ...] | None:
    """Where a mask is not false; None: nowhere."""
    box = []
    for axis in range(mask.ndim):
        lines = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(lines):
            return None
        box.append(slice(lines[0], lines[-1] + 1))
    return tuple(box)


def _values_shown(store: Store, indices: Ints) -> dict[int, Bools]:
    """Value of the masks, 0 aside -> [N], which of ``indices`` show it; the other slices do not."""
    shown: dict[int, Bools] = {}
    with progress("masks", len(indices), "slices") as advance:
        for start in range(0, len(indices), PIECE):
            piece = indices[start : start + PIECE]
            masks = store.masks(piece)  # [n,S,S]
            for value in np.unique(masks[masks > 0]).tolist():
                shown.setdefault(value, np.zeros(len(store), dtype=bool))[piece] = (masks == value).any((1, 2))
            advance(len(piece))
    return shown


def _warn_of_lost(store: Store, scans: Sequence[int], shown: Collection[int]) -> None:
    """Say which labels of the files are in no stored slice: they are neither learnt nor judged."""
    lost: dict[int, str] = {}  # label -> the first scan that has it
    shrunk = [i for i in scans if store.scans[i].loses_mask]
    with progress("masks of the files", len(shrunk), "scans") as advance:
        for i in shrunk:
            occurs = np.zeros(2**16, dtype=bool)
            occurs[store.source_mask(i).ravel()] = True
            for value in np.flatnonzero(occurs).tolist():
                if value and value not in shown:
                    lost.setdefault(value, store.scans[i].scan_id)
            advance(1)
    for value, scan_id in sorted(lost.items()):
        print(
            f"medclr: warning: label {value} (in the mask of scan {scan_id}) is too small for slices of "
            f"{store.info.size_px} px, which show it nowhere: it is neither learnt nor judged; prepare with a larger "
            "--size-px",
            file=sys.stderr,
        )


def _check_labels(store: Store, labels: Sequence[int], shown: dict[int, Bools]) -> None:
    """Raise MedclrError unless the masks show exactly the labels asked for."""
    if not shown:
        raise MedclrError(f"{store.path}: every mask is empty; there is no class to learn")
    occur = ", ".join(map(str, sorted(shown)))
    for value in sorted(shown):
        if value not in labels:
            scan = store.scans[store.column("scan")[shown[value].argmax()]]
            raise MedclrError(
                f"{store.path}: the mask of scan {scan.scan_id} holds label {value}, which is not among segment.labels"
                f" ({', '.join(map(str, labels))}); those that occur are {occur}: name them all, or leave it empty"
            )
    for value in labels:
        if value not in shown:
            raise MedclrError(f"{store.path}: no mask shows label {value} of segment.labels; those that occur: {occur}")
