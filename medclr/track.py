"""Where a run's figures go: always ``metrics.jsonl``, and TensorBoard or MLflow when asked for."""

import contextlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

from medclr.errors import MedclrError
from medclr.files import write_text

Backend = Literal["tensorboard", "mlflow"]
Send = Callable[[int, Mapping[str, float]], None]


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``; a last line that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # after the last newline: nothing, or half a row
    return [json.loads(line) for line in lines[:-1] if line]


def check(backend: Backend | None) -> None:
    """Raise MedclrError, naming the extra, if ``backend`` is not installed."""
    if backend is not None and importlib.util.find_spec(backend) is None:  # both modules bear the backend's name
        raise MedclrError(f"--track {backend} needs an extra: pip install 'medclr[{backend}]'")


class Tracker:
    """Appends one row a call to ``metrics.jsonl``; a context manager."""

    def __init__(self, run: Path, *, step: int, backend: Backend | None) -> None:
        """Continue at ``step``: rows that a lost stretch after the last checkpoint wrote are taken back.

        Raises:
            MedclrError: the backend is not installed, or its server refuses.
        """
        check(backend)
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._open = contextlib.ExitStack()
        self._send = self._open.enter_context(_BACKENDS[backend](run, step)) if backend else None
        self._file = self._open.enter_context((run / "metrics.jsonl").open("a", encoding="utf-8"))

    def write(self, step: int, figures: Mapping[str, float], *, send: bool = True) -> None:
        """One row: the step and its figures; the backend gets it too, if ``send``."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        if self._send and send:
            self._send(step, figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._open.__exit__(*failure)  # type: ignore[arg-type]


@contextlib.contextmanager
def _tensorboard(run: Path, step: int) -> Iterator[Send]:
    """Event files in ``run/tensorboard``; what an earlier stretch wrote beyond ``step`` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as writer:

        def send(step: int, figures: Mapping[str, float]) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

        yield send


@contextlib.contextmanager
def _mlflow(run: Path, step: int) -> Iterator[Send]:
    """One MLflow run, found again by its id in ``run/mlflow_run_id``, on MLFLOW_TRACKING_URI or in ``run/mlflow.db``.

    The database needs no server and no network; ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`` shows it.
    The client is told its address: MLflow's fluent functions would set it for the whole process.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # of the making of tables nobody needs to know
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run / 'mlflow.db').resolve()}"
    id_file = run / "mlflow_run_id"
    try:
        client = MlflowClient(tracking_uri=address)
        if id_file.exists():
            run_id = id_file.read_text(encoding="utf-8").strip()
            client.update_run(run_id, status="RUNNING")
        else:
            experiment = client.get_experiment_by_name("medclr")
            experiment_id = experiment.experiment_id if experiment else client.create_experiment("medclr")
            run_id = client.create_run(experiment_id, run_name=run.name).info.run_id
            write_text(id_file, run_id + "\n")
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        advice = "set MLFLOW_TRACKING_URI to a server that has this run, or pip install 'medclr[mlflow]'"
        raise MedclrError(f"--track mlflow: {address} cannot be used ({reason}); {advice}") from error

    def send(step: int, figures: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now_ms, step) for key, value in figures.items()])

    status = "FAILED"
    try:
        yield send
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status)


_BACKENDS = {"tensorboard": _tensorboard, "mlflow": _mlflow}
