from __future__ import annotations

import pytest
import torch
from torch import nn

import hap

INPUTS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block with batch norms, and two linear layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.back(self.inner(x).relu())).relu().mean((2, 3))
        return self.head(self.second(self.first(x).relu()).relu())


def random_sensitivity(structure: hap.Structure, seed: int) -> hap.Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    return hap.Sensitivity(
        "random",
        samples=0,
        draws=0,
        scores={f.name: torch.rand(f.size, generator=generator) for f in structure.families},
        stderr={},
        filters={layer.module: torch.rand(layer.filters, generator=generator) for layer in structure.layers},
    )


def make_net(seed: int) -> Net:
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    for tensor in (*net.parameters(), net.norm.running_mean):
        tensor.data = 0.5 * torch.randn(tensor.shape, generator=generator)
    return net.eval()


@pytest.fixture(scope="session")
def inputs() -> torch.Tensor:
    return INPUTS


@pytest.fixture(scope="session")
def dense() -> nn.Module:
    return make_net(0)


@pytest.fixture(scope="session")
def other_weights() -> nn.Module:
    """The same network, not the same numbers."""
    return make_net(1)


@pytest.fixture(scope="session")
def plan(dense: nn.Module) -> hap.Plan:
    structure = hap.trace(dense, (INPUTS,))
    return hap.decide(structure, random_sensitivity(structure, 0), hap.Budget(params=0.6), implant_ratio=0.3)


@pytest.fixture(scope="session")
def small(dense: nn.Module, plan: hap.Plan) -> nn.Module:
    """Pruned with implants and a gather, and then "trained"."""
    small = hap.apply(dense, plan)
    generator = torch.Generator().manual_seed(2)
    for parameter in small.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return small


@pytest.fixture(scope="session")
def foreign(dense: nn.Module) -> tuple[nn.Module, hap.Plan]:
    """Another plan for the same network."""
    structure = hap.trace(dense, (INPUTS,))
    plan = hap.decide(structure, random_sensitivity(structure, 5), hap.Budget(params=0.4), implant_ratio=0)
    return hap.apply(dense, plan), plan
