"""Pictures for looking at slices and features in a notebook: drawn at once, shown where they are made, or saved.

Letters: N slices of the store, n shown, q queries, k neighbours, m points, F features, H rows, W columns.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from medclr.augment.views import describe, two_views
from medclr.config import ViewsConfig
from medclr.data.loader import load_batch
from medclr.data.shown import shown
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.figures import COLOURS, INK, plain_axes
from medclr.figures_masks import COLOURS as LIGHT
from medclr.files import writing

Indices = NDArray[np.int64]

RED, REST = "#d1262f", "#c9d1d9"

DPI = 80
"""Small enough that a notebook with a dozen pictures stays below a megabyte."""

COLOURS_IN_PNG = 96
"""Greys and a few colours: a third of the bytes, and nothing that the eye misses."""

PAIRS_AT_ONCE = 2**24
"""So many cosines are held at once in the search for neighbours."""


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows when it is the last line of a cell."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: Path | str) -> None:
        """Write the PNG, atomically."""
        with writing(Path(path)) as temporary:
            temporary.write_bytes(self.png)


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of some rows among the rows of other groups, the nearest first."""

    rows: Indices
    """[q], whose neighbours they are."""
    nearest: Indices
    """[q,k]."""
    cosine: NDArray[np.float32]
    """[q,k], 1: the same direction."""


def read_picture(path: Path | str, *, width_px: int = 900) -> Picture:
    """A picture that medclr wrote, such as the curves of a run, shrunk to at most ``width_px``.

    Raises:
        MedclrError: there is no such picture.
    """
    try:
        with Image.open(path) as image:
            image.thumbnail((width_px, 10 * width_px))
            return Picture(_small(image))
    except OSError as error:
        raise MedclrError(f"{path}: cannot be read as a picture ({error})") from error


def find_neighbours(
    features: NDArray[np.floating[Any]], group: ArrayLike, rows: ArrayLike | None = None, k: int = 5
) -> Neighbours:
    """Nearest neighbours by cosine of centred features; a row of the same group is never a neighbour.

    The mean is subtracted first: what all slices have in common would make all cosines alike.

    Args:
        features: [N,F].
        group: [N], such as the patient of each row: a patient's own slices are near for no merit of the encoder.
        rows: [q], whose neighbours are looked for; None: all.
        k: how many.

    Raises:
        MedclrError: some row has fewer than ``k`` rows of other groups.
    """
    group = np.asarray(group)  # [N]
    wanted = np.arange(len(features)) if rows is None else np.asarray(rows, dtype=np.int64)  # [q]
    x = features - features.mean(0)
    x = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)  # [N,F]
    others = len(group) - np.unique(group, return_counts=True)[1].max()
    if k > others:
        raise MedclrError(f"k={k}: there are only {others} rows of other groups (patients) to be neighbours")
    nearest = np.empty((len(wanted), k), dtype=np.int64)
    cosine = np.empty((len(wanted), k), dtype=np.float32)
    step = max(1, PAIRS_AT_ONCE // len(x))
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]  # [b]
        pairs = x[part] @ x.T  # [b,N]
        pairs[group[part][:, None] == group[None, :]] = -np.inf
        best = np.argsort(-pairs, axis=1, kind="stable")[:, :k]  # [b,k]
        nearest[start : start + step] = best
        cosine[start : start + step] = np.take_along_axis(pairs, best, 1)
    return Neighbours(wanted, nearest, cosine)


def slices(store: Store, indices: ArrayLike, captions: Sequence[str] = (), *, columns: int = 6) -> Picture:
    """Slices as a viewer shows them, each with a caption.

    Args:
        store: where they lie.
        indices: [n].
        captions: [n]; without them modality, patient and slice.
        columns: slices a line.
    """
    indices = np.asarray(indices, dtype=np.int64)
    return _tiles(list(shown(store, indices)), list(captions) or [caption(store, i) for i in indices], columns)


def overlays(store: Store, indices: ArrayLike, *, names: Mapping[int, str] | None = None, columns: int = 6) -> Picture:
    """Slices with their masks as areas in light colours.

    Args:
        store: where they lie.
        indices: [n].
        names: value of a mask -> name of its class; other values are called by their number.
        columns: slices a line.
    """
    indices = np.asarray(indices, dtype=np.int64)
    masks = store.masks(indices)  # [n,S,S]
    values = np.unique(masks[masks > 0]).tolist()
    colours = {value: LIGHT[i % len(LIGHT)] for i, value in enumerate(values)}
    pictures = np.repeat(shown(store, indices)[..., None], 3, -1)  # [n,S,S,3]
    for value, colour in colours.items():
        here = masks == value
        pictures[here] = 0.45 * pictures[here] + 0.55 * np.array(to_rgb(colour), dtype=np.float32)
    legend = {(names or {}).get(value, str(value)): colour for value, colour in colours.items()}
    return _tiles(list(pictures), [caption(store, i) for i in indices], columns, legend=legend)


def views(store: Store, indices: ArrayLike, config: ViewsConfig, *, n: int = 5, seed: int = 0) -> Picture:
    """A line a slice: as it is stored, and ``n`` random views of it, captioned with what was done.

    Args:
        store: where the slices lie.
        indices: slices.
        config: of the views, as in pretraining.
        n: views a slice.
        seed: of the views.
    """
    batch = load_batch(store, np.asarray(indices, dtype=np.int64))
    drawn = [two_views(batch, config, seed=seed, step=step) for step in range(-(-n // 2))]
    pictures, captions = [], []
    for row, image in enumerate(shown(store, indices)):
        pictures.append(image)
        captions.append(f"{batch.modalities[int(batch.modality[row])]}, as stored")
        for view in range(n):
            of_step = drawn[view // 2]
            pictures.append((of_step.b if view % 2 else of_step.a)[row, 0].numpy())
            captions.append(describe(of_step, view % 2, row))
    return _tiles(pictures, captions, n + 1, caption_lines=5)


def neighbours(store: Store, found: Neighbours) -> Picture:
    """A line a query: the slice, and its nearest neighbours, each with its cosine; rows are slices of the store.

    A neighbour is framed in red if its modality is another than the query's, or its label, where both have one.
    """
    pictures: list[NDArray[np.float32]] = []
    captions: list[str] = []
    wrong: list[bool] = []
    modality, label = store.column("modality"), store.column("label")  # [N] each
    for query, near, cosines in zip(found.rows, found.nearest, found.cosine, strict=True):
        pictures.extend(shown(store, [query, *near]))
        captions.append(f"{caption(store, query)}\nIts neighbours:")
        captions.extend(f"{caption(store, i)}\ncosine {c:.2f}" for i, c in zip(near, cosines, strict=True))
        other = (label[near] != label[query]) & (label[near] >= 0) & (label[query] >= 0)  # [k]
        wrong += [False, *(other | (modality[near] != modality[query])).tolist()]
    return _tiles(pictures, captions, found.nearest.shape[1] + 1, caption_lines=4, red=wrong)


def maps(points: NDArray[np.floating[Any]], colours: Mapping[str, Sequence[str]], *, columns: int = 2) -> Picture:
    """The same points [m,2] once for each colouring: what lies together, and what it has in common.

    Args:
        points: such as ``medclr.embed.layout`` gives; rows that are NaN are left out.
        colours: title of a panel -> value of each point [m]; beyond eight values, the rest is 'other'.
        columns: panels a line.
    """
    kept = ~np.isnan(points).any(1)
    points = points[kept]
    lines = -(-len(colours) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * lines), layout="constrained")
    axes = plain_axes(figure, lines, columns)
    size = float(np.clip(4000 / max(len(points), 1), 4, 40))
    for axis, (title, given) in zip(axes, colours.items(), strict=False):
        values = np.array([str(value) for value in given], dtype=object)[kept]
        names, counts = np.unique(values.astype(str), return_counts=True)
        named = names[np.lexsort((names, -counts))][: len(COLOURS)].tolist()
        groups = [*zip(COLOURS, named, strict=False), *([(REST, "other")] if len(names) > len(COLOURS) else [])]
        for colour, name in reversed(groups):  # the rest lies below
            here = points[~np.isin(values, named) if name == "other" and name not in named else values == name]
            label = f"{name or 'not recorded'} ({len(here)})"
            axis.scatter(*here.T, s=size, color=colour, alpha=0.75, linewidths=0, label=label)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5),
                    markerscale=max(1.0, 5 / size**0.5))  # fmt: skip
    for axis in axes[len(colours) :]:
        axis.set_visible(False)
    return _picture(figure)


def mixed_up(panels: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Picture:
    """Which value is taken for which: a table a panel, a line a value, the share of each line in its cells.

    Args:
        panels: title -> values of the slices, and of what they are taken for, such as their nearest neighbours.
    """
    known = {title: sorted({*map(str, truth)} | {*map(str, said)}) for title, (truth, said) in panels.items()}
    figure = Figure(figsize=(sum(2.1 + 0.75 * len(names) for names in known.values()),
                             1.4 + 0.6 * max(map(len, known.values()))), layout="constrained")  # fmt: skip
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[2 + len(names) for names in known.values()])[0]
    for axis, (title, (truth, said)) in zip(axes, panels.items(), strict=True):
        names = known[title]
        counts = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(counts, ([names.index(str(t)) for t in truth], [names.index(str(s)) for s in said]), 1)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(share.shape):
            axis.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.6 else INK)  # fmt: skip
        said_names = [name or "not recorded" for name in names]
        axis.set_xticks(range(len(names)), said_names, fontsize=8)
        axis.set_yticks(range(len(names)), said_names, fontsize=8)
        axis.set_xlabel("nearest neighbour", fontsize=8, color=INK)
        axis.set_ylabel("slice", fontsize=8, color=INK)
        axis.set_title(title, fontsize=10, color=INK, loc="left")
    return _picture(figure)


def scatter(panels: Mapping[str, tuple[ArrayLike, ArrayLike]], x: str, y: str, *, diagonal: bool = False) -> Picture:
    """Panels side by side, with the same axes: y [m] over x [m].

    Args:
        panels: title -> (x, y).
        x: what x is.
        y: what y is.
        diagonal: draw the line on which both are equal.
    """
    figure = Figure(figsize=(3.3 * len(panels), 3.3), layout="constrained")
    axes = plain_axes(figure, 1, len(panels))
    for axis, colour, (title, (across, up)) in zip(axes, COLOURS * len(panels), panels.items(), strict=False):
        size = float(np.clip(3000 / max(np.size(up), 1), 5, 40))
        axis.scatter(across, up, s=size, color=colour, alpha=0.5, linewidths=0)
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel(x, fontsize=8, color=INK)
        if diagonal:
            axis.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle="--")
            axis.set_aspect("equal")
    axes[0].set_ylabel(y, fontsize=8, color=INK)
    for axis in axes[1:]:
        axis.sharex(axes[0])
        axis.sharey(axes[0])
    return _picture(figure)


def caption(store: Store, index: int) -> str:
    """Modality, patient and slice, and the label if there is one."""
    scan = store.scans[int(store.column("scan")[index])]
    where = f"slice {int(store.column('slice_index')[index])}" if scan.depth > 1 else ""
    return ", ".join(filter(None, (scan.modality, scan.patient_id[:6], where, scan.label)))


def sample(store: Store, n: int, seed: int = 0) -> Indices:
    """``n`` slices at random, each modality in turn, of as many patients as there are; ordered by modality."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(store))
    modality, patient = store.column("modality")[order], store.column("patient")[order]  # [N] each
    turn = np.empty(len(order), dtype=np.int64)  # how many slices of its modality and patient come before
    for kind, who in {*zip(modality.tolist(), patient.tolist(), strict=True)}:
        mine = (modality == kind) & (patient == who)
        turn[mine] = np.arange(mine.sum())
    place = np.empty_like(turn)  # how many slices of its modality come before
    for kind in np.unique(modality):
        mine = np.flatnonzero(modality == kind)
        place[mine[np.argsort(turn[mine], kind="stable")]] = np.arange(len(mine))
    chosen = order[np.argsort(place, kind="stable")[:n]]
    return chosen[np.argsort(store.column("modality")[chosen], kind="stable")]


def _tiles(
    pictures: Sequence[NDArray[np.float32]],
    captions: Sequence[str],
    columns: int,
    *,
    caption_lines: int = 2,
    red: Sequence[bool] = (),
    legend: Mapping[str, str] | None = None,
) -> Picture:
    """Pictures [H,W] or [H,W,3] in [0,1], ``columns`` a line, each with its caption below."""
    tile, gap, words = 1.7, 0.1, 0.12 + 0.13 * caption_lines  # inches
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    width, height = columns * (tile + gap), lines * (tile + words)
    figure = Figure(figsize=(width, height))
    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (i % columns) * (tile + gap), (i // columns) * (tile + words)
        axis = figure.add_axes((left / width, 1 - (top + tile) / height, tile / width, tile / height))
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=bool(red and red[i]), color=RED, linewidth=3)
        wrapped = "\n".join(textwrap.fill(line, 28) for line in text.splitlines())
        axis.text(0, -0.03, wrapped, transform=axis.transAxes, ha="left", va="top", fontsize=7,
                  color=RED if red and red[i] else INK)  # fmt: skip
    if legend:
        handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=6, fontsize=8, frameon=False)
    return _picture(figure)


def _picture(figure: Figure) -> Picture:
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white", bbox_inches="tight")
    with Image.open(drawn) as image:
        return Picture(_small(image))


def _small(image: Image.Image) -> bytes:
    content = io.BytesIO()
    few = image.convert("RGB").quantize(COLOURS_IN_PNG, Image.Quantize.MAXCOVERAGE)
    few.save(content, format="png", optimize=True)
    return content.getvalue()
