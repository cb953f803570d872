"""Splits, label budgets and the guard against overlap: everything that goes by patient."""

import itertools
from collections import Counter

import pytest

from medclr.data.splits import label_budgets, parse_split, patient_labels, refuse_overlap, split_of
from medclr.errors import MedclrError


def test_split_follows_the_fractions_and_never_moves_a_patient() -> None:
    fractions = {"train": 0.7, "test": 0.3}
    patients = [f"p-{i}" for i in range(4000)]
    counts = Counter(split_of(p, fractions) for p in patients)
    assert abs(counts["train"] / 4000 - 0.7) < 0.03  # 4 standard deviations
    # SHA-256("\\0p-0") begins with b6, and 0xb6/256 = 0.71: written down, so that no later version splits otherwise.
    assert [split_of(f"p-{i}", fractions) for i in range(3)] == ["test", "train", "train"]
    other = Counter((split_of(p, fractions), split_of(p, fractions, "again")) for p in patients)
    assert abs(other["test", "test"] / 4000 - 0.09) < 0.02  # independent: 0.3 * 0.3
    assert {split_of(p, {"all": 1.0}) for p in patients} == {"all"}
    assert {split_of(p, {"none": 0.0, "all": 1.0}) for p in patients} == {"all"}


def test_parse_split() -> None:
    assert parse_split("train=0.7, test=0.3") == {"train": 0.7, "test": 0.3}
    for wrong in ("train", "train=0.7,test=0.4", "train=a", "=1", "a=1.5,b=-0.5", ""):
        with pytest.raises(MedclrError, match="split"):
            parse_split(wrong)


def test_label_budgets_are_nested_stratified_and_seeded() -> None:
    labels = {f"p{i:03d}": "abc"[(i % 10 > 5) + (i % 10 > 8)] for i in range(200)}  # 60 % a, 30 % b, 10 % c
    budgets = label_budgets(labels, [3, 5, 10, 50, 0.5, 1.0], seed=1)
    subsets = [set(budget) for budget in budgets.values()]
    assert [len(s) for s in subsets] == [3, 5, 10, 50, 100, 200]
    assert all(a < b for a, b in itertools.pairwise(subsets))
    assert Counter(labels[p] for p in budgets[3]) == {"a": 1, "b": 1, "c": 1}
    assert Counter(labels[p] for p in budgets[10]) == {"a": 6, "b": 3, "c": 1}
    assert Counter(labels[p] for p in budgets[0.5]) == {"a": 60, "b": 30, "c": 10}
    assert label_budgets(dict(reversed(labels.items())), [10], seed=1)[10] == budgets[10]
    assert label_budgets(labels, [10], seed=2)[10] != budgets[10]


@pytest.mark.parametrize(("budget", "message"), [(7, "only 6"), (1, "fewer patients than the 2"), (1.5, r"\(0, 1\]")])
def test_impossible_budgets(budget: float, message: str) -> None:
    with pytest.raises(MedclrError, match=message):
        label_budgets({f"p{i}": "ab"[i % 2] for i in range(6)}, [budget], seed=0)


def test_a_budget_need_not_hold_every_class() -> None:
    labels = {f"p{i}": "aab"[i % 3] for i in range(9)}
    (one,) = label_budgets(labels, [1], seed=0, every_class=False)[1]
    assert labels[one] == "a"


def test_patient_labels_takes_the_commonest() -> None:
    pairs = [("p", "b"), ("p", "a"), ("p", "b"), ("q", "b"), ("q", "a"), ("r", "")]
    assert patient_labels(pairs) == {"p": "b", "q": "a"}


def test_refuse_overlap() -> None:
    refuse_overlap(["a", "b"], ["c"], "train and test")
    with pytest.raises(MedclrError, match="2 patients are in both train and test, the first is b"):
        refuse_overlap(["c", "b", "a"], ["b", "c"], "train and test")
