"""`decide`: the paper's rule, one global ranking cut where the budget is met."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hap.errors import HapError
from hap.planning.candidates import Candidates, block, candidates
from hap.planning.cost import POINTWISE, CostModel
from hap.planning.plan import Decision, Implant, Plan
from hap.types import Budget, Cost, Sensitivity, Structure

TOLERANCE = 0.01  # of the budget: how far under it a plan may land


def decide(
    structure: Structure,
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    implant_ratio: float = 0.1,
    floor: int = 1,
    round_to: int = 1,
    inexact: bool = False,
) -> Plan:
    """Chooses what to keep, implant and prune, as the paper does (Yu et al. 2022, section 3).

    All candidates are ranked together, least sensitive first. Of the first n, the most sensitive
    share `implant_ratio` gets implants and the others are pruned; n is the smallest number that
    meets the budget. A filter whose channel must stay, because others write to it too or because it
    is frozen, is implanted instead of pruned. A 1 x 1 filter has no smaller form: it is pruned.

    Args:
        structure: from `hap.trace`.
        sensitivity: from `hap.measure`.
        budget: what may remain; every part of it is met.
        implant_ratio: in [0, 1]; 0 makes a plan without implants.
        floor: the number of units that every family keeps at least.
        round_to: keep a multiple of this many units in each family (rounded up).
        inexact: also prune families behind a normalisation that mixes units.

    Raises:
        HapError: no family can be pruned, or the budget cannot be reached (says how low it can go).
    """
    _check(structure, implant_ratio, floor, round_to, inexact)
    ranked = candidates(structure, sensitivity, with_implants=implant_ratio > 0, floor=floor, inexact=inexact)
    cost = CostModel(structure)
    rule = _Rule(ranked, implant_ratio, round_to)
    choice = _search(rule, cost, budget)
    return Plan(
        structure=structure,
        decisions=_decisions(structure, choice.pruned),
        implants={module: Implant(tuple(rows), POINTWISE) for module, rows in choice.implanted.items() if rows},
        budget=budget,
        criterion=sensitivity.criterion,
        dense=cost.dense,
        small=choice.cost(cost),
        options={
            "implant_ratio": implant_ratio,
            "floor": floor,
            "round_to": round_to,
            "inexact": inexact,
            "samples": sensitivity.samples,
            "draws": sensitivity.draws,
        },
    )


class _Choice:
    """What happens to every unit (masks by family) and filter (rows by module)."""

    def __init__(self, pruned: Mapping[str, np.ndarray], implanted: Mapping[str, list[int]]) -> None:
        self.pruned = pruned
        self.implanted = implanted

    def cost(self, model: CostModel) -> Cost:
        return model(self.pruned, {module: len(rows) for module, rows in self.implanted.items()})


class _Rule:
    """The paper's rule as a function of n, the number of candidates that do not stay as they are.

    A candidate only ever goes from kept to implanted to pruned as n grows, so that the cost falls
    with n and the budget can be found by bisection.
    """

    def __init__(self, ranked: Candidates, implant_ratio: float, round_to: int) -> None:
        self.ranked = ranked
        self.ratio = implant_ratio
        self.round_to = round_to
        self.excluded: set[int] = set()
        self._active = np.arange(len(ranked))

    def __len__(self) -> int:
        return len(self._active)

    def exclude(self, candidate: int) -> None:
        """Keeps this candidate whatever n is."""
        self.excluded.add(candidate)
        self._active = np.array([i for i in range(len(self.ranked)) if i not in self.excluded], dtype=np.int64)

    def last_moves(self, n: int) -> list[int]:
        """The candidates whose state differs between n - 1 and n."""
        moved = [self._low(n) - 1] if self._low(n) > self._low(n - 1) else []
        return [int(self._active[i]) for i in {*moved, n - 1}]

    def _low(self, n: int) -> int:
        return n - math.ceil(self.ratio * n - 1e-9)

    def __call__(self, n: int) -> _Choice:
        ranked, low = self.ranked, self._low(n)
        pruned = {f.name: np.zeros(f.size, dtype=bool) for f in ranked.families}
        implant_units: list[tuple[int, int]] = []
        filters: list[tuple[int, int]] = []
        for position, i in enumerate(self._active[:n].tolist()):
            family, unit, layer = int(ranked.family[i]), int(ranked.unit[i]), int(ranked.layer[i])
            if layer >= 0:
                filters.append((layer, unit))
            elif position >= low and ranked.implants[family]:
                implant_units.append((family, unit))
            else:
                pruned[ranked.families[family].name][unit] = True
        self._round(pruned)
        return _Choice(pruned, self._implanted(pruned, implant_units, filters))

    def _round(self, pruned: dict[str, np.ndarray]) -> None:
        """Takes back the most sensitive pruned units of a family until its width is a multiple."""
        if self.round_to == 1:
            return
        names = [f.name for f in self.ranked.families]
        for i in reversed(self._active.tolist()):
            if self.ranked.layer[i] < 0:
                mask = pruned[names[self.ranked.family[i]]]
                if mask[self.ranked.unit[i]] and (len(mask) - mask.sum()) % self.round_to:
                    mask[self.ranked.unit[i]] = False

    def _implanted(
        self, pruned: dict[str, np.ndarray], units: list[tuple[int, int]], filters: list[tuple[int, int]]
    ) -> dict[str, list[int]]:
        ranked = self.ranked
        rows: dict[int, set[int]] = {}
        for family, unit in units:
            for layer, indices in ranked.implants[family].items():
                rows.setdefault(layer, set()).update(indices[unit])
        for layer, first in filters:
            rows.setdefault(layer, set()).update(range(first, first + block(ranked.layers[layer])))
        for layer, found in rows.items():
            for family, by_layer in ranked.implants.items():
                mask = pruned[ranked.families[family].name]
                for gone in np.flatnonzero(mask).tolist() if layer in by_layer else ():
                    found.difference_update(by_layer[layer][gone])
        return {ranked.layers[layer].module: sorted(found) for layer, found in rows.items()}


def _search(rule: _Rule, cost: CostModel, budget: Budget) -> _Choice:
    """The plan of the smallest n that meets the budget.

    Where one step jumps over the last percent (a unit that many layers share), that candidate is
    kept and the search goes on; the plan that lands closest under the budget wins.
    """
    lowest = rule(len(rule)).cost(cost)
    if _used(lowest, cost.dense, budget) > 1:
        raise HapError(
            "the budget cannot be reached",
            expected=", ".join(f"{k} kept >= {v:.4f}" for k, v in _fractions(lowest, cost.dense).items()),
            got=", ".join(f"{k} {getattr(budget, k)}" for k in ("params", "macs") if getattr(budget, k) is not None),
            remedy="ask for less, lower the floor, use implants, or include inexact families",
        )
    best: tuple[float, _Choice] | None = None
    for _ in range(64):
        n = _bisect(rule, cost, budget)
        choice = rule(n)
        used = _used(choice.cost(cost), cost.dense, budget)
        if used > 1:
            break
        if best is None or used > best[0]:
            best = (used, choice)
        if used >= 1 - TOLERANCE or n == 0:
            break
        rule.exclude(max(rule.last_moves(n), key=lambda i: _effect(rule, cost, i)))
    assert best is not None
    return best[1]


def _effect(rule: _Rule, cost: CostModel, candidate: int) -> int:
    """Parameters that one unit's removal alone saves; filters save little."""
    ranked = rule.ranked
    if ranked.layer[candidate] >= 0:
        return 0
    family = ranked.families[ranked.family[candidate]]
    mask = np.zeros(family.size, dtype=bool)
    mask[ranked.unit[candidate]] = True
    return cost.dense.params - cost({family.name: mask}, {}).params


def _bisect(rule: _Rule, cost: CostModel, budget: Budget) -> int:
    low, high = 0, len(rule)
    while low < high:
        middle = (low + high) // 2
        if _used(rule(middle).cost(cost), cost.dense, budget) <= 1:
            high = middle
        else:
            low = middle + 1
    return low


def _fractions(cost: Cost, dense: Cost) -> dict[str, float]:
    return {"params": cost.params / dense.params, "macs": cost.macs / max(1, dense.macs)}


def _used(cost: Cost, dense: Cost, budget: Budget) -> float:
    """The largest share of a budget that is used; over 1 breaks it."""
    fractions = _fractions(cost, dense)
    limits = {"params": budget.params, "macs": budget.macs}
    return max(fractions[k] / limit for k, limit in limits.items() if limit is not None)


def _decisions(structure: Structure, pruned: Mapping[str, np.ndarray]) -> dict[str, Decision]:
    decisions = {}
    for family in structure.families:
        mask = pruned.get(family.name, np.zeros(family.size, dtype=bool))
        decisions[family.name] = Decision(tuple(np.flatnonzero(~mask).tolist()), tuple(np.flatnonzero(mask).tolist()))
    return decisions


def _check(structure: Structure, implant_ratio: float, floor: int, round_to: int, inexact: bool) -> None:
    if not 0 <= implant_ratio <= 1:
        raise HapError("implant_ratio is out of range", expected="a share in [0, 1]", got=repr(implant_ratio))
    for name, value in (("floor", floor), ("round_to", round_to)):
        if value < 1:
            raise HapError(f"{name} is out of range", expected="an integer of at least 1", got=repr(value))
    if not any(f.exact or inexact for f in structure.families):
        reasons = sorted({f"{f.parameter} axis {f.axis}: {f.reason}" for f in structure.frozen})
        reasons += [f"{f.name}: a normalisation mixes its units" for f in structure.families]
        shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
        raise HapError(
            "this model has no prunable family",
            expected="at least one axis that can shrink",
            got=shown or "no layer at all",
            remedy="see Structure.frozen; inexact=True also offers families behind a normalisation",
        )
