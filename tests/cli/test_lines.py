"""Progress for files and pipes, by a clock that the tests set."""

from __future__ import annotations

import time
from collections.abc import Callable

from hap.cli.lines import Lines


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


def until(happened: Callable[[], bool]) -> None:
    """Waits for the thread that watches, however slow the machine is."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_line_comes_while_a_step_takes_long() -> None:
    told: list[str] = []
    clock = Clock()
    with Lines(told.append, every=30, apart=0.001, clock=clock) as progress:
        for step in progress([0, 1, 2], "measuring"):
            clock.now += 30
            until(lambda step=step: len(told) == step + 2)
    assert told == [
        "[  0:00] measuring: 0 of 3",
        "[  0:30] measuring: 0 of 3",
        "[  1:00] measuring: 1 of 3",
        "[  1:30] measuring: 2 of 3",
    ]


def test_loops_that_follow_each_other_quickly_share_a_line() -> None:
    told: list[str] = []
    clock = Clock()
    progress = Lines(told.append, every=60, apart=5, clock=clock)
    for epoch in range(50):
        assert list(progress(iter([1]), f"epoch {epoch}")) == [1]
        clock.now += 1
    assert told == [f"[  0:{second:02d}] epoch {second}" for second in range(0, 50, 5)]


def test_loops_in_loops_are_told_together() -> None:
    told: list[str] = []
    progress = Lines(told.append, every=0, apart=0, clock=Clock())
    for _ in progress(range(2), "epoch"):
        list(progress(range(3), "evaluate", 3))
    assert any(line.endswith("epoch: 1 of 2, evaluate: 0 of 3") for line in told)


def test_a_loop_that_is_left_early_is_forgotten() -> None:
    told: list[str] = []
    clock = Clock()
    progress = Lines(told.append, every=60, apart=0, clock=clock)
    for _ in progress(range(2), "first"):
        break
    clock.now += 1
    list(progress(range(2), "second"))
    assert told == ["[  0:00] first: 0 of 2", "[  0:01] second: 0 of 2"]


def test_nothing_is_said_where_nothing_goes_on() -> None:
    told: list[str] = []
    clock = Clock()
    with Lines(told.append, every=0, apart=0.001, clock=clock):
        until(lambda: clock.asked > 3)
    assert told == []
