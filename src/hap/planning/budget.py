"""How much of a budget a cost uses, and the error where it cannot be met."""

from __future__ import annotations

import math

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


def used(cost: Cost, dense: Cost, budget: Budget) -> float:
    """The largest share of a budget that is used; over 1 breaks it."""
    found = fractions(cost, dense)
    return max(found[name] / limit for name, limit in budget.limits.items())


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


def unreachable(lowest: Cost, dense: Cost, budget: Budget) -> HapError:
    """The error where even the `lowest` cost breaks the budget."""
    found = fractions(lowest, dense)
    return HapError(
        "the budget cannot be reached",
        # rounded up, so that to ask for what is written here works
        expected=", ".join(f"{k} kept >= {math.ceil(v * 1e4) / 1e4:.4f}" for k, v in found.items()),
        got=", ".join(f"{k} {v}" for k, v in budget.limits.items()),
        remedy="keep more, allow implants, loosen floor, minimum, protect or round_to, or include inexact families",
    )
