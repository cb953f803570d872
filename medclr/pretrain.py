"""THE pretraining loop: slices in, two views each, one contrastive step, until the schedule ends.

A run is a function of its settings and its store: sample order, views and initial weights are keyed by (seed, epoch)
and (seed, step), so a run that was killed and resumed has the same weights as one that was not, and a run on several
processes those of a run on one.
"""

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from medclr import checkpoint, figures, methods, monitor
from medclr.augment import chain
from medclr.augment.views import Draws
from medclr.clock import PARTS, Clock, shares
from medclr.data.leave_out import left_out
from medclr.data.loader import Loader, load_batch
from medclr.data.store import Store
from medclr.device import device_of
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.files import alone, write_json
from medclr.look import Indices, draw_views, look
from medclr.memory import keep_freed_memory
from medclr.methods import PretrainingMethod
from medclr.models.encoder import Encoder, build_encoder
from medclr.models.heads import ProjectionHead
from medclr.models.unet import UNetDecoder
from medclr.models.weights import load_weights
from medclr.optim.lars import build_optimizer, param_groups
from medclr.optim.schedule import scaled_lr, warmup_cosine
from medclr.progress import duration, progress
from medclr.request import Request, chosen_order, open_run, read_settings
from medclr.step import Plan, Result, Step, plan_of
from medclr.stop import GaveUp, StopRequest
from medclr.track import Backend, Tracker, check, read_metrics

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "knn": "kNN balanced accuracy (training patients)",
    "effective_rank": "effective rank of the embeddings",
    "uniformity": "uniformity (lower is more spread)",
    "images_per_s": "slices a second",
}

SPEED_STEPS = 10
"""The speed is that of the last so many steps."""

SHOWN = ("loss", "knn", "effective_rank", "uniformity")
"""Figures beside the bar, and in the summary."""

SEND_EVERY = 10
"""Each step has its row in metrics.jsonl; TensorBoard and MLflow get every tenth."""

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

DTYPES = {"float64": torch.float64}

SETTLED_STEPS = 50
"""Before that the running statistics of batch norm (momentum 0.1) still hold their start, and eval mode misleads."""


@dataclass(frozen=True)
class RunSummary:
    """What a finished run says of itself."""

    out: Path
    steps: int
    seconds: float
    figures: Mapping[str, float]
    times: Mapping[str, float]
    """Seconds of each part of the work (``medclr.clock.PARTS``), over all stretches."""

    def __str__(self) -> str:
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in self.figures.items())
        return (
            f"{self.out}: {self.steps} steps in {duration(self.seconds)}; {shown}; pictures in {self.out / 'figures'}\n"
            f"the time went into: {shares(self.times)}"
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
    started = time.perf_counter()
    return train(read_settings(arguments), started)


@dataclass
class State:
    """All that a run needs to go on, besides its settings: the content of a checkpoint."""

    method: PretrainingMethod
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    store: Mapping[str, Any]
    """What it is trained on."""
    step: int = 0
    """Steps that are done."""
    skipped: int = 0
    """Steps that were left out because they were not finite."""
    best: float = -math.inf
    """Score of the best checkpoint."""
    row: dict[str, float] = field(default_factory=dict)
    """Figures of the last step that are not in the metrics yet: those of the monitor are still to come."""

    _PARTS: ClassVar = ("method", "optimizer", "scaler")
    _FACTS: ClassVar = ("store", "step", "skipped", "best", "row")

    def content(self) -> dict[str, Any]:
        """Tensors and plain types."""
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        return parts | {name: getattr(self, name) for name in self._FACTS}

    def resume(self, out: Path, group: Group) -> None:
        """Go on from the newest whole checkpoint, if there is one; it is read by the first process alone.

        Raises:
            MedclrError: all checkpoints are damaged, or it was trained on another store.
        """
        with group.together():
            newest = checkpoint.latest(out) if group.is_first else None
        content = group.from_first(newest.read_bytes() if newest else b"")
        if not content:
            return
        saved = checkpoint.from_bytes(content, newest or out)
        if saved["store"] != self.store:
            raise MedclrError(f"{out}: was trained on a store of another manifest or slice size; choose another --out")
        for name in self._PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name in self._FACTS:
            setattr(self, name, saved.get(name, getattr(self, name)))  # earlier versions had no row


Enough = Callable[[int, Clock], bool]
"""Asked after each step, with the number of steps that are done."""


def train(request: Request, started: float, enough: Enough | None = None) -> RunSummary:
    """The run that is asked for, begun at that value of ``time.perf_counter``.

    Args:
        request: what is asked for.
        started: when.
        enough: whether to end the run as if it were complete; None: it goes on to the end.
    """
    settings = request.settings
    group = Group.from_environment(settings.device)
    try:
        with group.together():
            device = device_of(settings.device)
            store = Store(request.store)
            indices = store.indices(settings.data.split)  # [n]
            if settings.data.leave_out:
                indices = np.setdiff1d(indices, left_out(store, settings.data.leave_out))
            slices_bytes = 2 * store.info.size_px**2 * len(indices)
            chosen = chosen_order(request, slices_bytes) if group.is_first else ""
        order: Any = group.from_first(chosen.encode()).decode()  # the nodes may differ in their memory
        settings = replace(settings, data=replace(settings.data, order=order))
        request = replace(request, settings=settings)
        with group.together():
            plan = plan_of(settings.batch, settings.chunk, group)
            window_bytes = settings.data.window_mb * 2**20 if order == "shards" else None
            loader = Loader(
                store,
                indices,
                settings.batch,
                settings.seed,
                plan.rows,
                plan.pieces,
                settings.data.slices_per_scan,
                window_bytes,
                settings.encoder.slices,
                pinned=device.type == "cuda",
            )
            check(request.track)
            kinds = np.unique(store.column("modality")[indices])
            chain.check(settings.views, [store.info.modalities[kind] for kind in kinds])
            keep_freed_memory()
            method = _build(request, group, device)
            method.check(store, loader.indices)
        with contextlib.ExitStack() as held:
            with group.together():
                if group.is_first:  # after all else that can be refused: a run that never started leaves nothing
                    held.enter_context(alone(request.out))
                    open_run(request)
            clock = Clock(device, _spent(request.out))
            clock.add("rest", time.perf_counter() - started)
            return _loop(request, method, loader, plan, group, clock, enough)
    finally:
        group.close()


def _build(request: Request, group: Group, device: torch.device) -> PretrainingMethod:
    """The network to begin with."""
    settings = request.settings
    torch.manual_seed(settings.seed)  # initial weights; nothing later draws from the global generator
    encoder = build_encoder(settings.encoder, settings.views.size_px)
    matched = load_weights(encoder, settings.init)
    if matched and group.is_first:
        print(matched, file=sys.stderr)
    method = methods.get(settings.method).Method(request.own, encoder)
    method.to(device, DTYPES.get(settings.precision, torch.float32), memory_format=torch.channels_last)
    ready: PretrainingMethod = group.sync_batch_norm(method)
    return ready


def _loop(
    request: Request,
    method: PretrainingMethod,
    loader: Loader,
    plan: Plan,
    group: Group,
    clock: Clock,
    enough: Enough | None,
) -> RunSummary:
    settings, out, store = request.settings, request.out, loader.store
    device = next(method.parameters()).device
    per_epoch, total = loader.steps_per_epoch, settings.epochs * loader.steps_per_epoch
    end = total
    warmup_steps = round(settings.optim.warmup * total)
    peak_lr = scaled_lr(settings.optim.base_lr, settings.batch, settings.optim.lr_scaling)
    groups = param_groups(method, settings.optim.weight_decay)
    optimizer = build_optimizer(settings.optim.name, groups, lr=peak_lr, momentum=settings.optim.momentum)
    autocast = AUTOCAST.get(settings.precision)
    take_step = Step(method, optimizer, plan, group, autocast, compiled=settings.compile, clock=clock)
    origin = {"manifest_sha256": store.info.manifest_sha256, "size_px": store.info.size_px}
    state = State(method, optimizer, take_step.scaler, origin)
    state.resume(out, group)

    def save(*, best: bool = False) -> None:
        if group.is_first:
            clock.to("checkpoints")
            checkpoint.save(out, state.step, state.content(), keep=settings.monitor.keep, best=best)
            clock.to("rest")
            _write_times(out, clock)

    def one_step(lr: float) -> dict[str, float]:
        """One step; its row of the metrics."""
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        views = settings.views.at(state.step // per_epoch / settings.epochs)
        draws = Draws(views, settings.batch, seed=settings.seed, step=state.step)
        try:
            result = take_step(batches, draws, stop)
        except MedclrError as error:  # of this process alone, and of others that the command line leaves silent
            if not group.is_first:
                print(f"medclr: process {group.rank}: {error}", file=sys.stderr)
            raise
        state.skipped += result.is_lost
        if state.skipped > settings.skip_nonfinite:
            raise MedclrError(
                _not_finite(result, state.step, store, settings.encoder.slices, draws, plan, group, device, out)
            )
        state.step += 1
        row = {"loss": result.loss, "grad_norm": result.grad_norm, **result.logs}
        row = {key: value for key, value in row.items() if math.isfinite(value)}  # JSON knows no NaN
        if result.is_lost:
            row["skipped"] = state.skipped
        if settings.views.size_px_schedule:
            row["size_px"] = views.size_px
        return row | {"epoch": state.step / per_epoch, "lr": lr, "images_per_s": speed.step()}

    def judge(seen: Mapping[str, float], loss: float) -> None:
        """Warn of a collapse; keep the weights if they are the best so far."""
        if state.step >= max(warmup_steps, SETTLED_STEPS) and (warning := monitor.collapse_warning(seen)):
            print(f"medclr: warning: step {state.step}: {warning}", file=sys.stderr)
        if (score := seen.get("knn", -loss)) > state.best:
            state.best = score
            save(best=True)

    if group.is_first and state.step == 0:
        draw_views(store, loader.indices, settings, out)
    last: dict[str, float] = {}  # the newest of each figure: shown beside the bar, and in the summary
    saved_at = time.perf_counter()
    speed = Speed(settings.batch)
    with (
        _report(request, total, state.step, group) as report,
        StopRequest(group) as stop,
        contextlib.closing(loader.epochs(state.step, settings.epochs)) as batches,
    ):
        while state.step < end or state.row:
            try:
                state.row = state.row or one_step(peak_lr * warmup_cosine(state.step, total, warmup_steps))
                if enough is not None and enough(state.step, clock):
                    end = state.step
                epoch, within = divmod(state.step, per_epoch)
                is_watched = (within == 0 and epoch % settings.monitor.every_epochs == 0) or state.step == end
                if is_watched:
                    clock.to("monitor")
                seen = look(method, store, loader.indices, settings, device, group, stop) if is_watched else {}
                clock.to("rest")
            except GaveUp:
                save()
                raise stop.leaving(state.step, total, out) from None
            row, state.row = state.row | seen, {}
            if seen:
                judge(seen, row.get("loss", math.nan))
            last |= {key: value for key, value in row.items() if key in SHOWN}
            report(state.step, row, is_watched, f"epoch {-(-state.step // per_epoch)}/{settings.epochs}{_words(last)}")

            now = time.perf_counter()
            if is_watched:
                speed.restart()
            is_stopped = stop.asked() and state.step < end
            if is_stopped or state.step == end or now - saved_at > 60 * settings.monitor.checkpoint_minutes:
                save()
                saved_at = now
            if is_stopped:
                raise stop.leaving(state.step, total, out)
    if group.is_first:
        _finish(request, method, store, loader.indices)
        _write_times(out, clock)
    group.barrier()  # nobody leaves before the run is whole
    times = clock.seconds()
    return RunSummary(out, state.step, sum(times.values()), last or _last_figures(out), times)


class Speed:
    """Slices a second, over the last ``SPEED_STEPS`` steps."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._ended = deque([time.perf_counter()], maxlen=SPEED_STEPS + 1)

    def step(self) -> float:
        """A step has ended: the speed now."""
        self._ended.append(time.perf_counter())
        return (len(self._ended) - 1) * self._batch / (self._ended[-1] - self._ended[0])

    def restart(self) -> None:
        """Leave out what was done since the last step."""
        self._ended.clear()
        self._ended.append(time.perf_counter())


@contextlib.contextmanager
def _report(request: Request, total: int, step: int, group: Group) -> Iterator[Callable[..., None]]:
    """Yield ``report(step, row, is_watched, note)``: a row of metrics.jsonl and the bar; only the first process does.

    TensorBoard and MLflow get every tenth row, and those with figures of the monitor.
    """
    if not group.is_first:
        yield lambda step, row, is_watched, note: None
        return
    batch = request.settings.batch
    with (
        Tracker(request.out, step=step, backend=request.track) as tracker,
        progress("pretrain", total * batch, "slices", done=step * batch) as advance,
    ):

        def report(step: int, row: Mapping[str, float], is_watched: bool, note: str) -> None:
            tracker.write(step, row, send=is_watched or step % SEND_EVERY == 0)
            advance(batch, note)

        yield report


def _not_finite(
    result: Result,
    step: int,
    store: Store,
    slices: int,
    draws: Draws,
    plan: Plan,
    group: Group,
    device: torch.device,
    out: Path,
) -> str:
    """What to say of a step whose loss or gradient is not finite, with the slices that are to blame."""
    index = group.all_gather(result.facts.index.to(device)).cpu()  # [B], slices of the store
    rows = group.all_gather(torch.from_numpy(plan.rows).to(device)).cpu()  # [B], their rows of the global batch
    blamed = []
    for piece in torch.arange(len(index)).split(256):
        batch = load_batch(store, index[piece].numpy(), slices)
        is_bad = torch.zeros(len(piece), dtype=torch.bool)
        for view in (0, 1):
            is_bad |= ~draws.view(batch, view, rows[piece]).isfinite().flatten(1).all(1)
        for i in is_bad.nonzero()[:, 0].tolist():
            blamed.append(f"slice {int(batch.slice_index[i])} of scan {store.scans[int(batch.scan[i])].scan_id}")
    newest = checkpoint.latest(out) if group.is_first else None
    saved = group.from_first(newest.name.encode() if newest else b"").decode()  # all processes say the same
    what = f"step {step} is not finite: the loss is {result.loss:g}, the norm of its gradient {result.grad_norm:g}"
    who = f"to blame are the views of {', '.join(blamed[:5])}" if blamed else "no slice alone is to blame"
    where = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
    advice = "lower optim.lr or lengthen optim.warmup and choose another --out, or allow some with skip_nonfinite"
    return f"{out}: {what}; {who}; {where}; {advice}"


def _finish(request: Request, method: PretrainingMethod, store: Store, indices: Indices) -> None:
    """Export the encoder, with the patients it has seen, and the head and decoder above it; draw the curves."""
    encoder, head, decoder = method.encoder, getattr(method, "head", None), getattr(method, "decoder", None)
    assert isinstance(encoder, Encoder)
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
            "patients": sorted({store.patients[int(p)] for p in seen} | encoder.seen_patients),
        },
        head if isinstance(head, ProjectionHead) else None,
        decoder if isinstance(decoder, UNetDecoder) else None,
    )
    figures.curves(out / "figures" / "curves.png", read_metrics(out), CURVES)


TIMES = "time.json"
"""Seconds of each part of the work, over all stretches; written with each checkpoint, and at the end."""


def _spent(out: Path) -> dict[str, float]:
    """What earlier stretches of a run have written of their times."""
    try:
        read = json.loads((out / TIMES).read_text(encoding="utf-8"))
        return {name: float(read[name]) for name in PARTS}
    except (OSError, ValueError, KeyError, TypeError):  # none yet: times are worth telling, not worth failing for
        return {}


def _write_times(out: Path, clock: Clock) -> None:
    seconds = {name: round(value, 3) for name, value in clock.seconds().items()}
    write_json(out / TIMES, seconds | {"total": round(sum(seconds.values()), 3)})


def _words(watched: Mapping[str, float]) -> str:
    return "".join(f" · {key.replace('_', ' ')} {value:.2f}" for key, value in watched.items())


def _last_figures(out: Path) -> dict[str, float]:
    """The monitor's last row, for a run that was complete before this call."""
    last: dict[str, float] = {}
    for row in read_metrics(out):
        last |= {key: row[key] for key in SHOWN if key in row}
    return last
