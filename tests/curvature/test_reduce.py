from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap.curvature.reduce import groups_of
from hap.errors import HapError
from hap.types import Family, Layer, Member, Structure


def test_units_and_filters_sum_their_own_weights(case):
    generator = torch.Generator().manual_seed(0)
    groups = groups_of(case.model, case.structure)
    quantity = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in groups.weights.items()}
    masks = case.groups()
    expected = sum(torch.stack(masks[n]).double() @ q.flatten() for n, q in quantity.items())
    torch.testing.assert_close(groups.sums(quantity), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution(groups):
    """Filter j of group g is weight[inputs of g, j]: removing the others leaves its output as it was."""
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False).double()
    layer = Layer("", "weight", None, 6, 1, (3, 3), groups, True, 1)
    found = groups_of(conv, Structure((), (), (layer,), {}, {})).sums({"weight": conv.weight.detach()})
    # With inputs of one and the whole kernel seen by the middle pixels, an output channel sums its filter.
    middle = conv(torch.ones(1, 4, 5, 5, dtype=torch.float64))[0, :, 3, 3]
    torch.testing.assert_close(found, middle.detach(), rtol=1e-12, atol=1e-12)


def test_half_precision_accumulates_in_single():
    layer = Layer("", "weight", None, 1, 0, (), 1, False, 1)
    model = nn.Linear(4097, 1, bias=False).bfloat16()
    groups = groups_of(model, Structure((), (), (layer,), {}, {}))
    assert groups.sums({"weight": torch.ones(1, 4097, dtype=torch.bfloat16)}).item() == 4097  # 4096 in bfloat16


def test_producers_along_another_axis():
    model = nn.Embedding(3, 4)
    family = Family("", "channel", 2, True, (Member("weight", 1, ((0, 1), (2, 3)), "producer"),))
    sums = groups_of(model, Structure((family,), (), (), {}, {})).sums({"weight": torch.arange(12.0).view(3, 4)})
    assert sums.tolist() == [0 + 1 + 4 + 5 + 8 + 9, 2 + 3 + 6 + 7 + 10 + 11]


def test_a_producer_that_is_no_parameter_is_refused(mlp):
    family = mlp.structure.families[0]
    wrong = replace(family, members=(replace(family.members[0], parameter="table"),))
    with pytest.raises(HapError, match="'table', which is not a parameter"):
        groups_of(mlp.model, replace(mlp.structure, families=(wrong,)))


def test_a_head_owns_its_slices_of_all_four_projections() -> None:
    """As HAP has it for transformers; a neuron owns its producers' rows."""
    model = nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in "qkvo"})
    blocks = ((0, 1), (2, 3), (4, 5))
    members = tuple(Member(f"{name}.weight", 0, blocks, "producer") for name in "qkv")
    members = (*members, Member("o.weight", 1, blocks, "consumer"))
    for kind, owned in (("head", "qkvo"), ("neuron", "qkv")):
        family = Family("q", kind, 3, True, members)
        groups = groups_of(model, Structure((family,), (), (), {}, {}))
        squares = groups.sums({name: weight.square() for name, weight in groups.weights.items()})
        for unit, block in enumerate(blocks):
            rows = [model[name].weight.T if name == "o" else model[name].weight for name in owned]
            expected = sum(float(weight[list(block)].detach().square().sum()) for weight in rows)
            assert squares[unit].item() == pytest.approx(expected, rel=1e-6)
