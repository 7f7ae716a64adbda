from __future__ import annotations

import math

import pytest

from hap.training.schedule import Schedule, factor


def test_cosine() -> None:
    assert factor(0, 100) == 1.0
    assert factor(25, 100) == pytest.approx(0.5 + math.sqrt(0.125))
    assert factor(50, 100) == pytest.approx(0.5)
    assert 0 < factor(99, 100) < 3e-4
    assert factor(100, 100) == 0.0


def test_cosine_does_not_rise_again_where_len_was_too_small() -> None:
    assert factor(150, 100) == 0.0


def test_step_is_a_tenth_at_half_and_again_at_three_quarters() -> None:
    values = [factor(tick, 100, "step") for tick in (0, 49, 50, 74, 75, 99)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("tick", [0, 7, 9])
def test_constant(tick: int) -> None:
    assert factor(tick, 10, "constant") == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warmup_rises_in_a_line_to_one(schedule: Schedule) -> None:
    values = [factor(tick, 40, schedule, warmup=0.1) for tick in range(5)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_after_warmup_spans_what_is_left() -> None:
    assert factor(22, 40, "cosine", warmup=0.1) == pytest.approx(0.5)
    assert factor(40, 40, "cosine", warmup=0.1) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.999])
def test_one_tick_runs_are_defined(schedule: Schedule, warmup: float) -> None:
    assert 0 < factor(0, 1, schedule, warmup) <= 1
    assert 0 <= factor(1, 1, schedule, warmup) <= 1
