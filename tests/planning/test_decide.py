from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hap
from hap import Budget, HapError, decide
from hap.planning import versions


def fractions(plan: hap.Plan) -> dict[str, float]:
    return {"params": plan.small.params / plan.dense.params, "macs": plan.small.macs / plan.dense.macs}


def used(plan: hap.Plan) -> float:
    """The largest share of a budget that is used."""
    limits = {"params": plan.budget.params, "macs": plan.budget.macs}
    return max(fractions(plan)[k] / v for k, v in limits.items() if v is not None)


def kept(plan: hap.Plan) -> dict[str, set[int]]:
    return {name: set(d.keep) for name, d in plan.decisions.items()}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(params=0.7),
        Budget(params=0.35),
        Budget(macs=0.5),
        Budget(params=0.6, macs=0.5),
        Budget(params=0.4, macs=0.9),
    ],
    ids=str,
)
def test_budget_is_met_within_half_a_percent(resnet, sensitivity, budget, ratio) -> None:
    for seed in range(2):
        plan = decide(resnet, sensitivity(resnet, seed), budget, implant_ratio=ratio)
        assert 0.995 <= used(plan) <= 1


def test_budget_is_met_where_one_step_jumps_over_it(resnet, sensitivity) -> None:
    """A unit of the last stage's stream is over half a percent of the model; the plan makes up for it with others."""
    given = sensitivity(resnet)
    for family in resnet.families:
        if len(family.roles("producer")) > 1:  # the streams leave first
            given.scores[family.name][:] = torch.arange(family.size) / 1e6
    for budget in (0.9, 0.8, 0.6):
        assert 0.995 <= used(decide(resnet, given, Budget(params=budget), implant_ratio=0)) <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_never_over_budget_however_coarse_the_net(structure, sensitivity, ratio) -> None:
    for i, fraction in enumerate((0.3, 0.5, 0.7, 0.9, 0.99)):
        for budget in (Budget(params=fraction), Budget(macs=fraction), Budget(params=fraction, macs=fraction)):
            assert used(decide(structure, sensitivity(structure, i), budget, implant_ratio=ratio)) <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_a_smaller_budget_never_costs_more(resnet, sensitivity, ratio) -> None:
    given = sensitivity(resnet)
    plans = [decide(resnet, given, Budget(params=b / 20), implant_ratio=ratio) for b in range(20, 5, -1)]
    costs = [p.small.params for p in plans]
    assert costs == sorted(costs, reverse=True)


def test_a_smaller_budget_keeps_a_subset(sensitivity) -> None:
    """With one family there is one order in which units leave."""
    net = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2))
    traced = hap.trace(net, (torch.zeros(1, 4),))
    plans = [decide(traced, sensitivity(traced), Budget(params=b / 20)) for b in range(20, 1, -1)]
    for larger, smaller in zip(plans, plans[1:], strict=False):
        assert kept(smaller)["0"] < kept(larger)["0"]


def test_the_least_sensitive_leave(sensitivity) -> None:
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2, bias=False))
    traced = hap.trace(net, (torch.zeros(1, 4),))
    given = sensitivity(traced)
    plan = decide(traced, given, Budget(params=0.6))  # each unit has 4 + 1 + 2 of the 70 parameters
    assert set(plan.decisions["0"].keep) == set(given.scores["0"].argsort(descending=True)[:6].tolist())
    assert plan.small.params == 42


def test_a_whole_budget_changes_nothing(structure, sensitivity) -> None:
    plan = decide(structure, sensitivity(structure), Budget(params=1.0, macs=1.0), implant_ratio=0.5)
    assert plan.small == plan.dense and not plan.implants
    assert not any(d.prune for d in plan.decisions.values())


@pytest.mark.parametrize("floor, budget", [(1, 0.15), (2, 0.33), (3, 0.49)])
def test_floor(structure, sensitivity, floor, budget) -> None:
    lowest = decide(structure, sensitivity(structure), Budget(params=budget), implant_ratio=0, floor=floor)
    widths = {name: len(d.keep) for name, d in lowest.decisions.items()}
    assert all(width >= min(floor, structure.family(name).size) for name, width in widths.items())
    assert min(widths.values()) == floor


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_round_to(resnet, sensitivity, ratio) -> None:
    plan = decide(resnet, sensitivity(resnet), Budget(params=0.5), implant_ratio=ratio, round_to=8)
    assert used(plan) <= 1
    assert all(len(d.keep) % 8 == 0 for d in plan.decisions.values())
    assert any(d.prune for d in plan.decisions.values())


@pytest.mark.parametrize(
    "options",
    [
        {"implant_ratio": 0.0},
        {"implant_ratio": 0.5},
        {"implant_ratio": 0.0, "floor": 3},
        {"implant_ratio": 0.2, "round_to": 4},
    ],
    ids=str,
)
def test_an_unreachable_budget_says_how_low_it_can_go(structure, sensitivity, options) -> None:
    """To ask for what the message says works; a ten-thousandth less does not."""
    given = sensitivity(structure)
    with pytest.raises(HapError, match="the budget cannot be reached") as error:
        decide(structure, given, Budget(params=0.001, macs=0.002), **options)
    assert error.value.got == "params 0.001, macs 0.002"
    lowest = {k: float(v) for k, v in (part.split(" kept >= ") for part in error.value.expected.split(", "))}
    plan = decide(structure, given, Budget(**lowest), **options)
    assert used(plan) <= 1
    for name, value in lowest.items():
        with pytest.raises(HapError, match="cannot be reached"):
            decide(structure, given, Budget(**{name: value - 1e-4}), **options)


def test_without_a_prunable_family_it_says_why() -> None:
    traced = hap.trace(nn.Linear(4, 2), (torch.zeros(1, 4),))
    empty = hap.Sensitivity("none", 0, 0, {}, {})
    with pytest.raises(HapError, match="no prunable family") as error:
        decide(traced, empty, Budget(params=0.5))
    assert "weight axis 0" in error.value.got and "weight axis 1" in error.value.got


def test_families_behind_a_normalisation_are_left_alone_unless_asked_for(sensitivity) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    traced = hap.trace(net, (torch.zeros(1, 4),))
    assert [f.exact for f in traced.families] == [False]
    with pytest.raises(HapError, match="no prunable family") as error:
        decide(traced, sensitivity(traced), Budget(params=0.7))
    assert "a normalisation mixes its units" in error.value.got
    assert decide(traced, sensitivity(traced), Budget(params=0.7), inexact=True).decisions["0"].prune


def test_without_implants_there_are_none(resnet, sensitivity) -> None:
    assert not decide(resnet, sensitivity(resnet), Budget(params=0.4), implant_ratio=0).implants
    assert decide(resnet, sensitivity(resnet), Budget(params=0.4), implant_ratio=0.1).implants


def test_a_filter_whose_channel_must_stay_is_implanted_not_pruned(structure, sensitivity) -> None:
    """The residual stream's filters are worthless, its channels are not."""
    given = sensitivity(structure)
    given.scores["stem"][:] = 10
    given.filters["stem"][:] = given.filters["back"][:] = 0
    plan = decide(structure, given, Budget(params=0.75), implant_ratio=0.1)
    assert not plan.decisions["stem"].prune
    assert plan.implants["stem"].indices == plan.implants["back"].indices == tuple(range(8))


def test_no_pruned_filter_is_implanted(structure, sensitivity) -> None:
    for seed in range(4):
        plan = decide(structure, sensitivity(structure, seed), Budget(params=0.5), implant_ratio=0.5)
        assert hap.Plan.from_json(plan.to_json()) == plan  # which checks it


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_the_real_model_costs_what_is_promised(net, structure, sensitivity, inputs, real_cost, ratio) -> None:
    for seed in range(3):
        plan = decide(structure, sensitivity(structure, seed), Budget(params=0.6, macs=0.6), implant_ratio=ratio)
        assert real_cost(hap.apply(net, plan), inputs) == plan.small


def test_the_same_input_gives_the_same_plan(resnet, sensitivity) -> None:
    ties = sensitivity(resnet)
    for scores in (*ties.scores.values(), *ties.filters.values()):
        scores[:] = (scores * 3).round()  # many ties
    texts = {decide(resnet, ties, Budget(macs=0.5), implant_ratio=0.3).to_json() for _ in range(3)}
    assert len(texts) == 1


def test_the_plan_records_what_was_asked_for(structure, sensitivity) -> None:
    given = dataclasses.replace(sensitivity(structure), criterion="mine", samples=7, draws=2)
    plan = decide(structure, given, Budget(macs=0.8), implant_ratio=0.2, floor=2, round_to=2)
    assert (plan.criterion, plan.budget) == ("mine", Budget(macs=0.8))
    bounds = {"floor": 2, "minimum": {}, "maximum": {}, "round_to": 2, "protect": [], "inexact": False}
    choice = {"mode": "paper", "implant_ratio": 0.2, "joint": False, "pairs": 0.0, "units": None}
    assert plan.options == {**bounds, **choice, "versions": versions(), "samples": 7, "draws": 2}
    assert set(plan.decisions) == {f.name for f in structure.families}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"implant_ratio": -0.1}, "implant_ratio is out of range"),
        ({"implant_ratio": 1.1}, "implant_ratio is out of range"),
        ({"implant_ratio": float("nan")}, "implant_ratio is out of range"),
        ({"pairs": 1.5}, "pairs is out of range"),
        ({"floor": 0}, "floor is out of range"),
        ({"round_to": 0}, "round_to is out of range"),
    ],
)
def test_options_out_of_range_are_refused(structure, sensitivity, options, message) -> None:
    with pytest.raises(HapError, match=message):
        decide(structure, sensitivity(structure), Budget(params=0.5), **options)
