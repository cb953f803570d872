"""Ctrl-C, and a scheduler's SIGTERM: leave what is being done, save, and go."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from medclr.distributed import Group
from medclr.errors import Terminated


class GaveUp(Exception):
    """Work was left in the middle, because a stop was asked for; it is as if it had not been begun."""


class StopRequest:
    """Ctrl-C, or a scheduler's SIGTERM, asks for a stop; a second Ctrl-C stops at once."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._received = 0  # the signal handler alone writes it, so that none is lost while others are asked
        self._agreed = 0
        self._raises = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread: the caller owns the signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        # torchrun passes on what the terminal has sent to everyone: there, a second one is no second wish.
        if self._received == number == signal.SIGINT and self._group.world_size == 1:
            raise KeyboardInterrupt
        self._received = max(self._received, number)
        if self._raises:
            self._give_up()

    def asked(self) -> bool:
        """Whether any process was asked to stop; the same answer in all of them, which must all ask."""
        self._agreed = self._group.highest(self._received)
        return self._agreed > 0

    def check(self) -> None:
        """Raise GaveUp if ``asked``."""
        if self.asked():
            raise GaveUp

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside stands what can be left anywhere: a signal raises GaveUp between two bytecodes.

        A single process does so. Several must leave at the same point, and have to ``check``.
        """
        self._raises = self._group.world_size == 1
        try:
            if self._raises and self._received:
                self._give_up()
            yield
        finally:
            self._raises = False

    def _give_up(self) -> None:
        self._raises, self._agreed = False, self._received
        raise GaveUp

    def leaving(self, step: int, total: int, out: Path) -> KeyboardInterrupt:
        """What to raise once all is saved."""
        kind = Terminated if self._agreed == signal.SIGTERM else KeyboardInterrupt
        return kind(f"saved step {step} of {total} in {out}; the same command again goes on")
