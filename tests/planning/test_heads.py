"""Budgets of attention heads, and plans that touch one kind of unit alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.errors import HapError

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention with 4 heads of 3, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(60, 3)).eval()


@pytest.fixture(scope="module")
def structure(model: nn.Module) -> hap.Structure:
    found = hap.trace(model, (X,))
    assert sorted(f.kind for f in found.families) == ["head", "head", "neuron", "neuron"]
    return found


def weights(model: nn.Module) -> int:
    """Elements of all projections of heads."""
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[1] in "qkvo" and p.ndim > 1)


@pytest.mark.parametrize("mode", ["paper", "optimal"])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.3])
def test_heads_are_counted_as_they_are(model, structure, sensitivity, mode: str, keep: float) -> None:
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(heads=keep), mode=mode, implant_ratio=0)
    small = hap.apply(model, plan)
    assert plan.dense.heads == weights(model)
    assert plan.small.heads == weights(small)
    assert sum(len(plan.decisions[f.name].keep) for f in structure.families if f.kind == "head") == int(8 * keep)
    assert not any(plan.decisions[f.name].prune for f in structure.families if f.kind == "neuron")
    assert plan.options["units"] == ["head"]
    assert hap.Plan.from_json(plan.to_json()) == plan


def test_the_least_sensitive_heads_go(structure, sensitivity) -> None:
    scores = sensitivity(structure)
    plan = hap.decide(structure, scores, hap.Budget(heads=0.5), implant_ratio=0)
    heads = [f.name for f in structure.families if f.kind == "head"]
    gone = {(name, u) for name in heads for u in plan.decisions[name].prune}
    ranked = sorted((float(scores.scores[name][u]), (name, u)) for name in heads for u in range(4))
    assert gone == {unit for _, unit in ranked[:4]}


def test_heads_and_parameters_together(structure, sensitivity) -> None:
    budget = hap.Budget(params=0.6, heads=0.5)
    plan = hap.decide(structure, sensitivity(structure), budget, mode="optimal", implant_ratio=0)
    assert plan.small.params <= 0.6 * plan.dense.params
    assert plan.small.heads <= 0.5 * plan.dense.heads
    assert any(plan.decisions[f.name].prune for f in structure.families if f.kind == "neuron")


@pytest.mark.parametrize("units", [("head",), ("neuron",), ("neuron", "head")])
def test_other_kinds_stay(structure, sensitivity, units: tuple[str, ...]) -> None:
    plan = hap.decide(structure, sensitivity(structure), hap.Budget(params=0.8), units=units, implant_ratio=0)
    assert {f.kind for f in structure.families if plan.decisions[f.name].prune} == set(units)


def test_bad_kinds(structure, sensitivity) -> None:
    scores = sensitivity(structure)
    with pytest.raises(HapError, match="did you mean 'head'"):
        hap.decide(structure, scores, hap.Budget(params=0.8), units=("heads",))
    with pytest.raises(HapError, match="no units of kind 'channel' that can be pruned") as error:
        hap.decide(structure, scores, hap.Budget(params=0.8), units=("channel",))
    assert error.value.expected == "one of: head, neuron"


def test_a_model_without_heads(sensitivity) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    structure = hap.trace(net, (torch.zeros(2, 4),))
    with pytest.raises(HapError, match="no attention heads that can be pruned"):
        hap.decide(structure, sensitivity(structure), hap.Budget(params=0.9, heads=0.5))
