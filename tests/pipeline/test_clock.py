"""Plans that are held to a latency by the clock."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

import hap
from hap.pipeline.clock import TRIES, by_the_clock, clock
from hap.planning import Decision
from hap.planning.budget import unreachable
from hap.types import Budget, Cost


@pytest.fixture(scope="module")
def plan() -> hap.Plan:
    """Of a network with two families."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    structure = hap.trace(model, (torch.rand(2, 6),))
    sensitivity = hap.measure(model, None, None, structure, criterion="magnitude")
    return hap.decide(structure, sensitivity, Budget(params=0.6), implant_ratio=0)


class Planner:
    """Gives plans that use their limit of latency up, down to a floor; notes the limits."""

    def __init__(self, plan: hap.Plan, lowest: float = 0.0) -> None:
        self.plan, self.lowest = plan, lowest
        self.limits: list[float] = []

    def __call__(self, limits: Budget) -> hap.Plan:
        assert limits.latency is not None and limits.params == 0.6
        if limits.latency < self.lowest:
            raise unreachable(self.plan.small, self.plan.dense, limits)
        self.limits.append(limits.latency)
        dense, small = (
            dataclasses.replace(cost, latency=time)
            for cost, time in ((self.plan.dense, 2.0), (self.plan.small, 2.0 * limits.latency))
        )
        return dataclasses.replace(self.plan, dense=dense, small=small)


def share(cost: Cost, of: Cost) -> float:
    """Of the time by the table."""
    assert cost.latency is not None and of.latency is not None
    return cost.latency / of.latency


GOAL = Budget(params=0.6, latency=0.8)


def test_a_plan_that_is_fast_enough_is_taken_as_it_is(plan: hap.Plan) -> None:
    planner = Planner(plan)
    found = by_the_clock(planner, GOAL, lambda _: 0.81)  # within the clock's own error
    assert planner.limits == [0.8]
    assert found.options["latency_measured"] == 0.81 and found.budget == GOAL


def test_a_plan_that_changes_nothing_is_not_timed(plan: hap.Plan) -> None:
    """The clock may say 1.03 of the same model."""
    decisions = {name: Decision(tuple(range(8)), ()) for name in plan.decisions}
    planner = Planner(dataclasses.replace(plan, decisions=decisions, small=plan.dense))
    found = by_the_clock(planner, dataclasses.replace(GOAL, latency=1.0), lambda _: 1.03)
    assert planner.limits == [1.0] and found.small.params == plan.dense.params
    assert found.options["latency_measured"] == 1.0


def test_a_table_that_is_too_slow_does_not_hold_a_plan_back(plan: hap.Plan) -> None:
    """The model takes half of what the table says: it may have twice the time by the table, and one over the goal."""
    planner = Planner(plan)
    found = by_the_clock(planner, GOAL, lambda plan: share(plan.small, plan.dense) / 2)
    assert planner.limits == pytest.approx([0.8, 1.6])
    assert found.options["latency_measured"] == 0.8 and share(found.small, found.dense) == pytest.approx(1.6)
    assert found.budget == GOAL


def test_where_another_limit_holds_a_plan_back_it_is_taken_as_it_is(plan: hap.Plan) -> None:
    limits = []

    def decide(budget: Budget) -> hap.Plan:
        """A plan that takes half of the time, whatever it may take."""
        limits.append(budget.latency)
        dense, small = (dataclasses.replace(c, latency=t) for c, t in ((plan.dense, 2.0), (plan.small, 1.0)))
        return dataclasses.replace(plan, dense=dense, small=small)

    assert by_the_clock(decide, GOAL, lambda _: 0.4).options["latency_measured"] == 0.4
    assert limits == [0.8]


def test_the_loosest_limit_that_meets_the_goal_is_taken(plan: hap.Plan) -> None:
    """Where the table is too slow by a different factor for each plan, the limit is found between two others."""
    planner = Planner(plan)
    found = by_the_clock(planner, GOAL, lambda plan: share(plan.small, plan.dense) ** 3)
    met = [limit for limit in planner.limits if limit**3 <= 0.8 * 1.02]
    assert planner.limits[1] > 0.8**0.33 > max(met) > 0.8 and len(planner.limits) <= TRIES
    assert share(found.small, found.dense) == pytest.approx(max(met))


def test_the_limit_shrinks_by_what_the_clock_finds_too_much(plan: hap.Plan) -> None:
    """The model is slower than the table says, by half: the goal is met at two thirds of it."""
    planner = Planner(plan)
    found = by_the_clock(planner, GOAL, lambda plan: 1.5 * share(plan.small, plan.dense))
    assert planner.limits == pytest.approx([0.8, 0.8 / 1.5])
    assert found.options["latency_measured"] == 0.8
    assert found.budget == GOAL, "the plan is for what was asked"


def test_of_slow_plans_the_fastest_is_taken_with_a_warning(plan: hap.Plan, caplog: pytest.LogCaptureFixture) -> None:
    ratios = iter([1.5, 1.2, 1.3, 1.4, 1.6])
    planner = Planner(plan)
    with caplog.at_level(logging.WARNING):
        found = by_the_clock(planner, GOAL, lambda _: next(ratios))
    assert found.options["latency_measured"] == 1.2 and len(planner.limits) == TRIES
    assert "1.20 of the dense one's time; the goal was 0.80" in caplog.text


def test_where_no_faster_plan_can_be_had_it_ends(plan: hap.Plan) -> None:
    planner = Planner(plan, lowest=0.5)
    found = by_the_clock(planner, GOAL, lambda plan: 2 * share(plan.small, plan.dense))
    assert planner.limits == [0.8] and found.options["latency_measured"] == 1.6
    with pytest.raises(hap.HapError, match="cannot be reached"):
        by_the_clock(planner, Budget(params=0.6, latency=0.4), lambda _: 1.0)


def test_the_clock_times_the_plan_s_model(plan: hap.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(models: dict[str, nn.Module], args: object, kwargs: object, **_: object) -> object:
        seen.extend(sum(p.numel() for p in model.parameters()) for model in models.values())
        return real(models, args, kwargs, runs=5)

    real = hap.planning.measure_latency
    monkeypatch.setattr("hap.pipeline.clock.measure_latency", measured)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert clock(model, (torch.rand(2, 6),), {})(plan) > 0
    assert seen == [plan.dense.params, plan.small.params]


def test_a_table_that_is_too_slow_does_not_refuse_a_goal_that_the_clock_meets(plan: hap.Plan) -> None:
    def decide(limits: Budget) -> hap.Plan:
        assert limits.latency is not None
        if limits.latency < 0.9:  # by the table
            raise unreachable(plan.small, plan.dense, limits)
        return planner(limits)

    planner = Planner(plan)
    found = by_the_clock(decide, GOAL, lambda plan: 0.6 * share(plan.small, plan.dense))
    assert found.options["latency_measured"] <= 0.8 * 1.02 and found.budget == GOAL
    with pytest.raises(hap.HapError, match="cannot be reached"):
        by_the_clock(decide, GOAL, lambda plan: share(plan.small, plan.dense))


def test_where_no_time_would_be_enough_the_error_is_of_the_limits_as_given(plan: hap.Plan) -> None:
    def decide(limits: Budget) -> hap.Plan:
        raise unreachable(plan.small, plan.dense, limits)

    with pytest.raises(hap.HapError, match="cannot be reached") as caught:
        by_the_clock(decide, GOAL, lambda plan: 1.0)
    assert "0.8" in caught.value.got and "1.2" not in caught.value.got
