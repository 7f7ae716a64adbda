"""A small network with every kind of coupling, and what the planning tests share about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hap
from hap import zoo
from hap.planning.latency_table import Grid, LatencyTable

INPUTS = torch.zeros(2, 3, 8, 8)
Costs = Callable[[nn.Module, torch.Tensor], hap.types.Cost]


class Net(nn.Module):
    """A residual block, a depthwise and two grouped convolutions, squeeze-and-excitation, `cat`, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.back = nn.Conv2d(6, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, stride=2, groups=12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.narrow = nn.Conv2d(12, 12, 3, padding=1, groups=6)  # many narrow groups: a unit is a group
        self.wide = nn.Conv2d(12, 8, 3, padding=1, groups=2)  # few wide groups: a unit is a place in each
        self.left = nn.Conv2d(8, 5, 3, padding=1)
        self.right = nn.Conv2d(8, 4, 5, padding=2)
        self.hidden = nn.Linear(9 * 4, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        x = self.depthwise(F.relu(self.pointwise(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.wide(F.relu(self.narrow(x))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="session")
def structure(net: nn.Module) -> hap.Structure:
    return hap.trace(net, (INPUTS,))


@pytest.fixture(scope="session")
def inputs() -> torch.Tensor:
    return INPUTS


@pytest.fixture(scope="session")
def resnet() -> hap.Structure:
    return hap.trace(zoo.build("resnet20"), (torch.zeros(1, 3, 32, 32),))


@pytest.fixture(scope="session")
def sensitivity() -> Callable[..., hap.Sensitivity]:
    """Random scores for a structure; `filters` are as sensitive as units."""

    def draw(structure: hap.Structure, seed: int = 0) -> hap.Sensitivity:
        generator = torch.Generator().manual_seed(seed)

        def rand(size: int) -> torch.Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64)

        return hap.Sensitivity(
            "random",
            samples=0,
            draws=0,
            scores={f.name: rand(f.size) for f in structure.families},
            stderr={f.name: torch.zeros(f.size) for f in structure.families},
            filters={layer.module: rand(layer.filters) for layer in structure.layers},
        )

    return draw


@pytest.fixture(scope="session")
def real_cost() -> Costs:
    """Parameters, and MACs for one sample as PyTorch counts them, of a real model."""

    def count(model: nn.Module, inputs: torch.Tensor) -> hap.types.Cost:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(inputs)
        params = sum(p.numel() for p in model.parameters())
        return hap.types.Cost(params, counter.get_total_flops() // (2 * len(inputs)))

    return count


def slow_table(structure: hap.Structure, factor: float) -> LatencyTable:
    """Layers take a millisecond for each of their filters' inputs, pointwise implants `factor` of that."""
    layers, implants, joins = {}, {}, {}
    for layer in structure.layers:
        shape = structure.tensors[layer.weight].shape
        rows, columns = [1, shape[layer.output_axis]], [1, shape[1 - layer.output_axis]]
        layers[layer.module] = Grid(rows, columns, [[float(r * c) for c in columns] for r in rows])
        grid = Grid(rows, columns, [[factor * r * c for c in columns] for r in rows])
        implants[layer.module] = {("pointwise", None): grid}
        joins[layer.module] = Grid(rows, [1], [[0.1], [0.1]])
    return LatencyTable("nowhere", 1.0, layers, implants, joins)


@pytest.fixture(scope="session")
def slow_implants() -> Callable[[hap.Structure, float], LatencyTable]:
    return slow_table
