from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hap.planning import CostModel, Decision, Implant, Plan
from hap.structure import trace
from hap.surgery import apply, verify
from hap.surgery.layout import layout
from hap.types import Budget


def test_pruned_positions_go_and_implanted_ones_come_last(plan) -> None:
    kept = layout(plan).kept
    assert kept["stem.weight", 0] == (2, 5, 6, 7, 0, 3)
    assert kept["depthwise.weight", 0] == kept["inner.weight", 1] == kept["norm.running_var", 0] == (2, 5, 6, 7, 0, 3)
    assert kept["inner.bias", 0] == (1, 3, 5, 2, 4)
    assert kept["fc.weight", 1][:32] == (*range(16, 32), *range(48, 64))


def test_without_implants_the_order_stays(plan) -> None:
    kept = layout(dataclasses.replace(plan, implants={})).kept
    assert kept["stem.weight", 0] == (0, 2, 3, 5, 6, 7)


def test_what_loses_nothing_is_not_touched(plan) -> None:
    whole = {f.name: Decision(tuple(range(f.size)), ()) for f in plan.structure.families}
    nothing = dataclasses.replace(plan, implants={}, decisions=whole)
    assert layout(nothing).kept == {}
    assert list(layout(nothing).of("stem.weight", 0, 8)) == list(range(8))
    only_stem = dataclasses.replace(plan, decisions=whole, implants={"stem": Implant((0,), "pointwise")})
    assert layout(only_stem).kept["stem.weight", 0] == (1, 2, 3, 4, 5, 6, 7, 0)
    assert ("inner.weight", 0) not in layout(only_stem).kept


class Stream(nn.Module):
    """Four convolutions that write to one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x + self.b(x)
        x = x + self.c(x)
        return self.last(x + self.d(x))


@pytest.mark.parametrize(
    ("sets", "gathers"),
    [
        ([(0, 2), (0, 2), (0, 2), ()], 0),  # the same
        ([(0, 2, 5), (0,), (0, 2), ()], 0),  # nested
        ([(0, 2), (1, 5), (), ()], 0),  # apart: one set at either end
        ([(0, 2), (1, 3, 4, 5), (3, 4), (1, 3, 4)], 0),  # at either end, and nested there
        ([(0, 1, 2, 3, 4, 5), (1, 3), (), ()], 0),  # all, and some
        ([(0, 2), (2, 3), (), ()], 1),  # crossing
        ([(0, 2), (2, 3), (0, 2), (3, 2)], 2),
        ([(0, 2, 3), (2, 4), (2, 4), ()], 1),  # what most producers share decides
    ],
)
def test_the_order_serves_most_producers(sets, gathers) -> None:
    model = Stream().double()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    structure = trace(model, (x,))
    (family,) = structure.families
    decisions = {family.name: Decision(tuple(range(6)), ())}
    implants = {name: Implant(s, "pointwise") for name, s in zip("abcd", sets, strict=True) if s}
    cost = CostModel(structure)
    plan = Plan(structure, decisions, implants, Budget(params=1.0), "by hand", cost.dense, cost({}, implants))
    small = apply(model, plan)
    assert verify(model, small, plan, (x,)).ok
    program = torch.export.export(small, (x,))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("index" in name or "gather" in name for name in operators) == gathers
    assert not any("scatter" in name for name in operators)
