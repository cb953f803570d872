"""The figures of a run: taken back to the checkpoint's step, and readable in TensorBoard and MLflow."""

import json
import os
import sys
from pathlib import Path

import pytest

from medclr.errors import MedclrError
from medclr.track import Backend, Tracker, read_metrics

# MLflow's own use of SQLAlchemy; hidden from users, because Python hides deprecations inside libraries.
MLFLOW_DEPRECATIONS = "ignore:The ``noload`` loader strategy is deprecated"


@pytest.fixture(autouse=True)
def no_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def log(run: Path, steps: range, *, resumed_at: int = 0, backend: Backend | None = None, loss: float = 0.0) -> None:
    """One stretch of a run, with one figure a step."""
    with Tracker(run, step=resumed_at, backend=backend) as tracker:
        for step in steps:
            tracker.write(step, {"loss": loss or 1 / step})


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with Tracker(tmp_path, step=0, backend=None) as tracker:
        tracker.write(1, {"loss": 0.1, "lr": 1e-7})
        tracker.write(2, {"knn": 2 / 3})
        assert read_metrics(tmp_path)[1] == {"step": 2, "knn": 2 / 3}, "a row is on its way to the disk at once"
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1, "lr": 1e-7}, {"step": 2, "knn": 2 / 3}]


def test_rows_after_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8), loss=9)
    log(tmp_path, range(5, 10), resumed_at=4)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == [9] * 4 + [1 / step for step in range(5, 10)]


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_last_line_that_was_cut_short_is_ignored_and_removed(tmp_path: Path, cut: int) -> None:
    log(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    log(tmp_path, range(3, 5), resumed_at=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("backend", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_one_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)  # as if it were not installed
    with pytest.raises(MedclrError) as error:
        Tracker(tmp_path, step=0, backend=backend)
    assert str(error.value) == f"--track {backend} needs an extra: pip install 'medclr[{backend}]'"
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_curve_and_hides_what_was_taken_back(tmp_path: Path) -> None:
    reason = "TensorBoard is not installed: pip install 'medclr[tensorboard]'"
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    log(tmp_path, range(1, 8), backend="tensorboard", loss=9)
    log(tmp_path, range(5, 10), resumed_at=4, backend="tensorboard")
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = accumulator.Scalars("loss")
    assert [point.step for point in points] == list(range(1, 10))
    assert [point.value for point in points] == pytest.approx([9] * 4 + [1 / step for step in range(5, 10)])
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 10))


@pytest.mark.filterwarnings(MLFLOW_DEPRECATIONS)
class TestMlflow:
    @pytest.fixture(autouse=True)
    def client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
        self.mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'medclr[mlflow]'")
        pytest.importorskip("sqlalchemy", reason="MLflow has no database: pip install 'medclr[mlflow]'")
        self.address = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def runs(self) -> list:
        client = self.mlflow.MlflowClient(self.address)
        return client.search_runs([client.get_experiment_by_name("medclr").experiment_id])  # type: ignore[no-any-return]

    def test_one_run_holds_all_stretches_and_how_it_ended(self, tmp_path: Path) -> None:
        log(tmp_path, range(1, 4), backend="mlflow")
        assert [run.info.status for run in self.runs()] == ["FINISHED"]
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"

        def interrupted() -> None:
            with Tracker(tmp_path, step=3, backend="mlflow") as tracker:
                assert [run.info.status for run in self.runs()] == ["RUNNING"]
                tracker.write(4, {"loss": 1 / 4, "lr": 0.5})
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        (run,) = self.runs()
        assert (run.info.run_name, run.info.status) == (tmp_path.name, "KILLED")
        points = self.mlflow.MlflowClient(self.address).get_metric_history(run.info.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in range(1, 5)]
        with pytest.raises(ZeroDivisionError):
            log(tmp_path, range(1), resumed_at=4, backend="mlflow")
        assert [run.info.status for run in self.runs()] == ["FAILED"]
        assert self.mlflow.get_tracking_uri() != self.address, "the user's own MLflow is left as it is"

    def test_a_server_that_refuses_is_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://loft")
        with pytest.raises(MedclrError, match=r"carrier-pigeon://loft cannot be used .*MLFLOW_TRACKING_URI") as error:
            Tracker(tmp_path, step=0, backend="mlflow")
        assert "\n" not in str(error.value)
