"""A model of three layers, made by hand, and a plan for it."""

from __future__ import annotations

import pytest
import torch

from hap.planning.plan import Decision, Implant, Plan
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
