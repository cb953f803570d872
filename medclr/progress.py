"""Progress of long work: a bar with a rate and the time left; without a terminal, a line now and then."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

QUIET_SECONDS = 30.0
"""Without a terminal (a log file, a batch system), one line so often."""


class Advance(Protocol):
    """Call it with the number of items done since the last call, and words that stand beside the bar."""

    def __call__(self, items: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Yield ``advance(items, note)``; ``done`` items were finished by an earlier run and do not count in the rate."""
    started = time.perf_counter()
    count = done

    def speed() -> tuple[float, float]:
        rate = (count - done) / max(time.perf_counter() - started, 1e-9)
        return rate, (total - count) / rate if rate else float("inf")

    if not sys.stderr.isatty():  # nobody is watching
        spoken = started

        def line(items: int, note: str = "") -> None:
            nonlocal count, spoken
            count += items
            if time.perf_counter() - spoken >= QUIET_SECONDS:
                spoken = time.perf_counter()
                rate, left = speed()
                words = f"{title}: {count:,}/{total:,} {unit}, {rate:,.1f} {unit}/s, {duration(left)} left"
                print(f"{words}  {note}".rstrip(), file=sys.stderr, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[rate]}"),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def draw(items: int, note: str = "") -> None:
            nonlocal count
            count += items
            rate, left = speed()
            text = f"{count:,}/{total:,} {unit} · {rate:,.0f} {unit}/s · {duration(left)} left"
            bar.update(task, completed=count, rate=text, note=note)

        yield draw


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
