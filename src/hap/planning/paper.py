"""Mode ``paper``: one global ranking, cut where the budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hap.implants import Option
from hap.planning.budget import unreachable, used
from hap.planning.candidates import candidates
from hap.planning.choice import Choice
from hap.planning.constraints import Constraints
from hap.planning.cost import CostModel
from hap.planning.rule import Rule
from hap.types import Budget, Sensitivity, Structure

TOLERANCE = 0.005  # of the budget: how far under it a plan may land


def choose(
    structure: Structure,
    sensitivity: Sensitivity,
    budget: Budget,
    cost: CostModel,
    bounds: Constraints,
    *,
    implant_ratio: float,
    options: Mapping[str, Sequence[Option]] | None = None,
) -> Choice:
    """All candidates are ranked together, least sensitive first (Yu et al. 2022, section 3).

    Of the first n, the most sensitive share `implant_ratio` gets implants and the others are pruned; n is the
    smallest number that meets the budget. A filter whose channel must stay, because others write to it too or
    because it is frozen, is implanted instead of pruned. A 1 x 1 filter has no smaller form: it is pruned. Heads that
    the `options` offer as narrow ones get half of their width, two in the place of one; one that is left over goes.

    Raises:
        HapError: the budget cannot be reached (says how low it can go).
    """
    ranked = candidates(structure, sensitivity, bounds, with_implants=implant_ratio > 0, options=options)
    return _search(Rule(ranked, implant_ratio, bounds.round_to), cost, budget)


def _search(rule: Rule, cost: CostModel, budget: Budget) -> Choice:
    """The plan of the smallest n that meets the budget.

    Where one step jumps over the last half percent (a unit that many layers share), that candidate is
    kept and the search goes on; the plan that lands closest under the budget wins.
    """
    lowest = rule(len(rule)).cost(cost)
    if used(lowest, cost.dense, budget) > 1:
        raise unreachable(lowest, cost.dense, budget)
    best: tuple[float, Choice] | None = None
    for _ in range(64):
        n = _bisect(rule, cost, budget)
        choice = rule(n)
        share = used(choice.cost(cost), cost.dense, budget)
        if share > 1:
            break
        if best is None or share > best[0]:
            best = (share, choice)
        if share >= 1 - TOLERANCE or n == 0:
            break
        rule.exclude(max(rule.last_moves(n), key=lambda i: _effect(rule, cost, budget, i)))
    assert best is not None
    return best[1]


def _effect(rule: Rule, cost: CostModel, budget: Budget, candidate: int) -> float:
    """The share of the budget that one unit's removal alone saves; filters save little."""
    ranked = rule.ranked
    if ranked.layer[candidate] >= 0:
        return 0.0
    family = ranked.families[ranked.family[candidate]]
    mask = np.zeros(family.size, dtype=bool)
    mask[ranked.unit[candidate]] = True
    return used(cost.dense, cost.dense, budget) - used(cost({family.name: mask}, {}), cost.dense, budget)


def _bisect(rule: Rule, cost: CostModel, budget: Budget) -> int:
    low, high = 0, len(rule)
    while low < high:
        middle = (low + high) // 2
        if used(rule(middle).cost(cost), cost.dense, budget) <= 1:
            high = middle
        else:
            low = middle + 1
    return low
