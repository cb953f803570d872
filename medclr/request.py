"""What is asked of ``medclr pretrain``, and the run folder in which it is done.

An existing run is resumed by the same settings and by no others, except for those that cannot change its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from medclr import methods
from medclr.augment.chain import resolved
from medclr.config import (
    DataConfig,
    PretrainConfig,
    chosen_first,
    dataclass_options,
    flatten,
    option_parser,
    parse,
    read_yaml,
    to_plain,
)
from medclr.data.leave_out import pinned
from medclr.files import LOCK_NAME
from medclr.memory import machine_bytes
from medclr.runs import open_folder
from medclr.track import Backend

RUN_FILES = {
    "config.yaml", "metrics.jsonl", "time.json", "checkpoints", "encoder", "figures", "tensorboard", "mlflow.db",
    "mlflow_run_id", LOCK_NAME,
}  # fmt: skip
"""All that a run writes, and so all that --overwrite may remove."""

HARMLESS = {"skip_nonfinite", "monitor.checkpoint_minutes", "monitor.keep", "device", "compile"}
"""Settings that leave the method as it is, and so may differ when a run is resumed. With another device, or compiled or
not, it goes on from the same state with the same slices and views, but sums are rounded otherwise: its weights are then
those of a run that was never stopped up to rounding, no longer bit by bit, as on any other machine."""


EARLIER = {"data.order": "shuffle", "data.window_mb": DataConfig.window_mb}
"""Settings that a run of an earlier version does not name, and what it did."""


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
    save: Path | None = None
    """Where the table of a plan is written."""

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain types: the content of config.yaml."""
        return {**to_plain(self.settings), self.settings.method: to_plain(self.own)}


def read_settings(arguments: Sequence[str], *, planned: bool = False) -> Request:
    """Parse the options of ``medclr pretrain``, or, if it is only ``planned``, those of ``medclr plan``.

    Raises:
        MedclrError: an unknown setting, a wrong type, or a value that cannot work.
    """
    name = chosen_first(arguments, "method") or PretrainConfig.method
    module = methods.get(name)

    def add(parser: Any) -> None:
        parser.add_argument("--store", type=Path, required=True, help="Slice store that `medclr prepare` wrote.")
        if planned:
            parser.add_argument("--save", type=Path, help="Write the table to this file, too.")
            parser.add_argument("--out", type=Path, default=Path(), help="As for pretrain; nothing is written there.")
        else:
            help = "Run folder; the same command again resumes it."
            parser.add_argument("--out", type=Path, required=True, help=help)
        parser.add_argument("--track", type=Backend | None, help="Also log to TensorBoard or MLflow (extras).")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that is in --out.")
        dataclass_options(parser, PretrainConfig)
        dataclass_options(parser, module.Config, name)

    verb, what = "medclr pretrain", "Train an encoder on unlabelled slices."
    if planned:
        verb, what = "medclr plan", "Say what a pretraining will take, after some steps of it in a temporary folder."
    parser = option_parser(verb, what, add, config=True)
    options = parse(parser, arguments)
    settings = PretrainConfig(**{field.name: getattr(options, field.name) for field in fields(PretrainConfig)})
    settings = replace(settings, data=pinned(settings.data), views=resolved(settings.views))
    own = getattr(options, name)
    save = options.save if planned else None
    return Request(options.store, options.out, options.track, options.overwrite, settings, own, save)


LARGE = 0.5
"""A store whose slices take more than this share of the memory is read shard by shard."""


def chosen_order(request: Request, slices_bytes: int) -> Literal["shuffle", "shards"]:
    """What ``data.order`` means here: for auto as the run began, or, if it is new, by the bytes of its slices."""
    order = request.settings.data.order
    if order != "auto":
        return order
    existing = request.out / "config.yaml"
    if existing.exists() and not request.overwrite:
        before = (EARLIER | dict(flatten(read_yaml(existing))))["data.order"]
        return "shards" if before == "shards" else "shuffle"
    return "shards" if slices_bytes > LARGE * machine_bytes() else "shuffle"


def open_run(request: Request) -> None:
    """Make the run folder, or accept one with the same settings.

    Raises:
        MedclrError: it holds another run, or something that no run wrote.
    """
    open_folder(request.out, request.resolved, RUN_FILES, HARMLESS, overwrite=request.overwrite, earlier=EARLIER)
