"""THE pretraining loop: slices in, two views each, one contrastive step, until the schedule ends.

A run is a function of its settings and its store: sample order, views and initial weights are keyed by (seed, epoch)
and (seed, step), so a run that was killed and resumed has the same weights as one that was not.
"""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclr import checkpoint, figures, methods, monitor
from medclr.augment.views import describe, plain_view, two_views
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
from medclr.data.leave_out import left_out, pinned
from medclr.data.loader import Loader, load_batch
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.files import LOCK_NAME, alone, write_text
from medclr.memory import keep_freed_memory
from medclr.models.encoder import Encoder, build_encoder
from medclr.optim.lars import build_optimizer, param_groups
from medclr.optim.schedule import scaled_lr, warmup_cosine
from medclr.progress import duration, progress
from medclr.track import Backend, Tracker, check, read_metrics

CURVES = {
    "loss": "NT-Xent loss",
    "lr": "learning rate",
    "knn": "kNN balanced accuracy (training patients)",
    "effective_rank": "effective rank of the embeddings",
    "uniformity": "uniformity (lower is more spread)",
    "images_per_s": "slices a second",
}


RUN_FILES = {"config.yaml", "metrics.jsonl", "checkpoints", "encoder", "figures", "tensorboard", "mlflow.db", LOCK_NAME}
"""All that a run writes, and so all that --overwrite may remove."""

Indices = NDArray[np.int64]

LOG_EVERY = 10
"""Steps between two rows of metrics.jsonl; the first and the last step have theirs too."""


SETTLED_STEPS = 50
"""Before that the running statistics of batch norm (momentum 0.1) still hold their start, and eval mode misleads."""


@dataclass(frozen=True)
class RunSummary:
    """What a finished run says of itself."""

    out: Path
    steps: int
    seconds: float
    figures: Mapping[str, float]

    def __str__(self) -> str:
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in self.figures.items())
        return (
            f"{self.out}: {self.steps} steps in {duration(self.seconds)}; {shown}; pictures in {self.out / 'figures'}"
        )


def pretrain(
    store: Path | str,
    out: Path | str,
    *,
    config: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    track: Backend | None = None,
    overwrite: bool = False,
) -> RunSummary:
    """Train an encoder on the slices of a store.

    Args:
        store: Slice store that ``prepare`` wrote.
        out: Run folder; if it holds an unfinished run with the same settings, that run goes on.
        config: YAML file with settings.
        settings: Settings by their dotted name, as on the command line: ``{"epochs": 20, "views.size_px": 64}``.
        track: Also log to TensorBoard or MLflow.
        overwrite: Replace a run that is already in ``out``.

    Raises:
        MedclrError: wrong settings, a store that cannot be read, or an ``out`` that holds something else.
    """
    words = ["--store", str(store), "--out", str(out), *(["--track", track] if track else [])]
    words += ["--config", str(config)] if config else []
    words += [f"--{key}={'null' if value is None else value}" for key, value in (settings or {}).items()]
    return command([*words, "--overwrite", str(overwrite).lower()])


def command(arguments: Sequence[str]) -> RunSummary:
    """``medclr pretrain``: the options are the fields of PretrainConfig and of the chosen method's Config."""
    request = read_settings(arguments)
    return _train(request, Store(request.store))


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


def _open_run(request: Request) -> None:
    """Make the run folder, or accept one with the same settings."""
    out, existing = request.out, request.out / "config.yaml"
    if not existing.exists():
        if out.exists() and (not out.is_dir() or any(p.name != LOCK_NAME for p in out.iterdir())):
            raise MedclrError(f"{out}: exists and is not a run of medclr; choose another --out")
    elif request.overwrite:
        if strange := sorted(p.name for p in out.iterdir() if p.name not in RUN_FILES):
            raise MedclrError(
                f"{out}: holds {strange[0]}, which no run wrote, and is not overwritten; choose another --out"
            )
        for name in RUN_FILES - {LOCK_NAME}:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        if changed := differences(read_yaml(existing), request.resolved):
            advice = "choose another --out, or --overwrite true"
            raise MedclrError(f"{out}: holds a run with other settings ({', '.join(changed)}); {advice}")
        return
    write_text(existing, to_yaml(request.resolved))


def _train(request: Request, store: Store) -> RunSummary:
    settings, out = request.settings, request.out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MedclrError("this medclr pretrains in one process; start it without torchrun")
    device = _device(settings.device)
    keep_freed_memory()
    indices = store.indices(settings.data.split)  # [n]
    if settings.data.leave_out:
        indices = np.setdiff1d(indices, left_out(store, settings.data.leave_out))
    loader = Loader(store, indices, settings.batch, settings.seed, slices_per_scan=settings.data.slices_per_scan)
    check(request.track)
    _open_run(request)  # after all that can be refused: a run that never started leaves nothing
    with alone(out):
        return _loop(request, store, indices, loader, device)


def _loop(request: Request, store: Store, indices: Indices, loader: Loader, device: torch.device) -> RunSummary:
    settings, out, total = request.settings, request.out, request.settings.epochs * loader.steps_per_epoch
    torch.manual_seed(settings.seed)  # initial weights; nothing later draws from the global generator
    encoder = build_encoder(settings.encoder, settings.views.size_px)
    method = methods.get(settings.method).Method(request.own, encoder).to(device, memory_format=torch.channels_last)
    groups = param_groups(method, settings.optim.weight_decay)
    peak_lr = scaled_lr(settings.optim.base_lr, settings.batch, settings.optim.lr_scaling)
    optimizer = build_optimizer(settings.optim.name, groups, lr=peak_lr, momentum=settings.optim.momentum)
    warmup_steps = round(settings.optim.warmup * total)

    step = 0
    origin = {"manifest_sha256": store.info.manifest_sha256, "size_px": store.info.size_px}
    newest = checkpoint.latest(out)
    if newest is None:
        _draw_views(store, indices, settings, out)
    else:
        saved = checkpoint.load(newest)
        if saved["store"] != origin:
            raise MedclrError(f"{out}: was trained on a store of another manifest or slice size; choose another --out")
        step = saved["step"]
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])

    def save() -> None:
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(out, step, {**state, "step": step, "store": origin})

    def require_finite(loss: Tensor) -> float:
        value = loss.item()  # waits for the device: not at each step
        if not math.isfinite(value):
            advice = "lower optim.lr or lengthen optim.warmup, and choose another --out"
            raise MedclrError(f"{out}: the loss is not finite at step {step}; {advice}")
        return value

    def watch() -> dict[str, float]:
        figures = _look(method, store, indices, settings, device)
        tracker.write(step, figures)
        if step >= max(warmup_steps, SETTLED_STEPS) and (warning := monitor.collapse_warning(figures)):
            print(f"medclr: warning: step {step}: {warning}", file=sys.stderr)
        return figures

    last: dict[str, float] = {}  # the newest of each figure: shown beside the bar, and in the summary
    started = saved_at = clock = time.perf_counter()
    clock_step = step
    with (
        Tracker(out, step=step, backend=request.track) as tracker,
        progress("pretrain", total * settings.batch, "slices", done=step * settings.batch) as advance,
        _stop_at_step_end() as stop,
    ):
        for epoch in range(step // loader.steps_per_epoch, settings.epochs):
            for batch in loader.epoch(epoch, start_step=step % loader.steps_per_epoch):
                views = two_views(batch, settings.views, seed=settings.seed, step=step, device=device)  # a, b [B,1,s,s]
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * warmup_cosine(step, total, warmup_steps)
                method.train()
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    loss, logs = method.loss(views.a, views.b, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1

                now = time.perf_counter()
                if step % LOG_EVERY == 0 or step in (1, total):
                    row = {"loss": require_finite(loss), **{name: float(value) for name, value in logs.items()}}
                    speed = (step - clock_step) * settings.batch / (now - clock)
                    row |= {"epoch": step / loader.steps_per_epoch, "lr": group["lr"], "images_per_s": speed}
                    tracker.write(step, row)
                    clock, clock_step, last = now, step, last | {"loss": row["loss"]}
                advance(settings.batch, f"epoch {epoch + 1}/{settings.epochs}{_words(last)}")
                if stop() or now - saved_at > 60 * settings.monitor.checkpoint_minutes:
                    require_finite(loss)
                    save()
                    saved_at = now
                if stop():
                    raise KeyboardInterrupt(f"saved step {step} of {total} in {out}; the same command again goes on")
            if (epoch + 1) % settings.monitor.every_epochs == 0 or step == total:
                require_finite(loss)
                last |= watch()
                clock, clock_step = time.perf_counter(), step
        save()
    _finish(request, encoder, store, indices)
    return RunSummary(out, step, time.perf_counter() - started, last or _last_figures(out))


def _look(
    method: methods.PretrainingMethod,
    store: Store,
    indices: Indices,
    settings: PretrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """Figures of the monitor on a fixed sample of training slices, from the network in eval mode."""
    rng = np.random.default_rng([settings.seed, 1])
    sample = np.sort(rng.permutation(indices)[: settings.monitor.sample])  # [n]
    method.eval()
    features, embeddings, labels, patients = [], [], [], []
    with torch.inference_mode():
        for part in np.array_split(sample, -(-len(sample) // 256)):
            batch = load_batch(store, part)
            x = plain_view(batch.to(device), settings.views.size_px)  # [b,1,s,s]
            f, z = method.embed(x)  # [b,F], [b,K]
            features.append(f)
            embeddings.append(z)
            labels.append(batch.label)
            patients.append(batch.patient)
    z = torch.cat(embeddings).float().cpu()  # [n,K]
    figures = {"effective_rank": monitor.effective_rank(z), "uniformity": monitor.uniformity(z)}
    knn = monitor.knn_accuracy(torch.cat(features).float().cpu(), torch.cat(labels).cpu(), torch.cat(patients).cpu())
    return figures if math.isnan(knn) else {**figures, "knn": knn}


def _draw_views(store: Store, indices: Indices, settings: PretrainConfig, out: Path, n: int = 8) -> None:
    """The contact sheet: source slices and the two views of each, captioned with the parameters drawn."""
    rng = np.random.default_rng([settings.seed, 2])
    modality = store.column("modality")[indices]  # [n]
    kinds = np.unique(modality)
    chosen = [rng.choice(indices[modality == kinds[i % len(kinds)]]) for i in range(n)]  # each modality in turn
    batch = load_batch(store, np.array(chosen))
    source = plain_view(batch, store.info.size_px)  # [n,1,S,S]
    views = two_views(batch, settings.views, seed=settings.seed, step=0)

    def tiles(images: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        return images[:, 0].float().cpu().numpy()

    captions = [
        [
            f"{batch.modalities[int(batch.modality[i])]}, slice {int(batch.slice_index[i])}",
            describe(views, 0, i),
            describe(views, 1, i),
        ]
        for i in range(n)
    ]
    columns = [("slice in the store", tiles(source)), ("view 1", tiles(views.a)), ("view 2", tiles(views.b))]
    figures.contact_sheet(out / "figures" / "views.png", columns, captions, "Two random views of each slice")


def _finish(request: Request, encoder: Encoder, store: Store, indices: Indices) -> None:
    """Export the encoder, with the patients it has seen, and draw the curves."""
    seen = np.unique(store.column("patient")[indices])
    out = request.out
    checkpoint.export_encoder(
        out / "encoder",
        encoder,
        {
            "settings": request.resolved,
            "manifest_sha256": store.info.manifest_sha256,
            "store_px": store.info.size_px,
            "modalities": sorted({store.info.modalities[m] for m in np.unique(store.column("modality")[indices])}),
            "patients": [store.patients[int(p)] for p in seen],
        },
    )
    figures.curves(out / "figures" / "curves.png", read_metrics(out), CURVES)


def _device(name: str) -> torch.device:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MedclrError(f"device: {chosen!r} cannot be used here ({reason}); choose auto, cpu or cuda") from error
    return device


@contextlib.contextmanager
def _stop_at_step_end() -> Iterator[Any]:
    """Ctrl-C asks for a stop after the current step; a second one stops at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, ask) for number in signals}
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _words(watched: Mapping[str, float]) -> str:
    return "".join(f" · {key.replace('_', ' ')} {value:.2f}" for key, value in watched.items())


def _last_figures(out: Path) -> dict[str, float]:
    """The monitor's last row, for a run that was complete before this call."""
    keys = ("loss", *CURVES)
    last: dict[str, float] = {}
    for row in read_metrics(out):
        last |= {key: row[key] for key in keys if key in row and key not in ("lr", "images_per_s")}
    return last
