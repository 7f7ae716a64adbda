"""How much of a budget a cost uses, and the error where it cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from hap.errors import HapError
from hap.types import Budget, Cost


def fractions(cost: Cost, dense: Cost) -> dict[str, float]:
    """What remains of each quantity that is known, as a fraction of the dense model."""
    found = {"params": cost.params / dense.params, "macs": cost.macs / max(1, dense.macs)}
    if dense.heads:
        found["heads"] = cost.heads / dense.heads
    if cost.latency is not None and dense.latency is not None:
        found["latency"] = cost.latency / dense.latency
    return found


def used(cost: Cost, dense: Cost, limits: Mapping[str, float]) -> float:
    """The largest share of these parts of a budget that is used; over 1 breaks it."""
    found = fractions(cost, dense)
    return max((found[name] / limit for name, limit in limits.items()), default=0.0)


def lowest(costs: Iterable[Cost]) -> Cost:
    """Of each quantity the least that one of these costs has."""
    found = list(costs)
    times = [cost.latency for cost in found if cost.latency is not None]
    return Cost(
        min(cost.params for cost in found),
        min(cost.macs for cost in found),
        min(times, default=None),
        min(cost.heads for cost in found),
    )


def check_measured(budget: Budget, dense: Cost) -> None:
    """Raises a HapError for a part of the budget that nothing in the model counts for.

    That is a latency where nothing says how long the layers take, and heads where there are none.
    """
    if budget.heads is not None and not dense.heads:
        raise HapError(
            "this model has no attention heads that can be pruned",
            expected="a structure with families of kind 'head'",
            got=f"Budget(heads={budget.heads}), and none",
            remedy="see Structure.frozen for what cannot be pruned, and why; or budget params or macs",
        )
    if budget.latency is not None and dense.latency is None:
        raise HapError(
            "a latency budget needs times measured on your device",
            expected="latency=, what hap.planning.time_layers measures",
            got=f"Budget(latency={budget.latency}) alone",
            remedy="hap.prune and `hap prune --keep-latency` measure it by themselves",
        )


def rounded_up(share: float) -> float:
    """To four digits, so that to ask for what is written works."""
    return min(math.ceil(share * 1e4) / 1e4, 1.0)


class Unreachable(HapError):
    """A budget is broken by all that was tried.

    Attributes:
        least: of each quantity, the least that was found.
        implants: whether they were tried too.
    """

    least: Cost
    implants: bool


def unreachable(least: Cost, dense: Cost, budget: Budget, *, implants: bool = False) -> Unreachable:
    """The error where a budget is broken by all that was tried.

    Args:
        least: of each quantity, the least that was found.
        dense: the dense model's.
        budget: what was asked.
        implants: whether they were tried too.
    """
    found = {name: min(value, 1.0) for name, value in fractions(least, dense).items()}  # the dense model is one of them
    apart = all(found.get(name, 0.0) <= limit for name, limit in budget.limits.items())
    allow = "" if implants else "allow implants, "
    error = Unreachable(
        "the budget cannot be reached" + (": each part of it can, but not all of them at once" if apart else ""),
        expected=", ".join(f"{k} kept >= {rounded_up(v):.4f}" for k, v in found.items()),
        got=", ".join(f"{k} {v}" for k, v in budget.limits.items()),
        remedy=f"keep more, {allow}loosen floor, minimum, protect or round_to, or include inexact families",
    )
    error.least, error.implants = least, implants
    return error
