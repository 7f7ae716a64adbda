"""What each choice saves, to first order at given widths, as a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hap.planning.cost import CostModel, Place, Share
from hap.planning.problem import Implantable, Problem
from hap.types import Budget


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
        self._unit = np.array([limit * (dense[name] or 1) for name, limit in budget.limits.items()])

    def used(self, gone: np.ndarray, shares: dict[str, Share]) -> np.ndarray:
        """The share of each limited quantity, shape ``(quantities, places)``; see `CostModel.costs`."""
        found: np.ndarray = self.cost.costs(gone, shares)[self._rows] / self._unit[:, None]
        return found

    def layer(self, place: Place, module: str, share: Share | None = None) -> np.ndarray:
        """The share of each limited quantity that a layer takes, implanted or not, shape ``(quantities,)``."""
        found: np.ndarray = place.layer(module, share)[self._rows] / self._unit
        return found


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
    place = scale.cost.place(gone)
    pairs = [_of_layer(layer, scale, place, mix) for layer in problem.layers]
    return Prices(np.maximum(used[0] - used[1:], 0.0), tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def _of_layer(layer: Implantable, scale: Scale, place: Place, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each option, what an implanted block saves, and what the first one costs besides.

    The straight line through the savings of half of the blocks and of all but one: a basis is smaller for fewer
    filters than it has, and the time of two parts side by side goes when the last full filter does; such ends are
    left to the steps with exact costs.
    """
    module = layer.module
    if max(layer.parts) > 1:
        return _of_heads(layer, scale, place, mix)
    rows = place.widths(module)[0]
    few, many = max(rows // 2 // layer.block * layer.block, min(layer.block, rows)), rows - layer.block
    full = scale.layer(place, module)
    slopes, entries = [], []
    for option in layer.options:
        one, most = (
            float(mix @ (full - scale.layer(place, module, Share(n, option.form, option.rank)))) for n in (few, many)
        )
        slope = (most - one) / (many - few) if many > few else one / few
        slopes.append(slope * layer.block)
        entries.append(slope * few - one)
    return np.array(slopes), np.array(entries)


def _of_heads(layer: Implantable, scale: Scale, place: Place, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each option, what one narrow head saves where as many become narrow as take the place of one."""
    full = scale.layer(place, layer.module)
    saved = [
        float(mix @ (full - scale.layer(place, layer.module, Share(parts, option.form, option.rank)))) / parts
        for option, parts in zip(layer.options, layer.parts, strict=True)
    ]
    return np.array(saved), np.zeros(len(saved))
