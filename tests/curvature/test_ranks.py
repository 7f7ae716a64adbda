from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.curvature import measure
from hap.errors import HapError
from hap.types import Family, Layer, Member, Structure


def rank(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_rank(matrix))


def test_units_are_ranked_where_they_are_read(conv):
    result = measure(conv.model, conv.batches, None, conv.structure, criterion="feature-rank")
    model, x = conv.model, torch.cat([x for x, _ in conv.batches])
    with torch.no_grad():
        stream = F.silu(model.bn0(model.stem(x)))
        inner = F.silu(model.bn1(model.conv1(stream)))
        stream_after = model.conv2(inner) + stream
    inner_ranks = torch.tensor([[rank(image) for image in example] for example in inner]).double()
    torch.testing.assert_close(result.scores["conv1"], inner_ranks.mean(0))
    torch.testing.assert_close(result.stderr["conv1"], inner_ranks.std(0) / len(x) ** 0.5)
    # Unit 0 of the stem is its channels 0 and 2, one below the other, in both of the places where it is read.
    both = [[rank(torch.cat([e[0], e[2]])) for e in where] for where in (stream, stream_after)]
    assert result.scores["stem"][0] == torch.tensor(both).mean()
    assert (result.samples, result.draws) == (len(x), 0)


def test_a_flat_map_has_a_low_rank():
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 1, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(3, 2, 1, 1))
    x = torch.stack([torch.ones(4, 4), torch.eye(4)]).unsqueeze(0).double()
    layers = tuple(Layer(str(i), f"{i}.weight", None, n, 0, (1, 1), 1, False, 1) for i, n in enumerate((3, 1)))
    members = (
        Member("0.weight", 0, ((0,), (1,), (2,)), "producer"),
        Member("1.weight", 1, ((0,), (1,), (2,)), "consumer"),
    )
    structure = Structure((Family("0", "channel", 3, True, members),), (), layers, {}, {})
    result = measure(model, [(x, None)], None, structure, criterion="feature-rank")
    assert result.scores["0"].tolist() == result.filters["0"].tolist() == [0, 1, 4]


def test_features_of_linear_layers_by_positions(mlp):
    """One neuron is 1 x positions: alive or dead. Three neurons as one unit: up to rank 3."""
    with torch.no_grad():
        mlp.model.first.weight[4] = mlp.model.first.bias[4] = 0
        mlp.model.shared.weight[4] = mlp.model.shared.bias[4] = 0
    result = measure(mlp.model, mlp.batches, None, mlp.structure, criterion="feature-rank")
    assert result.scores["first"].tolist() == [1, 1, 1, 1, 0, 1]
    heads = ((0, 1, 2), (3, 4, 5))
    members = tuple(
        Member(m.parameter, m.axis, heads, m.role) for m in mlp.structure.families[0].members if m.role != "follower"
    )
    structure = Structure((Family("first", "head", 2, True, members),), (), mlp.structure.layers, {}, {})
    result = measure(mlp.model, mlp.batches, None, structure, criterion="feature-rank")
    assert result.scores["first"].tolist() == [3, 2]


def test_a_map_that_is_not_finite(conv):
    batch = (torch.full((2, 2, 5, 5), torch.inf, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(HapError, match="a feature map is not finite"):
        measure(conv.model, [batch], None, conv.structure, criterion="feature-rank")


def test_consumers_that_are_not_called(conv):
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv.model

        def forward(self, x):
            return F.conv2d(self.inner.stem(x), self.inner.conv1.weight)

    names = {"stem": "inner.stem", "conv1": "inner.conv1"}
    layers = tuple(
        type(y)(names[y.module], f"inner.{y.weight}", None, y.filters, 0, y.kernel, 1, False, 1)
        for y in conv.structure.layers
        if y.module in names
    )
    members = (
        Member("inner.stem.weight", 0, ((0,), (1,), (2,), (3,)), "producer"),
        Member("inner.conv1.weight", 1, ((0,), (1,), (2,), (3,)), "consumer"),
    )
    structure = Structure((Family("stem", "channel", 4, True, members),), (), layers, {}, {})
    with pytest.raises(HapError, match="family 'stem': it is read by 'inner.conv1', which"):
        measure(Bypass(), conv.batches, None, structure, criterion="feature-rank")
