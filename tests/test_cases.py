"""Who trains, validates and tests: nested, stratified, by patient, repeated from the file, and guarded."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medclr.data.cases import Cases, choose_cases, parse_budget, read_cases, refuse_seen, split_patients, write_cases
from medclr.errors import MedclrError

STRATA = {f"p{i:03d}": "abc"[(i % 10 > 5) + (i % 10 > 8)] for i in range(100)}  # 60 a, 30 b, 10 c


def a_store(splits: dict[str, str] | None = None, scans: int = 2) -> Any:
    """What of a store is asked: so many scans of each patient, in the split of the manifest."""
    splits = dict.fromkeys(STRATA, "") if splits is None else splits
    rows = [SimpleNamespace(patient_id=p, split=split) for _ in range(scans) for p, split in splits.items()]
    return SimpleNamespace(path=Path("store"), scans=rows)


SPLITS = {patient: "test" if number % 3 == 0 else "train" for number, patient in enumerate(STRATA)}
STORE = a_store(SPLITS)
TRAIN = {patient for patient, split in SPLITS.items() if split == "train"}


def chosen(cases: Cases) -> set[str]:
    return {*cases.train, *cases.validation}


def count(patients: Any) -> dict[str, int]:
    return dict(Counter(STRATA[p] for p in patients))


def test_budgets_are_nested_stratified_and_seeded() -> None:
    budgets = ["3", "5", "10", "20", "0.5", "100%"]
    drawn = [choose_cases(STORE, STRATA, budget, seed=1) for budget in budgets]
    assert [len(chosen(cases)) for cases in drawn] == [3, 5, 10, 20, 33, 66]
    for small, large in itertools.pairwise(drawn):
        assert chosen(small) < chosen(large)
    assert chosen(drawn[-1]) == TRAIN
    assert count(drawn[0].train) == {"a": 1, "b": 1, "c": 1}
    assert {cases.test for cases in drawn} == {tuple(sorted(STRATA.keys() - TRAIN))}
    whole, part = count(TRAIN), count(chosen(drawn[4]))
    assert all(abs(part[name] - whole[name] / 2) <= 1 for name in "abc")
    assert choose_cases(STORE, dict(reversed(STRATA.items())), "10", seed=1) == drawn[2]
    assert chosen(choose_cases(STORE, STRATA, "10", seed=2)) != chosen(drawn[2])


def test_from_twenty_cases_on_a_fifth_validates() -> None:
    for budget, held in (("19", 0), ("20", 4), ("50", 10)):
        cases = choose_cases(STORE, STRATA, budget, seed=0)
        assert (len(cases.validation), len(cases.train)) == (held, int(budget) - held)
        if held:
            assert count(cases.validation).keys() == count(cases.train).keys() == {"a", "b", "c"}
    assert choose_cases(STORE, STRATA, "50", seed=0, validation=0.0).validation == ()
    assert len(choose_cases(STORE, STRATA, "20", seed=0, validation=0.34).validation) == 7


def test_nobody_validates_where_a_class_would_be_missing_on_one_side() -> None:
    strata = {f"p{i:03d}": "rare" if i == 1 else "usual" for i in range(30)}
    splits = {p: "test" if i >= 25 else "train" for i, p in enumerate(strata)}
    assert choose_cases(a_store(splits), strata, "100%", seed=0).validation == ()
    asked = choose_cases(a_store(splits), strata, "100%", seed=0, validation=0.2)
    assert len(asked.validation) == 5
    assert "p001" in asked.train


def test_a_share_that_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(MedclrError, match=r"validation 0.2: 3 cases are too few to train and validate"):
        choose_cases(STORE, STRATA, "3", seed=0, validation=0.2)


def test_a_budget_below_the_number_of_strata_holds_the_commonest() -> None:
    strata = {f"p{i:03d}": "both" if i % 10 else "anterior" for i in range(40)}
    splits = {p: "test" if i >= 30 else "train" for i, p in enumerate(strata)}
    for seed in range(5):
        (one,) = choose_cases(a_store(splits), strata, "1", seed=seed).train
        assert strata[one] == "both"


@pytest.mark.parametrize("budget", ["7", "25", "30%"])
def test_the_file_of_a_run_repeats_its_split(budget: str, tmp_path: Path) -> None:
    cases = choose_cases(STORE, STRATA, budget, seed=3)
    write_cases(tmp_path / "cases.csv", cases, STRATA)
    again = choose_cases(STORE, STRATA, str(tmp_path / "cases.csv"), seed=99, validation=0.5, test_share=0.9)
    assert again == cases == read_cases(tmp_path / "cases.csv")
    assert again.csv(STRATA) == (tmp_path / "cases.csv").read_text()


def test_a_list_of_ids_is_the_budget(tmp_path: Path) -> None:
    ids = sorted(TRAIN)[::2][:24]
    (tmp_path / "ids.csv").write_text("\ufeffpatient_id,age\n" + "".join(f" {p} ,50\n" for p in ids), encoding="utf-8")
    cases = choose_cases(STORE, STRATA, str(tmp_path / "ids.csv"), seed=0)
    assert chosen(cases) == set(ids)
    assert len(cases.validation) == 5
    assert set(cases.test) == STRATA.keys() - TRAIN


def test_a_budget_goes_before_a_file_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("5").write_text("patient_id\np001\n")
    assert len(choose_cases(STORE, STRATA, "5", seed=0).train) == 5


def test_without_splits_in_the_manifest_a_hash_decides_by_patient() -> None:
    small = choose_cases(a_store(scans=1), STRATA, "100%", seed=0)
    for cases in (choose_cases(a_store(scans=3), STRATA, "100%", seed=1), small):
        assert set(cases.test) == set(small.test)
        assert chosen(cases) | set(cases.test) == STRATA.keys()
        assert 15 <= len(cases.test) <= 45
    more = choose_cases(a_store(), STRATA, "100%", seed=0, test_share=0.6)
    assert set(more.test) > set(small.test) or len(more.test) > len(small.test)


def test_who_has_no_split_among_those_who_have_is_left_out() -> None:
    splits = {**SPLITS, "p001": "", "p002": "pilot"}
    cases = choose_cases(a_store(splits), STRATA, "100%", seed=0)
    assert not {"p001", "p002"} & {*chosen(cases), *cases.test}


def test_patients_of_other_scans_do_not_matter() -> None:
    """Those without a label are in the store, and in no split of the cases."""
    splits = {**SPLITS, "unlabelled": "test", "other": "train"}
    assert choose_cases(a_store(splits), STRATA, "10", seed=0) == choose_cases(STORE, STRATA, "10", seed=0)
    assert split_patients(a_store(splits), STRATA, 0.3) == SPLITS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("patient_id,split\np001,train\np001,test\n", "patient p001 is in two splits, train and test"),
        ("patient_id,split\np001,train\nnobody,test\n", "patient nobody has no label in store"),
        ("patient_id,split\np001,train\np003,exam\n", "split 'exam' is unknown"),
        ("patient_id,split\np001,train\np003,\n", "split '' is unknown"),
        ("patient_id,split\np001,train\n", "names no patient of split test"),
        ("patient_id,split\np003,test\n", "names no patient of split train"),
        ("patient_id\np001\np003\n", "patient p003 is in split test of store"),
        ("patient_id\np001\nnobody\n", "patient nobody has no label in store"),
        ("patient_id,split\np001,train\n,test\n", "row 2 names no patient"),
        ("p001\np002\n", "needs a first line with a column patient_id"),
        ("", "needs a first line with a column patient_id"),
        ("patient_id\n", "at least one row"),
        (b"\xff\xfe\x00\x01", "cannot be read as a table of patients"),
    ],
)
def test_a_file_that_cannot_work_is_one_sentence(text: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MedclrError, match=r"cases\.csv: ") as error:
        choose_cases(STORE, STRATA, str(path), seed=0)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("67", "--cases 67: label budget 67: there are only 66"),
        ("0", "'0': write a number of patients"),
        ("-3", "write a number"),
        ("1.5", "write a number"),
        ("120%", "write a number"),
        ("nan", "write a number"),
        ("nowhere.csv", "'nowhere.csv': write a number.* or a file with patient ids, and there is none of that name"),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_sentence(wanted: str, sentence: str) -> None:
    with pytest.raises(MedclrError, match=sentence):
        choose_cases(STORE, STRATA, wanted, seed=0)


def test_budgets_are_numbers_shares_and_fractions() -> None:
    assert [parse_budget(text) for text in ("20", "10%", "0.1", "1.0", "100%", "0.5%")] == [20, 0.1, 0.1, 1, 1, 0.005]
    assert isinstance(parse_budget("1"), int)
    assert isinstance(parse_budget("1.0"), float)


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (dict.fromkeys(STRATA, "train"), "has the splits train; train and test are needed"),
        ({**dict.fromkeys(STRATA, "fit"), "p000": "eval"}, "has the splits eval, fit"),
        ({"p000": "train", "unlabelled": "test"}, "has the splits train"),
    ],
)
def test_a_manifest_without_both_splits_is_one_sentence(splits: dict[str, str], sentence: str) -> None:
    with pytest.raises(MedclrError, match=sentence):
        choose_cases(a_store(splits), {p: "a" for p in splits if p != "unlabelled"}, "1", seed=0)


def test_a_patient_in_two_splits_of_the_manifest_is_refused() -> None:
    store = a_store(SPLITS)
    store.scans.append(SimpleNamespace(patient_id="p001", split="test"))
    with pytest.raises(MedclrError, match="patient p001 is in two splits of its manifest, test and train"):
        choose_cases(store, STRATA, "5", seed=0)


def test_cases_never_share_a_patient() -> None:
    for roles in ((("x",), ("x",), ()), (("x",), (), ("x",)), ((), ("x",), ("x",))):
        with pytest.raises(MedclrError, match=r"patient x is a .* and a .* case"):
            Cases(*roles)


def test_seen_patients_are_refused_with_their_ids_or_stamped() -> None:
    cases = Cases(("a",), ("b",), tuple(f"t{i:02d}" for i in range(30)))
    said = "RUN was pretrained", "choose another"
    assert refuse_seen({"a", "b", "z"}, cases, *said, transductive=False) == ""
    assert refuse_seen({"a", "b", "z"}, cases, *said, transductive=True) == ""
    with pytest.raises(
        MedclrError, match=r"RUN was pretrained on 2 of the 30 test patients \(t03, t07\), .*another, or"
    ):
        refuse_seen({"t07", "t03", "a"}, cases, *said, transductive=False)
    stamp = refuse_seen({"t07", "t03", "a"}, cases, *said, transductive=True)
    assert stamp == "transductive: RUN was pretrained on 2 of the 30 test patients"
    with pytest.raises(MedclrError, match=r"t19, \.\.\.\)"):
        refuse_seen(set(cases.test), cases, *said, transductive=False)
