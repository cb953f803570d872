"""The page beside the table of ``medclr dedup``: how far apart the copies are, and pictures of the doubtful ones."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medclr.data.copies import Copies
from medclr.data.shown import shown
from medclr.data.store import Store
from medclr.figures import COLOURS, INK, plain_axes
from medclr.report import Page

PAIRS = 24
"""So many are shown."""


def write_page(store: Store, copies: Copies, distance: int, path: Path) -> None:
    """Write the page."""
    patient = store.column("patient")
    strange = patient[copies.slices] != patient[copies.kept]  # [m]
    exact = copies.exact
    page = Page(f"Copies in {store.path.name}", f"Near copies: at most {distance} of 256 bits apart.")
    page.tiles(
        [(len(store), "slices"), (int(exact.sum()), "exact copies"), (int((~exact).sum()), "near copies"),
         (int(strange.sum()), "of another patient")]
    )  # fmt: skip
    if strange.any():
        sentence = "copies are of another patient than the slice they repeat: one picture may stand in two splits."
        page.warnings([f"{int(strange.sum()):,} {sentence}"])
    if not len(exact):
        page.text("No slice repeats another.")
    if (~exact).any():
        page.section("How far apart the near copies are")
        figure = Figure(figsize=(7, 2.4), layout="constrained")
        (axis,) = plain_axes(figure, 1, 1)
        counts = np.bincount(copies.distance[~exact], minlength=distance + 1)
        axis.bar(np.arange(len(counts)), counts, color=COLOURS[0])
        axis.set_xlabel("differing bits of 256", fontsize=9, color=INK)
        axis.set_ylabel("slices", fontsize=9, color=INK)
        page.figure(figure, "Near copies by the distance to the slice that is kept.")
    for title, chosen in (("Near copies", ~exact), ("Exact copies", exact)):
        which = np.flatnonzero(chosen)
        if not len(which):
            continue
        order = np.lexsort((copies.slices[which], -copies.distance[which], ~strange[which]))
        which = which[order][:PAIRS]
        page.section(title)
        page.figure(
            _pairs(store, copies, which, strange),
            f"{len(which):,} of {int(chosen.sum()):,} pairs, the kept slice left and its copy right: first those of"
            " different patients, then the farthest apart.",
            "png",
        )
    page.write(path)


def _pairs(store: Store, copies: Copies, which: NDArray[np.int64], strange: NDArray[np.bool_]) -> Figure:
    across = min(4, len(which))
    lines = -(-len(which) // across)
    figure = Figure(figsize=(2.9 * across, 1.85 * lines))
    grid = figure.subplots(lines, across, squeeze=False).ravel()
    for axis in grid:
        axis.set_axis_off()
    for axis, k in zip(grid, which, strict=False):
        pair = shown(store, [copies.kept[k], copies.slices[k]])  # [2,S,S]
        axis.imshow(np.hstack([pair[0], np.ones((pair.shape[1], 2)), pair[1]]), cmap="gray", vmin=0, vmax=1)
        words = f"{copies.distance[k]} bits" + (" · other patient" if strange[k] else "")
        axis.set_title(words, fontsize=8, color=INK, loc="left", pad=3)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.2 / (1.85 * lines), 0.05, 0.14)
    return figure
