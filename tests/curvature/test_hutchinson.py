from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.curvature import measure
from hap.curvature.hutchinson import random_signs as _signs
from hap.errors import HapError
from hap.types import Layer, Structure


def exact(case):
    """The sensitivities from the dense Hessian: trace / (2 |p|) * ||w_p||^2."""
    loss, weights, masks = case.loss_of_weights()
    diagonal = torch.autograd.functional.hessian(loss, weights).diagonal()
    masks = masks.double()
    return (masks @ diagonal) * (masks @ weights.square()) / (2 * masks.sum(1))


def test_estimates_the_dense_hessian_with_calibrated_errors(case):
    result = measure(case.model, case.batches, None, case.structure, criterion="hessian-trace", draws=200)
    value, stderr = case.flat(result.scores, result.filters), case.flat(result.stderr, result.filters_stderr)
    z = (value - exact(case)) / stderr
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().sqrt() < 1.5
    assert (result.samples, result.draws) == (case.examples, 200)


def test_errors_shrink_with_draws(mlp):
    few, many = (
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion="hessian-trace", draws=draws).stderr["first"]
        for draws in (20, 320)
    )
    assert 0.15 < (many.mean() / few.mean()).item() < 0.4  # 1/4 expected


def test_any_loss_will_do():
    """Of a linear layer under squared error the Hessian is the inputs' second moment: exact for one weight a filter."""
    model = nn.Linear(1, 3, bias=False).double()
    structure = Structure((), (), (Layer("", "weight", None, 3, 0, (), 1, False, 1),), {}, {})
    x = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    batches = [(x[:2], None), (x[2:], None)]
    half_square = lambda out, batch: out.square().sum(1).mean() / 2  # noqa: E731
    result = measure(model, batches, half_square, structure, criterion="hessian-trace", draws=2)
    expected = x.square().mean() / 2 * model.weight.detach().square().flatten()
    torch.testing.assert_close(result.filters[""], expected, rtol=1e-12, atol=0)
    assert result.filters_stderr[""].max() < 1e-12


def test_a_loss_linear_in_the_weights_has_no_curvature():
    model = nn.Linear(2, 3).double()
    structure = Structure((), (), (Layer("", "weight", "bias", 3, 0, (), 1, False, 1),), {}, {})
    x = torch.ones(4, 2, dtype=torch.float64)
    result = measure(model, [(x, None)], lambda out, batch: out.mean(), structure, criterion="hessian-trace")
    assert torch.equal(result.filters[""], torch.zeros(3, dtype=torch.float64))


def test_a_loss_without_weights_is_refused():
    model = nn.Linear(2, 3)
    structure = Structure((), (), (Layer("", "weight", "bias", 3, 0, (), 1, False, 1),), {}, {})
    with pytest.raises(HapError, match="does not depend on the weights"):
        measure(model, [(torch.ones(4, 2), None)], lambda o, b: o.detach().mean(), structure, criterion="hessian-trace")


def test_attention_has_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)

    model = Attention()
    layers = (
        Layer("qkv", "qkv.weight", None, 24, 0, (), 1, False, 1),
        Layer("out", "out.weight", None, 3, 0, (), 1, False, 1),
    )
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    batch = (x, torch.tensor([0, 1, 2, 0]))
    result = measure(model, [batch], None, Structure((), (), layers, {}, {}), criterion="hessian-trace")
    assert torch.isfinite(result.filters["qkv"]).all()
    assert result.filters["qkv"].abs().max() > 0


def test_seed_decides(case):
    first, again, other = (
        measure(case.model, case.batches, None, case.structure, criterion="hessian-trace", seed=s).scores["first"]
        if "first" in case.units
        else measure(case.model, case.batches, None, case.structure, criterion="hessian-trace", seed=s).scores["stem"]
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_batches_have_probes_of_their_own(mlp):
    """The same batch twice: with the same probes the estimates would be equal to one batch's, with others not."""
    batch = mlp.batches[0]
    one = measure(mlp.model, [batch], None, mlp.structure, criterion="hessian-trace")
    two = measure(mlp.model, [batch, batch], None, mlp.structure, criterion="hessian-trace")
    assert not torch.allclose(one.scores["first"], two.scores["first"])
    assert two.stderr["first"].mean() < one.stderr["first"].mean()


def test_one_draw_is_refused(mlp):
    with pytest.raises(HapError, match="at least two draws"):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion="hessian-trace", draws=1)


def test_signs_are_balanced_and_fill_every_weight():
    weights = {"a": torch.zeros(1000, 3), "b": torch.zeros(7, dtype=torch.float64)}
    signs = _signs(weights, torch.Generator().manual_seed(0))
    assert {n: (s.shape, s.dtype) for n, s in signs.items()} == {n: (w.shape, w.dtype) for n, w in weights.items()}
    assert set(signs["a"].flatten().tolist()) == {-1.0, 1.0}
    assert abs(signs["a"].mean().item()) < 4 / 3000**0.5
    assert abs((signs["a"][:, 0] * signs["a"][:, 1]).mean().item()) < 4 / 1000**0.5
