"""What each choice saves, to first order at given widths, as a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hap.planning.cost import CostModel, Share
from hap.planning.problem import Problem, dense_weights, weights_of
from hap.types import Budget, Layer


class Scale:
    """Costs as shares of a budget: at most 1 in each limited quantity.

    Attributes:
        cost: the cost model.
        budget: what may remain.
    """

    def __init__(self, cost: CostModel, budget: Budget) -> None:
        whole = cost.dense
        dense = {"params": whole.params, "macs": whole.macs, "heads": whole.heads, "latency": whole.latency}
        self.cost = cost
        self.budget = budget
        self._rows = [i for i, name in enumerate(dense) if name in budget.limits]
        self._names = list(budget.limits)
        self._unit = np.array([limit * (dense[name] or 1) for name, limit in budget.limits.items()])

    def used(self, gone: np.ndarray, shares: dict[str, Share]) -> np.ndarray:
        """The share of each limited quantity, shape ``(quantities, places)``; see `CostModel.costs`."""
        found: np.ndarray = self.cost.costs(gone, shares)[self._rows] / self._unit[:, None]
        return found

    def weight(self, layer: Layer) -> np.ndarray:
        """The share that one weight of a layer takes, shape ``(quantities,)``. Implants take no time off."""
        each = {"params": 1, "macs": layer.positions, "heads": self.cost.of_heads(layer.module), "latency": 0}
        return np.array([each[name] for name in self._names]) / self._unit


@dataclass(frozen=True, eq=False)
class Prices:
    """Savings, all in shares of the budget.

    Attributes:
        unit: of one unit of each family, shape ``(families,)``.
        block: for each layer, of one implanted block by each option, shape ``(options,)``.
        entry: for each layer, what each option costs once, shape ``(options,)``.
    """

    unit: np.ndarray
    block: tuple[np.ndarray, ...]
    entry: tuple[np.ndarray, ...]

    def without_implants(self) -> Prices:
        """The same, but implants save nothing."""
        nothing = tuple(np.zeros_like(each) for each in self.block)
        return replace(self, block=nothing, entry=nothing)


def prices(problem: Problem, scale: Scale, gone: np.ndarray, shares: dict[str, Share], mix: np.ndarray) -> Prices:
    """The prices where `gone` units of each family have left.

    Args:
        problem: the choices.
        scale: costs as shares of the budget.
        gone: shape ``(families,)``.
        shares: the implants there.
        mix: how much each limited quantity counts, shape ``(quantities,)``, summing to 1.
    """
    gone = np.minimum(gone, np.maximum(problem.sizes - 1, 0))
    places = np.concatenate([gone[None], gone + np.eye(len(gone), dtype=np.int64)])
    used = mix @ scale.used(places, shares)
    block, entry = [], []
    for layer in problem.layers:
        rows, columns = scale.cost.widths(layer.layer.module, gone)
        weight = float(mix @ scale.weight(layer.layer))
        costs = [weights_of(option, layer.layer, rows, columns) for option in layer.options]
        full = dense_weights(layer.layer, columns)
        block.append(np.array([weight * layer.block * (full - each) for _, each in costs]))
        entry.append(np.array([weight * once for once, _ in costs]))
    return Prices(np.maximum(used[0] - used[1:], 0.0), tuple(block), tuple(entry))
