"""A request to stop is heard whenever it comes."""

import os
import signal

from medclr.distributed import Group
from medclr.stop import StopRequest


class Slow(Group):
    """While the processes agree, one of them is asked to leave."""

    def highest(self, value: int) -> int:
        if value == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return value


def test_a_signal_that_comes_while_the_processes_agree_counts_the_next_time() -> None:
    with StopRequest(Slow()) as stop:
        assert not stop.asked()
        assert stop.asked()
