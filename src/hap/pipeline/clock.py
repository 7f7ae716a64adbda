"""Holds a plan to a latency by the clock: the table knows layers alone, the user runs the whole model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hap.errors import HapError
from hap.pipeline.together import by_the_first
from hap.planning import Plan, measure_latency
from hap.surgery import apply
from hap.types import Budget

log = logging.getLogger(__name__)
TRIES = 5
TURNS, SECONDS = 100, 3.0  # of the dense and the small model, at most
TOLERANCE = 0.02  # of the goal: what the clock itself is unsure of


def by_the_clock(decide: Callable[[Budget], Plan], limits: Budget, measured: Callable[[Plan], float]) -> Plan:
    """Decides, times the small model against the dense one, and while it takes too long decides for less.

    The next limit is what the table said of the last plan times what the clock found too much of it. Of
    plans that all miss the goal the fastest is taken, with a warning. A plan that changes nothing is not timed: all
    that the clock could find is noise.

    Args:
        decide: a plan for limits.
        limits: with a latency.
        measured: time of the plan's model as a share of the dense model's.

    Returns:
        A plan for `limits`, with ``latency_measured`` among its options.

    Raises:
        HapError: no plan meets `limits` by the table.
    """
    goal = limits.latency
    assert goal is not None
    plan = decide(limits)
    if not plan.implants and not any(decision.prune for decision in plan.decisions.values()):
        return _timed(plan, limits, lambda _: 1.0)[0]
    plan, ratio = _timed(plan, limits, measured)
    best, fastest = plan, ratio
    for _ in range(TRIES - 1):
        if ratio <= goal * (1 + TOLERANCE):
            return plan
        assert plan.small.latency is not None and plan.dense.latency is not None
        tighter = plan.small.latency / plan.dense.latency * goal / ratio
        log.info("the model takes %.2f of the dense one's time; deciding again for %.2f by the table", ratio, tighter)
        try:
            plan, ratio = _timed(decide(dataclasses.replace(limits, latency=tighter)), limits, measured)
        except HapError:  # so little cannot be had
            break
        if ratio < fastest:
            best, fastest = plan, ratio
    if fastest > goal * (1 + TOLERANCE):
        log.warning("the model takes %.2f of the dense one's time; the goal was %.2f", fastest, goal)
    return best


def clock(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Plan], float]:
    """What times the model of a plan against the dense one, on these inputs; of several processes in the first."""

    def ratio(plan: Plan) -> float:
        small = apply(model, plan, init="zeros")  # what a weight holds takes no time
        return measure_latency({"dense": model, "small": small}, args, kwargs, runs=TURNS, seconds=SECONDS)[
            "small"
        ].ratio

    return lambda plan: by_the_first(lambda: ratio(plan))


def _timed(plan: Plan, limits: Budget, measured: Callable[[Plan], float]) -> tuple[Plan, float]:
    ratio = measured(plan)
    return dataclasses.replace(
        plan, budget=limits, options={**plan.options, "latency_measured": round(ratio, 3)}
    ), ratio
