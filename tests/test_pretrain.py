"""The loop: it learns, it resumes exactly after a kill, and it says in one sentence what it cannot do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import medclr
import medclr.look
from medclr import checkpoint
from medclr.augment.views import Draws
from medclr.cli import main
from medclr.clock import PARTS
from medclr.config import read_yaml
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.files import alone, sha256
from medclr.methods.simclr import Method
from medclr.track import read_metrics

SMALL = {"epochs": 3, "batch": 8, "encoder.width": 0.25, "views.size_px": 16, "device": "cpu", "monitor.sample": 32}


EASY = {
    "encoder.width": 1,
    "views.crop_area": "[0.7,1]",
    "views.strength": 0.3,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.lr_scaling": "none",
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder" / "encoder.safetensors")


@pytest.fixture(scope="module")
def run(image_store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    medclr.pretrain(image_store, out, settings=SMALL)
    return out


def test_a_run_leaves_everything_that_it_promises(run):
    for name in ("config.yaml", "metrics.jsonl", "encoder/encoder.json", "figures/views.png", "figures/curves.png"):
        assert (run / name).stat().st_size > 0, name
    rows = read_metrics(run)
    assert rows[-1]["step"] == 18
    assert {"effective_rank", "uniformity", "knn"} <= set(rows[-1])
    facts = json.loads((run / "encoder" / "encoder.json").read_text())
    assert len(facts["patients"]) == 24
    head, shape = checkpoint.read_head(run / "encoder")
    trained = checkpoint.load(checkpoint.latest(run))["method"]
    assert head.keys() == {name.removeprefix("head.") for name in trained if name.startswith("head.")}
    assert all(torch.equal(tensor, trained[f"head.{name}"]) for name, tensor in head.items())
    assert (shape["layers"], shape["out_features"]) == (2, 128)
    assert not list(run.rglob("*.tmp"))


def seconds_of(run: Path) -> dict[str, float]:
    return json.loads((run / "time.json").read_text())


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_times_of_the_parts_add_up_to_that_of_the_run(image_store, tmp_path, monkeypatch, chunk):
    view, forward, save = Draws.view, Method.forward, checkpoint.save

    def slowly(function, seconds):
        return lambda *arguments, **options: (time.sleep(seconds), function(*arguments, **options))[1]

    monkeypatch.setattr(Draws, "view", slowly(view, 0.01))
    monkeypatch.setattr(Method, "forward", slowly(forward, 0.02))
    monkeypatch.setattr(checkpoint, "save", slowly(save, 0.5))
    out = tmp_path / "run"
    started = time.perf_counter()
    summary = medclr.pretrain(image_store, out, settings={**SMALL, "epochs": 1, "chunk": chunk})
    wall = time.perf_counter() - started
    seconds = seconds_of(out)
    total = seconds.pop("total")
    assert set(seconds) == set(PARTS) == set(summary.times)
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)
    assert total == pytest.approx(wall, rel=0.02)
    assert summary.seconds == pytest.approx(total, rel=0.02)
    passes = 6 * (1 if chunk is None else 2 * 8)
    assert seconds["views"] > 0.01 * (12 if chunk is None else passes)
    assert seconds["forward"] > 0.02 * passes
    assert seconds["checkpoints"] > 0.5 * 2, "the best and the last"
    assert min(seconds.values()) > 0
    told = str(summary).splitlines()[-1]
    assert told.startswith("the time went into: ")
    largest = max(seconds, key=seconds.get)
    assert f": {PARTS[largest]} {100 * seconds[largest] / total:.0f} %" in told


def test_the_times_of_a_resumed_run_add_up(image_store, tmp_path):
    out = tmp_path / "run"
    words = command(image_store, out)[3:]
    started = time.perf_counter()
    stopped(words, Method, "objective", 4, wait=2)
    first = seconds_of(out)
    assert 2 < first["total"] <= time.perf_counter() - started
    assert first["forward"] > 2
    again = time.perf_counter()
    assert main(words) == 0
    total = seconds_of(out)["total"]
    assert total == pytest.approx(first["total"] + time.perf_counter() - again, rel=0.02)
    (out / "time.json").write_text("{")
    assert main(words) == 0, "no run fails for its times"
    assert seconds_of(out)["total"] < total


def test_the_loss_falls(image_store, tmp_path):
    medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, "epochs": 10, **EASY})
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert sum(losses[-2:]) / 2 < 0.7 * losses[0]


def test_the_same_settings_give_the_same_weights(run, image_store, tmp_path):
    medclr.pretrain(image_store, tmp_path / "again", settings=SMALL)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name]), name


def command(store: Path, out: Path, *more: str) -> list[str]:
    words = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "medclr", "pretrain", "--store", str(store), "--out", str(out), *words, *more]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "SIGTERM", "kill -9"])
def test_a_stopped_run_goes_on_to_the_same_weights(run, image_store, tmp_path, stop):
    out = tmp_path / "run"
    often = ("--monitor.checkpoint_minutes", "0.00001")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command(image_store, out, *often), stderr=subprocess.PIPE, text=True, env=environment)
    while not list(out.glob("checkpoints/step-*.pt.sha256")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGKILL: -signal.SIGKILL}[stop]
    if stop != signal.SIGKILL:
        assert "saved step" in said
    subprocess.run(command(image_store, out, *often), check=True, env=environment, capture_output=True)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(out)[name]), name
    steps = [row["step"] for row in read_metrics(out) if "loss" in row]
    assert steps == sorted(set(steps)), "a stretch that was run twice stands once in the metrics"


def stopped(words: list[str], target: object, name: str, number: int, wait: float = 0.1) -> float:
    """Run a command in which the call of that number takes a minute, and SIGTERM comes meanwhile: the seconds after."""
    function, calls, asked = getattr(target, name), [], []

    def terminate() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def slow(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            threading.Timer(wait, terminate).start()
            time.sleep(60)
        return function(*arguments, **options)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(target, name, slow)
        assert main(words) == 0
        took = time.monotonic() - asked[0]
    signal.signal(signal.SIGTERM, before)
    return took


def assert_same_run(run: Path, expected: Path) -> None:
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(run)[name]), name
    rows = [[{**row, "images_per_s": 0} for row in read_metrics(path)] for path in (run, expected)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("target", "name", "number", "step"),
    [
        (Draws, "view", 8, 3),
        (Method, "embed", 5, 4),
        (Method, "objective", 9, 8),
        (medclr.look, "plain_view", 3, 12),
        (medclr.look, "plain_view", 4, 18),
    ],
    ids=["making views", "in the network", "in the loss", "looking", "looking at the end"],
)
def test_sigterm_does_not_wait_for_a_long_step_or_look(run, image_store, tmp_path, capsys, target, name, number, step):
    out = tmp_path / "run"
    words = command(image_store, out)[3:]
    assert stopped(words, target, name, number) < 10
    assert f"saved step {step} of 18 in {out}; the same command again goes on" in capsys.readouterr().err
    assert checkpoint.load(checkpoint.latest(out))["step"] == step
    assert main(words) == 0
    assert_same_run(out, run)


def test_the_order_is_chosen_by_the_memory_and_then_kept(run, image_store, tmp_path, monkeypatch):
    out, small = tmp_path / "run", {**SMALL, "epochs": 1, "data.window_mb": 1}

    def order(**more: object) -> str:
        medclr.pretrain(image_store, out, settings=small, **more)
        return read_yaml(out / "config.yaml")["data"]["order"]

    assert read_yaml(run / "config.yaml")["data"]["order"] == "shuffle"
    monkeypatch.setattr("medclr.request.machine_bytes", lambda: 3 * 48 * 32**2)
    assert order() == "shards", "its slices are two thirds of the memory"
    monkeypatch.setattr("medclr.request.machine_bytes", lambda: 2**40)
    assert order() == "shards", "as it began"
    with pytest.raises(MedclrError, match=r"data\.order was shards and is now shuffle"):
        medclr.pretrain(image_store, out, settings={**small, "data.order": "shuffle"})
    assert order(overwrite=True) == "shuffle"
    monkeypatch.setattr("medclr.request.machine_bytes", lambda: 1)
    text = (out / "config.yaml").read_text()
    old = "".join(text.split(", order: shuffle, window_mb: 1"))
    assert old != text
    (out / "config.yaml").write_text(old)
    with pytest.raises(MedclrError, match=r"\(data\.window_mb was None and is now 1\)"):
        order()
    small["data.window_mb"] = 2048
    assert order() == "shuffle", "a run of an earlier version"


def test_a_run_that_reads_shard_by_shard_goes_on_to_the_same_weights(image_store, tmp_path):
    shards = ("--data.order", "shards", "--data.window_mb", "1")
    whole, out = (command(image_store, tmp_path / name, *shards)[3:] for name in ("whole", "run"))
    assert main(whole) == 0
    stopped(out, Method, "objective", 9)
    assert main(out) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


GROWING = {**SMALL, "encoder.stem": "imagenet", "views.size_px": 16, "views.size_px_schedule": "[[0,8],[0.5,16]]"}


def test_views_grow_and_a_stopped_run_goes_on_at_the_size_of_its_epoch(image_store, tmp_path, monkeypatch):
    sizes: list[int] = []
    forward = Method.forward
    monkeypatch.setattr(Method, "forward", lambda self, x: (sizes.append(x.shape[-1]), forward(self, x))[1])
    whole, out = tmp_path / "whole", tmp_path / "run"
    medclr.pretrain(image_store, whole, settings=GROWING)
    expected = [8] * 12 + [16] * 6  # epochs begin after 0, 1/3 and 2/3 of the run
    assert sizes == expected
    assert [row["size_px"] for row in read_metrics(whole)] == expected
    assert json.loads((whole / "encoder" / "encoder.json").read_text())["size_px"] == 16
    words = [word for key, value in GROWING.items() for word in (f"--{key}", str(value))]
    words = ["pretrain", "--store", str(image_store), "--out", str(out), *words]
    stopped(words, Method, "objective", 8)
    assert checkpoint.load(checkpoint.latest(out))["step"] == 7
    assert main(words) == 0
    assert_same_run(out, whole)


def test_float16_goes_on_with_its_scale_of_the_loss(image_store, tmp_path):
    few = ("--precision", "float16", "--epochs", "1", "--views.size_px", "8", "--monitor.sample", "8")
    whole, out = (command(image_store, tmp_path / name, *few)[3:] for name in ("whole", "run"))
    assert main(whole) == 0
    stopped(out, Method, "objective", 4)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert (saved["step"], saved["scaler"]["scale"] < 65536) == (3, True), "it began with that, and has come down"
    assert main(out) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch's own compiler, when it is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile warns of what it imports itself
def test_a_run_goes_on_on_another_device_and_compiled(run, image_store, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    medclr.pretrain(image_store, out, settings={**SMALL, "device": "auto", "compile": True})
    assert [read_yaml(out / "config.yaml")[name] for name in ("device", "compile")] == ["auto", True]
    assert_same_run(out, run)


def test_a_truncated_checkpoint_is_noticed(run, image_store, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    for damaged in (broken / "checkpoints").glob("*.pt"):
        damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(MedclrError, match="checkpoint is damaged"):
        medclr.pretrain(image_store, broken, settings=SMALL)


def test_other_settings_never_touch_an_existing_run(run, image_store):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(MedclrError, match=r"seed was 0 and is now 1; simclr.temperature was 0.2 and is now 0.3"):
        medclr.pretrain(image_store, run, settings={**SMALL, "seed": 1, "simclr.temperature": 0.3})
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(image_store, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(MedclrError, match="not a run"):
        medclr.pretrain(image_store, tmp_path, settings=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch": 1000}, "1000"),
        ({"data.split": "training"}, "split 'training'"),
        ({"method": "simclrr"}, "'simclr'"),
        ({"device": "quantum"}, "device"),
        ({"simclr.temperature": -1}, "temperature"),
        ({"simclr.temprature": 0.1}, "simclr.temperature"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(image_store, tmp_path, settings, sentence):
    out = tmp_path / "run"
    with pytest.raises(MedclrError) as error:
        medclr.pretrain(image_store, out, settings={**SMALL, **settings})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_overwriting_replaces_a_run_and_nothing_else(run, image_store, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "thesis.txt").write_text("three years")
    with pytest.raises(MedclrError, match=r"thesis\.txt"):
        medclr.pretrain(image_store, out, settings={**SMALL, "epochs": 1}, overwrite=True)
    assert (out / "encoder" / "encoder.json").exists()
    (out / "thesis.txt").unlink()
    assert medclr.pretrain(image_store, out, settings={**SMALL, "epochs": 1}, overwrite=True).steps == 6


def test_overwriting_that_was_interrupted_can_be_asked_for_again(run, image_store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(run, out)

    def interrupted(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("medclr.runs.write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            medclr.pretrain(image_store, out, settings={**SMALL, "epochs": 1}, overwrite=True)
    assert medclr.pretrain(image_store, out, settings={**SMALL, "epochs": 1}, overwrite=True).steps == 6


def test_a_run_that_is_going_on_is_not_overwritten(run, image_store, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with alone(out), pytest.raises(MedclrError, match="another medclr is writing there"):
        medclr.pretrain(image_store, out, settings=SMALL, overwrite=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_resumes_on_its_own_store_only(run, image_store, tmp_path):
    other = tmp_path / "store"
    medclr.prepare(image_store.parent / "images.csv", other, size_px=24, key_file=image_store.parent / "key")
    with pytest.raises(MedclrError, match="another manifest or slice size"):
        medclr.pretrain(other, run, settings=SMALL)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(image_store, tmp_path):
    wild = {**SMALL, "optim.name": "sgd", "optim.lr": 1e30, "optim.warmup": 0.0}
    with pytest.raises(
        MedclrError, match=r"step 1 is not finite.*no slice alone is to blame; there is no checkpoint yet"
    ):
        medclr.pretrain(image_store, tmp_path / "run", settings=wild)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.fixture
def one_bad_view(monkeypatch):
    """At step 2 the first view of the first slice of a batch is NaN."""
    view = Draws.view

    def broken(self, batch, number, rows, device=None):
        made = view(self, batch, number, rows, device)
        if self._key[1] == 2 and number == 0:
            made[0] = float("nan")
            BAD.append(int(batch.index[0]))
        return made

    BAD = []
    monkeypatch.setattr(Draws, "view", broken)
    return BAD


def test_a_slice_that_is_not_finite_is_named(image_store, tmp_path, one_bad_view):
    often = {"monitor.checkpoint_minutes": 0}
    with pytest.raises(MedclrError) as error:
        medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, **often})
    store = Store(image_store)
    scan = store.scans[int(store.column("scan")[one_bad_view[0]])]
    assert f"to blame are the views of slice 0 of scan {scan.scan_id};" in str(error.value)
    assert "the last good checkpoint is step-0000002.pt" in str(error.value)


def test_some_steps_that_are_not_finite_may_be_left_out(image_store, tmp_path, one_bad_view):
    medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, "skip_nonfinite": 1})
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_an_overflow_of_float16_leaves_no_nan_in_the_metrics(image_store, tmp_path):
    medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, "epochs": 1, "precision": "float16"})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    rows = read_metrics(tmp_path / "run")
    assert "grad_norm" not in rows[0], "the first scale of the loss is too large"
    assert all("loss" in row and "skipped" not in row for row in rows)


@pytest.mark.parametrize("settings", [{"optim.name": "adamw", "optim.lr": 1e-3, "optim.lr_scaling": "none"},
                                      {"optim.name": "sgd"}, {"simclr.head_layers": 3}, {"encoder.stem": "medium"},
                                      {"precision": "bfloat16"}, {"precision": "float16"}, {"precision": "float64"},
                                      {"chunk": 2}], ids=str)  # fmt: skip
def test_other_choices_run(image_store, tmp_path, settings):
    summary = medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, "epochs": 1, **settings})
    assert summary.steps == 6


def test_slices_of_a_table_are_left_out_and_a_changed_table_is_noticed(image_store, tmp_path):
    store = Store(image_store)
    doubtful = [scan for scan in store.scans if scan.patient_id == store.patients[3]]
    table, out = tmp_path / "doubtful.csv", tmp_path / "run"
    table.write_text("scan_id,slice_index\n" + "".join(f"{scan.scan_id},0\n" for scan in doubtful))
    settings = {**SMALL, "epochs": 1, "data.leave_out": table}
    medclr.pretrain(image_store, out, settings=settings)
    facts = json.loads((out / "encoder" / "encoder.json").read_text())
    assert set(store.patients) - set(facts["patients"]) == {store.patients[3]}
    assert read_yaml(out / "config.yaml")["data"]["leave_out_sha256"] == sha256(table)
    medclr.pretrain(image_store, out, settings=settings)
    table.write_text(table.read_text().splitlines()[0] + "\n")
    with pytest.raises(MedclrError, match=r"other settings .*data.leave_out_sha256 was"):
        medclr.pretrain(image_store, out, settings=settings)
    with pytest.raises(MedclrError, match="has changed"):
        medclr.pretrain(image_store, tmp_path / "copy", config=out / "config.yaml")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("scan,slice\n", "scan_id, slice_index is missing"),
        ("scan_id,slice_index\nnobody,0\n", "line 2: scan nobody is not in"),
        ("scan_id,slice_index\nSCAN,1\n", "has no slice 1"),
        ("scan_id,slice_index\nSCAN,-1\n", "has no slice -1"),
        ("scan_id,slice_index\nSCAN,first\n", "cannot be read as a table"),
        ("scan_id,slice_index\nSCAN\n", "cannot be read as a table"),
    ],
)
def test_a_table_that_does_not_fit_is_one_sentence(image_store, tmp_path, text, sentence):
    table = tmp_path / "table.csv"
    if text is not None:
        table.write_text(text.replace("SCAN", Store(image_store).scans[-1].scan_id))
    with pytest.raises(MedclrError, match=sentence) as error:
        medclr.pretrain(image_store, tmp_path / "run", settings={**SMALL, "data.leave_out": table})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
