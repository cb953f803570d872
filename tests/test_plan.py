"""What a plan says follows from short runs: their sums, what is tried at all, and how it compares with a real run."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import medclr
from medclr.clock import Clock
from medclr.config import MonitorConfig, PretrainConfig, ViewsConfig
from medclr.errors import MedclrError
from medclr.plan import Forecast, Trial
from medclr.request import Request

planning = importlib.import_module("medclr.plan")  # the package's attribute of this name is the function

SMALL = {"epochs": 3, "batch": 8, "views.size_px": 16, "device": "cpu", "monitor.sample": 32}

GB = 10**9


def trial(batch: int, chunk: int | None = None, size_px: int = 64, peak: float = 1.0, **more: float) -> Trial:
    facts = {
        "step_s": 0.5, "monitor_s": 3.0, "checkpoint_s": 0.25, "rest_s": 7.0,
        "peak_bytes": int(peak * GB), "steps_bytes": int(peak * GB),
        "device_bytes": 16 * GB, "device": "a CPU with 2 threads", "checkpoint_bytes": 90_000_000,
        "export_bytes": 50_000_000, "row_bytes": 200.0, "steps_per_epoch": 20,
    }  # fmt: skip
    return Trial(size_px=size_px, batch=batch, chunk=chunk, **(facts | more))  # type: ignore[arg-type]


def test_the_parts_add_up_over_the_sizes_of_the_views():
    views = ViewsConfig(size_px=64, size_px_schedule=((0.0, 32), (0.5, 64)))
    settings = PretrainConfig(epochs=5, batch=128, views=views, monitor=MonitorConfig(every_epochs=2))
    forecast = Forecast(
        settings, (trial(128, size_px=32, step_s=0.2), trial(128, peak=4)), None, (trial(32, peak=1.6),)
    )
    assert forecast.steps == (60, 40), "epochs 0 to 2 are below half of the run"
    assert forecast.looks == 3, "after epochs 2, 4 and 5"
    assert forecast.steps_s == pytest.approx(60 * 0.2 + 40 * 0.5)
    assert forecast.checkpoints == 3 + 1
    assert forecast.seconds == pytest.approx(32 + 3 * 3.0 + 4 * 0.25 + 7.0)
    assert forecast.disk_bytes == 2 * 90_000_000 + 50_000_000 + 100 * 200
    # 1.6 GB with 32 and 4 GB with 128: 25 MB each, and 0.8 GB besides
    assert forecast.fits == (0.9 * 16 - 0.8) / 0.025 // 8 * 8
    text = str(forecast)
    for part in (
        "resnet18, float32, on a CPU with 2 threads: 5 epochs in batches of 128",
        "steps at 32 px                           0.2 s        60            12 s",
        "looks of the monitor                       3 s         3             9 s",
        "the run                                                             49 s",
        "memory, without chunks: 4.00 GB of 16.00 GB",
        "the largest batch that fits at 64 px: about 544",
        "disk: 230 MB, 2 checkpoints of 90 MB each among it",
    ):
        assert part in text.splitlines(), text


def test_a_long_run_has_checkpoints_now_and_then():
    settings = PretrainConfig(epochs=100, batch=128, views=ViewsConfig(size_px=64))
    forecast = Forecast(settings, (trial(128, step_s=3),), None, (trial(32),))
    assert forecast.steps == (2000,)
    assert forecast.now_and_then == 10, "100 minutes, one every ten"
    assert forecast.checkpoints == 10 + 1 + 100
    assert forecast.disk_bytes == 3 * 90_000_000 + 50_000_000 + 2000 * 200, "the two newest, and the best"
    always = replace(settings, monitor=MonitorConfig(checkpoint_minutes=0))
    assert replace(forecast, settings=always).now_and_then == 2000


class Tried:
    """In place of the short runs: memory by the slices that go through at once; what was tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each_gb: float) -> None:
        self.asked: list[tuple[int, int, int | None]] = []
        self.each_gb = each_gb
        monkeypatch.setattr(planning, "_trial", self.trial)

    def trial(self, request: Request, size_px: int, batch: int, chunk: int | None, *, quick: bool = False) -> Trial:
        self.asked.append((size_px, batch, chunk))
        return trial(batch, chunk, size_px, peak=0.5 + self.each_gb * (chunk or batch))


def plan(**settings: object) -> Forecast:
    given = {"views.size_px": 64, "batch": 128, "epochs": 2} | {
        key.replace("__", "."): v for key, v in settings.items()
    }
    return medclr.plan("store", settings=given)


def test_what_fits_is_tried(monkeypatch):
    tried = Tried(monkeypatch, 0.01)
    forecast = plan()
    assert tried.asked == [(64, 32, None), (64, 128, None), (64, 128, 32)]
    assert forecast.fits == (14.4 - 0.5) // 0.01 // 8 * 8
    assert "memory, in chunks of 32: 820 MB, a step takes 1.00 times as long" in str(forecast)


def test_a_schedule_is_tried_at_each_size(monkeypatch):
    tried = Tried(monkeypatch, 0.01)
    forecast = plan(epochs=10, views__size_px_schedule="[[0,32],[0.3,48],[0.6,64]]")
    assert tried.asked[1:4] == [(32, 128, None), (48, 128, None), (64, 128, None)]
    assert forecast.steps == (60, 60, 80)


def test_a_batch_that_will_not_fit_is_never_tried(monkeypatch):
    tried = Tried(monkeypatch, 0.15)
    text = str(plan())
    assert tried.asked == [(64, 32, None), (64, 16, None), (64, 128, 32)], "19.7 GB of 16"
    assert "memory: a batch of 128 does not fit into 16.00 GB; give it a chunk" in text
    assert "memory, in chunks of 32: 5.30 GB" in text.splitlines()
    assert "the largest batch that fits at 64 px: about 88" in text
    assert "the run" not in text


def test_what_is_there_in_any_case_does_not_count_against_a_batch(monkeypatch):
    tried = Tried(monkeypatch, 0.105)  # 13.94 GB fit into 14.4; four times the 3.86 GB of 32 slices would not
    assert plan().trials[0].batch == 128
    assert tried.asked == [(64, 32, None), (64, 16, None), (64, 128, None), (64, 128, 32)]


def test_with_chunks_the_chunk_decides(monkeypatch):
    tried = Tried(monkeypatch, 0.15)
    forecast = plan(batch=1024, chunk=64)
    assert tried.asked == [(64, 256, 16), (64, 1024, 64)], "the whole batch at once would not fit"
    assert "memory, in chunks of 64: 10.10 GB of 16.00 GB" in str(forecast)
    assert "the largest chunk that fits at 64 px: about 88" in str(forecast)
    tried.asked.clear()
    tried.each_gb = 0.001
    forecast = plan(batch=1024, chunk=64)
    assert tried.asked[-1] == (64, 1024, None)
    assert "memory, without chunks: 1.52 GB, a step takes 1.00 times as long" in str(forecast)


def test_the_table_is_written_only_if_asked(monkeypatch, tmp_path):
    Tried(monkeypatch, 0.01)
    monkeypatch.chdir(tmp_path)
    forecast = plan()
    assert not list(tmp_path.iterdir())
    medclr.plan("store", settings={"views.size_px": 64, "batch": 128, "epochs": 2}, save=tmp_path / "plan.txt")
    assert (tmp_path / "plan.txt").read_text() == f"{forecast}\n"


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MedclrError, match="plan measures a single process; start it without torchrun"):
        plan()


def test_a_trial_that_dies_is_one_sentence(monkeypatch):
    def dead(command, **options):
        return subprocess.CompletedProcess(command, -9, "", "")

    monkeypatch.setattr(planning.subprocess, "run", dead)
    with pytest.raises(MedclrError, match=r"the trial of a batch of 32 at 64 px did not end well \(status -9, without"):
        plan()


class Steps(Clock):
    """A clock on which the monitor takes a second, and each step what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told = {"rest": 0.0, "monitor": 0.0, "checkpoints": 0.0}

    def seconds(self) -> dict[str, float]:
        return dict(self.told)


def test_the_first_steps_and_the_pauses_are_left_out():
    watch, clock = planning._Watch("cpu", quick=False), Steps()
    ended = []
    for number in range(40):
        clock.told["rest"] += 5.0 if number < planning.WARM else 1.5
        clock.told["monitor"] += 1.0
        ended.append(watch(number + 1, clock))
        if ended[-1]:
            break
    assert watch.step_s == pytest.approx(1.5)
    assert len(ended) == planning.WARM + 7, "more than ten seconds"
    quick = planning._Watch("cpu", quick=True)
    assert [quick(number, clock) for number in range(6)] == [False] * 5 + [True]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_plan_agrees_with_a_real_run(image_store, tmp_path, chunk):
    """Memory and disk within 15 %; of the time only that it is no other one, for the machine may be busy."""
    settings = {**SMALL, "chunk": chunk, "views.size_px_schedule": "[[0,8],[0.5,16]]", "encoder.stem": "imagenet"}
    before = set(Path(image_store).parent.rglob("*"))
    forecast = medclr.plan(image_store, settings=settings)
    assert set(Path(image_store).parent.rglob("*")) == before
    words = [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]
    code = (
        "import sys, json\nfrom medclr.memory import peak_bytes\nfrom medclr.pretrain import command\n"
        "print(json.dumps([command(sys.argv[1:]).seconds, peak_bytes()]))"
    )
    out = tmp_path / "run"
    run = [sys.executable, "-c", code, "--store", str(image_store), "--out", str(out), *words]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.strip("[]\n").split(","))
    assert forecast.trials[-1].peak_bytes == pytest.approx(peak, rel=0.15)
    used = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert forecast.disk_bytes == pytest.approx(used, rel=0.15)
    assert forecast.steps == (12, 6)
    assert 0.2 * seconds < forecast.seconds < 5 * seconds
    with pytest.raises(MedclrError, match="batch 64 is larger than the data"):
        medclr.plan(image_store, settings={**SMALL, "batch": 64})
