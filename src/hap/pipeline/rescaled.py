"""Budgets of a dense model, where earlier rounds have made it smaller already."""

from __future__ import annotations

from dataclasses import replace

from hap.errors import HapError
from hap.planning import Plan
from hap.planning.budget import rounded_up
from hap.types import Budget, Cost


def rescaled(budget: Budget, after: Plan, now: Cost) -> Budget:
    """The budget as fractions of a model that is smaller than the one it was written for."""
    of, limits = after.dense, dict[str, float]()
    if budget.params is not None:
        limits["params"] = min(1.0, budget.params * of.params / now.params)
    if budget.macs is not None:
        limits["macs"] = min(1.0, budget.macs * of.macs / max(1, now.macs))
    if budget.latency is not None:
        limits["latency"] = budget.latency / _took(after)
    if budget.heads is not None and (heads := _heads_left(budget.heads, after, now)) is not None:
        limits["heads"] = heads
    return Budget(**(limits or {"params": 1.0}))


def since(after: Plan, cost: Cost, now: Cost) -> Cost:
    """A cost of a model that a plan has made already smaller, as a cost of the dense one."""
    of, alone = after.dense.latency, max(0, after.small.heads - now.heads)
    if of is None or cost.latency is None or now.latency is None:
        return replace(cost, latency=None, heads=cost.heads + alone)
    return replace(cost, latency=of * _took(after) * cost.latency / now.latency, heads=cost.heads + alone)


def _took(after: Plan) -> float:
    """The time of the plan's model as a share of the dense one's: by the clock, else by the table."""
    of, small, clocked = after.dense.latency, after.small.latency, after.options.get("latency_measured")
    if clocked is None and (of is None or small is None):
        raise HapError(
            "nothing says how much faster the model is than the dense one",
            expected="after=, a plan that was made with a budget of latency",
            got="a plan for " + ", ".join(after.budget.limits),
            remedy="leave after= out, and give the latency as a share of this model's",
        )
    return float(clocked) if clocked is not None else small / of  # type: ignore[operator]


def _heads_left(limit: float, after: Plan, now: Cost) -> float | None:
    """What may remain of the heads that are units: one that is alone in its layer is none any more, but it counts.

    None where every layer has one head left, and these are few enough.
    """
    alone = max(0, after.small.heads - now.heads)
    may = limit * after.dense.heads - alone
    if may > 0 and now.heads:
        return min(1.0, may / now.heads)
    if may >= 0 and not now.heads:
        return None
    raise HapError(
        "the budget cannot be reached: every layer keeps a head",
        expected=f"heads kept >= {rounded_up(alone / after.dense.heads):.4f}",
        got=f"heads {limit}",
        remedy="keep more",
    )
