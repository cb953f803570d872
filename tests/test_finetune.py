"""The supervised loop: the same twice, resumed at any step, frozen where it should be, stamped where it must be."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Tiny
from torch import Tensor, nn

from medclr import checkpoint, figures
from medclr.config import FinetuneConfig, read_yaml
from medclr.data.cases import read_cases
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.finetune import State, _batch, build_tuner, command, finetune, fit, keyed_noise, set_free, setting_word
from medclr.models.heads import ProjectionHead
from medclr.optim.schedule import warmup_cosine
from medclr.outcomes import read_outcome
from medclr.tasks import classify
from medclr.track import read_metrics
from medclr.trained import load_model

SMALL = {"steps": 6, "batch": 6, "size_px": 16, "device": "cpu", "lr": 0.01}
STOPS = {**SMALL, "steps": 12, "validation": 0.25, "every": 2, "patience": 2, "lr": 0.05}


@pytest.fixture(scope="module", autouse=True)
def tiny_network() -> Iterator[None]:
    with tiny.in_place_of("resnet18"):
        yield


@pytest.fixture(scope="module")
def run(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune(image_store, out, task="classify", settings=SMALL)
    return out


def a_pretrained(folder: Path, patients: Sequence[str] = (), seed: int = 0) -> Path:
    """What pretraining leaves, with its head."""
    encoder, head = tiny.used(Tiny(), seed), tiny.used(ProjectionHead(6), seed)
    checkpoint.export_encoder(folder / "encoder", encoder, {"patients": list(patients), "store_px": 32}, head)
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def content(run: Path) -> dict[str, bytes]:
    """All files but the checkpoints, which know how long it took."""
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "checkpoints")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# ---- what a run leaves


def test_a_run_leaves_everything_that_it_promises(run: Path, image_store: Path) -> None:
    assert set(content(run)) == {
        "config.yaml", "cases.csv", "match.txt", "metrics.jsonl", "predictions.csv", "scores.csv",
        "model/model.json", "model/model.safetensors", "figures/curves.png", "figures/confusion.png",
    }  # fmt: skip
    cases, store = read_cases(run / "cases.csv"), Store(image_store)
    assert set(cases.test) == {scan.patient_id for scan in store.scans if scan.split == "test"}
    outcome = read_outcome(run / "predictions.csv")
    assert set(outcome.patient_id) == set(cases.test)
    trained = load_model(run)
    assert trained.patients == {*cases.train, *cases.validation}
    assert (trained.modalities, trained.facts["transductive"]) == (("XR",), False)
    assert trained.model.classes == ("lying", "standing")
    task = classify.Task(trained.config, store)
    judged = task.judge(trained.model, np.flatnonzero([scan.split == "test" for scan in store.scans]))
    assert judged.probability == pytest.approx(outcome.probability, rel=1e-5, abs=1e-6)
    with (run / "scores.csv").open() as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["macro AUC", "balanced accuracy"]
    for metric, row in rows.items():
        assert float(row["value"]) == pytest.approx(outcome.score(metric), abs=1e-6)
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        assert (row["patients"], row["note"]) == (str(len(cases.test)), "")


def test_it_learns_what_is_easy(image_store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 80, "batch": 12, "lr": 0.05, "size_px": 32}
    summary = finetune(image_store, tmp_path / "run", task="classify", settings=settings)
    assert summary.scores["macro AUC"].mean > 0.9
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])


def test_the_settings_of_a_run_make_it_again(run: Path, image_store: Path, tmp_path: Path) -> None:
    words = [f"--config={run / 'config.yaml'}", f"--store={image_store}", f"--out={tmp_path / 'again'}"]
    command([*words, "--manifests=null"])
    assert content(tmp_path / "again") == content(run)


def test_a_finished_run_is_not_trained_again(run: Path, image_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(run)
    monkeypatch.setattr(classify.Task, "loss", None)
    summary = finetune(image_store, run, task="classify", settings=SMALL)
    assert content(run) == before
    assert summary.steps == 6
    assert "macro AUC" in str(summary)


def test_without_validation_the_schedule_is_fixed(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert not any("score" in row for row in rows)
    assert [row["lr"] for row in rows] == [0.01 * warmup_cosine(step, 6, 1) for step in range(6)]
    assert read_cases(run / "cases.csv").validation == ()


# ---- stopped and resumed


class Killed(Exception):
    """As if the process had ended."""


def interrupted(store: Path, out: Path, at: Sequence[int], settings: dict[str, Any], **asked: Any) -> None:
    """The same command again and again, killed when these steps begin."""
    loss = classify.Task.loss
    for dying in at:

        def deadly(*arguments: Any, seed: int, step: int, dying: int = dying) -> Tensor:
            if step == dying:
                raise Killed
            return loss(*arguments, seed=seed, step=step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classify.Task, "loss", deadly)
            with pytest.raises(Killed):
                finetune(store, out, task="classify", settings={**settings, "checkpoint_minutes": 0}, **asked)


@pytest.mark.parametrize("settings", [SMALL, STOPS, {**SMALL, "classify.pool": "attention"}], ids=str)
def test_killed_at_any_step_it_ends_with_the_same_files(
    settings: dict[str, Any], image_store: Path, tmp_path: Path
) -> None:
    finetune(image_store, tmp_path / "whole", task="classify", settings=settings)
    done = len(read_metrics(tmp_path / "whole"))
    at = range(done) if settings == SMALL else sorted(random.Random(0).sample(range(done), 3))
    interrupted(image_store, tmp_path / "part", at, settings)
    finetune(image_store, tmp_path / "part", task="classify", settings=settings)
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def start(words: Sequence[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "medclr", "finetune", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_process_goes_on_to_the_same_weights(
    number: signal.Signals, image_store: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, "steps": 25, "network.stem": "imagenet", "checkpoint_minutes": 1e-9}
    words = [f"--store={image_store}", "--manifests=null", *(f"--{key}={value}" for key, value in settings.items())]
    for name in ("whole", "run"):
        process = start([*words, f"--out={tmp_path / name}"])
        if name == "run":
            while len(read_metrics(tmp_path / name)) < 5:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(number)
        _, said = process.communicate(timeout=300)
        expected = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGKILL: -9}[number] if name == "run" else 0
        assert process.returncode == expected, said
    if number != signal.SIGKILL:
        assert "the same command again goes on" in said
    assert not (tmp_path / "run" / "model").exists()
    process = start([*words, f"--out={tmp_path / 'run'}"])
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_what_a_run_was_begun_with_must_stay_the_same(image_store: Path, tmp_path: Path) -> None:
    encoder, cases = a_pretrained(tmp_path / "encoder"), tmp_path / "cases.csv"
    finetune(image_store, tmp_path / "first", task="classify", settings=SMALL)
    rows = (tmp_path / "first" / "cases.csv").read_text().splitlines(keepends=True)
    cases.write_text("".join(rows))
    asked = {"encoder": str(encoder), "cases": str(cases)}
    out = tmp_path / "run"
    interrupted(image_store, out, [3], SMALL, **asked)
    cases.write_text("".join(rows[:1] + rows[3:]))
    with pytest.raises(MedclrError, match="begun with another content of its cases"):
        finetune(image_store, out, task="classify", settings=SMALL, **asked)
    cases.write_text("".join(rows))
    a_pretrained(tmp_path / "encoder", seed=1)
    with pytest.raises(MedclrError, match="begun with another content of its encoder"):
        finetune(image_store, out, task="classify", settings=SMALL, **asked)
    a_pretrained(tmp_path / "encoder")
    finetune(image_store, out, task="classify", settings=SMALL, **asked)


# ---- the loop itself


class Counted(nn.Module):
    """A model of one number, which is how many steps were done."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Tiny()
        self.number = nn.Parameter(torch.zeros(()))

    def stages(self) -> list[list[nn.Module]]:
        return self.encoder.stages()


class Plan:
    """A task whose validation scores are written down."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.looks = scores, 0

    def items(self, scans: Any) -> list[int]:
        return [int(i) for i in scans]

    def loss(self, model: Any, items: Any, views: Any, *, seed: int, step: int) -> Tensor:
        return -model.number

    def judge(self, model: Any, scans: Any) -> Any:
        assert not model.training
        self.looks += 1
        value = self.scores[self.looks - 1]
        return SimpleNamespace(metrics=lambda: ("score",), score=lambda metric: value)


def fitted(scores: Sequence[float], out: Path, **settings: Any) -> tuple[Plan, State]:
    config = FinetuneConfig(**{"steps": 12, "every": 2, "patience": 2, "warmup": 0.0, "device": "cpu", **settings})
    model, task = Counted(), Plan(scores)
    optimizer = torch.optim.SGD([{"params": [model.number], "peak": 1.0}], lr=1.0)
    state = State(model, optimizer, {})  # type: ignore[arg-type]
    scans = np.arange(4)
    fit(out, config, task, scans, scans, state, is_new=True)  # type: ignore[arg-type]
    return task, state


def number_after(steps: int, total: int = 12) -> float:
    return sum(warmup_cosine(step, total, 0) for step in range(steps))


@pytest.mark.parametrize(
    ("scores", "steps", "best"),
    [
        ([0.5, 0.6, 0.6, 0.55], 8, 4),
        ([0.5, 0.4, 0.3], 6, 2),
        ([0.1, 0.2, 0.15, 0.3, 0.29, 0.28], 12, 8),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 12, 12),
        ([math.nan, 0.2, math.nan, math.nan, 0.1, 0.15], 12, 4),
        ([math.nan] * 6, 12, 12),
    ],
)
def test_it_stops_where_nothing_gets_better_and_keeps_the_best(
    scores: Sequence[float], steps: int, best: int, tmp_path: Path
) -> None:
    task, state = fitted(scores, tmp_path)
    assert (state.step, task.looks) == (steps, steps // 2)
    assert float(state.model.number.detach()) == pytest.approx(number_after(best))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "score" in row] == [
        2 * (i + 1) for i, score in enumerate(scores[: steps // 2]) if math.isfinite(score)
    ]
    assert not state.model.training


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "loss", lambda task, model, *_, **__: model.number * math.inf)
    with pytest.raises(MedclrError, match="loss of step 0 is not finite"):
        fitted([0.5], tmp_path)


def test_every_item_is_taken_once_a_pass() -> None:
    items, config = list("abcdefg"), FinetuneConfig(batch=3, seed=5)
    stream = [item for step in range(21) for item in _batch(items, config, step)]
    passes = [stream[start : start + 7] for start in range(0, 63, 7)]
    assert all(sorted(each) == items for each in passes)
    assert len({tuple(each) for each in passes}) > 1
    assert _batch(items, config, 4) == _batch(items, config, 4)
    assert sorted(_batch(items, FinetuneConfig(batch=32), 3)) == items
    assert _batch(["a"], config, 0) == ["a", "a"], "batch norm needs two"


def test_dropout_follows_from_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> float:
        with keyed_noise(seed, step, torch.device("cpu")):
            return float(torch.rand(()))

    state = torch.get_rng_state()
    assert drawn(0, 1) == drawn(0, 1)
    assert len({drawn(0, 1), drawn(0, 2), drawn(1, 1)}) == 3
    assert torch.equal(state, torch.get_rng_state())


# ---- what is trained


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("stages", range(6))
def test_the_last_stages_are_free_and_the_head_always(stages: int, follows: bool) -> None:
    model = classify.Model(classify.Config(pool="attention"), Tiny(), ("a", "b"))
    set_free(model, 5, follows=True)
    set_free(model, stages, follows=follows)
    for i, part in enumerate(model.encoder.parts):
        free = i >= 5 - stages
        assert all(p.requires_grad == free for p in part.parameters())
        assert all(module.training == (free and follows) for module in part.modules())
    assert model.attention is not None
    for module in (*model.classifier.modules(), *model.attention.modules()):
        assert module.training
    assert all(p.requires_grad for p in (*model.classifier.parameters(), *model.attention.parameters()))


def rates(model: Any, settings: FinetuneConfig, is_new: bool) -> dict[str, tuple[float, float]]:
    """Tensor -> peak rate and weight decay; each is in one group only."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in build_tuner(model, settings, is_new=is_new).param_groups:
        assert group["lr"] == group["peak"]
        for parameter in group["params"]:
            assert name_of[id(parameter)] not in found
            found[name_of[id(parameter)]] = group["peak"], group["weight_decay"]
    assert found.keys() == set(name_of.values())
    return found


def test_rates_fall_with_the_depth(tmp_path: Path) -> None:
    settings = FinetuneConfig(lr=1e-2, encoder_lr=0.5, layer_decay=0.1, weight_decay=0.3)
    model = classify.Model(classify.Config(layer="projection"), Tiny(), ("a", "b"))
    found = rates(model, settings, is_new=False)
    for i in range(5):
        rate = pytest.approx(1e-2 * 0.5 * 0.1 ** (4 - i), rel=1e-12)
        assert found[f"encoder.parts.{i}.0.weight"] == (rate, 0.3)
        for name in ("0.bias", "1.weight", "1.bias"):
            assert found[f"encoder.parts.{i}.{name}"] == (rate, 0)
    assert found["classifier.weight"] == found["first.0.weight"] == (1e-2, 0.3)
    assert found["classifier.bias"] == found["first.1.weight"] == (1e-2, 0)
    model.start_from(a_pretrained(tmp_path))
    found = rates(model, settings, is_new=False)
    assert found["first.0.weight"] == (pytest.approx(5e-3), 0.3)
    assert found["classifier.weight"] == (1e-2, 0.3)
    assert {rate for rate, _ in rates(model, settings, is_new=True).values()} == {1e-2}


@pytest.mark.parametrize(
    ("settings", "moves", "follows"),
    [
        ({"free_stages": 0}, (), ()),
        ({"frozen_steps": 1.0}, (), ()),
        ({"free_stages": 2, "frozen_steps": 0.5}, (3, 4), (3, 4)),
        ({"free_stages": 5, "batch_norm": "frozen"}, (0, 1, 2, 3, 4), ()),
        ({"free_stages": 5, "frozen_steps": 0.0}, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    ],
    ids=str,
)
def test_what_is_frozen_stays_bit_by_bit(
    settings: dict[str, Any], moves: tuple[int, ...], follows: tuple[int, ...], image_store: Path, tmp_path: Path
) -> None:
    encoder = a_pretrained(tmp_path / "encoder")
    asked = {**SMALL, **settings, "classify.layer": "projection"}
    finetune(image_store, tmp_path / "run", task="classify", encoder=str(encoder), settings=asked)
    after, (before, _) = weights(tmp_path / "run"), checkpoint.read_encoder(encoder / "encoder")
    head = checkpoint.read_head(encoder / "encoder")
    assert head is not None
    for name, tensor in before.items():
        stage = int(name.split(".")[1])
        expected = stage in (follows if "running" in name or "num_batches" in name else moves)
        assert (not torch.equal(after[f"encoder.{name}"], tensor)) == expected, name
    for name in ("0.weight", "1.running_mean"):  # of the head's first layer, which goes with the last stage
        expected = 4 in (follows if "running" in name else moves)
        assert (not torch.equal(after[f"first.{name}"], head[0][f"hidden.0.{name}"])) == expected, name
    assert after["classifier.weight"].abs().sum() > 0


def test_the_first_steps_are_frozen_unless_the_encoder_is_new(
    image_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[int] = []
    loss = classify.Task.loss

    def watched(task: Any, model: Any, *rest: Any, **more: Any) -> Tensor:
        free.append(sum(part[0].weight.requires_grad for part in model.encoder.parts))
        return loss(task, model, *rest, **more)

    monkeypatch.setattr(classify.Task, "loss", watched)
    encoder = a_pretrained(tmp_path / "encoder")
    for name in (str(encoder), "random"):
        settings = {**SMALL, "frozen_steps": 0.5, "free_stages": 3, "batch_norm": "frozen"}
        finetune(image_store, tmp_path / f"run {len(name)}", task="classify", encoder=name, settings=settings)
    assert free == [0, 0, 0, 3, 3, 3] + [3] * 6
    after = weights(tmp_path / "run 6")
    assert after["encoder.parts.4.1.running_mean"].abs().sum() > 0, "what is new follows, frozen or not"
    assert after["encoder.parts.1.1.running_mean"].abs().sum() == 0


# ---- patients


def test_a_test_patient_seen_in_pretraining_stops_it_or_is_stamped(
    image_store: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = read_cases(run / "cases.csv")
    encoder = a_pretrained(tmp_path / "encoder", [*cases.train, *cases.test[:2]])
    with pytest.raises(MedclrError, match=f"2 of the {len(cases.test)} test patients .{', '.join(cases.test[:2])}"):
        finetune(image_store, tmp_path / "run", task="classify", encoder=str(encoder), settings=SMALL)
    assert not (tmp_path / "run").exists()
    titles: list[str] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: titles.append(figure.get_suptitle()))
    summary = finetune(
        image_store, tmp_path / "run", task="classify", encoder=str(encoder), settings=SMALL, transductive=True
    )
    stamp = f"transductive: the encoder was pretrained on 2 of the {len(cases.test)} test patients"
    assert summary.stamp == stamp
    assert stamp in str(summary)
    assert len(titles) == 2
    assert all(" ".join(title.split()) == stamp for title in titles)
    with (tmp_path / "run" / "scores.csv").open() as file:
        assert {row["note"] for row in csv.DictReader(file)} == {stamp}
    facts = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (facts["transductive"], facts["stamp"]) == (True, stamp)
    assert set(facts["patients"]) == {*cases.train, *cases.test[:2]}
    harmless = a_pretrained(tmp_path / "harmless", cases.train)
    assert not finetune(
        image_store, tmp_path / "other", task="classify", encoder=str(harmless), settings=SMALL, transductive=True
    ).stamp


def test_cases_are_repeated_from_the_file(run: Path, image_store: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "seed": 3}
    finetune(image_store, tmp_path / "a", task="classify", cases="8", settings=settings)
    file = tmp_path / "a" / "cases.csv"
    finetune(image_store, tmp_path / "b", task="classify", cases=str(file), settings=settings)
    assert file.read_bytes() == (tmp_path / "b" / "cases.csv").read_bytes()
    assert len(read_cases(file).train) == 8
    assert all(torch.equal(t, weights(tmp_path / "b")[name]) for name, t in weights(tmp_path / "a").items())


def test_the_command_leaves_a_copy_of_the_cases_with_the_manifests(
    image_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--store={image_store}", *(f"--{key}={value}" for key, value in {**SMALL, "steps": 1}.items())]
    command([*words, "--out=runs/none", "--cases=4"])
    assert not Path("data_manifests").exists()
    Path("data_manifests").mkdir()
    finetune(image_store, tmp_path / "called", task="classify", settings={**SMALL, "steps": 1})
    for _ in range(2):
        command([*words, "--out=runs/four", "--cases=4"])
    assert [path.name for path in Path("data_manifests").iterdir()] == ["four.cases.csv"]
    copy = Path("data_manifests/four.cases.csv")
    assert copy.read_bytes() == Path("runs/four/cases.csv").read_bytes()
    assert "left as it is" not in capsys.readouterr().err
    command([*words, "--out=more/four", "--cases=6"])
    assert "data_manifests/four.cases.csv has other cases and is left as it is" in capsys.readouterr().err
    assert copy.read_bytes() == Path("runs/four/cases.csv").read_bytes()


# ---- what cannot work


@pytest.mark.parametrize(
    ("asked", "settings", "sentence"),
    [
        ({"task": "clasify"}, {}, "--task 'clasify' is unknown; the nearest known one is 'classify'"),
        ({"task": "segment"}, {}, "no scan has a mask"),
        ({"encoder": "nowhere"}, {}, "nowhere: is neither a run folder nor a file"),
        ({"cases": "1"}, {}, "none of the 1 training cases has label"),
        ({"cases": "1000"}, {}, "--cases 1000"),
        ({"cases": "nowhere.csv"}, {}, "nowhere.csv"),
        ({"modality": "CT"}, {}, "labelled scans of modality CT"),
        ({"test_share": 1.5}, {}, "test_share: 1.5 is no share"),
        ({}, {"steps": 0}, "steps must be at least 1"),
        ({}, {"batch": 1}, "batch must be at least 2"),
        ({}, {"classify.pool": "median"}, "median"),
        ({}, {"classify.pol": "mean"}, "'--classify.pool'"),
        ({}, {"device": "quantum"}, "device: 'quantum' cannot be used here"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(
    asked: dict[str, Any], settings: dict[str, Any], sentence: str, image_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(MedclrError) as error:
        finetune(image_store, tmp_path / "run", settings={**SMALL, **settings}, **{"task": "classify", **asked})
    assert sentence.strip("'") in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_class_without_a_case_is_one_sentence(run: Path, image_store: Path, tmp_path: Path) -> None:
    store = Store(image_store)
    label = {scan.patient_id: scan.label for scan in store.scans}
    cases = read_cases(run / "cases.csv")
    kept = [p for p in cases.train if label[p] == "lying"]
    rows = ["patient_id,split", *(f"{p},train" for p in kept), *(f"{p},test" for p in cases.test)]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    with pytest.raises(MedclrError, match=f"none of the {len(kept)} training cases has label 'standing'"):
        finetune(image_store, tmp_path / "a", task="classify", cases=str(tmp_path / "cases.csv"), settings=SMALL)
    test = [p for p in cases.test if label[p] == "standing"]
    rows = ["patient_id,split", *(f"{p},train" for p in cases.train), *(f"{p},test" for p in test)]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    with pytest.raises(MedclrError, match=f"none of the {len(test)} test patients has label 'lying'"):
        finetune(image_store, tmp_path / "b", task="classify", cases=str(tmp_path / "cases.csv"), settings=SMALL)


def test_other_settings_never_touch_a_run(run: Path, image_store: Path) -> None:
    before = content(run)
    with pytest.raises(MedclrError, match=r"cases was 100% and is now 5; lr was 0.01 and is now 0.1"):
        finetune(image_store, run, task="classify", cases="5", settings={**SMALL, "lr": 0.1})
    assert content(run) == before


def test_overwrite_begins_anew(image_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(image_store, out, task="classify", settings=SMALL)
    finetune(image_store, out, task="classify", settings={**SMALL, "steps": 3}, overwrite=True)
    assert len(read_metrics(out)) == 3
    assert read_yaml(out / "config.yaml")["steps"] == 3
    assert [path.name for path in out.glob("checkpoints/*.pt")] == ["step-0000003.pt"]


def test_values_are_written_as_the_command_line_reads_them() -> None:
    values = [None, True, 0.5, 3, "mean", Path("a/b"), (0.5, 1.0), [1, 2]]
    assert [*map(setting_word, values)] == ["null", "true", "0.5", "3", "mean", "a/b", "[0.5, 1.0]", "[1, 2]"]
