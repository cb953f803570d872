"""The report of a comparison: one page that holds its pictures, and under each what it shows and what it does not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from medclr.compare_figures import (
    calibration_error,
    calibration_figure,
    curve_figure,
    difference_figure,
    differing,
    metrics_figure,
    scatter_figure,
    scattered,
)
from medclr.compare_results import (
    NAMES,
    Results,
    Row,
    chosen,
    further,
    in_words,
    many_or_few,
    per_patient,
    verdict,
    verdicts,
)
from medclr.config import to_plain
from medclr.figures import save
from medclr.outcomes import Classified
from medclr.progress import duration
from medclr.report import Cell, Page

FEW_SEEDS = 5
"""Fewer are for orientation."""

FEW_PATIENTS = 30
"""A bootstrap of fewer is too sure of itself."""


def write_report(results: Results, out: Path) -> None:
    """Write ``report.html``, and its pictures as PNG into ``figures``."""
    _Report(results, out).write()


class _Report:
    """The page from top to bottom."""

    def __init__(self, results: Results, out: Path) -> None:
        self.results, self.out = results, out
        self.plan, self.metric = results.plan, results.metrics[0]
        first = results.rows[0]
        self.seeds, self.patients = min(results.seeds.values()), first.test_patients
        self.title = self.plan.title or self.plan.store.resolve().name
        self.seeds_words = results.seeds_words
        counts = f"{self.patients} test patients, {self.seeds_words}"
        self.page = Page(f"{self.title}: {counts}", f"medclr compare: {', '.join(self.plan.inits)}")
        self.others = [name for name in self.plan.inits if name != self.plan.referred]

    def write(self) -> None:
        """Write the page and its pictures."""
        results, plan, page = self.results, self.plan, self.page
        budgets = len(plan.budgets)
        page.tiles(
            [(self.patients, "test patients"), (self.seeds, "seeds"), (len(plan.inits), "inits"), (budgets, "budgets"),
             (sum(map(len, results.outcomes.values())), "models")]
        )  # fmt: skip
        page.warnings(self._warnings())
        if self.others:
            page.section("In short")
            for protocol in results.protocols:
                for sentence in verdicts(results, protocol):
                    page.text(sentence)
        self._curves()
        if self.others:
            self._differences()
            if results.taught:
                self._students()
            self._equivalents()
            self._scatter()
        self._overlays()
        self._calibration()
        self._other_metrics()
        self._scores()
        self._times()
        self._method()
        page.write(self.out / "report.html")

    def _warnings(self) -> list[str]:
        results = self.results
        found = [f"{results.stamp}. What follows flatters it."] if results.stamp else []
        if results.missing:
            found.append(
                f"{results.missing:,} cells are not computed yet: this is a report on the seeds that every init and "
                "budget has. The same command without --report-only true goes on."
            )
        if self.seeds < FEW_SEEDS:
            few = "one seed says" if self.seeds == 1 else f"{self.seeds} seeds say"
            found.append(
                f"For orientation only: {few} little of how much chance there is in which patients are labelled."
            )
        if self.patients < FEW_PATIENTS:
            found.append(f"Only {self.patients} test patients: intervals from so few are too narrow, and unsteady.")
        return found

    def _draw(self, name: str, figure: Figure, caption: str) -> None:
        save(figure, self.out / "figures" / f"{name}.png", dpi=150)
        self.page.figure(figure, self._stamped(caption))

    def _stamped(self, caption: str) -> str:
        return f"{caption} {self.results.stamp}.".strip() if self.results.stamp else caption

    def _number(self, protocol: str) -> dict[str, int]:
        """Budget -> patients, ascending."""
        return {row.budget: row.patients for row in self.results.of(protocol, self.metric)}

    def _ends(self, protocol: str) -> list[str]:
        """The smallest and the largest budget."""
        budgets = list(self._number(protocol))
        return list(dict.fromkeys([budgets[0], budgets[-1]]))

    def _curves(self) -> None:
        results = self.results
        self.page.section(f"{self.metric[0].upper()}{self.metric[1:]} with few labelled patients")
        told = []
        for protocol in results.protocols:
            for budget in self._ends(protocol):
                rows = [row for row in results.of(protocol, self.metric) if row.budget == budget]
                best = max(rows, key=lambda row: row.mean)
                told.append(
                    f"{NAMES[protocol]}: with {in_words([best])} the highest mean is that of {best.init}, "
                    f"{best.mean:.3f} [{best.low:.3f}, {best.high:.3f}]."
                )
        bands = (
            f"Mean over {self.seeds_words}; bands are 95 % intervals over the {self.patients} test patients. Bands "
            "that overlap do not rule a difference out, because all inits are judged on the same patients: see the "
            "paired differences below."
        )
        self._draw("curve", curve_figure(results, self.metric), f"{bands} {' '.join(told)}")

    def _differences(self) -> None:
        results, reference = self.results, self.plan.referred
        drawn = differing(results)
        undrawn = [name for name in self.others if name not in drawn]
        left_out = f"Not drawn, because it would set the scale: {', '.join(undrawn)}; it stands in the table below."
        told = [sentence for protocol in results.protocols for sentence in verdicts(results, protocol)]
        self._difference("difference", reference, results.rows, drawn, told, left_out if undrawn else "")

    def _students(self) -> None:
        """What distillation gains: each student against the model that taught it."""
        rows = self.results.taught
        students = list(dict.fromkeys(row.init for row in rows))
        told = []
        for protocol in self.results.protocols:
            for name in students:
                told.append(f"{NAMES[protocol]}: {verdict(chosen(rows, protocol, self.metric, name))}")
        self._difference("distillation", "the teacher", rows, students, told)

    def _difference(
        self,
        name: str,
        reference: str,
        found: Sequence[Row],
        drawn: Sequence[str],
        told: Sequence[str],
        left_out: str = "",
    ) -> None:
        """A section on the paired differences that are ``found``: a figure of those ``drawn``, and a table of all."""
        results = self.results
        self.page.section(f"Paired difference to {reference}")
        how = (
            "Above zero is better. Thick bars: 95 % interval over test patients, the same draws for both; thin lines: "
            "test patients and seeds drawn together, more cautious. Filled: the thick bar excludes zero."
        )
        all_rows = [row for p in results.protocols for row in chosen(found, p, self.metric) if row.reference]
        words = list(told)
        if not any(row.is_decided for row in all_rows):
            words = ["No interval excludes zero: the data do not support any difference."]
        if len(all_rows) > 1:
            words.append(f"These are {len(all_rows)} intervals, and they are not corrected for being many.")
        figure = difference_figure(results, found, drawn, reference)
        self._draw(name, figure, " ".join(filter(None, [how, left_out, *words])))
        rows: list[list[Cell]] = []
        for row in all_rows:
            rows.append([NAMES[row.protocol], row.patients, row.init, _signed(row.difference),
                         _between(row.difference_low, row.difference_high),
                         _between(row.difference_cautious_low, row.difference_cautious_high),
                         "yes" if row.is_decided else "not supported"])  # fmt: skip
        header = [
            "protocol",
            "labelled",
            "init",
            "difference",
            "over patients",
            "over patients and seeds",
            "a difference?",
        ]
        n = f"{self.metric}, {self.seeds_words}, {self.patients} test patients, 95 % intervals."
        self.page.table(header, rows, self._stamped(n))

    def _equivalents(self) -> None:
        results, reference = self.results, self.plan.referred
        self.page.section(f"How many labels {reference} needs for the same score")
        rows: list[list[Cell]] = []
        for protocol in results.protocols:
            number = self._number(protocol)
            smallest, largest = min(number.values()), max(number.values())
            for init in self.others:
                cells = [many_or_few(results.equivalents[protocol, init, b], largest, smallest) for b in number]
                rows.append([NAMES[protocol], init, *cells])
        caption = (
            f"Across: labelled patients of each init. Below: how many {reference} needs to score the same, and a 95 % "
            f"interval over test patients. The mean curve of {reference} is made to rise, and read between budgets on "
            "a logarithmic scale; outside the budgets nothing is claimed."
        )
        header = ["protocol", "init", *(f"with {n}" for n in self._number(results.protocols[0]).values())]
        self.page.table(header, rows, self._stamped(caption))

    def _scatter(self) -> None:
        results, reference = self.results, self.plan.referred
        is_class = isinstance(next(iter(results.outcomes.values()))[0], Classified)
        what = "probability of the true class" if is_class else "Dice"
        self.page.section("Patient by patient")
        for protocol in results.protocols:
            number, ends, told = self._number(protocol), self._ends(protocol), []
            for budget in ends:
                base, _ = per_patient(results.outcomes[protocol, reference, budget])
                for init in scattered(results):
                    values, _ = per_patient(results.outcomes[protocol, init, budget])
                    gaps = np.array([values[p] - base[p] for p in base])
                    median = float(np.nanmedian(gaps)) if np.isfinite(gaps).any() else 0.0
                    better = int((gaps > 0).sum())
                    told.append(f"{init} at {number[budget]}: {better} of {len(gaps)} higher, median {median:+.3f}.")
            caption = (
                f"{NAMES[protocol]}: each dot is a test patient, its {what}, mean over seeds; above the line it "
                f"does better than from {reference}. {' '.join(told)} A shift of the whole cloud is a difference; a "
                "few far dots are patients to look at."
            )
            self._draw(f"patients-{protocol}", scatter_figure(results, protocol, ends), caption)

    def _overlays(self) -> None:
        results = self.results
        shown = False
        for protocol in results.protocols:
            number = self._number(protocol)
            for budget in reversed(self._ends(protocol)):
                rows = [row for row in results.of(protocol, self.metric) if row.budget == budget]
                best = max(rows, key=lambda row: row.mean)
                picture = results.pictures.get((protocol, best.init, budget))
                if picture is None:
                    continue
                if not shown:
                    self.page.section("Best, median and worst segmentation")
                shown = True
                caption = (
                    f"{best.init}, {number[budget]} labelled patients, seed 0: the init of the highest mean "
                    f"{self.metric} at this budget. The worst patient shows what the mean hides; one seed's pictures "
                    "prove no difference."
                )
                self.page.picture(picture, self._stamped(caption))

    def _calibration(self) -> None:
        results = self.results
        if not isinstance(next(iter(results.outcomes.values()))[0], Classified):
            return
        self.page.section("Calibration")
        for protocol in results.protocols:
            ends, number = self._ends(protocol), self._number(protocol)
            told = []
            for budget in ends:
                errors = {init: calibration_error(results, protocol, init, budget) for init in self.plan.inits}
                best, worst = min(errors, key=errors.__getitem__), max(errors, key=errors.__getitem__)
                told.append(
                    f"With {number[budget]} labelled patients the error is smallest for {best} ({errors[best]:.3f}) "
                    f"and largest for {worst} ({errors[worst]:.3f})."
                )
            caption = (
                f"{NAMES[protocol]}: how often the likeliest class is the true one, by the probability that was "
                "said; on the dashed line a model is as sure as it is right, below it too sure. Larger dots hold more "
                f"scans. Numbers: expected calibration error in ten bins, mean over seeds. {' '.join(told)} They have "
                "no interval: small differences mean nothing."
            )
            self._draw(f"calibration-{protocol}", calibration_figure(results, protocol, ends), caption)

    def _other_metrics(self) -> None:
        results = self.results
        metrics = results.metrics[1:]
        if not metrics:
            return
        self.page.section("Other metrics")
        for protocol in results.protocols:
            caption = f"{NAMES[protocol]}: mean over seeds and 95 % intervals over test patients. "
            caption += further(results, protocol) if self.others else ""
            self._draw(f"metrics-{protocol}", metrics_figure(results, protocol, metrics), caption.strip())

    def _scores(self) -> None:
        self.page.section("All scores")
        rows = [_score_cells(row) for p in self.results.protocols for row in self.results.of(p, self.metric)]
        header = [
            "protocol",
            "labelled",
            "init",
            self.metric,
            "SD over seeds",
            "over patients",
            "over patients and seeds",
        ]
        caption = f"Mean over {self.seeds_words}; 95 % intervals. Every metric stands in results.csv."
        self.page.table(header, rows, self._stamped(caption))

    def _times(self) -> None:
        results = self.results
        self.page.section("Run time")
        rows: list[list[Cell]] = []
        for protocol in results.protocols:
            for init in self.plan.inits:
                took = [results.seconds[protocol, init, budget] for budget in self._number(protocol)]
                medians = [duration(float(np.median(each))) for each in took]
                rows.append([NAMES[protocol], init, *medians, duration(sum(map(sum, took)))])
        total = sum(sum(each) for each in results.seconds.values())
        jobs = f", {self.plan.jobs} at a time" if self.plan.jobs > 1 else ""
        caption = (
            f"Median of a cell, by labelled patients; {duration(total)} in all{jobs}. The features of the probe, made "
            "once for each init, do not count."
        )
        header = ["protocol", "init", *(f"with {n}" for n in self._number(results.protocols[0]).values()), "all cells"]
        self.page.table(header, rows, self._stamped(caption))

    def _method(self) -> None:
        plan = self.plan
        self.page.section("How it was made")
        self.page.text(
            "Patients were split once into training and test. The seed alone decides which training patients are "
            "labelled, and larger budgets hold the smaller ones; so every init learned from the same patients and was "
            "judged on the same ones. Test patients were touched by predictions alone."
        )
        self.page.text(
            f"Intervals are percentile bootstraps of {plan.resamples:,} resamples of the test patients, all scans of a "
            "patient together, and the same for all inits. They answer for other patients, with these seeds; the more "
            "cautious ones draw the seeds too, and answer for other labelled patients and other initial weights."
        )
        settings = to_plain(plan)
        shared = {key: value for key, value in settings.items() if key != "inits"}
        rows: list[list[Cell]] = [[key, _plain(value)] for key, value in shared.items()]
        rows += [
            [f"inits: {name}", _plain({k: v for k, v in init.items() if v})] for name, init in settings["inits"].items()
        ]
        self.page.table(["setting", "value"], rows)


def _score_cells(row: Row) -> list[Cell]:
    return [NAMES[row.protocol], row.patients, row.init, f"{row.mean:.3f}", "" if row.sd != row.sd else f"{row.sd:.3f}",
            _between(row.low, row.high, ""), _between(row.cautious_low, row.cautious_high, "")]  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _between(low: float, high: float, sign: str = "+") -> str:
    return "" if low != low else f"{low:{sign}.3f} to {high:{sign}.3f}"


def _plain(value: object) -> str:
    """A setting as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return {"None": "none", "": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
