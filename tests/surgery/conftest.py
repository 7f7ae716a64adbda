"""A small network with every kind of role, and a plan for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.planning import CostModel, Decision, Implant, Plan
from hap.structure import trace
from hap.types import Budget


class Small(nn.Module):
    """A stem, a grouped and a depthwise convolution, and a linear layer; every parameter also has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.norm(self.stem(x)).relu())
        return self.fc(self.inner(y).relu().flatten(1))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(image: torch.Tensor) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
    model(image).sum().backward()
    return model


@pytest.fixture
def plan(net: Small, image: torch.Tensor) -> Plan:
    """Prunes channels 1 and 4 of the stem and 0 of `inner`, and implants two filters of each."""
    structure = trace(net, (image,))
    prune = {"stem": (1, 4), "inner": (0,)}
    decisions, masks = {}, {}
    for family in structure.families:
        gone = prune[family.name]
        decisions[family.name] = Decision(tuple(u for u in range(family.size) if u not in gone), gone)
        masks[family.name] = torch.tensor([u in gone for u in range(family.size)]).numpy()
    implants = {"stem": Implant((0, 3), "pointwise"), "inner": Implant((2, 4), "pointwise")}
    cost = CostModel(structure)
    small = cost(masks, implants)
    return Plan(structure, decisions, implants, Budget(params=1.0), "by hand", cost.dense, small)
