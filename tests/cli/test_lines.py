"""Progress for files and pipes."""

from __future__ import annotations

import re
import time

from hap.cli.lines import Lines


def test_a_line_comes_while_a_step_takes_long() -> None:
    told: list[str] = []
    with Lines(told.append, every=0.1, apart=0.01) as progress:
        for _ in progress([1, 2, 3], "measuring"):
            time.sleep(0.25)
    assert 5 <= len(told) <= 12
    assert told[0].endswith("measuring: 0 of 3") and told[-1].endswith("measuring: 2 of 3")
    assert all(re.fullmatch(r"\[ +\d+:\d\d\] [ -~]+", line) for line in told)


def test_loops_that_follow_each_other_quickly_share_a_line() -> None:
    told: list[str] = []
    with Lines(told.append, every=60, apart=0.2) as progress:
        for epoch in range(50):
            assert list(progress(iter([1]), f"epoch {epoch}")) == [1]
            time.sleep(0.01)
    assert 2 <= len(told) <= 6 and told[0].endswith("epoch 0")


def test_loops_in_loops_are_told_together() -> None:
    told: list[str] = []
    with Lines(told.append, every=0, apart=0) as progress:
        for _ in progress(range(2), "epoch"):
            list(progress(range(3), "evaluate", 3))
    assert any(line.endswith("epoch: 1 of 2, evaluate: 0 of 3") for line in told)


def test_a_loop_that_is_left_early_is_forgotten() -> None:
    told: list[str] = []
    with Lines(told.append, every=60, apart=0) as progress:
        for _ in progress(range(2), "first"):
            break
        time.sleep(0.05)
        list(progress(range(2), "second"))
    assert told[-1].endswith("] second: 0 of 2")


def test_nothing_is_said_where_nothing_goes_on() -> None:
    told: list[str] = []
    with Lines(told.append, every=0.01, apart=0.01):
        time.sleep(0.1)
    assert told == []
