"""Which patients train, validate and test: drawn once, written down, and repeated from the file.

A budget counts patients, because a radiologist labels patients. Validation patients are part of the budget: their
labels cost as much.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medclr.data.splits import label_budgets, split_of
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.files import write_text

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")

VALIDATED = 20
"""From so many cases on a fifth validates, unless the settings say otherwise."""

MOST_IDS = 20
"""Patients that a message names, of all that it means."""


@dataclass(frozen=True)
class Cases:
    """What each patient is for; patients that are for nothing, such as those beyond the budget, are left out."""

    train: tuple[str, ...]
    """Patient ids, sorted; and below."""
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
            if both := sorted(set(getattr(self, a)) & set(getattr(self, b))):
                raise MedclrError(f"patient {both[0]} is a {a} and a {b} case; a patient can be in one split only")

    def csv(self, strata: Mapping[str, str]) -> str:
        """The text of ``cases.csv``: patient_id, split, stratum."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["patient_id", "split", "stratum"])
        for role in ROLES:
            writer.writerows([patient, role, strata.get(patient, "")] for patient in getattr(self, role))
        return text.getvalue()


def write_cases(path: Path, cases: Cases, strata: Mapping[str, str]) -> None:
    """Write ``cases.csv``, which ``--cases`` takes to repeat the same split."""
    write_text(path, cases.csv(strata))


def parse_budget(text: str) -> int | float:
    """``20`` patients; ``10%`` or ``0.1`` of them.

    Raises:
        MedclrError: it reads like neither.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text) if "." in text else int(text)
        if 0 < value <= (1 if isinstance(value, float) else math.inf):
            return value
    except ValueError:
        pass
    raise MedclrError(f"{text!r}: write a number of patients (20), a percentage (10%) or a fraction (0.1)")


def split_patients(store: Store, patients: Iterable[str], test_share: float) -> dict[str, str]:
    """The split of each patient: the manifest's, or train and test by a hash of the id where it names none.

    Raises:
        MedclrError: the manifest names splits, but not both train and test, or has a patient in two.
    """
    wanted = set(patients)
    split: dict[str, str] = {}
    for scan in store.scans:
        if scan.patient_id in wanted and split.setdefault(scan.patient_id, scan.split) != scan.split:
            two = " and ".join(sorted(name or "none" for name in (split[scan.patient_id], scan.split)))
            raise MedclrError(
                f"{store.path}: patient {scan.patient_id} is in two splits of its manifest, {two}; index again, which "
                "gives a patient one"
            )
    named = set(split.values()) - {""}
    if not named:
        shares = {"train": 1 - test_share, "test": test_share}
        return {patient: split_of(patient, shares) for patient in split}
    if not {"train", "test"} <= named:
        there = ", ".join(sorted(named))
        raise MedclrError(f"{store.path}: its manifest has the splits {there}; train and test are needed")
    return split


def choose_cases(
    store: Store,
    strata: Mapping[str, str],
    wanted: str,
    *,
    seed: int,
    validation: float | None = None,
    test_share: float = 0.3,
) -> Cases:
    """Draw the cases of a run, or read them.

    Args:
        store: whose manifest may name splits.
        strata: patient -> stratum of every labelled patient; budgets are drawn alike over strata, and nested: whoever
            is among the 5 of a seed is also among the 10 of that seed.
        wanted: a budget of training patients as ``parse_budget`` reads it, or a file: a ``cases.csv``, which is
            repeated as it is, or a list of patient ids, which are the budget.
        seed: of the draw.
        validation: share of the budget; None: a fifth from 20 cases on, else none.
        test_share: of the patients, by a hash of the id, where the manifest names no splits.

    Raises:
        MedclrError: a budget that the labelled training patients cannot meet, or of which the share cannot be held out;
            an unknown patient, or one in two splits.
    """
    path, budget = Path(wanted), _budget(wanted)
    listed = _read(path) if budget is None else {}
    if unknown := sorted(set(listed) - set(strata)):
        raise MedclrError(f"{path}: patient {unknown[0]} has no label in {store.path}; make the list from this store")
    if any(listed.values()):
        return _roles(path, listed)
    split = split_patients(store, strata, test_share)
    pool = {patient: strata[patient] for patient, name in split.items() if name == "train"}
    test = tuple(sorted(patient for patient, name in split.items() if name == "test"))
    if not pool or not test:
        raise MedclrError(f"{store.path}: no labelled patient is in split {'test' if pool else 'train'}")
    if listed:
        if outside := sorted(set(listed) - set(pool)):
            its = f"in split {split[outside[0]]}" if split[outside[0]] else "in no split"
            raise MedclrError(
                f"{path}: patient {outside[0]} is {its} of {store.path}, and only those in train can be trained on; "
                "take it off the list"
            )
        chosen: list[str] = sorted(listed)
    else:
        assert budget is not None
        try:
            # A patient of one stratum can show several classes, so whether a budget shows all is the task's to say.
            (chosen,) = label_budgets(pool, [budget], seed, every_class=False).values()
        except MedclrError as error:
            raise MedclrError(f"--cases {wanted}: {error}") from None
    held = _hold_out({patient: pool[patient] for patient in chosen}, seed, validation)
    if validation and not held:
        raise MedclrError(
            f"validation {validation}: {len(chosen)} cases are too few to train and validate on each kind of patient; "
            "take more cases, or set validation to 0"
        )
    return Cases(tuple(sorted(set(chosen) - held)), tuple(sorted(held)), test)


def read_cases(path: Path) -> Cases:
    """The cases of a run, from its ``cases.csv``.

    Raises:
        MedclrError: there is no such file, or it is not one.
    """
    return _roles(path, _read(path))


def refuse_seen(seen: Set[str], cases: Cases, who: str, advice: str, *, transductive: bool) -> str:
    """The stamp of a run whose weights have seen test patients; '' if they have not.

    Args:
        seen: patients that were learnt from, labelled or not.
        cases: of the run.
        who: has seen them, such as "the encoder was pretrained".
        advice: what to choose instead.
        transductive: go on, whoever was seen.

    Raises:
        MedclrError: test patients were seen, and that is not allowed; with their ids.
    """
    both = sorted(seen & set(cases.test))
    if not both:
        return ""
    said = f"{len(both)} of the {len(cases.test)} test patients"
    if not transductive:
        ids = ", ".join(both[:MOST_IDS]) + (", ..." if len(both) > MOST_IDS else "")
        raise MedclrError(
            f"{who} on {said} ({ids}), so its score would flatter; {advice}, or go on with --transductive true, which "
            "is stamped on every figure"
        )
    return f"transductive: {who} on {said}"


def _budget(wanted: str) -> int | float | None:
    """The budget that was asked for; None if it is a file that was."""
    try:
        return parse_budget(wanted)
    except MedclrError as error:
        if Path(wanted).is_file():
            return None
        raise MedclrError(f"--cases: {error}; or a file with patient ids, and there is none of that name") from None


def _roles(path: Path, listed: Mapping[str, str]) -> Cases:
    """The cases of a table that says what each patient is for."""
    if absent := sorted(set(listed.values()) - set(ROLES)):
        raise MedclrError(f"{path}: split {absent[0]!r} is unknown; use train, validation and test")
    roles = {role: tuple(sorted(p for p, its in listed.items() if its == role)) for role in ROLES}
    if not roles["train"] or not roles["test"]:
        raise MedclrError(f"{path}: names no patient of split {'test' if roles['train'] else 'train'}")
    return Cases(**roles)


def _hold_out(chosen: Mapping[str, str], seed: int, share: float | None) -> set[str]:
    """The validation patients: at least one of each stratum stays, and one validates, or there are none.

    A share that was asked for leaves a stratum of one patient to training; else, with such a stratum, none validate.
    """
    counts = Counter(chosen.values())
    if share is None:
        share = 0.2 if len(chosen) >= VALIDATED and min(counts.values()) > 1 else 0.0
    pool = {patient: stratum for patient, stratum in chosen.items() if counts[stratum] > 1}
    strata = set(pool.values())
    n = max(round(share * len(chosen)), len(strata)) if share else 0
    if n == 0 or n > len(pool) - len(strata):
        return set()
    (held,) = label_budgets(pool, [n], seed + 1, every_class=False).values()
    return set(held) if {pool[p] for p in pool.keys() - set(held)} == strata else set()


def _read(path: Path) -> dict[str, str]:
    """patient -> split ('' in a bare list of ids) of a CSV with a column patient_id."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets like to write a byte order mark
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MedclrError(f"{path}: cannot be read as a table of patients ({error})") from error
    if not rows or "patient_id" not in rows[0]:
        raise MedclrError(f"{path}: needs a first line with a column patient_id, and at least one row below it")
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        patient, split = ((row.get(name) or "").strip() for name in ("patient_id", "split"))
        if not patient:
            raise MedclrError(f"{path}: row {number} names no patient; write its id, or remove the row")
        if found.setdefault(patient, split) != split:
            raise MedclrError(f"{path}: patient {patient} is in two splits, {found[patient]} and {split}; keep one")
    return found
