"""What a person wants to know of a cohort before a night of training: tables in the terminal, and a page with pictures.

Shape letters: m scans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medclr.data.cohort import SPACINGS, Cohort, read_cohort, warnings
from medclr.data.shown import shown
from medclr.errors import MedclrError
from medclr.figures import COLOURS, INK, plain_axes
from medclr.report import Cell, Page, cell_text

BINS = 24
ACROSS, DOWN = 8, 5
"""Slices of the contact sheet."""

REASONS = 12
"""So many reasons are listed; the rest is counted together."""


@dataclass(frozen=True)
class Table:
    """One table, for the terminal and for the page."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Description:
    """What ``medclr describe`` found; as text, all of its tables."""

    page: Path
    headline: str
    warnings: list[str]
    tables: list[Table]

    def __str__(self) -> str:
        import io

        from rich.console import Console
        from rich.table import Table as Drawn

        text = io.StringIO()
        console = Console(file=text, width=Console().width)
        console.print(self.headline, highlight=False, markup=False)
        for table in self.tables:
            drawn = Drawn(title=table.title, title_justify="left", title_style="bold", caption=table.note or None)
            drawn.caption_justify = "left"
            for i, name in enumerate(table.header):
                numeric = all(not isinstance(row[i], str) for row in table.rows)
                drawn.add_column(name, justify="right" if numeric else "left", no_wrap=len(table.header) > 3)
            for row in table.rows:
                drawn.add_row(*(cell_text(cell) for cell in row))
            console.print()
            console.print(drawn, markup=False)
        console.print()
        for sentence in self.warnings:
            console.print(f"! {sentence}", highlight=False, markup=False)
        return f"{text.getvalue()}{self.page}: the same with pictures"


def describe(cohort: Path, *, out: Path | None = None, seed: int = 0) -> Description:
    """What is in a manifest or a store: counts, geometry, intensities, rejects, and what may harm training.

    Args:
        cohort: NAME.csv that medclr index wrote, or the folder that medclr prepare wrote.
        out: Page to write; by default NAME.describe.html beside it.
        seed: Draws the slices of the contact sheet, which only a store has.

    Raises:
        MedclrError: there is no such manifest or store, or the page cannot be written.
    """
    path = Path(cohort)
    page = Path(out) if out else path.with_name(f"{path.name.removesuffix('.csv')}.describe.html")
    if page.suffix != ".html":
        raise MedclrError(f"--out {page}: the name of a page ends in .html")
    found = read_cohort(path)
    said, made = warnings(found), list(tables(found))
    _write(found, said, made, page, seed)
    counts = " of ".join(f"{count:,} {noun}" for count, noun in _counts(found)[::-1])
    return Description(page, f"{found.name}: {counts}", said, made)


def _counts(cohort: Cohort) -> list[tuple[int, str]]:
    patients, scans = len(np.unique(cohort.column("patient_id"))), len(cohort.scans)
    slices = int(cohort.column("n_slices").sum())
    counts = ((patients, "patient"), (scans, "scan"), (slices, "slice"))
    return [(count, noun + "s" * (count != 1)) for count, noun in counts]


# Tables


def tables(cohort: Cohort) -> Iterator[Table]:
    """All that there is something to say about."""
    total = int(cohort.column("n_slices").sum())
    yield Table(
        "Modality and body part",
        ("modality", "body part", "patients", "scans", "slices", "share"),
        [
            (row["modality"], row["body_part"].lower() or "not recorded", row["patients"], row["scans"], row["slices"],
             _share(row["slices"], total))
            for row in sorted(cohort.group("modality", "body_part"), key=lambda row: -row["slices"])
        ],
    )  # fmt: skip
    facets: dict[str, tuple[str, ...]] = {"Splits and labels": ("split", "label"), "Planes": ("plane",)}
    for title, wanted in facets.items():
        keys = [key for key in wanted if (cohort.column(key) != "").any()]
        if keys:
            counts = ("patients", "scans", "slices")
            yield Table(
                title,
                (*keys, *counts),
                [(*(row[key] or "none" for key in keys), *map(row.get, counts)) for row in cohort.group(*keys)],
            )
    yield _geometry(cohort)
    if cohort.store:
        header = ("modality", "unit", "low", "high: least", "median", "most")
        note = "low (the median) and high: the 0.5 and 99.5 percentiles of each scan"
        yield Table("Intensities", header, [_intensities(cohort, name) for name in cohort.modalities], note)
    scans = len(cohort.scans)
    if irregular := cohort.irregular():
        yield Table("Irregular scans", ("in what", "scans", "share"), _ranked(irregular, scans))
    if cohort.rejected:
        what = "scans" if cohort.store else "files"
        yield Table("Not used", ("why", what, "share"), _ranked(cohort.rejected, cohort.rejected.total()))
    if cohort.store and (blank := cohort.store.info.n_blank):
        yield Table("Left out", ("what", "slices"), [("blank slices", blank)])
    if cohort.copies:
        kinds = {"exact": "exact copies", "near": "near copies", "patients": "of them of another patient"}
        yield Table("Copies", ("what", "slices"), [(text, cohort.copies[key]) for key, text in kinds.items()])


def _intensities(cohort: Cohort, modality: str) -> tuple[Cell, ...]:
    mine = cohort.column("modality") == modality
    low, high = (cohort.column(end)[mine] for end in ("low", "high"))  # [m] each
    numbers = map(_round, (np.median(low), high.min(), np.median(high), high.max()))
    return (modality, "HU" if modality == "CT" else "as stored", *numbers)


def _geometry(cohort: Cohort) -> Table:
    per_patient = cohort.scans.group_by("patient_id").aggregate([("scan_id", "count"), ("n_slices", "sum")])
    measures: dict[str, NDArray[Any]] = {
        "scans a patient": per_patient["scan_id_count"].to_numpy(),
        "slices a patient": per_patient["n_slices_sum"].to_numpy(),
        "slices a scan": cohort.column("n_slices"),
        "rows, px": cohort.column("rows"),
        "columns, px": cohort.column("columns"),
        "between slices, mm": cohort.column(SPACINGS[0]),
        "between rows, mm": cohort.column(SPACINGS[1]),
        "between columns, mm": cohort.column(SPACINGS[2]),
    }
    rows: list[tuple[Cell, ...]] = []
    for name, values in measures.items():
        known = values[~np.isnan(values.astype(float))]
        quantiles = np.percentile(known, (0, 5, 50, 95, 100), method="nearest") if len(known) else [None] * 5
        rows.append((name, *(None if v is None else _round(v) for v in quantiles), len(values) - len(known) or None))
    return Table("Sizes", ("", "least", "5 %", "median", "95 %", "most", "unknown"), rows)


def _ranked(counts: Mapping[str, int], total: int) -> list[tuple[Cell, ...]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows: list[tuple[Cell, ...]] = [(text, count, _share(count, total)) for text, count in ranked[:REASONS]]
    if rest := ranked[REASONS:]:
        count = sum(count for _, count in rest)
        rows.append((f"{len(rest)} other reasons", count, _share(count, total)))
    return rows


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part >= 0.001 * whole else "< 0.1%"


def _round(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(float(value))


# Page


def _write(cohort: Cohort, said: Sequence[str], made: Sequence[Table], path: Path, seed: int) -> None:
    page = Page(cohort.name, "Slice store" if cohort.store else "Manifest")
    page.tiles([*_counts(cohort), (cohort.rejected.total(), "not used")])
    page.warnings(said)
    for table in made:
        page.section(table.title)
        page.table(table.header, table.rows, table.note)
        if table.title == "Sizes":
            page.figure(_distributions(cohort), "How many scans, or patients, have which size, by modality.")
        if table.title == "Intensities":
            caption = (
                "Each scan is a bar from its low to its high; the scans of a modality stand in the order of their high."
            )
            page.figure(_ranges(cohort), caption)
    if cohort.store:
        page.section(
            "Slices", "Drawn at random, from as many patients as there are, and shown as evaluation sees them."
        )
        caption = "Pseudonym and slice. Look for names that are burned into the pixels before you pass this page on."
        page.figure(_contact_sheet(cohort, seed), caption, "png")
    else:
        page.section("Intensities and pictures", "Not known before medclr prepare has read the pixels.")
    page.write(path)


def _distributions(cohort: Cohort) -> Figure:
    """Six histograms, stacked by modality."""
    modality, names = cohort.column("modality"), cohort.modalities
    counted = [("scan_id", "count"), ("n_slices", "sum")]
    patients = cohort.scans.group_by(["modality", "patient_id"]).aggregate(counted)
    theirs = patients["modality"].to_numpy()
    longer = np.maximum(cohort.column("rows"), cohort.column("columns"))
    panels = {
        "scans of a patient": (theirs, patients["scan_id_count"].to_numpy()),
        "slices of a patient": (theirs, patients["n_slices_sum"].to_numpy()),
        "slices of a scan": (modality, cohort.column("n_slices")),
        "longer side, px": (modality, longer),
        "between slices, mm": (modality, cohort.column(SPACINGS[0])),
        "between rows, mm": (modality, cohort.column(SPACINGS[1])),
    }
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    for axis, (title, (kind, values)) in zip(plain_axes(figure, 2, 3), panels.items(), strict=True):
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        _histogram(axis, {name: _known(values[kind == name]) for name in names})
        axis.set_ylabel("patients" if kind is theirs else "scans", fontsize=8, color=INK)
    if len(names) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _known(values: NDArray[Any]) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = values.astype(np.float64)
    return numbers[~np.isnan(numbers)]


def _histogram(axis: Any, groups: Mapping[str, NDArray[np.float64]]) -> None:
    """Few values are named one by one; many are binned, evenly by size or, over a wide range, by its logarithm."""
    everything = np.concatenate(list(groups.values()))
    axis.grid(visible=False, axis="x")
    if not len(everything):
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="#9aa5b1", fontsize=9)
        return
    rounded = {name: np.array([float(f"{v:.3g}") for v in np.unique(values)]) for name, values in groups.items()}
    distinct = np.unique(np.concatenate(list(rounded.values())))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(groups))]
    if len(distinct) <= 6:
        edges = np.arange(len(distinct) + 1) - 0.5
        cut = (distinct[1:] + distinct[:-1]) / 2
        data = [np.searchsorted(cut, values) for values in groups.values()]
        axis.hist(data, edges, stacked=True, color=colours, label=list(groups), rwidth=0.7)
        axis.set_xticks(range(len(distinct)), [f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}" for v in distinct])
        axis.set_xlim(-0.5 - (len(distinct) < 3), len(distinct) - 0.5 + (len(distinct) < 3))
    else:
        low, high = everything.min(), everything.max()
        wide = low > 0 and high / low > 30
        edges = np.geomspace(low, high, BINS + 1) if wide else np.linspace(low, high, BINS + 1)
        if np.array_equal(everything, np.rint(everything)):  # no bin between whole numbers
            width = np.ceil((high - low + 1) / BINS)
            edges = np.unique(edges.round()) - 0.5 if wide else np.arange(low - 0.5, high + width, width)
            edges[-1] = max(edges[-1], high + 0.5)
        axis.hist(list(groups.values()), edges, stacked=True, color=colours, label=list(groups))
        if wide:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda v, _: f"{v:,.4g}")
            axis.xaxis.set_minor_formatter(lambda v, _: "")
    axis.yaxis.get_major_locator().set_params(integer=True, nbins=5)


def _ranges(cohort: Cohort, most: int = 400) -> Figure:
    """For each modality, its scans side by side, each from its low to its high."""
    names = cohort.modalities
    across = min(3, len(names))
    lines = -(-len(names) // across)
    figure = Figure(figsize=(9.6 if across > 1 else 5.2, 2.6 * lines), layout="constrained")
    axes = plain_axes(figure, lines, across)
    for i, (axis, name) in enumerate(zip(axes, names, strict=False)):
        mine = cohort.column("modality") == name
        low, high = cohort.column("low")[mine], cohort.column("high")[mine]
        order = np.lexsort((low, high))
        order = order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))]
        x = (np.arange(len(order)) + 0.5) * 100 / len(order)  # in the middle of the scan's share
        colour = COLOURS[i % len(COLOURS)]
        if len(order) > 60:
            axis.fill_between(x, low[order], high[order], color=colour, linewidth=0)
        else:
            axis.bar(x, high[order] - low[order], 80 / len(order), low[order], color=colour)
        axis.set_title(name, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("scans, %", fontsize=8, color=INK)
        axis.set_ylabel("Hounsfield units" if name == "CT" else "value as stored", fontsize=8, color=INK)
        axis.set_xlim(0, 100)
        if high.max() > 50 * max(np.median(high), 1e-9) and low.min() >= 0:
            axis.set_yscale("log")
            axis.set_ylim(bottom=max(float(np.median(high)) / 1000, 1e-9))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


def _contact_sheet(cohort: Cohort, seed: int) -> Figure:
    """Rows of slices, a modality after the other."""
    store = cohort.store
    assert store is not None
    names = cohort.modalities
    lines = max(1, DOWN // len(names))
    rng = np.random.default_rng(seed)
    patient, modality = store.column("patient"), store.column("modality")
    rows: list[tuple[str, NDArray[np.int64]]] = []
    for name in names:
        mine = np.flatnonzero(modality == store.info.modalities.index(name))
        mine = rng.permutation(mine)[: 50 * ACROSS * lines]
        chosen = _spread(mine, patient[mine])[: ACROSS * lines]
        rows += [
            (name if start == 0 else "", chosen[start : start + ACROSS]) for start in range(0, len(chosen), ACROSS)
        ]
    across = max(len(row) for _, row in rows)
    tile, label, margin = 1.3, 0.17, 0.4  # inches
    size = (margin + tile * across, (tile + label) * len(rows))
    figure = Figure(figsize=size)
    for line, (name, row) in enumerate(rows):
        bottom = size[1] - (line + 1) * (tile + label)
        figure.text(0.12 / size[0], (bottom + label + tile / 2) / size[1], name, fontsize=11, color=INK, va="center",
                    rotation=90)  # fmt: skip
        for column, (index, picture) in enumerate(zip(row.tolist(), shown(store, row), strict=True)):
            left = margin + column * tile
            box = (left / size[0], (bottom + label) / size[1], 0.97 * tile / size[0], 0.97 * tile / size[1])
            axis = figure.add_axes(box)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            words = f"{store.patients[patient[index]][:8]} · {store.column('slice_index')[index]}"
            figure.text(left / size[0], (bottom + 0.05) / size[1], words, fontsize=6.5, color=INK)
    return figure


def _spread(indices: NDArray[np.int64], patient: NDArray[Any]) -> NDArray[np.int64]:
    """The same slices, the first of every patient first, then the second of each, and so on."""
    by_patient = np.argsort(patient, kind="stable")
    place = np.empty(len(indices), np.int64)
    place[by_patient] = np.arange(len(indices)) - np.searchsorted(patient[by_patient], patient[by_patient])
    return indices[np.argsort(place, kind="stable")]
