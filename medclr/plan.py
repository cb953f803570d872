"""What a pretraining will take, before it is begun: time, memory, disk, and the batch that fits.

Nothing is guessed from the network: each figure comes from a run of the same settings that is cut short after some
steps, in a process and a temporary folder of its own. That run goes all the way, with a look of the monitor, its
checkpoints, the export and the pictures at the end, so each of them is measured too.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medclr import files
from medclr.config import PretrainConfig, to_yaml
from medclr.errors import MedclrError
from medclr.memory import machine_bytes, peak_bytes
from medclr.progress import duration
from medclr.request import Request, read_settings

if TYPE_CHECKING:
    from medclr.clock import Clock

WARM = 2
"""Steps that are not counted: buffers are made in them."""

FEWEST, MOST = 4, 60
"""Steps that are timed, ..."""

ENOUGH_S = 10.0
"""... and for how long, within these bounds."""

FITS = 0.9
"""Share of the memory that a run may take; the system needs the rest."""


@dataclass(frozen=True)
class Trial:
    """What a short run has shown."""

    size_px: int
    batch: int
    chunk: int | None
    step_s: float
    """Seconds of a step."""
    monitor_s: float
    """Of a look of the monitor."""
    checkpoint_s: float
    rest_s: float
    """Of what comes once: beginning, end, and what the first steps took longer."""
    peak_bytes: int
    """Of the process, or of the GPU's memory that its tensors took."""
    steps_bytes: int
    """The same when the steps were done, before the export and the pictures: what grows with the batch."""
    device_bytes: int
    """Memory of the machine or of the GPU."""
    device: str
    checkpoint_bytes: int
    export_bytes: int
    """Encoder, head and pictures."""
    row_bytes: float
    """A row of the metrics."""
    steps_per_epoch: int

    @property
    def together(self) -> int:
        """Slices that go through the network at once."""
        return min(self.chunk or self.batch, self.batch)


@dataclass(frozen=True)
class Forecast:
    """What a run will take. As text it is a table."""

    settings: PretrainConfig
    trials: tuple[Trial, ...]
    """As asked for, one a size of the views, in order; empty if the batch does not fit."""
    other: Trial | None
    """The same step with gradient caching if it is asked for without, else without; None: not possible or not tried."""
    small: tuple[Trial, ...]
    """Smaller batches (with gradient caching: chunks) of the largest views, ascending: how the memory grows."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each trial's size."""
        sizes = [self.settings.views.at(e / self.settings.epochs).size_px for e in range(self.settings.epochs)]
        return tuple(sizes.count(trial.size_px) * trial.steps_per_epoch for trial in self.trials)

    @property
    def looks(self) -> int:
        """Of the monitor."""
        return math.ceil(self.settings.epochs / self.settings.monitor.every_epochs)

    @property
    def steps_s(self) -> float:
        """Seconds of all steps."""
        return sum(n * trial.step_s for n, trial in zip(self.steps, self.trials, strict=True))

    @property
    def now_and_then(self) -> int:
        """Checkpoints that are written because time has passed."""
        minutes = self.settings.monitor.checkpoint_minutes
        return min(sum(self.steps), int(self.steps_s / 60 / minutes)) if minutes else sum(self.steps)

    @property
    def checkpoints(self) -> int:
        """That are written: those, the last, and a best one at each look, which is the most there can be."""
        return self.now_and_then + 1 + self.looks

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        last = self.trials[-1]
        return self.steps_s + self.looks * last.monitor_s + self.checkpoints * last.checkpoint_s + last.rest_s

    @property
    def disk_bytes(self) -> int:
        """Of the run folder when it is done; TensorBoard and MLflow not counted."""
        last = self.trials[-1]
        kept = min(self.settings.monitor.keep, self.now_and_then + 1) + 1  # the best one stays besides
        return int(kept * last.checkpoint_bytes + last.export_bytes + sum(self.steps) * last.row_bytes)

    @property
    def fits(self) -> int:
        """The largest batch (with gradient caching: chunk) of the largest views that should fit, a multiple of 8."""
        known = [*self.small, *self.trials[-1:]]
        return max(int(_items(known, FITS * known[0].device_bytes)) // 8 * 8, 0)

    def __str__(self) -> str:
        rows = [("", "each", "times", "together"), *self._time_rows()] if self.trials else []
        table = [f"{name:<34}{each:>12}{times:>10}{together:>16}".rstrip() for name, each, times, together in rows]
        table += [""] if table else []
        return "\n".join([self._title(), "", *table, *self._memory_lines(), *self._disk_line()])

    def _title(self) -> str:
        settings = self.settings
        network = f"{settings.encoder.name}, {settings.precision}, on {self.small[0].device}"
        return f"{network}: {settings.epochs:,} epochs in batches of {settings.batch:,}"

    def _time_rows(self) -> list[tuple[str, str, str, str]]:
        last = self.trials[-1]
        parts = [
            *(
                (f"steps at {trial.size_px} px", trial.step_s, n)
                for n, trial in zip(self.steps, self.trials, strict=True)
            ),
            ("looks of the monitor", last.monitor_s, self.looks),
            ("checkpoints (at most)", last.checkpoint_s, self.checkpoints),
            ("beginning, export, pictures", last.rest_s, 1),
        ]
        rows = [(name, f"{each:.3g} s", f"{n:,}", duration(each * n)) for name, each, n in parts]
        return [*rows, ("the run", "", "", duration(self.seconds))]

    def _memory_lines(self) -> list[str]:
        whole, large = _size(self.small[0].device_bytes), self.trials[-1] if self.trials else None
        lines = []
        if large is not None:
            lines.append(f"memory, {_chunking(large)}: {_size(large.peak_bytes)} of {whole}")
        else:
            lines.append(f"memory: a batch of {self.settings.batch} does not fit into {whole}; give it a chunk")
        if self.other is not None:
            times = f", a step takes {self.other.step_s / large.step_s:.2f} times as long" if large else ""
            lines.append(f"memory, {_chunking(self.other)}: {_size(self.other.peak_bytes)}{times}")
        what = "batch" if self.small[0].chunk is None else "chunk"
        lines.append(f"the largest {what} that fits at {self.small[0].size_px} px: about {self.fits:,}")
        return lines

    def _disk_line(self) -> list[str]:
        if not self.trials:
            return []
        kept = min(self.settings.monitor.keep, self.now_and_then + 1) + 1
        each = _size(self.trials[-1].checkpoint_bytes)
        return [f"disk: {_size(self.disk_bytes)}, {kept} checkpoints of {each} each among it"]


def plan(
    store: Path | str,
    *,
    config: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    save: Path | str | None = None,
) -> Forecast:
    """Say what a pretraining would take: time, memory, disk. Takes a minute or some; nothing is left behind.

    Args:
        store: Slice store that ``prepare`` wrote.
        config: YAML file with settings.
        settings: Settings by their dotted name, as for ``pretrain``.
        save: Write the table to this file, too.

    Raises:
        MedclrError: settings or a store that ``pretrain`` would refuse.
    """
    words = ["--store", str(store), *(["--config", str(config)] if config else [])]
    words += [f"--{key}={'null' if value is None else value}" for key, value in (settings or {}).items()]
    return command([*words, *(["--save", str(save)] if save else [])])


def command(arguments: Sequence[str]) -> Forecast:
    """``medclr plan``: the options are those of ``medclr pretrain``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MedclrError("plan measures a single process; start it without torchrun")
    request = read_settings(arguments, planned=True)
    settings = request.settings
    views, batch, chunk = settings.views, settings.batch, settings.chunk
    is_chunked = chunk is not None and chunk < batch
    whole = chunk if is_chunked and chunk else batch

    def trial_of(items: int) -> Trial:
        """So many slices at once, of the largest views: in as many chunks as asked for."""
        return _trial(request, views.size_px, items * (batch // whole), items if is_chunked else None, quick=True)

    small = [trial_of(max(2, whole // 4))]
    room = FITS * small[0].device_bytes
    if _bytes(small, whole) > room and whole >= 16:  # a second one tells what of the first is there in any case
        small.insert(0, trial_of(whole // 8))
    sizes = list(dict.fromkeys(views.at(epoch / settings.epochs).size_px for epoch in range(settings.epochs)))
    trials = [_trial(request, size, batch, chunk) for size in sizes] if _bytes(small, whole) <= room else []
    other = None
    other_chunk = None if is_chunked else _chunk_of(batch)
    if other_chunk is not None or (is_chunked and _bytes([*small, *trials[-1:]], batch) <= room):
        other = _trial(request, views.size_px, batch, other_chunk, quick=True)
    forecast = Forecast(settings, tuple(trials), other, tuple(small))
    if request.save is not None:
        files.write_text(request.save, f"{forecast}\n")
    return forecast


def _line(known: Sequence[Trial]) -> tuple[float, float]:
    """Memory as a line over the slices that go through the network at once: bytes of none, and bytes of each.

    Through the last two; one alone is taken as if all of its memory were that of its slices: rather too much.
    """
    large, small = known[-1], known[-2] if len(known) > 1 else known[-1]
    if large.together == small.together:
        return 0.0, large.steps_bytes / large.together
    each = max((large.steps_bytes - small.steps_bytes) / (large.together - small.together), 1.0)
    return large.steps_bytes - each * large.together, each


def _bytes(known: Sequence[Trial], items: int) -> float:
    """What so many slices at once should take."""
    none, each = _line(known)
    return none + each * items


def _items(known: Sequence[Trial], n_bytes: float) -> float:
    """How many slices at once should take so much."""
    none, each = _line(known)
    return (n_bytes - none) / each


def _chunk_of(batch: int) -> int | None:
    """A chunk to show what gradient caching would take: the largest that is at most a quarter of the batch."""
    return next((chunk for chunk in range(batch // 4, 1, -1) if batch % chunk == 0), None)


def _chunking(trial: Trial) -> str:
    return "without chunks" if trial.together == trial.batch else f"in chunks of {trial.chunk}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _trial(request: Request, size_px: int, batch: int, chunk: int | None, *, quick: bool = False) -> Trial:
    """Run some steps in a new process; ``quick`` ones for the memory, not for the time.

    Raises:
        MedclrError: the run is refused, or its process has died.
    """
    settings, last = request.settings, request.settings.views.size_px
    schedule = None if size_px == last else ((0.0, size_px), (1 - 1e-9, last))  # the network is made for the last one
    views = replace(settings.views, size_px_schedule=schedule)
    tried = replace(request, settings=replace(settings, batch=batch, chunk=chunk, views=views))
    what = f"a batch of {batch} at {size_px} px" + (f" in chunks of {chunk}" if chunk and chunk < batch else "")
    print(f"medclr: trying {what}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="medclr-plan-") as folder:
        config, out = Path(folder) / "config.yaml", Path(folder) / "run"
        files.write_text(config, to_yaml(tried.resolved))
        words = ["--config", str(config), "--store", str(request.store), "--out", str(out)]
        command = [sys.executable, "-m", "medclr.plan", "quick" if quick else "timed", *words]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - this program itself
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}, without a word"])[-1]
        raise MedclrError(f"the trial of {what} did not end well ({said}); try a smaller one")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise MedclrError(found["error"])
    return Trial(size_px=size_px, batch=batch, chunk=chunk, **found)


class _Watch:
    """Looks at the clock after each step, and ends the run after some."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._marks: list[float] = []  # seconds when each step was done, monitor and checkpoints left out

    def __call__(self, step: int, clock: "Clock") -> bool:
        self.clock, self.steps_bytes = clock, _peak(self._device)
        self._marks.append(_without_pauses(clock.seconds()))
        timed = len(self._marks) - WARM
        long = timed > 0 and self._marks[-1] - self._marks[WARM - 1] > ENOUGH_S
        return timed >= FEWEST and (self._quick or long or timed >= MOST)

    @property
    def step_s(self) -> float:
        """Mean seconds of a step, the first ones left out."""
        marks = self._marks[WARM - 1 :] if len(self._marks) > WARM else [0.0, *self._marks]
        return (marks[-1] - marks[0]) / (len(marks) - 1)

    def found(self, out: Path) -> dict[str, Any]:
        """Fields of ``Trial``, when the run is complete."""
        seconds, begun = self.clock.seconds(), self.clock.begun
        steps = len(self._marks)
        exported = [file for folder in ("encoder", "figures") for file in (out / folder).iterdir()]
        return {
            "step_s": self.step_s,
            "peak_bytes": _peak(self._device),
            "steps_bytes": self.steps_bytes,
            "monitor_s": seconds["monitor"] / begun["monitor"],
            "checkpoint_s": seconds["checkpoints"] / begun["checkpoints"],
            "rest_s": max(_without_pauses(seconds) - steps * self.step_s, 0.0),
            "checkpoint_bytes": (out / "checkpoints" / "best.pt").stat().st_size,
            "export_bytes": sum(file.stat().st_size for file in exported),
            "row_bytes": (out / "metrics.jsonl").stat().st_size / steps,
        }


def _without_pauses(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values()) - seconds["monitor"] - seconds["checkpoints"]


def _child(kind: str, words: Sequence[str]) -> dict[str, Any]:
    """What a trial has shown, in its own process."""
    import torch

    from medclr.pretrain import train
    from medclr.track import read_metrics

    started = time.perf_counter()
    request = read_settings(words)
    on_gpu = request.settings.device != "cpu" and torch.cuda.is_available()
    watch = _Watch("cuda" if on_gpu else "cpu", quick=kind == "quick")
    try:
        train(request, started, watch)
    except MedclrError as error:
        return {"error": str(error)}
    row = read_metrics(request.out)[-1]
    found = watch.found(request.out) | {"steps_per_epoch": round(row["step"] / row["epoch"])}
    if not on_gpu:
        return found | {"device": f"a CPU with {torch.get_num_threads()} threads", "device_bytes": machine_bytes()}
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return found | {"device": torch.cuda.get_device_name(), "device_bytes": memory}


def _peak(device: str) -> int:
    """The most memory so far: of a GPU's tensors, or of this process."""
    if device == "cpu":
        return peak_bytes()
    import torch

    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], sys.argv[2:])))
