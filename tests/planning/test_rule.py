from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import hap
from hap.planning import CostModel
from hap.planning.candidates import candidates
from hap.planning.choice import Choice
from hap.planning.constraints import constraints
from hap.planning.rule import Rule


def rule_for(structure, sensitivity, *, ratio: float, round_to: int = 1, seed: int = 0) -> Rule:
    ranked = candidates(structure, sensitivity(structure, seed), constraints(structure), with_implants=ratio > 0)
    return Rule(ranked, ratio, round_to)


def implanted(choice: Choice, module: str) -> tuple[int, ...]:
    return choice.implants[module].indices if module in choice.implants else ()


def state(rule: Rule, choice: Choice, candidate: int) -> str:
    ranked = rule.ranked
    unit = int(ranked.unit[candidate])
    if ranked.layer[candidate] >= 0:
        return "implanted" if unit in implanted(choice, ranked.layers[ranked.layer[candidate]].module) else "kept"
    family = int(ranked.family[candidate])
    if choice.pruned[ranked.families[family].name][unit]:
        return "pruned"
    rows = {(ranked.layers[k].module, i) for k, indices in ranked.implants[family].items() for i in indices[unit]}
    there = [i in implanted(choice, module) for module, i in rows]
    return "implanted" if there and all(there) else "kept"


@pytest.fixture(scope="module")
def chain() -> hap.Structure:
    """All but the last convolution's filters are units with one producer: 8 + 8 units, all implantable."""
    model = nn.Sequential(nn.Conv1d(2, 9, 3), nn.ReLU(), nn.Conv1d(9, 9, 3), nn.ReLU(), nn.Conv1d(9, 2, 1))
    return hap.trace(model, (torch.zeros(1, 2, 9),))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_most_sensitive_share_of_the_first_n_is_implanted(chain, sensitivity, ratio) -> None:
    rule = rule_for(chain, sensitivity, ratio=ratio)
    assert len(rule) == 16
    for n in range(17):
        choice = rule(n)
        states = [state(rule, choice, i) for i in range(16)]
        implants = math.ceil(round(ratio * n, 9))
        assert states == ["pruned"] * (n - implants) + ["implanted"] * implants + ["kept"] * (16 - n)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("round_to", [1, 4])
def test_cost_never_rises_with_n(structure, sensitivity, slow_implants, ratio, round_to) -> None:
    """The bisection rests on this; rounding must not turn an implanted unit back into a full one.

    Time falls without implants, but not with slow ones.
    """
    cost = CostModel(structure, slow_implants(structure, 3.0))
    rises = False
    for seed in range(3):
        rule = rule_for(structure, sensitivity, ratio=ratio, round_to=round_to, seed=seed)
        costs = [rule(n).cost(cost) for n in range(len(rule) + 1)]
        assert all(a.params >= b.params and a.macs >= b.macs for a, b in zip(costs, costs[1:], strict=False))
        rises |= any(a.latency < b.latency for a, b in zip(costs, costs[1:], strict=False))
        assert costs[0] == cost.dense
    assert rises == (ratio > 0)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_widths_are_multiples_or_whole(structure, sensitivity, ratio) -> None:
    rule = rule_for(structure, sensitivity, ratio=ratio, round_to=4)
    widths = set()
    for n in range(len(rule) + 1):
        for mask in rule(n).pruned.values():
            kept = int((~mask).sum())
            assert kept % 4 == 0 or kept == len(mask)
            widths.add((len(mask), kept))
    assert {(5, 5), (5, 4)} <= widths


def test_rounding_takes_back_the_most_sensitive(chain, sensitivity) -> None:
    given = sensitivity(chain)
    mask = rule_for(chain, sensitivity, ratio=0.0, round_to=4)(16).pruned["0"]
    assert set(np.flatnonzero(mask).tolist()) == set(given.scores["0"].argsort()[:5].tolist())  # 9 units, 4 stay


def test_an_excluded_candidate_stays_as_it_is(structure, sensitivity) -> None:
    rule = rule_for(structure, sensitivity, ratio=0.0)
    total = len(rule)
    rule.exclude(5)
    assert len(rule) == total - 1
    choice = rule(total - 1)
    assert [state(rule, choice, i) for i in range(total)].count("kept") == 1
    assert state(rule, choice, 5) == "kept"


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_last_moves_are_those_that_changed(chain, sensitivity, ratio) -> None:
    rule = rule_for(chain, sensitivity, ratio=ratio)
    rule.exclude(3)
    for n in range(1, len(rule) + 1):
        before, after = rule(n - 1), rule(n)
        changed = {i for i in range(16) if state(rule, before, i) != state(rule, after, i)}
        assert set(rule.last_moves(n)) == changed


def test_no_filter_is_both_pruned_and_implanted(structure, sensitivity) -> None:
    for seed in range(3):
        rule = rule_for(structure, sensitivity, ratio=0.5, seed=seed)
        for n in range(len(rule) + 1):
            choice = rule(n)
            for family in structure.families:
                for member in family.roles("producer") + family.roles("follower"):
                    rows = set(implanted(choice, member.parameter.removesuffix(".weight")))
                    if member.axis == 0 and member.parameter.endswith(".weight"):
                        gone = np.flatnonzero(choice.pruned[family.name]).tolist()
                        assert not rows & {i for u in gone for i in member.indices[u]}
