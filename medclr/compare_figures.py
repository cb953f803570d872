"""Pictures of a comparison. Every init has one colour throughout; bands and bars are 95 % intervals.

Letters: b budgets.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from medclr.compare_results import NAMES, Results, Row, chosen, lower_is_better, per_patient, pooled
from medclr.figures import COLOURS, INK, plain_axes
from medclr.outcomes import Classified
from medclr.statistics import reliability

SOFT = "#7b8794"
"""Colour of what is not the point: random weights, lines to compare with."""

GREYS, OTHERS = (SOFT, COLOURS[5], "#b6bec8"), (*(COLOURS[i] for i in (0, 2, 4, 3, 6)), "#d6789c")
"""Of inits: random weights, and what is neither random nor the reference."""

GROUPS = (COLOURS[5], COLOURS[6], COLOURS[4], COLOURS[3])
"""Of true classes."""

RARE = 0.01
"""Bins with a smaller share of the scans are not drawn: where they lie is chance."""

WARN = "#b3261e"
"""Colour of the stamp."""


STUDENTS = (("D", (0, (4, 2))), ("^", (0, (1, 1.5))), ("v", (0, (6, 1.5, 1, 1.5))), ("P", (0, (2, 3))))
"""Marker and dashes of the first, second... student of a teacher, in its colour."""


def colours(results: Results) -> dict[str, str]:
    """Init -> colour: the reference red, random weights of some networks in greys, a student that of its teacher."""
    inits = results.plan.inits
    greys, rest = iter(GREYS * len(inits)), iter(OTHERS * len(inits))
    first = {
        name: COLOURS[1] if name == results.plan.referred else next(greys) if init.encoder == "random" else next(rest)
        for name, init in inits.items()
        if init.teacher is None or name == results.plan.referred
    }
    return {name: first[name] if name in first else first[str(init.teacher)] for name, init in inits.items()}


def marks(results: Results) -> dict[str, tuple[str, Any]]:
    """Init -> marker and dashes: with the colour they tell every init from the others."""
    chosen: dict[str, tuple[str, Any]] = {}
    siblings: Counter[str] = Counter()
    for name, init in results.plan.inits.items():
        if init.teacher is None:
            chosen[name] = ("s" if name == results.plan.referred else "o"), "-"
        else:
            chosen[name] = STUDENTS[siblings[init.teacher] % len(STUDENTS)]
            siblings[init.teacher] += 1
    return chosen


def curve_figure(results: Results, metric: str) -> Figure:
    """A metric over the labelled patients, a panel a protocol."""
    figure, axes = _panels(results, [NAMES[name] for name in results.protocols], 3.5)
    for protocol, axis in zip(results.protocols, axes, strict=True):
        _curves(axis, results, protocol, metric)
        axis.set_xlabel("labelled patients", fontsize=9, color=INK)
        axis.set_ylabel(metric, fontsize=9, color=INK)
    _legend(figure, axes[0])
    return figure


def metrics_figure(results: Results, protocol: str, metrics: Sequence[str]) -> Figure:
    """Further metrics, a small panel each."""
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * lines + 0.4), layout="constrained")
    axes = plain_axes(figure, lines, columns)
    for metric, axis in zip(metrics, axes, strict=False):
        _curves(axis, results, protocol, metric)
        better = " (lower is better)" if lower_is_better(metric) else ""
        axis.set_title(f"{metric}{better}", fontsize=9, color=INK, loc="left")
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    figure.supxlabel("labelled patients", fontsize=9, color=INK)
    _legend(figure, axes[0])
    _stamp(figure, results)
    return figure


def differing(results: Results) -> list[str]:
    """The inits whose difference to the reference is drawn: random weights would set the scale for all others."""
    inits = {name: init for name, init in results.plan.inits.items() if name != results.plan.referred}
    return [name for name, init in inits.items() if init.encoder != "random"] or list(inits)


def difference_figure(results: Results, rows: Sequence[Row], others: Sequence[str], reference: str) -> Figure:
    """The differences of ``others`` in ``rows``, a panel a protocol: thick over patients, thin over seeds too."""
    metric = results.metrics[0]
    figure, axes = _panels(results, [NAMES[name] for name in results.protocols], 3.3)
    colour, mark_of = colours(results), marks(results)
    for protocol, axis in zip(results.protocols, axes, strict=True):
        axis.axhline(0, color=COLOURS[1], linewidth=1.2)
        axis.grid(visible=False, axis="x")
        for index, name in enumerate(others):
            its = chosen(rows, protocol, metric, name)
            mark, _ = mark_of[name]
            x = np.arange(len(its)) + min(0.16, 0.7 / len(others)) * (index - (len(others) - 1) / 2)  # [b]
            for at, row in zip(x, its, strict=True):
                axis.plot([at, at], [row.difference_cautious_low, row.difference_cautious_high],
                          color=colour[name], linewidth=1.1, alpha=0.7)  # fmt: skip
                axis.plot([at, at], [row.difference_low, row.difference_high], color=colour[name], linewidth=5,
                          alpha=0.45, solid_capstyle="butt")  # fmt: skip
                face = colour[name] if row.is_decided else "white"
                axis.plot(at, row.difference, mark, color=colour[name], markerfacecolor=face, markersize=5.5)
            axis.plot([], [], f"{mark}-", color=colour[name], label=name)
        its = chosen(rows, protocol, metric, others[0])
        axis.set_xticks(range(len(its)), [str(row.patients) for row in its])
        axis.set_xlim(-0.5, len(its) - 0.5)
        axis.set_xlabel("labelled patients", fontsize=9, color=INK)
        axis.set_ylabel(f"{metric}: difference to {reference}", fontsize=9, color=INK)
    _legend(figure, axes[0])
    return figure


def scattered(results: Results) -> list[str]:
    """The inits whose patients are drawn against the reference's: without students, if there are others."""
    inits = {name: init for name, init in results.plan.inits.items() if name != results.plan.referred}
    return [name for name, init in inits.items() if init.teacher is None] or list(inits)


def scatter_figure(results: Results, protocol: str, budgets: Sequence[str]) -> Figure:
    """Every test patient: the reference across, another init up; a line a budget, a column an init."""
    plan, others = results.plan, scattered(results)
    side = 2.7
    lines, columns = (len(budgets), len(others)) if len(others) > 1 else (1, len(budgets))
    figure = Figure(figsize=(side * columns + 0.3, (side + 0.15) * lines + 0.5), layout="constrained")
    axes = plain_axes(figure, lines, columns)
    number = {row.budget: row.patients for row in results.of(protocol, results.metrics[0])}
    groups: dict[str, str] = {}
    for place, axis in enumerate(axes):
        budget, name = budgets[place // len(others)], others[place % len(others)]
        across, groups = per_patient(results.outcomes[protocol, plan.referred, budget])
        up, _ = per_patient(results.outcomes[protocol, name, budget])
        palette = dict(zip(sorted(set(groups.values())), GROUPS * 9, strict=False))
        patients = sorted(across)
        size = float(np.clip(1500 / len(patients), 8, 30))
        x, y = np.array([across[p] for p in patients]), np.array([up[p] for p in patients])
        axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1)
        for group, its in palette.items():
            here = np.array([groups[p] == group for p in patients])
            axis.scatter(x[here], y[here], s=size, color=its, alpha=0.55, linewidths=0, label=group or "test patients")
        above, below = int((y > x).sum()), int((y < x).sum())
        axis.set_title(f"{number[budget]} labelled: {above} above, {below} below", fontsize=8.5, color=INK, loc="left")
        known = np.append(x, y)[np.isfinite(np.append(x, y))]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        room = max(0.05 * (high - low), 0.03)
        ends = max(low - room, -0.02), min(high + room, 1.02)
        axis.set(xlim=ends, ylim=ends, aspect="equal")
        axis.set_ylabel(textwrap.fill(name, 26), fontsize=8.5, color=INK)
        axis.set_xlabel(plan.referred, fontsize=8.5, color=INK)
    if any(groups.values()):
        _legend(figure, axes[0], "true class")
    _stamp(figure, results)
    return figure


def calibration_figure(results: Results, protocol: str, budgets: Sequence[str]) -> Figure:
    """How often a classifier is right where it is sure to a certain degree; a panel a budget."""
    figure = Figure(figsize=(3.9 * len(budgets), 4.5), layout="constrained")
    axes = plain_axes(figure, 1, len(budgets))
    number = {row.budget: row.patients for row in results.of(protocol, results.metrics[0])}
    colour = colours(results)
    for budget, axis in zip(budgets, axes, strict=True):
        axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for name in results.plan.inits:
            found = reliability(pooled(results.outcomes[protocol, name, budget]))
            here = found.count > RARE * found.count.sum()
            size = 8 + 90 * found.count[here] / found.count.sum()
            error = calibration_error(results, protocol, name, budget)
            axis.plot(found.confidence[here], found.accuracy[here], color=colour[name], linewidth=1.4,
                      linestyle=marks(results)[name][1], label=f"{name}: {error:.3f}")  # fmt: skip
            axis.scatter(found.confidence[here], found.accuracy[here], s=size, color=colour[name], linewidths=0)
        axis.set_title(f"{number[budget]} labelled patients", fontsize=10, color=INK, loc="left")
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        axis.set_xlabel("probability that is said", fontsize=9, color=INK)
        axis.set_ylabel("share that is right", fontsize=9, color=INK)
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(-0.03, -0.14), alignment="left",
                    title="expected calibration error", title_fontsize=8)  # fmt: skip
    _stamp(figure, results)
    return figure


def calibration_error(results: Results, protocol: str, init: str, budget: str) -> float:
    """Expected calibration error, the mean over seeds."""
    outcomes = results.outcomes[protocol, init, budget]
    return float(np.mean([reliability(each).error for each in outcomes if isinstance(each, Classified)]))


def _panels(results: Results, titles: Sequence[str], height: float) -> tuple[Figure, list[Any]]:
    """A panel a title, side by side, with the same scale."""
    width = 7.2 if len(titles) == 1 else 4.7 * len(titles)
    figure = Figure(figsize=(width, height + 0.35), layout="constrained")
    axes = plain_axes(figure, 1, len(titles))
    for title, axis in zip(titles, axes, strict=True):
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.sharey(axes[0])
    _stamp(figure, results)
    return figure, axes


def _curves(axis: Any, results: Results, protocol: str, metric: str) -> None:
    colour, mark_of = colours(results), marks(results)
    ticks: list[Row] = []
    for name in results.plan.inits:
        ticks = rows = results.of(protocol, metric, name)
        x = np.array([row.patients for row in rows], dtype=float)  # [b]
        mean, low, high = (np.array([getattr(row, key) for row in rows]) for key in ("mean", "low", "high"))
        mark, dashes = mark_of[name]
        if len(rows) > 1:
            axis.fill_between(x, low, high, color=colour[name], alpha=0.13, linewidth=0)
        else:
            axis.errorbar(x, mean, yerr=(mean - low, high - mean), color=colour[name], capsize=3)
        axis.plot(x, mean, color=colour[name], marker=mark, linestyle=dashes, markersize=4, linewidth=1.7, label=name)
    axis.set_xscale("log")
    numbers = sorted({row.patients for row in ticks})
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()


def _legend(figure: Figure, axis: Any, title: str | None = None) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), fontsize=8.5, frameon=False,
                  title=title, title_fontsize=8.5, alignment="left", handlelength=3)  # fmt: skip


def _stamp(figure: Figure, results: Results) -> None:
    """What no reader of a single picture may miss."""
    if results.stamp:
        width = int(figure.get_figwidth() * 15)
        figure.text(0.01, -0.01, textwrap.fill(results.stamp, width), color=WARN, fontsize=8, weight="bold", va="top")
