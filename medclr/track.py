"""Where a run's figures go: always ``metrics.jsonl``, and TensorBoard or MLflow when asked for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self

from medclr.errors import MedclrError
from medclr.files import write_text

Backend = Literal["tensorboard", "mlflow"]


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``; a last line that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # after the last newline: nothing, or half a row
    return [json.loads(line) for line in lines[:-1] if line]


class Tracker:
    """Appends one row a call to ``metrics.jsonl``; a context manager."""

    def __init__(self, run: Path, *, step: int, backend: Backend | None) -> None:
        """Continue at ``step``: rows that a lost stretch after the last checkpoint wrote are taken back."""
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._send, self._close = _backend(backend, run)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One row: the step and its figures."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        self._send(step, figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._close()


def _backend(name: Backend | None, run: Path) -> tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]:
    if name is None:
        return (lambda step, figures: None), (lambda: None)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run / "tensorboard"))

            def send(step: int, figures: Mapping[str, float]) -> None:
                for key, value in figures.items():
                    writer.add_scalar(key, value, step)

            return send, writer.close
        import mlflow
    except ImportError as error:
        raise MedclrError(f"--track {name} needs an extra: pip install 'medclr[{name}]'") from error
    # A file store beside the run: no server, no network. MLFLOW_TRACKING_URI, if set, is the user's own choice.
    import os

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{(run / 'mlflow.db').resolve()}")
    mlflow.set_experiment("medclr")
    mlflow.start_run(run_name=run.name)
    return (lambda step, figures: mlflow.log_metrics(dict(figures), step=step)), mlflow.end_run
