"""One plan that does what two do, one after the other."""

from __future__ import annotations

import pytest
import torch

import hap
from hap import Budget, HapError, decide
from hap.planning import CostModel, compose


@pytest.fixture(scope="module")
def plans(net, structure, inputs, sensitivity) -> tuple[hap.Plan, hap.Plan]:
    first = decide(structure, sensitivity(structure), Budget(params=0.7), implant_ratio=0)
    again = hap.trace(hap.apply(net, first), (inputs,))
    return first, decide(again, sensitivity(again, 2), Budget(params=0.7), implant_ratio=0.7)


def test_the_dense_model_becomes_the_same_at_once(net, inputs, plans) -> None:
    """Bit for bit, implants and all; and a plan that was stored does, too."""
    first, second = plans
    assert second.implants and any(d.prune for d in second.decisions.values())
    step_by_step = hap.apply(hap.apply(net, first), second).state_dict()
    for plan in (compose(first, second), hap.Plan.from_json(compose(first, second).to_json())):
        at_once = hap.apply(net, plan).state_dict()
        assert at_once.keys() == step_by_step.keys()
        assert all(torch.equal(at_once[name], tensor) for name, tensor in step_by_step.items())


def test_its_cost_is_the_dense_structures(structure, plans) -> None:
    plan = compose(*plans)
    masks = {
        name: torch.tensor([u in d.prune for u in range(len(d.keep) + len(d.prune))]).numpy()
        for name, d in plan.decisions.items()
    }
    assert CostModel(structure)(masks, plan.implants) == plan.small
    assert plan.dense == plans[0].dense


def test_predictions_add_up(net, structure, inputs, sensitivity, plans) -> None:
    first, _ = plans
    again = hap.trace(hap.apply(net, first), (inputs,))
    second = decide(again, sensitivity(again, 1), Budget(params=0.7), implant_ratio=0)
    assert compose(first, second).predicted == first.predicted + second.predicted
    assert compose(first, plans[1]).predicted is None


def test_it_is_associative(net, inputs, sensitivity, plans) -> None:
    first = plans[0]
    model = hap.apply(net, first)
    middle = decide(
        hap.trace(model, (inputs,)), sensitivity(hap.trace(model, (inputs,)), 2), Budget(params=0.8), implant_ratio=0
    )
    end = hap.trace(hap.apply(model, middle), (inputs,))
    last = decide(end, sensitivity(end, 3), Budget(params=0.8))
    left, right = compose(compose(first, middle), last), compose(first, compose(middle, last))
    assert left.decisions == right.decisions and left.implants == right.implants


def test_what_has_implants_cannot_come_first(structure, sensitivity, plans) -> None:
    first = decide(structure, sensitivity(structure), Budget(params=0.7), implant_ratio=0.5)
    with pytest.raises(HapError, match="plans can follow only on one that prunes"):
        compose(first, plans[1])


def test_a_plan_for_another_model_is_refused(structure, sensitivity, plans) -> None:
    with pytest.raises(HapError, match="not for the model that the first one makes"):
        compose(plans[0], decide(structure, sensitivity(structure), Budget(params=0.7)))
