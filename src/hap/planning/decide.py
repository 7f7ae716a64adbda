"""`decide`: the paper's rule, one global ranking cut where the budget is met."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hap.errors import HapError
from hap.planning.candidates import candidates
from hap.planning.cost import POINTWISE, CostModel
from hap.planning.plan import Decision, Implant, Plan, versions
from hap.planning.rule import Choice, Rule
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
    rule = Rule(ranked, implant_ratio, round_to)
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
            "versions": versions(),
        },
    )


def _search(rule: Rule, cost: CostModel, budget: Budget) -> Choice:
    """The plan of the smallest n that meets the budget.

    Where one step jumps over the last percent (a unit that many layers share), that candidate is
    kept and the search goes on; the plan that lands closest under the budget wins.
    """
    lowest = rule(len(rule)).cost(cost)
    if _used(lowest, cost.dense, budget) > 1:
        raise HapError(
            "the budget cannot be reached",
            # rounded up, so that to ask for what is written here works
            expected=", ".join(
                f"{k} kept >= {math.ceil(v * 1e4) / 1e4:.4f}" for k, v in _fractions(lowest, cost.dense).items()
            ),
            got=", ".join(f"{k} {v}" for k, v in _limits(budget).items()),
            remedy="keep more, change implant_ratio, lower floor or round_to, or include inexact families",
        )
    best: tuple[float, Choice] | None = None
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
    return _used(cost.dense, cost.dense, budget) - _used(cost({family.name: mask}, {}), cost.dense, budget)


def _bisect(rule: Rule, cost: CostModel, budget: Budget) -> int:
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


def _limits(budget: Budget) -> dict[str, float]:
    return {k: v for k, v in (("params", budget.params), ("macs", budget.macs)) if v is not None}


def _used(cost: Cost, dense: Cost, budget: Budget) -> float:
    """The largest share of a budget that is used; over 1 breaks it."""
    fractions = _fractions(cost, dense)
    return max(fractions[k] / limit for k, limit in _limits(budget).items())


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
