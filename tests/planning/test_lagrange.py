"""At fixed prices every unit and block is chosen for itself, so that the best choice is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hap
from hap.implants import Option
from hap.planning.constraints import constraints
from hap.planning.lagrange import best_at, rates
from hap.planning.prices import Prices, Scale, prices
from hap.planning.problem import Problem, problem


@pytest.fixture
def setting(structure, sensitivity) -> tuple[Problem, Prices]:
    """`inner` may be implanted: each of its filters belongs to one unit."""
    undone = 0.03 * torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offered = {"inner": (Option("pointwise", None, undone),)}
    found = problem(structure, sensitivity(structure), constraints(structure), offered, pairs=0.0)
    scale = Scale(hap.CostModel(structure), hap.Budget(params=0.5))
    return found, prices(found, scale, np.zeros(len(found.families), dtype=np.int64), {}, np.ones(1))


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0, 5.0, 7.0, 10.0, 15.0, 30.0])
def test_each_unit_does_what_costs_least(setting, rate) -> None:
    """Keep at 0, implant, or leave; a family's last unit stays."""
    found, at = setting
    state = best_at(found, at, rate, found.score)
    price = np.repeat(at.unit, found.sizes)
    ways = np.zeros((3, len(found.score)))
    ways[2] = found.score - rate * price
    (layer,) = found.layers
    ways[1] = np.inf
    ways[1, layer.owner] = layer.rise[0] - rate * at.block[0][0]
    done = np.where(state.gone, 2, 0)
    done[layer.owner[state.implanted[0]]] = 1
    for family, span in enumerate(found.spans()):
        if state.counts[family] < found.most[family]:
            assert (done[span] == ways[:, span].argmin(0)).all()
    assert state.predicted == pytest.approx(ways[2][done == 2].sum() + ways[1][done == 1].sum() + rate * (
        price[done == 2].sum() + at.block[0][0] * (done == 1).sum()
    ))  # fmt: skip


def test_all_three_ways_occur(setting) -> None:
    found, at = setting
    states = [best_at(found, at, rate, found.score) for rate in (1.0, 3.0, 10.0)]
    assert any(state.implanted[0].any() for state in states) and any(state.gone.any() for state in states)


def test_the_rates_span_all_choices(setting) -> None:
    found, at = setting
    low, high = rates(found, at, found.score)
    nothing, everything = best_at(found, at, low, found.score), best_at(found, at, high, found.score)
    assert not nothing.gone.any() and not nothing.implanted[0].any()
    assert (everything.counts == found.most).all()
