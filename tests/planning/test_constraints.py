from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap import Budget, HapError, decide
from hap.planning.constraints import Room, constraints, counts


def rooms(structure: hap.Structure, **options: object) -> dict[str, Room]:
    return dict(constraints(structure, **options).rooms)


def test_one_unit_stays_unless_told_otherwise(structure) -> None:
    assert all(rooms(structure)[f.name] == Room(0, f.size - 1) for f in structure.families)


def test_smallest_and_largest_widths(structure) -> None:
    found = rooms(structure, minimum={"inner": 0.5, "left": 4}, maximum={"hidden": 6, "l*": 0.8})
    assert found["inner"] == Room(0, 3) and found["left"] == Room(1, 1) and found["hidden"] == Room(4, 9)


def test_the_strictest_of_several_patterns_counts(structure) -> None:
    assert rooms(structure, minimum={"*": 2, "inner": 3, "in*": 1})["inner"] == Room(0, 3)


def test_widths_are_rounded_inwards(structure) -> None:
    found = rooms(structure, round_to=4, minimum={"hidden": 5}, maximum={"stem": 7})
    assert found["hidden"] == Room(0, 2) and found["stem"] == Room(4, 4)


def test_what_a_protected_module_writes_stays(structure) -> None:
    """`back` writes to the stream, `norm` scales it; what they read may shrink."""
    for name in ("back", "norm", "b*"):
        found = rooms(structure, protect=[name])
        assert found["stem"] == Room(0, 0) and found["inner"].most == 5


def test_a_pattern_protects_what_is_inside(resnet) -> None:
    found = rooms(resnet, protect=["layer1"])
    held = {name for name, room in found.items() if not room.most}
    assert held == {"conv1", "layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1"}


@pytest.mark.parametrize("mode", ["paper", "optimal"])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_plans_respect_them(structure, sensitivity, mode, ratio) -> None:
    for seed in range(3):
        plan = decide(
            structure, sensitivity(structure, seed), Budget(params=0.7), mode=mode, implant_ratio=ratio,
            minimum={"hidden": 0.5}, maximum={"stem": 7}, protect=["inner"],
        )  # fmt: skip
        widths = {name: len(d.keep) for name, d in plan.decisions.items()}
        assert widths["hidden"] >= 5 and widths["stem"] <= 7 and widths["inner"] == 6
        assert "inner" not in plan.implants
        assert plan.small.params <= 0.7 * plan.dense.params


class Fused(nn.Module):
    """Attention and MLP side by side, computed by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out, self.down = nn.Linear(16, 80), nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.out.in_features
        *qkv, hidden = self.both(x).split([width, width, width, self.down.in_features], -1)
        q, k, v = (part.view(*x.shape[:2], -1, 4).transpose(1, 2) for part in qkv)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(heads) + self.down(hidden.relu())


def test_units_of_other_kinds_stay_though_the_same_layer_writes_them() -> None:
    structure = hap.trace(Fused().eval(), (torch.zeros(2, 5, 16),))
    kinds = {family.kind: rooms(structure, units=["head"])[family.name].most for family in structure.families}
    assert kinds["head"] == 3 and kinds["neuron"] == 0


def test_a_share_is_neither_less_nor_more_than_it_says(structure) -> None:
    assert counts(structure, {"left": 0.5}, largest=False)["left"] == 3
    assert counts(structure, {"left": 0.5}, largest=True)["left"] == 2
    assert counts(structure, {"hidden": 0.3}, largest=False)["hidden"] == 3


def test_a_largest_width_that_cannot_be_had_is_said(structure, caplog) -> None:
    with caplog.at_level("INFO"):
        assert rooms(structure, protect=["inner"], maximum={"inn*": 0.5, "left": 3})["inner"] == Room(0, 0)
    assert "stay wider than maximum" in caplog.text and caplog.text.rstrip().endswith(": inner")


def test_families_without_scores_stay(structure, sensitivity) -> None:
    given = sensitivity(structure)
    scores = {name: score for name, score in given.scores.items() if name != "inner"}
    some = hap.Sensitivity("part", 0, 0, scores, given.stderr, given.filters, skipped={"inner": "it is odd"})
    for mode in ("paper", "optimal"):
        assert not decide(structure, some, Budget(params=0.7), mode=mode).decisions["inner"].prune


def test_widths_as_counts(structure) -> None:
    assert counts(structure, {"inner": 0.5, "*": 2}, largest=False)["inner"] == 3
    assert counts(structure, {"inner": 0.5, "*": 2}, largest=True)["inner"] == 2
    assert counts(structure, None, largest=True) == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"minimum": {"iner": 2}}, "unknown family 'iner'.*\n.*\n.*did you mean 'inner'"),
        ({"maximum": {"layer9.*": 2}}, "unknown family 'layer9"),
        ({"protect": ["bakc"]}, "unknown module to protect 'bakc'.*\n.*\n.*did you mean 'back'"),
        ({"minimum": {"inner": 0}}, "minimum of 'inner' is out of range"),
        ({"minimum": {"inner": 1.5}}, "minimum of 'inner' is out of range"),
        ({"maximum": {"inner": True}}, "maximum of 'inner' is out of range"),
        ({"floor": 2.0}, "floor is out of range"),
        ({"round_to": 4.0}, "round_to is out of range"),
        ({"minimum": {"inner": 5}, "maximum": {"inner": 3}}, "no width is left for family 'inner'"),
        ({"maximum": {"inner": 3}, "round_to": 4}, "no width is left for family 'inner'"),
    ],
)
def test_wrong_constraints_are_refused(structure, options, message) -> None:
    with pytest.raises(HapError, match=message):
        constraints(structure, **options)
