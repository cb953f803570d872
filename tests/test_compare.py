"""The comparison: settings, a grid that goes on, pairs that are pairs, and a page that claims no more than it may."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_report import Reader

import medclr
from medclr.cli import main
from medclr.compare import run_cell, run_comparison, wish_of
from medclr.compare_figures import colours, marks
from medclr.compare_page import write_report
from medclr.compare_plan import Cell, CompareConfig, InitConfig, folder_name, open_comparison, read_config
from medclr.compare_results import Results, Row, further, many_or_few, read_results, verdict, write_tables
from medclr.config import read_yaml
from medclr.data.cases import choose_cases, write_cases
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.files import write_json
from medclr.finetune import read_wish as finetune_wish
from medclr.outcomes import Classified, Outcome, Segmented, read_outcome, write_outcome
from medclr.pretrain import read_settings
from medclr.statistics import Equivalence, resample
from medclr.tasks.classify import Config, Task

CONFIGS = Path(__file__).parents[1] / "configs" / "compare"
SMALL = {"size_px": 16, "steps": 2, "batch": 4, "device": "cpu", "network.name": "resnet18"}


def a_plan(store: Path, **changes: Any) -> CompareConfig:
    """Two inits, two budgets, two seeds."""
    inits = {"random": InitConfig("random"), "Other": InitConfig("random", settings={"lr": 0.01})}
    settings: dict[str, Any] = {
        "store": store, "inits": inits, "budgets": (4, "8"), "seeds": 2, "resamples": 100, "settings": SMALL,
        "protocols": ("probe",),
    }  # fmt: skip
    return CompareConfig(**settings | changes)


def fake_cell(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """Predictions of a model that is the better the more it has seen, and much better if it is not random."""
    with (out / "logs" / "calls.txt").open("a") as log:
        log.write(f"{cell}\n")
    store = Store(plan.store)
    task = Task(Config(), store)
    cases = choose_cases(store, task.strata, cell.budget, seed=cell.seed)
    test = np.array([i for i in task.scans if store.scans[int(i)].patient_id in cases.test])
    truth = task.truth(test)
    rng = np.random.default_rng(cell.seed)
    signal_of = {"random": 0.5, "Other": 2.5}.get(cell.init, 1.5)
    p = 1 / (1 + np.exp(-(signal_of * (2 * truth[:, 1] - 1) + rng.normal(0, 1, len(truth)))))
    scans = [store.scans[int(i)] for i in test]
    ids = [scan.scan_id for scan in scans], [scan.patient_id for scan in scans]
    write_cases(cell.folder(out) / "cases.csv", cases, task.strata)
    write_outcome(cell.folder(out) / "predictions.csv", Classified(*ids, task.classes, truth, np.stack([1 - p, p], 1)))
    return 0.25


def slow_cell(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """The same after a while."""
    time.sleep(0.5)
    return fake_cell(plan, cell, out)


def deadly_cell(plan: CompareConfig, cell: Cell, out: Path) -> float:
    """As if memory ran out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes seconds, and most tests are of the grid."""
    monkeypatch.setattr("medclr.compare_page._Report._draw", lambda report, name, figure, caption: None)


def calls(out: Path) -> list[str]:
    """Which cells were computed, in this order."""
    return (out / "logs" / "calls.txt").read_text().splitlines()


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_complete_and_valid(path: Path) -> None:
    plan = read_config(path)
    assert set(read_yaml(path)) == {field.name for field in fields(CompareConfig)}
    for init in plan.inits:
        assert wish_of(plan, init).task == plan.task
    assert not plan.transductive
    assert not plan.store.is_absolute()
    text = path.read_text()
    assert f"--config configs/compare/{path.name}" in text


def test_the_recipes_are_those_that_were_measured() -> None:
    """What a user is told to run is what stands in the results."""
    told = finetune_wish(["--config", str(CONFIGS.parent / "finetune" / "few_masks.yaml"), "--store=s", "--out=o"])
    dense = CONFIGS / "hippocampus_methods.yaml"
    measured = wish_of(read_config(dense), "dense")
    assert told.task == measured.task
    assert told.settings == measured.settings
    assert replace(told.own, labels=(1, 2), names=("anterior", "posterior")) == measured.own
    scans = runpy.run_path(str(CONFIGS.parents[1] / "benchmarks" / "real_scans.py"))
    config, own = scans["METHOD_RUNS"]["simclr"]
    words = [f"--{key}={value}" for key, value in (scans["METHODS"] | scans["VOLUMES"] | own).items()]
    run, file = CONFIGS.parent / "pretrain", ["--store=s", "--out=o"]
    by_file = read_settings(["--config", str(run / "mr_crops.yaml"), *file])
    assert by_file.resolved == read_settings(["--config", str(run / f"{config}.yaml"), *words, *file]).resolved


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budgett": 3}, ["'budgett'", "'budgets'"]),
        ({"budgets": [0]}, ["budgets", "'0'"]),
        ({"budgets": [5, "5"]}, ["budgets"]),
        ({"seeds": "many"}, ["seeds", "many"]),
        ({"seeds": 0, "jobs": 0}, ["seeds", "jobs"]),
        ({"inits": {}}, ["inits"]),
        ({"inits": {"a": "random"}}, ["inits.a", "encoder"]),
        ({"inits": {"a": {"encoder": 5}}}, ["encoder"]),
        ({"inits": {"a": {"encod": "random"}}}, ["'inits.a.encod'", "'encoder'"]),
        ({"inits": {"a b": {"encoder": "random"}, "A-B": {"encoder": "random"}}}, ["folder"]),
        ({"protocols": ["prob"]}, ["protocols", "prob"]),
        ({"task": "segment", "protocols": ["probe"]}, ["probe goes with task classify"]),
        ({"task": "guess"}, ["task"]),
        ({"reference": "Random"}, ["'Random'", "'random'"]),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(
    tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    (tmp_path / "c.yaml").write_text("store: s\ninits:\n  random: {encoder: random}\n")
    with pytest.raises(MedclrError) as error:
        read_config(tmp_path / "c.yaml", **changes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "c.yaml"))
    for word in named:
        assert word in str(error.value)


def test_settings_of_an_init_win_over_those_of_all() -> None:
    plan = CompareConfig(
        Path("s"),
        {"a": InitConfig("random", settings={"network": {"name": "resnet34"}})},
        settings={"network.name": "resnet18", "steps": 7},
    )
    assert plan.settings_of("a") == {"network.name": "resnet34", "steps": 7}
    assert wish_of(plan, "a").settings.network.name == "resnet34"
    with pytest.raises(MedclrError, match=r"unknown setting --stepps.*--steps"):
        wish_of(replace(plan, settings={"stepps": 7}), "a")


def test_the_reference_is_imagenet_if_there_is_one() -> None:
    inits = {"new": InitConfig("random"), "I": InitConfig("imagenet"), "run": InitConfig("runs/a")}
    assert CompareConfig(Path("s"), inits).referred == "I"
    assert CompareConfig(Path("s"), {"run": inits["run"], "new": inits["new"]}).referred == "new"
    assert CompareConfig(Path("s"), {"run": inits["run"]}).referred == "run"
    assert CompareConfig(Path("s"), inits, reference="run").referred == "run"
    assert folder_name("ImageNet, then SimCLR") == "imagenet-then-simclr"


# ---- the grid


@pytest.fixture(scope="module")
def compared(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, Path]:
    """A comparison of invented cells."""
    plan, out = a_plan(image_store), tmp_path_factory.mktemp("compared") / "c"
    run_comparison(plan, out, run=fake_cell)
    return plan, out


@pytest.fixture
def copied(compared: tuple[CompareConfig, Path], tmp_path: Path, no_pictures: None) -> tuple[CompareConfig, Path]:
    """The same, to change."""
    shutil.copytree(compared[1], tmp_path / "c")
    return compared[0], tmp_path / "c"


def test_every_cell_is_computed_once_and_the_table_has_a_line_for_each(compared: tuple[CompareConfig, Path]) -> None:
    plan, out = compared
    assert sorted(calls(out)) == sorted(map(str, plan.cells("probe")))
    assert len(calls(out)) == 8
    rows = table(out)
    assert list(rows[0]) == [field.name for field in fields(Row)]
    assert len(rows) == 2 * 2 * 2  # inits, budgets, metrics
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "cells", "logs", "results.csv", "report.html", "figures"
    }  # fmt: skip


def test_the_table_says_what_the_statistics_say(compared: tuple[CompareConfig, Path]) -> None:
    plan, out = compared
    runs: dict[str, list[Outcome]] = {
        init: [read_outcome(Cell("probe", init, "8", seed).folder(out) / "predictions.csv") for seed in (0, 1)]
        for init in plan.inits
    }
    one, other = (resample(runs[init], "macro AUC", 100) for init in ("random", "Other"))
    found, apart = other.estimate(), (other - one).estimate()
    (row,) = (r for r in table(out) if (r["init"], r["budget"], r["metric"]) == ("Other", "8", "macro AUC"))
    assert (row["reference"], row["patients"], row["seeds"]) == ("random", "8", "2")
    assert float(row["mean"]) == pytest.approx(np.mean([run.score("macro AUC") for run in runs["Other"]]), abs=1e-6)
    for name, value in (
        ("sd", found.sd), ("low", found.low), ("cautious_high", found.cautious_high), ("difference", apart.mean),
        ("difference_low", apart.low), ("difference_cautious_low", apart.cautious_low),
    ):  # fmt: skip
        assert float(row[name]) == pytest.approx(value, abs=1e-6)
    (base,) = (r for r in table(out) if (r["init"], r["budget"], r["metric"]) == ("random", "8", "macro AUC"))
    assert (base["reference"], base["difference"]) == ("", "")


def test_what_is_there_is_not_computed_again(copied: tuple[CompareConfig, Path]) -> None:
    plan, out = copied
    lost = Cell("probe", "Other", "4", 1)
    (lost.folder(out) / "cell.json").unlink()
    before = (out / "results.csv").read_bytes()
    run_comparison(plan, out, run=fake_cell)
    assert calls(out)[8:] == [str(lost)]
    assert (out / "results.csv").read_bytes() == before


def test_inits_budgets_and_seeds_can_be_added(copied: tuple[CompareConfig, Path]) -> None:
    plan, out = copied
    more = replace(
        plan, inits={**plan.inits, "Third": InitConfig("random")}, budgets=(*plan.budgets, "100%"), seeds=3, jobs=1,
        reference="Other", title="New", resamples=120,
    )  # fmt: skip
    run_comparison(more, out, run=fake_cell)
    assert len(calls(out)) == 3 * 3 * 3
    assert len(set(calls(out))) == 27
    assert {row["reference"] for row in table(out)} == {"", "Other"}
    assert "Third" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {**SMALL, "steps": 3}}, ["settings.steps was 2 and is now 3"]),
        ({"test_share": 0.5}, ["test_share"]),
        ({"seeds": 1}, ["seeds was 2 and is now 1"]),
        ({"budgets": (4, 9)}, ["budgets"]),
        ({"inits": {"random": InitConfig("random")}}, ["inits.Other.encoder was random and is now None"]),
        ({"inits": {"random": InitConfig("random"), "Other": InitConfig("imagenet")}}, ["inits.Other"]),
    ],
)
def test_other_changes_are_refused_with_the_difference(
    copied: tuple[CompareConfig, Path], changes: dict[str, Any], named: list[str]
) -> None:
    plan, out = copied
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(MedclrError) as error:
        run_comparison(replace(plan, **changes), out, run=fake_cell)
    for word in named:
        assert word in str(error.value)
    assert (out / "config.yaml").read_bytes() == before
    assert len(calls(out)) == 8


def test_a_store_that_was_made_anew_is_another_comparison(copied: tuple[CompareConfig, Path]) -> None:
    plan, out = copied
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(re.sub(r"store: \w{64}", f"store: {'0' * 64}", text))
    with pytest.raises(MedclrError, match=r"found\.Other\.store was 0000"):
        run_comparison(plan, out, run=fake_cell)


def test_cells_of_older_rules_are_not_mixed_with_new_ones(
    copied: tuple[CompareConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = copied
    assert "rules" not in (out / "config.yaml").read_text(), "those of classification have not changed"
    segmented = replace(plan, task="segment", protocols=("finetune",))
    open_comparison(tmp_path / "s", segmented)
    open_comparison(tmp_path / "s", replace(segmented, seeds=plan.seeds + 1))
    before = (tmp_path / "s" / "config.yaml").read_text()
    monkeypatch.setattr("medclr.compare_plan.RULES", "3")
    assert before.count(", rules: '2'") == len(plan.inits)
    for text in (before, before.replace(", rules: '2'", "")):  # older ones had none
        (tmp_path / "s" / "config.yaml").write_text(text)
        with pytest.raises(MedclrError, match=r"an earlier medclr judged its segmentations.*choose another --out"):
            open_comparison(tmp_path / "s", segmented)
        assert (tmp_path / "s" / "config.yaml").read_text() == text


@pytest.mark.parametrize("name", ["letter.txt", "config.yaml"])
def test_a_folder_of_something_else_is_left_alone(image_store: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("task: classify\n")
    with pytest.raises(MedclrError, match="is not a comparison"):
        run_comparison(a_plan(image_store), tmp_path, run=fake_cell)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["task: classify\n"]


def test_a_stop_leaves_what_is_done_and_says_how_to_go_on(image_store: Path, tmp_path: Path, no_pictures: None) -> None:
    plan, out = a_plan(image_store), tmp_path / "c"

    def stopped(plan: CompareConfig, cell: Cell, out: Path) -> float:
        if (out / "logs" / "calls.txt").exists() and len(calls(out)) == 5:
            raise KeyboardInterrupt
        return fake_cell(plan, cell, out)

    with pytest.raises(KeyboardInterrupt, match=r"5 of 8 probe cells are in .*the same command goes on"):
        run_comparison(plan, out, run=stopped)
    assert not (out / "results.csv").exists()
    partial = run_comparison(plan, out, report_only=True)  # the four cells of seed 0
    assert (partial.results.rows[0].seeds, partial.results.missing) == (1, 3)
    assert "3 cells are not computed yet" in (out / "report.html").read_text()
    run_comparison(plan, out, run=fake_cell)
    assert len(calls(out)) == len(set(calls(out))) == 8
    assert "not computed yet" not in (out / "report.html").read_text()


def test_a_report_needs_a_whole_seed(image_store: Path, tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match="no seed is whole"):
        run_comparison(a_plan(image_store), tmp_path / "c", report_only=True)


def test_a_cell_that_fails_is_named(image_store: Path, tmp_path: Path) -> None:
    def failing(plan: CompareConfig, cell: Cell, out: Path) -> float:
        raise MedclrError("the loss is not finite")

    with pytest.raises(MedclrError, match=r"probe, random, 4 patients, seed 0: the loss is not finite"):
        run_comparison(a_plan(image_store), tmp_path / "c", run=failing)


def test_cells_of_other_patients_are_no_pair(copied: tuple[CompareConfig, Path]) -> None:
    plan, out = copied
    path = Cell("probe", "Other", "4", 0).folder(out) / "cases.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace(lines[1].split(",")[0], "somebody"), *lines[2:]]) + "\n")
    with pytest.raises(MedclrError, match="was trained on other patients than"):
        run_comparison(plan, out, run=fake_cell)


def test_predictions_of_other_test_patients_are_refused(copied: tuple[CompareConfig, Path]) -> None:
    plan, out = copied
    path = Cell("probe", "Other", "4", 0).folder(out) / "predictions.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-4]) + "\n")
    with pytest.raises(MedclrError, match="was judged on other scans than random"):
        run_comparison(plan, out, run=fake_cell)


def script(plan: CompareConfig, out: Path, run: str) -> list[str]:
    """A command that runs a comparison, as a process of its own."""
    made = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path, PosixPath\nimport test_compare\nfrom medclr.compare import run_comparison\n"
        "from medclr.compare_plan import CompareConfig, InitConfig\n"
        "if __name__ == '__main__':\n"
        "    import signal\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
        f"    plan = {plan!r}\n"
        f"    run_comparison(plan, Path({str(out)!r}), run=test_compare.{run})\n"
    )
    file = out.with_suffix(".py")
    file.write_text(made)
    return [sys.executable, str(file)]


@pytest.mark.slow
def test_several_processes_find_what_one_finds(compared: tuple[CompareConfig, Path], tmp_path: Path) -> None:
    plan, out = compared
    done = subprocess.run(script(replace(plan, jobs=2), tmp_path / "c", "fake_cell"), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
    assert sorted(calls(tmp_path / "c")) == sorted(calls(out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_between_two_cells_it_goes_on(image_store: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches all processes of the terminal, a kill the first alone: no cell is lost or done twice."""
    plan, out = a_plan(image_store, jobs=2, seeds=4), tmp_path / "c"
    process = subprocess.Popen(script(plan, out, "slow_cell"), stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (out / "logs" / "calls.txt").exists():
        time.sleep(0.1)
    time.sleep(1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    told = process.communicate(timeout=60)[1].decode()
    if number == signal.SIGINT:
        assert re.search(r"KeyboardInterrupt: stopped .* of 16 probe cells", told)
    time.sleep(3)  # whoever computes a cell for nobody finds out when it is done
    done = sum(cell.is_done(out) for cell in plan.cells("probe"))
    assert 0 < done < 16
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left
    before = len(calls(out))
    run_comparison(replace(plan, jobs=1), out, run=fake_cell)
    assert len(calls(out)) - before == 16 - done


@pytest.mark.slow
def test_a_process_that_dies_is_one_sentence(image_store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        script(a_plan(image_store, jobs=2), tmp_path / "c", "deadly_cell"), check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(r"MedclrError: probe, \w+, 4 patients, seed 0: its process ended", done.stderr)


# ---- before anything is computed


@pytest.fixture(scope="module")
def seen_all(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has seen every patient, those of the test split too."""
    out = tmp_path_factory.mktemp("runs") / "all"
    medclr.pretrain(image_store, out, settings={"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu"})
    return out


def test_an_encoder_that_saw_a_test_patient_stops_it_or_is_stamped(
    image_store: Path, seen_all: Path, tmp_path: Path
) -> None:
    inits = {"random": InitConfig("random"), "SimCLR": InitConfig(str(seen_all))}
    plan, out = a_plan(image_store, inits=inits, seeds=1), tmp_path / "c"
    with pytest.raises(MedclrError, match=r"patients are in both the pretraining of SimCLR and the test set"):
        run_comparison(plan, out, run=fake_cell)
    assert not out.exists()
    results = run_comparison(replace(plan, transductive=True), out, run=fake_cell).results
    assert re.search(r"TRANSDUCTIVE.*of SimCLR has seen \d", results.stamp)
    html = Reader((out / "report.html").read_text())
    pictures = [attributes["alt"] or "" for tag, attributes in html.tags if tag == "img"]
    assert len(pictures) >= 4
    assert all(results.stamp in alt for alt in pictures)
    captions = re.findall(r"<caption>(.*?)</caption>", (out / "report.html").read_text())
    assert len(captions) >= 3
    assert all(results.stamp in caption for caption in captions)
    assert {row["init"]: int(row["seen_test_patients"]) > 0 for row in table(out)} == {"random": False, "SimCLR": True}


def test_what_would_stop_a_cell_stops_before_the_first(image_store: Path, tmp_path: Path) -> None:
    for changes, sentence in (
        ({"budgets": (4, 1000)}, "1000"),
        ({"budgets": (1,)}, "none of the cases of budget 1, seed 0, has label"),
        ({"settings": {"stepps": 1}}, "--steps"),
        ({"inits": {"a": InitConfig("nowhere")}}, "inits.a: "),
        ({"modality": "CT"}, "CT"),
        ({"store": Path("nowhere")}, "nowhere"),
    ):
        with pytest.raises(MedclrError) as error:
            run_comparison(replace(a_plan(image_store), **changes), tmp_path / "c", run=fake_cell)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_stores_of_other_scans_are_no_pair(image_store: Path, tmp_path: Path) -> None:
    other = tmp_path / "store"
    shutil.copytree(image_store, other)
    info = json.loads((other / "store.json").read_text())
    lines = (other / "scans.csv").read_text().splitlines()
    at = lines[0].split(",").index("label")
    cells = lines[1].split(",")
    cells[at] = "lying" if cells[at] == "standing" else "standing"
    text = "\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n"
    (other / "scans.csv").write_text(text)
    info["files"]["scans.csv"]["size"] = len(text.encode())
    (other / "store.json").write_text(json.dumps(info))
    inits = {"random": InitConfig("random"), "b": InitConfig("random", store=other)}
    with pytest.raises(MedclrError, match=r"inits\.b: its store has other labelled scans"):
        run_comparison(a_plan(image_store, inits=inits), tmp_path / "c", run=fake_cell)


# ---- the whole of it, small


def test_probe_and_fine_tuning_from_settings_to_page(image_store: Path, tmp_path: Path, capsys: Any) -> None:
    """Real cells: the same labelled patients for both protocols and inits, and predictions that repeat."""
    settings = {"network.stem": "imagenet", "network.slices": 3}
    inits = {"random": InitConfig("random"), "Wide": InitConfig("random", settings=settings)}
    plan = a_plan(image_store, inits=inits, budgets=(4,), seeds=1, protocols=("probe", "finetune"))
    lines = [f"store: {image_store}", f"settings: {json.dumps(SMALL)}", "protocols: [probe, finetune]"]
    lines += ["budgets: [4]", "seeds: 1", "resamples: 100", "inits:", "  random: {encoder: random}"]
    lines += ["  Wide: {encoder: random, settings: {network: {stem: imagenet}}}"]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    out = tmp_path / "c"
    assert main(["compare", "--config", str(tmp_path / "c.yaml"), "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    for protocol in plan.protocols:
        labelled = set()
        for init in inits:
            folder = Cell(protocol, init, "4", 0).folder(out)
            assert isinstance(read_outcome(folder / "predictions.csv"), Classified)
            with (folder / "cases.csv").open() as file:
                labelled.add(
                    tuple(sorted(row["patient_id"] for row in csv.DictReader(file) if row["split"] == "train"))
                )
        assert len(labelled) == 1
        assert len(labelled.pop()) == 4
    assert not (Cell("finetune", "Wide", "4", 0).folder(out) / "model").exists(), "keep_models is false"
    assert {path.name for path in (out / "features").iterdir()} == {"random-0.npy", "wide-0.npy"}
    assert {row["protocol"] for row in table(out)} == {"probe", "finetune"}
    first = (Cell("probe", "Wide", "4", 0).folder(out) / "predictions.csv").read_bytes()
    run_cell(plan, Cell("probe", "Wide", "4", 0), out)
    assert (Cell("probe", "Wide", "4", 0).folder(out) / "predictions.csv").read_bytes() == first


# ---- words and pictures


def a_row(patients: int, low: float, high: float, cautious: tuple[float, float] | None = None, seeds: int = 5) -> Row:
    wide = cautious or (low - 0.001, high + 0.001)
    return Row("probe", "SimCLR", str(patients), patients, "macro AUC", 0.8, 0.01, 0.7, 0.9, 0.6, 0.95, seeds, 100,
               "ImageNet", (low + high) / 2, low, high, *wide, 0)  # fmt: skip


def test_a_verdict_says_where_the_data_support_a_difference() -> None:
    rows = [a_row(10, 0.02, 0.08), a_row(20, 0.01, 0.05), a_row(50, -0.01, 0.02)]
    assert verdict(rows) == (
        "SimCLR is ahead of ImageNet at 10 and 20 patients (+0.050 [+0.020, +0.080], +0.030 [+0.010, +0.050]); at 50 "
        "patients the interval includes zero: the data do not support a difference."
    )


def test_a_verdict_says_where_they_do_not() -> None:
    assert verdict([a_row(10, -0.02, 0.08), a_row(20, -0.1, 0.05)]) == (
        "SimCLR against ImageNet: at every budget the interval of the difference includes zero: the data do not "
        "support a difference."
    )
    assert "at 1 patient the interval" in verdict([a_row(1, -0.02, 0.08)])


def test_a_verdict_names_what_other_seeds_could_overturn() -> None:
    told = verdict([a_row(10, 0.02, 0.08, (-0.01, 0.11)), a_row(20, -0.08, -0.02)])
    assert "ahead of ImageNet at 10 patients" in told
    assert "behind ImageNet at 20 patients" in told
    assert told.endswith("At 10 patients the more cautious interval, over seeds and patients, includes zero.")
    one = verdict([a_row(10, 0.02, 0.08, (float("nan"), float("nan")), seeds=1)])
    assert one.endswith("At 10 patients one seed says nothing of others.")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Equivalence(34.4, 22.2, float("inf")), "34 (22 to > 200)"),
        (Equivalence(float("inf"), float("inf"), float("inf")), "more than 200"),
        (Equivalence(5.0, 5.0, 12.0), "at most 5 (≤ 5 to 12)"),
    ],
)
def test_equivalent_labels_claim_nothing_beyond_the_budgets(found: Equivalence, words: str) -> None:
    assert many_or_few(found, 200, 5) == words


def test_of_distances_less_is_better(tmp_path: Path) -> None:
    told = further(invented(tmp_path, "segment", patients=60), "finetune")
    assert "SimCLR <b> is better in mean HD95 mm at 5, 10 and 40 patients" in told
    assert "random is worse in Dice anterior at 5, 10 and 40 patients" in told
    assert "random is worse in HD95 mm posterior" in told
    assert "random is better" not in told
    assert "SimCLR <b> is worse" not in told


THREE = {"random": InitConfig("random"), "ImageNet": InitConfig("imagenet"), "SimCLR <b>": InitConfig("runs/a")}


def invented(out: Path, task: str, patients: int = 24, seeds: int = 3, inits: dict[str, InitConfig] = THREE) -> Results:
    """Results of cells that were never computed: three inits, three budgets; pictures for a segmentation."""
    plan = CompareConfig(
        Path("cohort"), inits, task=task, seeds=seeds, budgets=(5, 10, 40), resamples=100, protocols=("finetune",)
    )
    y, ids = np.arange(patients) % 3, [f"p{i}" for i in range(patients)]
    for cell in plan.cells("finetune"):
        rng = np.random.default_rng(cell.seed)
        skill = list(inits).index(cell.init) + 0.3 * np.log(int(cell.budget))
        if task == "classify":
            logits = skill * np.eye(3)[y] + rng.normal(0, 1, (patients, 3))
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            outcome: Outcome = Classified(ids, ids, ("a", "b", "c"), np.eye(3, dtype=np.int64)[y], p)
        else:
            dice = 1 / (1 + np.exp(-skill - rng.normal(0, 0.5, (patients, 2))))
            dice[0, 1] = np.nan
            outcome = Segmented(ids, ids, ("anterior", "posterior"), dice, 10 * (1 - dice))
        folder = cell.folder(out)
        write_outcome(folder / "predictions.csv", outcome)
        (folder / "cases.csv").write_text(
            "patient_id,split,stratum\n" + "".join(f"t{i},train,\n" for i in range(int(cell.budget)))
        )
        write_json(folder / "cell.json", {"seconds": 3.5})
        if task == "segment" and cell.seed == 0:
            drawn = Figure(figsize=(2, 2))
            drawn.subplots().set_title(f"{cell.init} {cell.budget}")
            (folder / "figures").mkdir()
            drawn.savefig(folder / "figures" / "overlays.png")
    return read_results(plan, out, dict.fromkeys(inits, 0))


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_the_page_holds_all_it_promises_and_nothing_from_outside(task: str, tmp_path: Path) -> None:
    results = invented(tmp_path, task)
    write_report(results, tmp_path)
    write_tables(results, tmp_path)
    html = (tmp_path / "report.html").read_text()
    read = Reader(html)
    assert read.open == []
    assert not re.search(r"https?:|url\(|@import|<link|<script", html)
    text = " ".join(read.text)
    assert "cohort: 24 test patients, 3 seeds" in text
    assert "SimCLR <b>" in text, "names are text"
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    expected = ["In short", "Paired difference to ImageNet", "How many labels ImageNet needs for the same score",
                "Patient by patient", "Other metrics", "All scores", "Run time", "How it was made"]  # fmt: skip
    expected += ["Calibration"] if task == "classify" else ["Best, median and worst segmentation"]
    assert set(expected) <= set(headings)
    assert "not corrected for being many" in text
    assert "For orientation only: 3 seeds" in text
    pictures = [attributes for tag, attributes in read.tags if tag == "img"]
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "distillation.png" not in drawn
    assert "to the teacher" not in html
    assert {"curve.png", "difference.png", "patients-finetune.png", "metrics-finetune.png"} <= drawn
    assert len(pictures) == len(drawn) + (2 if task == "segment" else 0)
    assert all(attributes["src"].startswith("data:image/") for attributes in pictures)  # type: ignore[union-attr]
    assert all(len(attributes["alt"] or "") > 60 for attributes in pictures), "words under each"


def test_the_page_does_not_claim_what_the_data_do_not_support(tmp_path: Path, no_pictures: None) -> None:
    """The same predictions under two names: no difference, anywhere."""
    results = invented(tmp_path, "classify")
    for seed in range(3):
        for budget in ("5", "10", "40"):
            source, target = (
                Cell("finetune", init, budget, seed).folder(tmp_path) for init in ("ImageNet", "SimCLR <b>")
            )
            shutil.copy(source / "predictions.csv", target / "predictions.csv")
    again = read_results(results.plan, tmp_path, results.stamps)
    assert all(row.difference == 0 for row in again.rows if row.init == "SimCLR <b>")
    write_report(again, tmp_path)
    assert "SimCLR &lt;b&gt; against ImageNet: at every budget the interval" in (tmp_path / "report.html").read_text()


def test_a_student_is_set_against_its_teacher(tmp_path: Path) -> None:
    """What it gains on random weights is its teacher's merit and its own; the second alone is distillation's."""
    student = InitConfig("same", teacher="SimCLR <b>")
    results = invented(tmp_path, "segment", inits={**THREE, "student": student, "other": student})
    assert {(row.init, row.reference, row.metric) for row in results.taught} == {
        ("student", "SimCLR <b>", "mean Dice"), ("other", "SimCLR <b>", "mean Dice")
    }  # fmt: skip
    for row in results.taught:
        taught, teacher = (
            np.mean([each.score("mean Dice") for each in results.outcomes["finetune", name, row.budget]])
            for name in (row.init, "SimCLR <b>")
        )
        assert row.difference == pytest.approx(taught - teacher, abs=1e-12)
        assert row.difference_low < row.difference < row.difference_high
    colour, mark = colours(results), marks(results)
    assert colour["student"] == colour["other"] == colour["SimCLR <b>"]
    assert len({(colour[name], *mark[name]) for name in results.plan.inits}) == 5, "each init is told from the others"
    write_tables(results, tmp_path)
    write_report(results, tmp_path)
    with (tmp_path / "students.csv").open(newline="") as file:
        written = [(row["init"], row["reference"], row["budget"]) for row in csv.DictReader(file)]
    assert written == [(name, "SimCLR <b>", n) for name in ("student", "other") for n in ("5", "10", "40")]
    html = (tmp_path / "report.html").read_text()
    assert "<h2>Paired difference to ImageNet</h2>" in html
    assert "<h2>Paired difference to the teacher</h2>" in html
    assert "student is ahead of SimCLR &lt;b&gt; at 5, 10 and 40 patients" in html
    assert (tmp_path / "figures" / "distillation.png").is_file()


def test_seeds_are_counted_by_protocol(copied: tuple[CompareConfig, Path]) -> None:
    """Stopped in the second protocol, a comparison has fewer seeds of it, and says so of each."""
    plan, out = copied
    both = replace(plan, protocols=("probe", "finetune"), seeds=2, jobs=1)

    def stops(plan: CompareConfig, cell: Cell, out: Path) -> float:
        if (cell.protocol, cell.seed) == ("finetune", 1):
            raise KeyboardInterrupt
        return fake_cell(plan, cell, out)

    with pytest.raises(KeyboardInterrupt):
        run_comparison(both, out, run=stops)
    found = run_comparison(both, out, report_only=True).results
    assert found.seeds == {"probe": 2, "finetune": 1}
    html = (out / "report.html").read_text()
    assert "Mean over 2 seeds of Linear probe and 1 seed of Fine-tuning" in html
    assert "For orientation only: one seed says little" in html


def test_one_init_is_a_report_without_differences(tmp_path: Path, no_pictures: None) -> None:
    results = invented(tmp_path, "classify")
    alone = replace(results.plan, inits={"ImageNet": InitConfig("imagenet")})
    found = read_results(alone, tmp_path, {"ImageNet": 0})
    write_report(found, tmp_path / "alone")
    html = (tmp_path / "alone" / "report.html").read_text()
    assert "Paired difference" not in html
    assert str(found).startswith("24 test patients, 3 seeds, macro AUC")
