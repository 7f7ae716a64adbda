"""A model of three layers, made by hand, and a plan for it."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import hap
from hap.planning.plan import Decision, Implant, Plan
from hap.report.figures import save_png
from hap.types import Budget, Cost, Family, Layer, Member, Role, Sensitivity, Structure


def layer(module: str, filters: int) -> Layer:
    return Layer(module, f"{module}.weight", None, filters, 0, (3, 3), 1, False, 64)


def member(parameter: str, size: int, *, axis: int = 0, start: int = 0, role: Role = "producer") -> Member:
    return Member(parameter, axis, tuple((start + unit,) for unit in range(size)), role)


@pytest.fixture
def plan() -> Plan:
    """`first`: 4 units, of which 1 leaves. `tied`: 5 filters, 3 of them units of a family, one of these leaves.

    `tied` has implants at a unit's filter (2) and at one that is no unit (4); `last` is frozen.
    """
    families = (
        Family(
            "first",
            "channel",
            4,
            True,
            (member("first.weight", 4), member("tied.weight", 4, axis=1, role="consumer")),
        ),
        Family(
            "tied",
            "channel",
            3,
            True,
            (member("tied.weight", 3, start=1), member("norm.weight", 3, start=1, role="follower")),
        ),
    )
    return Plan(
        structure=Structure(families, (), (layer("first", 4), layer("tied", 5), layer("last", 2)), {}, {}),
        decisions={"first": Decision((0, 1, 3), (2,)), "tied": Decision((1, 2), (0,))},
        implants={"tied": Implant((2, 4), "pointwise")},
        budget=Budget(params=0.5),
        criterion="gate-fisher",
        dense=Cost(100, 1000),
        small=Cost(50, 500),
    )


@pytest.fixture
def sensitivity() -> Sensitivity:
    double = torch.float64
    return Sensitivity(
        criterion="gate-fisher",
        samples=1024,
        draws=1,
        scores={
            "first": torch.tensor([4.0, 3.0, 0.1, 2.0], dtype=double),
            "tied": torch.tensor([0.2, 0.5, 9.0], dtype=double),
        },
        stderr={
            "first": torch.tensor([0.4, 0.3, 0.01, 0.2], dtype=double),
            "tied": torch.tensor([0.02, 0.05, 0.9], dtype=double),
        },
        filters={"tied": torch.tensor([7.0, 70.0, 70.0, 70.0, 0.3], dtype=double)},
        filters_stderr={"tied": torch.tensor([0.7, 1.0, 1.0, 1.0, 0.03], dtype=double)},
    )


class Block(nn.Module):
    """Attention with 4 heads of 4, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


@pytest.fixture(scope="session")
def heads() -> tuple[Sensitivity, Plan]:
    """A plan that prunes 4 of 8 heads, and makes 2 narrow; neurons may not leave."""
    structure = hap.trace(nn.Sequential(Block(), Block()), (torch.zeros(2, 5, 16),))
    scores = {f.name: torch.arange(f.size, dtype=torch.float64) + 1 for f in structure.families}
    sensitivity = Sensitivity("by hand", 1, 0, scores, {name: torch.zeros_like(s) for name, s in scores.items()})
    plan = hap.decide(structure, sensitivity, Budget(heads=0.6), implant_ratio=0)
    assert {name: len(d.prune) for name, d in plan.decisions.items() if d.prune} == {"0.q": 2, "1.q": 2}
    return sensitivity, dataclasses.replace(plan, implants={"1": Implant((2, 3), "head", 2)})


sensitivities, widths = (importlib.import_module(f"hap.report.{name}") for name in ("sensitivities", "widths"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    for place in (sensitivities, widths):
        monkeypatch.setattr(place, "save_png", lambda figure, path: (figures.append(figure), save_png(figure, path)))
    return figures
