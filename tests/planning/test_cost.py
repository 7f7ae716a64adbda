"""What the cost model promises is what the real small model costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.planning import CostModel, Decision, Implant, Plan
from hap.planning.candidates import block, implantable


def random_plan(structure: hap.Structure, seed: int) -> Plan:
    """Prunes any units but one in each family, and implants any blocks of filters that are left."""
    random = np.random.default_rng(seed)
    decisions, masks = {}, {}
    lost: set[tuple[str, int, int]] = set()
    for family in structure.families:
        gone = random.permutation(family.size)[: random.integers(0, family.size)]
        masks[family.name] = np.isin(np.arange(family.size), gone)
        keep, prune = np.flatnonzero(~masks[family.name]), np.flatnonzero(masks[family.name])
        decisions[family.name] = Decision(tuple(keep.tolist()), tuple(prune.tolist()))
        lost |= {(m.parameter, m.axis, i) for m in family.members for u in prune.tolist() for i in m.indices[u]}
    implants = {}
    for layer in implantable(structure):
        starts = [i for i in range(0, layer.filters, block(layer)) if (layer.weight, 0, i) not in lost]
        chosen = sorted(random.permutation(starts)[: random.integers(0, len(starts) + 1)].tolist())
        rows = tuple(first + i for first in chosen for i in range(block(layer)))
        if rows:
            implants[layer.module] = Implant(rows, "pointwise")
    cost = CostModel(structure)
    small = cost(masks, implants)
    return Plan(structure, decisions, implants, hap.Budget(params=1.0), "random", cost.dense, small)


@pytest.mark.parametrize("seed", range(20))
def test_promised_cost_is_the_real_one(net, structure, inputs, real_cost, seed) -> None:
    plan = random_plan(structure, seed)
    assert real_cost(hap.apply(net, plan), inputs) == plan.small
    assert plan.small.params < plan.dense.params


def test_the_random_plans_cover_what_matters(structure) -> None:
    """Every implantable layer gets an implant in some plan of the test above, and every family loses a unit."""
    plans = [random_plan(structure, seed) for seed in range(20)]
    layers = {layer.module for layer in implantable(structure)}
    assert layers == {"stem", "inner", "back", "depthwise", "narrow", "left", "right"}
    assert {name for plan in plans for name in plan.implants} == layers
    assert {name for plan in plans for name, d in plan.decisions.items() if d.prune} == set(plans[0].decisions)
    implanted = [len(p.implants[n].indices) == p.structure.layer(n).filters for p in plans for n in p.implants]
    assert any(implanted)  # some layer has no k x k filter left


def test_dense_cost_is_the_models(net, structure, inputs, real_cost) -> None:
    assert CostModel(structure).dense == real_cost(net, inputs)


def test_cost_of_resnet20_is_the_literatures(resnet) -> None:
    """0.27 M parameters (He et al. 2016, table 6), 40.6 M multiply-accumulates."""
    dense = CostModel(resnet).dense
    assert dense.params == 269_722
    assert dense.macs == pytest.approx(40.6e6, rel=0.01)


class Bare(nn.Module):
    """Three weights, two of them in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(32, 8)), nn.Parameter(torch.ones(16, 32))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(F.linear(F.relu(F.linear(x, self.first)), self.second)))


def test_all_weights_of_one_module_are_multiplied(real_cost) -> None:
    model, x = Bare(), torch.zeros(2, 8)
    assert CostModel(hap.trace(model, (x,))).dense == real_cost(model, x)


def test_attention_with_a_weight_for_each_projection() -> None:
    attention = nn.MultiheadAttention(16, 4, kdim=24, vdim=24, batch_first=True)
    x, memory = torch.zeros(1, 5, 16), torch.zeros(1, 5, 24)
    dense = CostModel(hap.trace(attention, (x, memory, memory))).dense
    assert dense.macs == 5 * 16 * (16 + 24 + 24 + 16)
