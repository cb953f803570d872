"""Who is trained on and who is tested: splits, label budgets and the overlap guard, all by ``patient_id``."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from medclr.errors import MedclrError


def parse_split(text: str) -> dict[str, float]:
    """``"train=0.7,test=0.3"`` -> ``{"train": 0.7, "test": 0.3}``.

    Raises:
        MedclrError: it does not read like that, or the fractions do not add up to 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            fractions[name] = float(value)
        except ValueError:
            raise MedclrError(f"split {text!r} is not understood; write it as train=0.7,test=0.3") from None
    if "" in fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise MedclrError(f"split {text!r}: each part needs a name, and the fractions must add up to 1")
    return fractions


def split_of(patient_id: str, fractions: Mapping[str, float], salt: str = "") -> str:
    """The split of one patient, a function of the id alone: new patients never move those who are already there.

    Args:
        patient_id: as in the manifest.
        fractions: name -> fraction, adding up to 1.
        salt: another word gives another, independent split.
    """
    digest = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0,1)
    upper = 0.0
    for name, fraction in fractions.items():
        upper += fraction
        if position < upper:
            return name
    return name  # the fractions add up to a hair less than 1


def patient_labels(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(patient, label) of each scan -> one label a patient: the commonest, of equals the first in the alphabet."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for patient, label in pairs:
        if label:
            counts[patient][label] += 1
    return {patient: min(c, key=lambda label: (-c[label], label)) for patient, c in counts.items()}


def label_budgets(
    patients: Mapping[str, str], budgets: Sequence[int | float], seed: int, *, every_class: bool = True
) -> dict[int | float, list[str]]:
    """Nested, stratified subsets of patients: whoever is among the 5 is also among the 10.

    One order of all patients is drawn, of which every budget is a prefix: first one patient of each class, then
    always the class that lags furthest behind its share. Within a class the order is a hash of (seed, patient).

    Args:
        patients: patient -> label, of the training patients alone.
        budgets: a whole number counts patients; a fraction (a float, at most 1.0) is a part of them, rounded, and at
            least one patient a class.
        seed: another seed gives other subsets.
        every_class: refuse a budget smaller than the number of classes; else it holds the commonest classes.

    Raises:
        MedclrError: a budget is larger than the patients there are, or does not hold every class.
    """
    queues: dict[str, list[str]] = {label: [] for label in sorted(set(patients.values()))}
    for patient in sorted(patients, key=lambda p: hashlib.sha256(f"{seed}\0{p}".encode()).digest()):
        queues[patients[patient]].append(patient)
    total, n_classes = len(patients), len(queues)
    taken = dict.fromkeys(queues, 0)
    order: list[str] = []
    while len(order) < total:
        waiting = [label for label in queues if taken[label] < len(queues[label])]
        label = min(
            waiting,
            key=lambda label: (taken[label] > 0, taken[label] - (len(order) + 1) * len(queues[label]) / total, label),
        )
        order.append(queues[label][taken[label]])
        taken[label] += 1

    subsets: dict[int | float, list[str]] = {}
    for budget in budgets:
        is_fraction = isinstance(budget, float)
        if is_fraction and not 0 < budget <= 1:
            raise MedclrError(f"label budget {budget}: fractions lie in (0, 1]; a whole number counts patients")
        n = max(n_classes, round(budget * total)) if is_fraction else int(budget)
        if n > total:
            raise MedclrError(f"label budget {budget}: there are only {total} labelled patients to train on")
        if every_class and n < n_classes:
            raise MedclrError(f"label budget {budget}: fewer patients than the {n_classes} classes")
        subsets[budget] = order[:n]
    return subsets


def refuse_overlap(first: Iterable[str], second: Iterable[str], what: str) -> None:
    """Raise if any patient stands on both sides.

    Args:
        first: patient ids.
        second: patient ids.
        what: names the two sides in the message, such as "the training and the test set".

    Raises:
        MedclrError: some patient is in both.
    """
    shared = sorted(set(first) & set(second))
    if shared:
        raise MedclrError(f"{len(shared)} patients are in both {what}, the first is {shared[0]}; split by patient")
