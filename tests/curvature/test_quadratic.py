from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hap.curvature import HessianQuadratic, measure
from hap.curvature.quadratic import _patterns
from hap.curvature.reduce import groups_of
from hap.errors import HapError
from hap.types import Family, Member, Structure


def exact(case, role):
    """``1/2 w_p' H_pp w_p`` from the dense Hessian."""
    loss, weights, _ = case.loss_of_weights()
    hessian = torch.autograd.functional.hessian(loss, weights)
    removed = case.mask(role) * weights
    return torch.einsum("gv,vw,gw->g", removed, hessian, removed) / 2


@pytest.mark.parametrize("along", ["producers", "consumers"])
def test_estimates_the_dense_quadratic_with_calibrated_errors(weighted, along):
    criterion = HessianQuadratic(along=along)
    result = measure(weighted.model, weighted.batches, None, weighted.structure, criterion=criterion, draws=120)
    value = weighted.flat(result.scores, result.filters)
    stderr = weighted.flat(result.stderr, result.filters_stderr)
    expected = exact(weighted, along.removesuffix("s"))
    there = stderr > 1e-12  # a unit that no weight reads has nothing to remove
    assert torch.equal(value[~there], expected[~there])
    z = (value - expected)[there] / stderr[there]
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().sqrt() < 1.5
    assert (result.samples, result.draws) == (weighted.examples, 120)
    assert result.criterion == ("hessian-quadratic" if along == "producers" else "hessian-quadratic along consumers")


def test_it_is_the_rise_of_a_quadratic_loss():
    """Of a linear layer under squared error the form is the mean of the removed outputs' squares, for each alone."""
    model = nn.Linear(2, 1, bias=False).double()
    family = Family("", "neuron", 2, True, (Member("weight", 1, ((0,), (1,)), "consumer"),))
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=torch.float64)  # no example has both: no noise
    half_square = lambda out, batch: out.square().mean() / 2  # noqa: E731
    structure = Structure((family,), (), (), {}, {})
    criterion = HessianQuadratic(along="consumers")
    result = measure(model, [(x, None)], half_square, structure, criterion=criterion, draws=2)
    expected = (x * model.weight.detach()).square().mean(0) / 2
    torch.testing.assert_close(result.scores[""], expected, rtol=1e-12, atol=0)


def test_filters_that_are_units_are_read_off_every_probe(conv, mlp):
    """The stem is tied to conv2: probes take turns, and what they share is told by both."""
    filters, units = _patterns(groups_of(conv.model, conv.structure))
    told = {"filters": dict(zip("uf", conv_split(conv, filters.says), strict=True))}
    told["units"] = dict(zip("uf", conv_split(conv, units.says), strict=True))
    assert all(told["filters"]["f"][n].all() for n in told["filters"]["f"])
    assert {n: bool(v.any()) for n, v in told["filters"]["u"].items()} == {
        "stem": False,
        "conv1": True,
        "grouped": False,
    }
    assert all(v.all() for v in told["units"]["u"].values())
    assert {n for n, v in told["units"]["f"].items() if v.any()} == {"conv1"}


def conv_split(conv, flat):
    structure = conv.structure
    parts = flat.split([f.size for f in structure.families] + [y.filters for y in structure.layers])
    names = [f.name for f in structure.families] + [y.module for y in structure.layers]
    pairs = list(zip(names, parts, strict=True))
    return dict(pairs[: len(structure.families)]), dict(pairs[len(structure.families) :])


def test_one_pattern_serves_a_network_without_ties(conv):
    only = replace(conv.structure, families=conv.structure.families[1:2])
    assert len(_patterns(groups_of(conv.model, only))) == 1
    no_layers = replace(conv.structure, layers=())
    assert len(_patterns(groups_of(conv.model, no_layers))) == 1


def test_two_patterns_need_four_draws(conv):
    with pytest.raises(HapError, match="at least four draws"):
        measure(conv.model, conv.batches, None, conv.structure, criterion="hessian-quadratic", draws=3)


def test_units_that_overlap_are_refused():
    model = nn.Bilinear(2, 2, 3)
    members = (Member("weight", 1, ((0,), (1,)), "consumer"), Member("weight", 2, ((0,), (1,)), "consumer"))
    families = tuple(Family(str(m.axis), "neuron", 2, True, (m,)) for m in members)
    structure = Structure(families, (), (), {}, {})
    batch = ((torch.ones(4, 2), torch.ones(4, 2)), torch.zeros(4, dtype=torch.long))
    with pytest.raises(HapError, match="units overlap in 'weight'"):
        measure(model, [batch], None, structure, criterion=HessianQuadratic(along="consumers"))


def test_along_what(mlp):
    with pytest.raises(HapError, match="no such removal"):
        measure(mlp.model, mlp.batches, None, mlp.structure, criterion=HessianQuadratic(along="followers"))
