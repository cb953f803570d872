"""Every picture that medclr draws, as PNG: curves, contact sheets, embedding maps, score plots.

Drawn with matplotlib's object interface: no global state, no display needed.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medclr.files import writing

INK, FAINT, WARNING = "#1b2733", "#c9d1d9", "#b3261e"
COLOURS = ("#0b6e8f", "#d1495b", "#edae49", "#4f772d", "#7b4b94", "#2e4057", "#a05c2f", "#00798c")


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write the figure as PNG, atomically."""
    FigureCanvasAgg(figure)
    with writing(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", metadata={"Software": None}
        )


def plain_axes(figure: Figure, rows: int, columns: int) -> list[Any]:
    """The panels of a figure, row by row, in the style of all."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
        axis.grid(color=FAINT, linewidth=0.5)
        axis.set_axisbelow(True)
    return list(axes.flat)


def curves(path: Path, metrics: Sequence[Mapping[str, float]], panels: Mapping[str, str], stamp: str = "") -> None:
    """One panel a figure over the step; ``panels`` maps a key of the metrics to its title. Absent keys get no panel.

    The ``stamp``, what must be known of the run, stands above.
    """
    present = {key: title for key, title in panels.items() if any(key in row for row in metrics)}
    if not present:
        return
    columns = min(3, len(present))
    lines = -(-len(present) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * lines), layout="constrained")
    axes = plain_axes(figure, lines, columns)
    for index, (axis, (key, title)) in enumerate(zip(axes, present.items(), strict=False)):
        points = np.array([(row["step"], row[key]) for row in metrics if key in row], dtype=float)  # [n,2]
        few = len(points) <= 30
        axis.plot(
            *points.T, color=COLOURS[index % len(COLOURS)], linewidth=1.4, marker="o" if few else None, markersize=3
        )
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[len(present) :]:
        axis.set_visible(False)
    if stamp:
        figure.suptitle(stamp, fontsize=9, color=WARNING, x=0, ha="left")
    save(figure, path)


def contact_sheet(
    path: Path,
    columns: Sequence[tuple[str, NDArray[np.float32]]],
    captions: Sequence[Sequence[str]],
    title: str,
) -> None:
    """Tiles side by side, two samples a line, each with a caption below.

    Args:
        path: PNG to write.
        columns: names of a sample's tiles, and their images [n,H,W] in [0,1].
        captions: ``captions[sample][tile]``.
        title: stands above.
    """
    tile, gap, caption, head = 1.9, 0.12, 0.52, 0.75  # inches
    n, width = len(captions), len(columns)
    lines, across = -(-n // 2), min(2, n) * width
    size = (across * (tile + gap) + gap, head + lines * (tile + caption))
    figure = Figure(figsize=size)
    for sample in range(n):
        for column, (name, images) in enumerate(columns):
            left = gap + ((sample % 2) * width + column) * (tile + gap)
            bottom = size[1] - head - (sample // 2) * (tile + caption) - tile
            axis = figure.add_axes((left / size[0], bottom / size[1], tile / size[0], tile / size[1]))
            axis.imshow(images[sample], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            words = textwrap.fill(captions[sample][column], 34)
            axis.text(0, -0.03, words, transform=axis.transAxes, ha="left", va="top", fontsize=6.5, color=INK)
            if sample < 2:
                axis.set_title(name, fontsize=9, color=INK)
    figure.text(gap / size[0], 1 - 0.2 / size[1], title, fontsize=11, color=INK, va="top")
    save(figure, path)


def embedding_map(path: Path, points: NDArray[np.float64], values: Sequence[str], title: str) -> None:
    """Points [n,2] coloured by a column; beyond eight values, the rest share one colour named 'other'."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    (axis,) = plain_axes(figure, 1, 1)
    counts = sorted(set(values), key=lambda value: (-list(values).count(value), value))
    named = counts[: len(COLOURS)]
    groups = np.array([value if value in named else "other" for value in values])
    size = float(np.clip(4000 / max(len(points), 1), 4, 40))
    for colour, name in zip(
        (*COLOURS, "#9aa5b1"), [*named, *(["other"] if len(counts) > len(COLOURS) else [])], strict=False
    ):
        here = points[groups == name]
        axis.scatter(
            *here.T, s=size, color=colour, alpha=0.75, linewidths=0, label=f"{name or 'no value'} ({len(here)})"
        )
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)
    save(figure, path)


def score_plot(
    path: Path, series: Mapping[str, Sequence[tuple[int, float, float, float]]], metric: str, title: str
) -> None:
    """Score over the number of labelled patients: per name, rows of (patients, mean, low, high) with interval bars."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    (axis,) = plain_axes(figure, 1, 1)
    for index, (name, rows) in enumerate(series.items()):
        x, mean, low, high = np.array(rows, dtype=float).T  # each [budgets]
        x = x * (1 + 0.03 * (index - (len(series) - 1) / 2))  # beside each other, not on top
        colour = COLOURS[index % len(COLOURS)]
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), color=colour, marker="o", markersize=4, capsize=3,
                      linewidth=1.4, label=name)  # fmt: skip
    axis.set_xscale("log")
    ticks = sorted({int(row[0]) for rows in series.values() for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("labelled patients", fontsize=9)
    axis.set_ylabel(metric, fontsize=9)
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.legend(fontsize=8, frameon=False)
    save(figure, path)


def confusion(
    path: Path,
    truth: NDArray[np.int64],
    probability: NDArray[np.float64],
    classes: Sequence[str],
    stamp: str = "",
) -> None:
    """Which class [r,K] is taken for which, from probabilities [r,K]: the share of each true class, and counts.

    The ``stamp``, what must be known of the model, stands above.
    """
    k = len(classes)
    counts = np.zeros((k, k), dtype=int)
    np.add.at(counts, (truth.argmax(1), probability.argmax(1)), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(1.6 + 0.9 * k, 1.2 + 0.8 * k), layout="constrained")
    (axis,) = plain_axes(figure, 1, 1)
    axis.grid(visible=False)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(k, k):
        ink = "white" if share[i, j] > 0.6 else INK
        axis.text(j, i, f"{share[i, j]:.0%}\n{counts[i, j]}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(k), classes)
    axis.set_yticks(range(k), classes)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    axis.set_title(f"{len(truth)} test scans", fontsize=10, color=INK, loc="left")
    if stamp:
        words = textwrap.fill(stamp, 14 * k + 12)
        figure.suptitle(words, fontsize=8, color=WARNING, x=0, ha="left")
    save(figure, path)
