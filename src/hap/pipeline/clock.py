"""Holds a plan to a latency by the clock: the table knows layers alone, the user runs the whole model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hap.planning import Plan, measure_latency
from hap.planning.budget import Unreachable, fractions
from hap.surgery import apply
from hap.types import Budget

log = logging.getLogger(__name__)
TRIES = 5
TURNS, SECONDS = 100, 5.0  # of the dense and the small model, at most
TOLERANCE = 0.02  # of the goal: what the clock itself is unsure of
LOOSER = 1.5  # than the goal: the limit for a table that says that it cannot be met
ROOM = 0.05  # of the goal: less time left over is not worth another decision


def missed(plan: Plan) -> bool:
    """Whether the clock found that the plan's model takes longer than its budget allows."""
    measured, limit = plan.options.get("latency_measured"), plan.budget.latency
    return limit is not None and measured is not None and measured > limit * (1 + TOLERANCE)


def by_the_clock(decide: Callable[[Budget], Plan], limits: Budget, measured: Callable[[Plan], float]) -> Plan:
    """Decides, times the small model against the dense one, and decides again for what the table should have said.

    The table is wrong about the whole model by some factor. The next limit is what it said of the last plan, times the
    goal, over what the clock found: smaller where the model takes too long, larger where the limit held the plan back
    and time is left. A plan that changes nothing is not timed: all that the clock could find is noise.

    Args:
        decide: a plan for limits.
        limits: with a latency.
        measured: time of the plan's model as a share of the dense model's.

    Returns:
        Of the plans that meet the goal the one with the loosest limit; where none does the fastest one, with a warning.
        Its budget is `limits`, and ``latency_measured`` is among its options.

    Raises:
        HapError: no plan meets `limits`, neither by the table nor by the clock.
    """
    assert limits.latency is not None
    goal = limit = float(limits.latency)
    refused: Unreachable | None = None
    try:
        plan = decide(limits)
    except Unreachable as error:  # by the table, which may be wrong of the whole model
        refused, limit = error, goal * LOOSER
        try:
            plan = decide(dataclasses.replace(limits, latency=limit))
        except Unreachable:  # not for want of time
            raise refused from None
    if not plan.implants and not any(decision.prune for decision in plan.decisions.values()):
        return _noted(plan, limits, 1.0)
    tried = [_Try(limit, plan, measured(plan))]
    while len(tried) < TRIES and (following := _next(tried, goal)) is not None:
        log.info("the model takes %.2f of the dense one's time; deciding again for %.2f", tried[-1].ratio, following)
        try:
            plan = decide(dataclasses.replace(limits, latency=following))
        except Unreachable:  # so little cannot be had
            break
        tried.append(_Try(following, plan, measured(plan)))
    met = [one for one in tried if one.meets(goal)]
    if refused and not met:
        raise refused
    best = max(met, key=lambda one: one.limit) if met else min(tried, key=lambda one: one.ratio)
    if not met:
        log.warning("the model takes %.2f of the dense one's time; the goal was %.2f", best.ratio, goal)
    return _noted(best.plan, limits, best.ratio)


@dataclass(frozen=True)
class _Try:
    """A limit by the table, the plan for it, and the time of its model by the clock / the dense model's."""

    limit: float
    plan: Plan
    ratio: float

    def meets(self, goal: float) -> bool:
        return self.ratio <= goal * (1 + TOLERANCE)

    @property
    def share(self) -> float:
        """What the table says of the plan."""
        return fractions(self.plan.small, self.plan.dense)["latency"]


def _next(tried: list[_Try], goal: float) -> float | None:
    """The next limit for the table; None where it cannot help."""
    last = tried[-1]
    held_back = last.share > last.limit * (1 - ROOM)  # by this limit, and not by the others
    if last.meets(goal) and (last.ratio > goal * (1 - ROOM) or not held_back):
        return None
    limit = last.share * goal / last.ratio
    low = max((one.limit for one in tried if one.meets(goal)), default=0.0)
    high = min((one.limit for one in tried if not one.meets(goal)), default=float("inf"))
    if not low < limit < high:  # the factor is not the same for all plans
        limit = (low + high) / 2
    return limit if low * (1 + ROOM) < high and limit < high else None


def clock(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Plan], float]:
    """What times the model of a plan against the dense one, on these inputs."""

    def ratio(plan: Plan) -> float:
        small = apply(model, plan, init="zeros")  # what a weight holds takes no time
        found = measure_latency({"dense": model, "small": small}, args, kwargs, runs=TURNS, seconds=SECONDS)
        return found["small"].least / found["dense"].least  # on a busy machine medians are of what else it does

    return ratio


def _noted(plan: Plan, limits: Budget, ratio: float) -> Plan:
    return dataclasses.replace(plan, budget=limits, options={**plan.options, "latency_measured": round(ratio, 3)})
