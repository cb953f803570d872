"""Where the time of a run goes: each moment belongs to one part of the work, so the parts add up to the whole."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch

PARTS = {
    "data": "waiting for data",
    "views": "views",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "monitor": "monitor",
    "checkpoints": "checkpoints",
    "rest": "the rest",
}
"""Each part, and how it is called."""


class Clock:
    """Counts the seconds of each part; it begins with ``rest``.

    On a GPU the time is that of its own queue of work, told by events: between the end of one part there and the end of
    the next, whatever the CPU does meanwhile. So a wait for data counts for as long as the GPU stood idle for it, and
    nothing is slowed down: the GPU is waited for only by ``seconds``.

    Args:
        device: where the work is done.
        spent: seconds of each part before.

    Attributes:
        begun: how often each part was begun.
    """

    def __init__(self, device: torch.device | None = None, spent: Mapping[str, float] | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._spent = dict.fromkeys(PARTS, 0.0) | dict(spent or {})
        self.begun = Counter[str]()
        self._marks: deque[tuple[str, Any]] = deque()  # a part and when it began; on a GPU the last ones are still open
        self.to("rest")

    def to(self, part: str) -> None:
        """From now on the time belongs to ``part``."""
        if self._device is None:
            mark: Any = time.perf_counter()
        else:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
        self.begun[part] += 1
        self._marks.append((part, mark))
        while len(self._marks) > 1 and (self._device is None or self._marks[1][1].query()):
            part, began = self._marks.popleft()
            ended = self._marks[0][1]
            self._spent[part] += ended - began if self._device is None else began.elapsed_time(ended) / 1000

    def add(self, part: str, seconds: float) -> None:
        """What was spent on ``part`` before the clock began."""
        self._spent[part] += seconds

    def seconds(self) -> dict[str, float]:
        """Of each part, until now."""
        now = self._marks[-1][0]
        self.to(now)
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            self.to(now)  # all that came before has ended, and is counted
        return dict(self._spent)


def shares(seconds: Mapping[str, float]) -> str:
    """``forward 40 %, backward 52 %, ...``: every part that took a hundredth or more, the largest first."""
    total = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{PARTS[name]} {100 * value / total:.0f} %" for name, value in parts if value >= 0.01 * total)
