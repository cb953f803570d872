"""What a comparison found: its predictions, read back and scored; its tables; and what may be said of them."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import numpy as np

from medclr.compare_plan import Cell, CompareConfig
from medclr.errors import MedclrError
from medclr.files import write_text
from medclr.outcomes import Classified, Floats, Outcome, Segmented, read_outcome
from medclr.progress import progress
from medclr.statistics import Equivalence, Estimate, Resampled, equivalent_budget, resample

NAMES = {"probe": "Linear probe", "finetune": "Fine-tuning"}
"""What readers call the protocols."""


@dataclass(frozen=True)
class Row:
    """A line of ``results.csv`` or ``students.csv``: its fields are the columns."""

    protocol: str
    init: str
    budget: str
    """As asked for."""
    patients: int
    """Labelled ones, with those that validate."""
    metric: str
    mean: float
    """Over seeds, as in ``medclr.statistics.Estimate``; and below."""
    sd: float
    low: float
    high: float
    cautious_low: float
    cautious_high: float
    seeds: int
    test_patients: int
    reference: str
    """The init from which the next five are the paired difference; '' for that init itself."""
    difference: float
    difference_low: float
    difference_high: float
    difference_cautious_low: float
    difference_cautious_high: float
    seen_test_patients: int
    """Test patients that the init was pretrained on: more than 0 is transductive."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.difference_low > 0 or self.difference_high < 0

    @property
    def is_decided_cautiously(self) -> bool:
        """Whether that of patients and seeds together does."""
        return self.difference_cautious_low > 0 or self.difference_cautious_high < 0


@dataclass(frozen=True)
class Results:
    """All that a report tells of."""

    plan: CompareConfig
    outcomes: Mapping[tuple[str, str, str], Sequence[Outcome]]
    """(protocol, init, budget) -> one outcome a seed, the same seeds for all."""
    rows: Sequence[Row]
    equivalents: Mapping[tuple[str, str, str], Equivalence]
    """(protocol, init, budget) -> how many labels the reference needs for that score."""
    seconds: Mapping[tuple[str, str, str], Sequence[float]]
    """(protocol, init, budget) -> how long each seed took."""
    stamps: Mapping[str, int]
    """Init -> test patients that it was pretrained on."""
    taught: Sequence[Row] = ()
    """Of students, in the first metric: the difference of their rows is that to their teacher."""
    missing: int = 0
    """Cells that are not computed yet."""
    pictures: Mapping[tuple[str, str, str], Path] = field(default_factory=dict)
    """(protocol, init, budget) -> overlays of its first seed."""

    @property
    def protocols(self) -> list[str]:
        """Those with results."""
        return list(dict.fromkeys(row.protocol for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """The first one decides."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def stamp(self) -> str:
        """'' or the stamp of a transductive comparison, for every figure and table."""
        seen = [f"{name} has seen {count}" for name, count in self.stamps.items() if count]
        return f"TRANSDUCTIVE: of the test patients, training without labels of {', of '.join(seen)}" if seen else ""

    @property
    def seeds(self) -> dict[str, int]:
        """Protocol -> seeds of its scores; an unfinished comparison may have fewer of one than of another."""
        return {row.protocol: row.seeds for row in self.rows}

    @property
    def seeds_words(self) -> str:
        """``5 seeds``, or ``6 seeds of Linear probe and 2 seeds of Fine-tuning``."""
        words = {name: f"{n} seed{'s' if n > 1 else ''}" for name, n in self.seeds.items()}
        if len(set(words.values())) == 1:
            return next(iter(words.values()))
        return " and ".join(f"{told} of {NAMES[name]}" for name, told in words.items())

    def of(self, protocol: str, metric: str, init: str | None = None) -> list[Row]:
        """Rows by protocol, metric and perhaps init, the smallest budget first."""
        return chosen(self.rows, protocol, metric, init)

    def __str__(self) -> str:
        first = self.rows[0]
        lines = [f"{first.test_patients} test patients, {self.seeds_words}, {first.metric} [95 % interval]"]
        for protocol in self.protocols:
            for init in self.plan.inits:
                scores = (
                    f"{r.patients}: {r.mean:.3f} [{r.low:.3f}, {r.high:.3f}]"
                    for r in self.of(protocol, first.metric, init)
                )
                lines.append(f"  {protocol:<9} {init:<24} {'   '.join(scores)}")
        lines += [sentence for protocol in self.protocols for sentence in verdicts(self, protocol)]
        return "\n".join([*lines, *([self.stamp] if self.stamp else [])])


def chosen(rows: Sequence[Row], protocol: str, metric: str, init: str | None = None) -> list[Row]:
    """Rows by protocol, metric and perhaps init, the smallest budget first."""
    some = [row for row in rows if (row.protocol, row.metric) == (protocol, metric) and init in (None, row.init)]
    return sorted(some, key=lambda row: row.patients)


def read_results(plan: CompareConfig, out: Path, stamps: Mapping[str, int]) -> Results:
    """Read and score the predictions of all seeds that every init and budget of a protocol has.

    Raises:
        MedclrError: there is no whole seed, or the cells of a seed are not of the same patients.
    """
    outcomes: dict[tuple[str, str, str], list[Outcome]] = {}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    labelled: dict[tuple[str, str], int] = {}
    pictures: dict[tuple[str, str, str], Path] = {}
    missing = 0
    for protocol in plan.protocols:
        cells = plan.cells(protocol)
        absent = {cell.seed for cell in cells if not cell.is_done(out)}
        missing += sum(not cell.is_done(out) for cell in cells)
        for cell in cells:
            if cell.seed in absent:
                continue
            folder, key = cell.folder(out), (cell.protocol, cell.init, cell.budget)
            outcomes.setdefault(key, []).append(read_outcome(folder / "predictions.csv"))
            seconds.setdefault(key, []).append(float(json.loads((folder / "cell.json").read_text())["seconds"]))
            _check_pair(plan, cell, out)
            labelled[protocol, cell.budget] = len(_labelled(folder))
            picture = folder / "figures" / "overlays.png"
            if picture.is_file():
                pictures.setdefault(key, picture)
    for key, judged in outcomes.items():
        for ours, theirs in zip(judged, outcomes[key[0], plan.referred, key[2]], strict=True):
            if sorted(ours.scan_id) != sorted(theirs.scan_id):
                raise MedclrError(
                    f"{out}: {', '.join(key)} patients was judged on other scans than {plan.referred}, so the two "
                    "cannot be paired; judge both on the same"
                )
    if not outcomes:
        raise MedclrError(f"{out}: no seed is whole over all inits and budgets yet; run it without --report-only")
    rows, taught, equivalents = _score(plan, outcomes, labelled, stamps)
    return Results(plan, outcomes, rows, equivalents, seconds, stamps, taught, missing, pictures)


def _labelled(folder: Path) -> list[str]:
    """The patients whose labels a cell was given, sorted."""
    with (folder / "cases.csv").open(newline="", encoding="utf-8") as file:
        return sorted(row["patient_id"] for row in csv.DictReader(file) if row["split"] != "test")


def _check_pair(plan: CompareConfig, cell: Cell, out: Path) -> None:
    """Raise unless the reference was given the same patients."""
    other = Cell(cell.protocol, plan.referred, cell.budget, cell.seed)
    if _labelled(cell.folder(out)) != _labelled(other.folder(out)):
        raise MedclrError(
            f"{cell.folder(out)}: was trained on other patients than {other.folder(out)}, so the two cannot be paired; "
            "remove the one that is wrong, and run the same command again"
        )


def _score(
    plan: CompareConfig,
    outcomes: Mapping[tuple[str, str, str], Sequence[Outcome]],
    labelled: Mapping[tuple[str, str], int],
    stamps: Mapping[str, int],
) -> tuple[list[Row], list[Row], dict[tuple[str, str, str], Equivalence]]:
    rows: list[Row] = []
    taught: list[Row] = []
    equivalents: dict[tuple[str, str, str], Equivalence] = {}
    metrics = next(iter(outcomes.values()))[0].metrics()
    with progress("statistics", len(outcomes) * len(metrics), "scores") as advance:
        for protocol in dict.fromkeys(key[0] for key in outcomes):
            number = {str(budget): labelled[protocol, str(budget)] for budget in plan.budgets}
            budgets = sorted(number, key=number.__getitem__)
            for metric in metrics:
                drawn: dict[tuple[str, str], Resampled] = {}
                for init in plan.inits:
                    for budget in budgets:
                        drawn[init, budget] = resample(outcomes[protocol, init, budget], metric, plan.resamples)
                        advance(1, metric)
                for init, budget in drawn:
                    against = "" if init == plan.referred else plan.referred
                    rows.append(_row(protocol, init, budget, against, number, metric, drawn, stamps))
                if metric == metrics[0]:
                    for init, budget in drawn:
                        if teacher := plan.inits[init].teacher:
                            taught.append(_row(protocol, init, budget, teacher, number, metric, drawn, stamps))
                    numbers = [float(number[budget]) for budget in budgets]
                    curve = [drawn[plan.referred, budget] for budget in budgets]
                    for (init, budget), one in drawn.items():
                        if init != plan.referred:
                            equivalents[protocol, init, budget] = equivalent_budget(numbers, curve, one)
    return rows, taught, equivalents


def _row(
    protocol: str,
    init: str,
    budget: str,
    against: str,
    number: Mapping[str, int],
    metric: str,
    drawn: Mapping[tuple[str, str], Resampled],
    stamps: Mapping[str, int],
) -> Row:
    """Of one init and budget; ``against`` another init, or '' for none."""
    one = drawn[init, budget]
    apart = (one - drawn[against, budget]).estimate() if against else None
    return Row(
        protocol, init, budget, number[budget], metric, *_numbers(one.estimate()),
        len(one.point), one.patients, against, *_apart(apart), stamps[init],
    )  # fmt: skip


def _numbers(found: Estimate) -> tuple[float, float, float, float, float, float]:
    return found.mean, found.sd, found.low, found.high, found.cautious_low, found.cautious_high


def _apart(found: Estimate | None) -> tuple[float, float, float, float, float]:
    if found is None:
        return (math.nan,) * 5
    return found.mean, found.low, found.high, found.cautious_low, found.cautious_high


def write_tables(results: Results, out: Path) -> None:
    """Write ``results.csv``, and ``students.csv`` if there are any."""
    _write_table(results.rows, out / "results.csv")
    if results.taught:
        _write_table(results.taught, out / "students.csv")


def _write_table(rows: Sequence[Row], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([each.name for each in fields(Row)])
    for row in rows:
        writer.writerow([_cell(value) for value in astuple(row)])
    write_text(path, text.getvalue())


def _cell(value: str | float) -> str | int:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value


# By patient -----------------------------------------------------------------------------------------------------------


def per_patient(outcomes: Sequence[Outcome]) -> tuple[dict[str, float], dict[str, str]]:
    """How well each test patient is served, the mean over seeds and scans: patient -> value, patient -> true class.

    Of a segmentation its Dice; of a classification the probability of what is true; classes are '' unless there is one
    a scan.
    """
    values: dict[str, list[float]] = {}
    groups: dict[str, str] = {}
    for outcome in outcomes:
        each: Floats = np.full(len(outcome.scan_id), np.nan)  # [r]
        named = [""] * len(each)
        if isinstance(outcome, Segmented):
            each = outcome.rows(outcome.metrics()[0])
        elif isinstance(outcome, Classified) and outcome.multi_label:
            each = np.where(outcome.truth == 1, outcome.probability, 1 - outcome.probability).mean(1)
        elif isinstance(outcome, Classified):
            each = (outcome.truth * outcome.probability).sum(1)
            named = [outcome.classes[c] for c in outcome.truth.argmax(1)]
        for patient, value, name in zip(outcome.patient_id, each.tolist(), named, strict=True):
            values.setdefault(patient, []).append(value)
            groups.setdefault(patient, name)
    known = {patient: [value for value in some if value == value] for patient, some in values.items()}
    return {patient: float(np.mean(some)) if some else math.nan for patient, some in known.items()}, groups


def pooled(outcomes: Sequence[Outcome]) -> Classified:
    """The classifications of all seeds below one another; for pictures, not for intervals."""
    chosen = [outcome for outcome in outcomes if isinstance(outcome, Classified)]
    return Classified(
        [scan for outcome in chosen for scan in outcome.scan_id],
        [patient for outcome in chosen for patient in outcome.patient_id],
        chosen[0].classes,
        np.concatenate([outcome.truth for outcome in chosen]),
        np.concatenate([outcome.probability for outcome in chosen]),
        chosen[0].multi_label,
    )


# In words -------------------------------------------------------------------------------------------------------------


def verdicts(results: Results, protocol: str) -> list[str]:
    """One sentence an init: where it is ahead of the reference, and where the data do not support a difference."""
    metric, plan = results.metrics[0], results.plan
    return [
        f"{NAMES[protocol]}: {verdict(results.of(protocol, metric, init))}"
        for init in plan.inits
        if init != plan.referred
    ]


def verdict(rows: Sequence[Row]) -> str:
    """What the paired differences [budgets] of one init in a metric of which more is better allow to say."""
    first = rows[0]
    ahead = [row for row in rows if row.difference_low > 0]
    behind = [row for row in rows if row.difference_high < 0]
    open_ = [row for row in rows if not row.is_decided]
    parts = []
    for words, chosen in ((f"ahead of {first.reference}", ahead), (f"behind {first.reference}", behind)):
        if chosen:
            parts.append(f"{words} at {in_words(chosen)} ({_by(chosen)})")
    if open_ and len(open_) == len(rows):
        where = f"at {in_words(rows)}" if len(rows) == 1 else "at every budget"
        return (
            f"{first.init} against {first.reference}: {where} the interval of the difference includes zero: the data "
            "do not support a difference."
        )
    said = f"{first.init} is {' and '.join(parts)}"
    if open_:
        said += f"; at {in_words(open_)} the interval includes zero: the data do not support a difference"
    if weak := [row for row in rows if row.is_decided and not row.is_decided_cautiously]:
        why = (
            "one seed says nothing of others"
            if first.seeds == 1
            else "the more cautious interval, over seeds and patients, includes zero"
        )
        said += f". At {in_words(weak)} {why}"
    return said + "."


def _by(rows: Sequence[Row]) -> str:
    """The differences with their intervals; of many, the smallest and the largest."""
    if len(rows) <= 3:
        return ", ".join(f"{r.difference:+.3f} [{r.difference_low:+.3f}, {r.difference_high:+.3f}]" for r in rows)
    return f"by {min(row.difference for row in rows):+.3f} to {max(row.difference for row in rows):+.3f}"


def lower_is_better(metric: str) -> bool:
    """Of distances."""
    return metric.startswith(("HD95", "mean HD95"))


def further(results: Results, protocol: str) -> str:
    """Where the paired intervals of the metrics after the first exclude zero, in a sentence."""
    reference, told = results.plan.referred, []
    for init in (name for name in results.plan.inits if name != reference):
        for metric in results.metrics[1:]:
            rows = [row for row in results.of(protocol, metric, init) if row.is_decided]
            for word, is_better in (("better", True), ("worse", False)):
                if chosen := [row for row in rows if ((row.difference < 0) == lower_is_better(metric)) is is_better]:
                    told.append(f"{init} is {word} in {metric} at {in_words(chosen)}")
    if told:
        return f"Where the paired interval against {reference} excludes zero: {'; '.join(told)}."
    return f"No paired interval against {reference} excludes zero: the data do not support a difference."


def in_words(rows: Sequence[Row]) -> str:
    """``5, 10 and 20 patients``."""
    numbers = list(dict.fromkeys(str(row.patients) for row in rows))
    listed = numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    return f"{listed} patient{'' if listed == '1' else 's'}"


def many_or_few(found: Equivalence, largest: int, smallest: int) -> str:
    """``34 (22 to > 200)``, or ``more than 200``: nothing is claimed beyond the budgets."""

    def number(value: float, less: str, more: str) -> str:
        if math.isnan(value):
            return "unknown"
        if math.isinf(value):
            return f"{more} {largest}"
        return f"{less} {smallest}" if value <= smallest else f"{value:.0f}"

    point = number(found.patients, "at most", "more than")
    if found.low == found.patients == found.high:
        return point
    return f"{point} ({number(found.low, '≤', '>')} to {number(found.high, '≤', '>')})"
