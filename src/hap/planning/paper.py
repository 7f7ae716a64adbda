"""Mode ``paper``: one global ranking, cut where the budget is met."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hap.implants import Option
from hap.planning.budget import lowest, unreachable, used
from hap.planning.candidates import candidates
from hap.planning.choice import Choice
from hap.planning.constraints import Constraints
from hap.planning.cost import CostModel
from hap.planning.rule import Rule
from hap.types import Budget, Cost, Sensitivity, Structure

log = logging.getLogger(__name__)
TOLERANCE = 0.005  # of the budget: how far under it a plan may land
STEPS = 256  # at most, in a search that cannot halve


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

    Implants take time. Where the budget limits it, there are none unless less leaves with them than without.

    Raises:
        HapError: the budget cannot be reached (says how low it can go).
    """
    # without implants only where they may be too slow: they never add parameters or multiplications
    ratios = [implant_ratio, 0.0] if implant_ratio and budget.latency is not None else [implant_ratio]
    tried: list[Cost] = []
    found: dict[float, Choice] = {}
    for ratio in ratios:
        ranked = candidates(structure, sensitivity, bounds, with_implants=ratio > 0, options=options)
        choice = _search(Rule(ranked, ratio, bounds.round_to), cost, budget, tried)
        if choice is not None:
            found[ratio] = choice
    if not found:
        raise unreachable(lowest(tried), cost.dense, budget, implants=implant_ratio > 0)
    best = min(sorted(found), key=lambda ratio: _lost(found[ratio], sensitivity))
    if best != implant_ratio and (implant_ratio not in found or found[implant_ratio].implants):
        log.info("no implants: they take so much time that no less would leave with them than without")
    return found[best]


def _lost(choice: Choice, sensitivity: Sensitivity) -> float:
    """How sensitive the units are that leave, all together."""
    return sum(float(sensitivity.scores[name][mask].sum()) for name, mask in choice.pruned.items())


def _search(rule: Rule, cost: CostModel, budget: Budget, tried: list[Cost]) -> Choice | None:
    """The plan of the smallest n that meets the budget, if one does; notes the costs of what was `tried`.

    Where one step jumps over the last half percent (a unit that many layers share), that candidate is
    kept and the search goes on; the plan that lands closest under the budget wins.
    """
    best: tuple[float, Choice] | None = None
    start = 0
    for _ in range(64):
        n = _smallest(rule, cost, budget, start, tried)
        if n is None:
            break
        choice = rule(n)
        share = used(choice.cost(cost), cost.dense, budget.limits)
        if best is None or share > best[0]:
            best = (share, choice)
        if share >= 1 - TOLERANCE or n == 0:
            break
        rule.exclude(max(rule.last_moves(n), key=lambda i: _effect(rule, cost, budget, i)))
        start = max(0, n - 2)  # with one candidate less, the plans of fewer are much as they were
    return None if best is None else best[1]


def _effect(rule: Rule, cost: CostModel, budget: Budget, candidate: int) -> float:
    """The share of the budget that one unit's removal alone saves; filters save little."""
    ranked = rule.ranked
    if ranked.layer[candidate] >= 0:
        return 0.0
    family = ranked.families[ranked.family[candidate]]
    mask = np.zeros(family.size, dtype=bool)
    mask[ranked.unit[candidate]] = True
    without = cost({family.name: mask}, {})
    return used(cost.dense, cost.dense, budget.limits) - used(without, cost.dense, budget.limits)


def _smallest(rule: Rule, cost: CostModel, budget: Budget, start: int, tried: list[Cost]) -> int | None:
    """The smallest n that meets the budget; None if none does.

    What falls with n is found by halving. The time of implants does not: from where the rest of the budget is met, but
    not below `start`, n grows in equal steps, of one but in large models, and what lies between the last two is halved.
    """
    limits = budget.limits
    falling = {name: limit for name, limit in limits.items() if name != "latency" or not rule.ratio}

    def meets(n: int, part: Mapping[str, float]) -> bool:
        tried.append(rule(n).cost(cost))
        return used(tried[-1], cost.dense, part) <= 1

    last = len(rule)
    if not meets(last, falling):
        return None
    first = _halved(lambda n: meets(n, falling), 0, last)
    if falling == limits:
        return first
    first = min(max(first, start), last)
    before = first - 1
    for n in (*range(first, last, max(1, (last - first) // STEPS)), last):
        if meets(n, limits):
            return _halved(lambda n: meets(n, limits), before + 1, n)
        before = n
    return None


def _halved(meets: Callable[[int], bool], low: int, high: int) -> int:
    """A number that meets, as `high` does, and is `low` or follows on one that does not."""
    while low < high:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    return low
