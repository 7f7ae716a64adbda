from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.curvature import GGNQuadratic, measure
from hap.errors import HapError
from hap.types import Layer, Structure


def exact(case, name, role):
    """The scores from the dense matrix."""
    _, weights, _ = case.loss_of_weights()
    matrix, mask = case.gauss_newton(), case.mask(role)
    if name == "ggn-trace":
        return (mask @ matrix.diagonal()) * (mask @ weights.square()) / (2 * mask.sum(1))
    removed = mask * weights
    return torch.einsum("gv,vw,gw->g", removed, matrix, removed) / 2


@pytest.mark.parametrize(
    ("criterion", "role"),
    [("ggn-trace", "producer"), ("ggn-quadratic", "producer"), (GGNQuadratic(along="consumers"), "consumer")],
    ids=["trace", "producers", "consumers"],
)
def test_estimates_the_dense_matrix_with_calibrated_errors(weighted, criterion, role):
    expected = exact(weighted, criterion if isinstance(criterion, str) else "ggn-quadratic", role)
    z = []
    for seed in range(12):  # one draw's estimates hang together: only other seeds tell of calibration
        result = measure(
            weighted.model, weighted.batches, None, weighted.structure, criterion=criterion, draws=40, seed=seed
        )
        value = weighted.flat(result.scores, result.filters)
        stderr = weighted.flat(result.stderr, result.filters_stderr)
        there = stderr > 0  # a unit that no weight reads has nothing to remove
        assert torch.equal(value[~there], expected[~there])
        z.append((value - expected)[there] / stderr[there])
    assert torch.stack(z).abs().max() < 6
    assert 0.6 < torch.stack(z).square().mean().sqrt() < 1.5
    assert (result.samples, result.draws) == (weighted.examples, 40)


def test_along_the_consumers_it_is_the_curvature_of_the_gates(case):
    exactly = measure(case.model, case.batches, None, case.structure, criterion="gate-ggn")
    found = measure(
        case.model, case.batches, None, case.structure, criterion=GGNQuadratic(along="consumers"), draws=300
    )
    for name, value in found.scores.items():
        assert ((value - exactly.scores[name]) / found.stderr[name]).abs().max() < 5
    assert found.criterion == "ggn-quadratic along consumers"


def test_positions_are_terms(mlp):
    """Two positions with the same logits are one example's mean: the matrix is the same."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp.model

        def forward(self, x):
            return self.inner(x).unsqueeze(2).expand(-1, -1, 2)

    layers = tuple(
        Layer(f"inner.{y.module}", f"inner.{y.weight}", None, y.filters, 0, (), 1, False, 1)
        for y in mlp.structure.layers
    )
    batches = [(x, y.unsqueeze(1).expand(-1, 2)) for x, y in mlp.batches]
    result = measure(Twice().eval(), batches, None, Structure((), (), layers, {}, {}), criterion="ggn-trace", draws=400)
    expected = exact(mlp, "ggn-trace", "producer")[6:]
    value = torch.cat(list(result.filters.values()))
    assert ((value - expected) / torch.cat(list(result.filters_stderr.values()))).abs().max() < 5


def test_squared_error_has_a_matrix_too():
    """Of a linear layer with one input: ``2 E[x^2]`` over the number of outputs, for every filter."""
    model = nn.Linear(1, 3, bias=False).double()
    structure = Structure((), (), (Layer("", "weight", None, 3, 0, (), 1, False, 1),), {}, {})
    x = torch.tensor([[1.0], [2.0], [4.0], [3.0]], dtype=torch.float64)
    labels = torch.zeros(4, 3, dtype=torch.float64)
    loss = lambda out, batch: (out - batch[1]).square().mean()  # noqa: E731
    result = measure(model, [(x, labels)], loss, structure, criterion="ggn-quadratic", draws=400)
    expected = x.square().mean() / 3 * model.weight.detach().square().flatten()
    assert ((result.filters[""] - expected) / result.filters_stderr[""]).abs().max() < 4


def test_a_loss_that_is_no_likelihood_is_refused(mlp):
    with pytest.raises(HapError, match="ggn-trace needs cross-entropy"):
        measure(mlp.model, mlp.batches, lambda o, b: o.abs().mean(), mlp.structure, criterion="ggn-trace")


def test_outputs_without_weights_are_refused(mlp):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x).detach()

    structure = Structure((), (), (Layer("layer", "layer.weight", None, 3, 0, (), 1, False, 1),), {}, {})
    with pytest.raises(HapError, match="do not depend on the weights"):
        measure(Cut(), [(torch.ones(4, 2), torch.zeros(4).long())], None, structure, criterion="ggn-trace")


def test_data_that_does_not_count(conv):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x).transpose(1, 2)

    structure = Structure((), (), (Layer("layer", "layer.weight", None, 3, 0, (), 1, False, 1),), {}, {})
    batch = (torch.ones(2, 4, 2), torch.full((2, 4), -100))
    with pytest.raises(HapError, match="nothing in the data counts"):
        measure(Positions(), [batch], None, structure, criterion="ggn-trace")


def test_one_draw_is_refused(mlp):
    with pytest.raises(HapError, match="ggn-trace needs at least two draws"):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion="ggn-trace", draws=1)
