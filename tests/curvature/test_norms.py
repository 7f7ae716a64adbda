from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap.curvature import measure
from hap.errors import HapError
from hap.types import Family, Layer, Member, Structure


def flat(case, result):
    return case.flat(result.scores, result.filters), case.flat(result.stderr, result.filters_stderr)


@pytest.mark.parametrize(("criterion", "power"), [("magnitude", 2), ("l1", 1)])
def test_norms_of_what_produces(case, criterion, power):
    _, weights, masks = case.loss_of_weights()
    result = measure(case.model, None, None, case.structure, criterion=criterion)
    expected = torch.stack([weights[mask].norm(power) for mask in masks])
    value, stderr = flat(case, result)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert not stderr.any()
    assert (result.samples, result.draws) == (0, 0)


class Small(nn.Module):
    """conv -> batch norm -> conv, with weights that are easy to add up."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.last = nn.Conv2d(2, 1, 1, bias=False)
        for parameter, values in zip(self.parameters(), ([3, 0], [4, 1], [-5, -7], [0, 2], [1, -6]), strict=True):
            parameter.data = torch.tensor(values).float().reshape(parameter.shape)


def small_structure() -> Structure:
    members = [
        ("conv.weight", 0, "producer"),
        ("conv.bias", 0, "follower"),
        ("norm.weight", 0, "follower"),
        ("norm.bias", 0, "follower"),
        ("norm.running_mean", 0, "follower"),  # no parameter: not a weight
        ("last.weight", 1, "consumer"),
    ]
    family = Family("conv", "channel", 2, True, tuple(Member(n, a, ((0,), (1,)), r) for n, a, r in members))
    layers = (
        Layer("conv", "conv.weight", "conv.bias", 2, 0, (1, 1), 1, False, 1),
        Layer("last", "last.weight", None, 1, 0, (1, 1), 1, False, 1),
    )
    return Structure((family,), (), layers, {}, {})


def test_group_norms_by_hand():
    """Unit 0 has weights 3, 4, -5, 0, 1; unit 1 has 0, 1, -7, 2, -6."""
    found = {n: measure(Small(), None, None, small_structure(), criterion=n) for n in ("group-l1", "group-l2")}
    assert found["group-l1"].scores["conv"].tolist() == [13, 16]
    torch.testing.assert_close(found["group-l2"].scores["conv"].square(), torch.tensor([51.0, 90.0]).double())
    assert found["group-l1"].filters["conv"].tolist() == [3, 0]
    assert found["group-l1"].filters["last"].tolist() == [7]


def test_bn_scale_by_hand():
    result = measure(Small(), None, None, small_structure(), criterion="bn-scale")
    assert result.scores["conv"].tolist() == [5, 7]
    assert {name: value.tolist() for name, value in result.filters.items()} == {"conv": [5, 7]}


def test_bn_scale_is_the_mean_of_all_norms(conv):
    """Units of two channels, with two norms: and producers that tie filters, which have no scale of their own."""
    with torch.no_grad():
        conv.model.bn0.weight.copy_(torch.tensor([1.0, 2.0, -3.0, 4.0]))
        conv.model.bn1.weight.copy_(torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 0.0]))
    stem = conv.structure.families[0]
    both = replace(stem, members=(*stem.members, Member("bn1.weight", 0, ((0, 1), (2, 3)), "follower")))
    result = measure(conv.model, None, None, replace(conv.structure, families=(both,)), criterion="bn-scale")
    assert result.scores["stem"].tolist() == [(1 + 3 + 0 + 1) / 4, (2 + 4 + 0 + 3) / 4]
    assert result.filters == {}


def test_bn_scale_needs_a_batch_norm(mlp):
    with pytest.raises(HapError, match="no batch norm behind family 'first'"):
        measure(mlp.model, None, None, mlp.structure, criterion="bn-scale")


def test_whc_by_hand():
    """Filters (3, 4), (4, 3) and 0: cos = 24/25, so that the first two have 5 * 5 * (1 - 24/25) = 1."""
    model = nn.Linear(2, 3)
    model.weight.data = torch.tensor([[3.0, 4.0], [-4.0, -3.0], [0.0, 0.0]])
    structure = Structure((), (), (Layer("", "weight", "bias", 3, 0, (), 1, False, 1),), {}, {})
    result = measure(model, None, None, structure, criterion="whc")
    torch.testing.assert_close(result.filters[""], torch.tensor([1.0, 1.0, 0.0]).double())


def test_whc_of_a_unit_adds_up_its_filters(conv):
    result = measure(conv.model, None, None, conv.structure, criterion="whc")
    weight = conv.model.stem.weight.detach().flatten(1)
    norms = weight.norm(dim=1)
    cosine = (weight / norms[:, None]) @ (weight / norms[:, None]).T
    expected = norms * ((1 - cosine.abs()) @ norms)
    torch.testing.assert_close(result.filters["stem"], expected)
    both = result.filters["stem"] + result.filters["conv2"]
    torch.testing.assert_close(result.scores["stem"], torch.stack([both[0] + both[2], both[1] + both[3]]))
