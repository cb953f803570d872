"""Each moment belongs to one part, on a CPU and in the queue of a GPU."""

import pytest
import torch

from medclr import clock
from medclr.clock import PARTS, Clock, shares


class Machine:
    """A CPU that waits and a GPU that works through a queue, in seconds of their own."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def perf_counter(self) -> float:
        return self.now

    def launch(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def synchronize(self, device: object = None) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self, stream: object) -> None:
        self.at = max(self.machine.now, self.machine.free)

    def query(self) -> bool:
        return self.at <= self.machine.now

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "else torch raises"
        return 1000 * (end.at - self.at)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock.time, "perf_counter", machine.perf_counter)
    monkeypatch.setattr(torch.cuda, "Event", machine.event)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return machine


def test_on_a_cpu_the_parts_are_what_lies_between_the_calls(machine):
    clock = Clock(spent={"views": 10.0})
    clock.add("rest", 4)
    for part, seconds in (("data", 1), ("views", 2), ("data", 3), ("rest", 5)):
        clock.to(part)
        machine.now += seconds
    expected = dict.fromkeys(PARTS, 0.0) | {"data": 4, "views": 12, "rest": 9}
    assert clock.seconds() == clock.seconds() == expected
    machine.now += 1
    assert clock.seconds() == expected | {"rest": 10}


def test_on_a_gpu_a_wait_counts_as_long_as_the_gpu_stands_idle(machine):
    clock = Clock(torch.device("cuda"))
    for wait in (1.0, 6.0, 1.0):  # the GPU works for 4 s a step, and the CPU is told at once to go on
        clock.to("data")
        machine.now += wait
        clock.to("forward")
        machine.launch(1)
        clock.to("backward")
        machine.launch(3)
    clock.to("rest")
    # 1 s without work; then the 4 s hide 4 of the 6 s; then all of 1 s
    assert clock.seconds() == dict.fromkeys(PARTS, 0.0) | {"data": 1 + 2 + 0, "forward": 3, "backward": 9}
    assert machine.now == 1 + 4 + 2 + 4 + 4 == sum(clock.seconds().values())


def test_shares_are_told_from_the_largest_on():
    assert shares({"data": 0.4, "forward": 60, "backward": 39.6}) == "forward 60 %, backward 40 %"
    assert shares(dict.fromkeys(PARTS, 0.0)) == shares({})  # a run that took no time
