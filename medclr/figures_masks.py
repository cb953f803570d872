"""Slices with their masks and what a model predicts, as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from medclr.figures import INK, save

COLOURS = ("#ffb000", "#3ddbd9", "#ff5fa2", "#8cff66", "#b79cff", "#ff7d4d", "#5fa8ff", "#f4f45c")
"""Light colours, that stand out from grey."""


@dataclass(frozen=True)
class Overlaid:
    """A line of the picture: some slices of a scan."""

    caption: str
    titles: Sequence[str]
    """[c], of the slices."""
    images: NDArray[np.float32]
    """[c,H,W] in [0,1]."""
    truth: NDArray[np.integer[Any]]
    """[c,H,W], classes 0..K."""
    predicted: NDArray[np.integer[Any]]
    """[c,H,W]."""


def overlays(path: Path, rows: Sequence[Overlaid], classes: Sequence[str], stamp: str = "") -> None:
    """Every slice bare, and beside it the mask as an area and the prediction as a line, a colour a class.

    Args:
        path: PNG to write.
        rows: scans, at least one; each with equally many slices.
        classes: names of the K classes.
        stamp: what must be known of the predictions, in the title.
    """
    columns = len(rows[0].images)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(classes))]
    tile, left, legend = 2.3, 0.35, 0.45  # inches
    size = (left + 2 * columns * tile, legend + len(rows) * (tile + 0.25))
    engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.06, wspace=0, hspace=0, rect=(0, 0, 1, 1 - legend / size[1]))
    figure = Figure(figsize=size, layout=engine)
    axes = figure.subplots(len(rows), 2 * columns, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for c in range(columns):
            for axis in line[2 * c : 2 * c + 2]:
                axis.imshow(row.images[c], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[2 * c].set_title(row.titles[c], fontsize=8, color=INK, loc="left")
            for k, colour in enumerate(colours, start=1):
                predicted = np.pad(row.predicted[c] == k, 1)  # [H+2,W+2]: lines close at the border too
                rows_at, columns_at = (np.arange(-1, length - 1) for length in predicted.shape)
                fill = np.zeros((*row.truth[c].shape, 4))
                fill[row.truth[c] == k] = to_rgba(colour, 0.45)
                line[2 * c + 1].imshow(fill, interpolation="nearest")
                if predicted.any():
                    line[2 * c + 1].contour(columns_at, rows_at, predicted, levels=[0.5], colors=colour, linewidths=1.6)
        line[0].set_ylabel(row.caption, fontsize=8, color=INK)
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, classes, strict=True)]
    title = "area: mask; line: prediction" + f"; {stamp}" * bool(stamp)
    figure.legend(handles=handles, title=title, loc="upper left", ncols=8, fontsize=8, title_fontsize=8, frameon=False)
    save(figure, path)
