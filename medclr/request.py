"""What is asked of ``medclr pretrain``, and the run folder in which it is done.

An existing run is resumed by the same settings and by no others, except for those that cannot change its result.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from medclr import methods
from medclr.config import (
    PretrainConfig,
    dataclass_options,
    differences,
    option_parser,
    parse,
    read_yaml,
    to_plain,
    to_yaml,
)
from medclr.data.leave_out import pinned
from medclr.errors import MedclrError
from medclr.files import LOCK_NAME, write_text
from medclr.track import Backend

RUN_FILES = {
    "config.yaml", "metrics.jsonl", "checkpoints", "encoder", "figures", "tensorboard", "mlflow.db", "mlflow_run_id",
    LOCK_NAME,
}  # fmt: skip
"""All that a run writes, and so all that --overwrite may remove."""

HARMLESS = {"skip_nonfinite", "monitor.checkpoint_minutes", "monitor.keep", "device", "compile"}
"""Settings that leave the method as it is, and so may differ when a run is resumed. With another device, or compiled or
not, it goes on from the same state with the same slices and views, but sums are rounded otherwise: its weights are then
those of a run that was never stopped up to rounding, no longer bit by bit, as on any other machine."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    store: Path
    out: Path
    track: Backend | None
    overwrite: bool
    settings: PretrainConfig
    own: Any
    """The method's Config."""

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain types: the content of config.yaml."""
        return {**to_plain(self.settings), self.settings.method: to_plain(self.own)}


def read_settings(arguments: Sequence[str]) -> Request:
    """Parse the options of ``medclr pretrain``.

    Raises:
        MedclrError: an unknown setting, a wrong type, or a value that cannot work.
    """
    name = _chosen_method(arguments)
    module = methods.get(name)

    def add(parser: Any) -> None:
        parser.add_argument("--store", type=Path, required=True, help="Slice store that `medclr prepare` wrote.")
        parser.add_argument("--out", type=Path, required=True, help="Run folder; the same command again resumes it.")
        parser.add_argument("--track", type=Backend | None, help="Also log to TensorBoard or MLflow (extras).")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that is in --out.")
        dataclass_options(parser, PretrainConfig)
        dataclass_options(parser, module.Config, name)

    parser = option_parser("medclr pretrain", "Train an encoder on unlabelled slices.", add, config=True)
    options = parse(parser, arguments)
    settings = PretrainConfig(**{field.name: getattr(options, field.name) for field in fields(PretrainConfig)})
    settings = replace(settings, data=pinned(settings.data))
    own = getattr(options, name)
    return Request(options.store, options.out, options.track, options.overwrite, settings, own)


def _chosen_method(arguments: Sequence[str]) -> str:
    """The method decides which settings exist, so it is read before them: option first, then file, then default."""
    import argparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--config", type=Path)
    chosen, _ = first.parse_known_args(list(arguments))
    return str(
        chosen.method or (read_yaml(chosen.config).get("method") if chosen.config else None) or PretrainConfig.method
    )


def open_run(request: Request) -> None:
    """Make the run folder, or accept one with the same settings.

    Raises:
        MedclrError: it holds another run, or something that no run wrote.
    """
    out, existing = request.out, request.out / "config.yaml"
    if not existing.exists():
        if out.exists() and (not out.is_dir() or any(p.name != LOCK_NAME for p in out.iterdir())):
            raise MedclrError(f"{out}: exists and is not a run of medclr; choose another --out")
    elif request.overwrite:
        if strange := sorted(p.name for p in out.iterdir() if p.name not in RUN_FILES):
            raise MedclrError(
                f"{out}: holds {strange[0]}, which no run wrote, and is not overwritten; choose another --out"
            )
        for name in RUN_FILES - {LOCK_NAME, existing.name}:  # killed meanwhile, it still is a run
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        changed = differences(read_yaml(existing), request.resolved)
        telling = [f"{name} was {was} and is now {now}" for name, (was, now) in changed.items() if name not in HARMLESS]
        if telling:
            advice = "choose another --out, or --overwrite true"
            raise MedclrError(f"{out}: holds a run with other settings ({'; '.join(telling)}); {advice}")
        if not changed:
            return
    write_text(existing, to_yaml(request.resolved))
