"""Laws of every form: what it computes, what it costs, and that it is found again where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hap import HapError
from hap.implants import FORMS, Fitted, Form, Geometry, Target, form_of, from_weights, least_squares, register
from hap.implants.lowrank import LowRank


def choices(conv) -> list[list[int]]:
    """Filters at the end, at the start, in between (with a gather), and all: whole groups, if there are any."""
    block = conv.out_channels // conv.groups if conv.groups > 1 else 1
    blocks = conv.out_channels // block
    return [
        [b * block + i for b in chosen for i in range(block)]
        for chosen in ([blocks - 1], [0], [*range(0, blocks, 2)], range(1, blocks), range(blocks))
    ]


def random_factors(form: Form, conv, rows: list[int], rank: int | None) -> tuple[torch.Tensor, ...]:
    """Factors of the right shapes, random."""
    target = Target(rows, range(conv.weight.shape[1]), form, rank)
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in from_weights(conv, target).factors)


def filled(conv, rows: list[int], weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The convolution with other filters in these rows."""
    whole, biases = conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    whole[rows] = weight
    if biases is not None:
        biases[rows] = bias
    return Geometry.of(conv).layer(whole, biases)


def test_implanted_and_merged_are_the_dense_equivalent(conv, x, form, implant, layer_of) -> None:
    name, rank = form
    form = form_of(name)
    if not form.applies(layer_of(conv)):
        pytest.skip("not a layer for this form")
    for rows in choices(conv):
        factors = random_factors(form, conv, rows, rank)
        bias = None if conv.bias is None else torch.arange(1.0, len(rows) + 1).double()
        target = Target(rows, range(conv.weight.shape[1]), form, rank)
        module = implant(conv, rows, name, rank, Fitted(target, factors, bias))
        block = conv.out_channels // conv.groups
        groups = len(rows) // block if conv.groups > 1 else 1
        want = filled(conv, rows, form.dense(factors, Geometry.of(conv).grouped(groups), rank), bias)(x)
        torch.testing.assert_close(module(x), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(module.merged()(x), want, rtol=1e-11, atol=1e-11)
        assert type(module.merged()) is type(conv) and module.merged().weight.shape == conv.weight.shape
        assert not torch.allclose(want, conv(x)), "the implant matters"
        assert (module.dense is None) == (len(rows) == conv.out_channels)


def test_gradients_are_the_dense_equivalents(conv, x, form, implant, layer_of) -> None:
    name, rank = form
    if not form_of(name).applies(layer_of(conv)):
        pytest.skip("not a layer for this form")
    module = implant(conv, choices(conv)[2], name, rank)
    gradients = []
    for layer in (module, module.merged()):
        inputs = x.clone().requires_grad_()
        layer(inputs).sin().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_weights_are_counted_exactly(conv, form, implant, layer_of) -> None:
    name, rank = form
    layer = layer_of(conv)
    if not form_of(name).applies(layer):
        pytest.skip("not a layer for this form")
    for rows in choices(conv):
        module = implant(conv, rows, name, rank)
        found = tuple(tuple(factor.shape) for factor in module.factors())
        assert found == form_of(name).shapes(layer, len(rows), conv.weight.shape[1], rank)
        count = sum(factor.numel() for factor in module.factors())
        assert count == form_of(name).weights(layer, len(rows), conv.weight.shape[1], rank)


@pytest.mark.parametrize("form", ["low-rank", "depthwise", "spatial", "tucker"])
def test_a_rank_has_a_limit(form, implant, layer_of) -> None:
    """The number of rows, inputs or taps: more is neither made nor paid for."""
    conv = nn.Conv2d(3, 4, (2, 3), padding=(0, 1))
    module = implant(conv, [0, 1], form, 100)
    count = sum(factor.numel() for factor in module.factors())
    assert count == form_of(form).weights(layer_of(conv), 2, 3, 100)
    torch.testing.assert_close(module.merged().weight, conv.weight)  # and it can be anything


def test_what_has_the_form_already_is_found_again(conv, x, form, layer_of) -> None:
    """By the data, and by the weights alone: the dense weights are those of some factors."""
    name, rank = form
    form, geometry = form_of(name), Geometry.of(conv)
    if not form.applies(layer_of(conv)):
        pytest.skip("not a layer for this form")
    every = [i for chosen in choices(conv)[4:] for i in chosen]
    factors = random_factors(form, conv, every, rank)
    with torch.no_grad():
        conv.weight.copy_(form.dense(factors, geometry, rank))
    target = Target(every, range(conv.weight.shape[1]), form, rank)
    fits = from_weights(conv, target), least_squares(nn.Sequential(conv), {"0": target}, [(x, None)])["0"]
    for fitted in fits:
        torch.testing.assert_close(
            form.dense(fitted.factors, geometry, rank), conv.weight.detach(), rtol=1e-4, atol=1e-4
        )
        if conv.bias is not None:
            torch.testing.assert_close(fitted.bias, conv.bias.detach(), rtol=1e-4, atol=1e-4)


def test_every_form_is_in_these_tests(form) -> None:
    assert form[0] in FORMS
    assert {"pointwise", "low-rank", "depthwise", "spatial", "tucker"} == set(FORMS)


@pytest.mark.parametrize(
    ("layer", "forms"),
    [
        (nn.Linear(4, 6), {"low-rank"}),
        (nn.Conv2d(4, 6, 1), {"low-rank"}),
        (nn.Conv2d(4, 6, (1, 3)), {"pointwise", "low-rank", "depthwise", "tucker"}),
        (nn.Conv2d(4, 6, (2, 3)), {"pointwise", "low-rank", "depthwise", "tucker", "spatial"}),
        (nn.Conv2d(4, 8, 3, groups=2), {"pointwise"}),
        (nn.Conv1d(4, 4, 3, groups=4), {"pointwise"}),
    ],
)
def test_forms_know_where_they_apply(layer, forms, layer_of) -> None:
    assert {name for name, form in FORMS.items() if form.applies(layer_of(layer))} == forms


def test_ranks_are_worth_a_try(conv, layer_of) -> None:
    layer, columns = layer_of(conv), conv.weight.shape[1]
    for form in FORMS.values():
        if form.applies(layer):
            ranks = form.ranks(layer, layer.filters, columns)
            assert (ranks == (None,)) == (not form.ranked)
            assert all(rank is None or rank >= 1 for rank in ranks) and len(set(ranks)) == len(ranks)


def test_a_form_has_a_name_of_its_own() -> None:
    class Again(LowRank):
        pass

    with pytest.raises(HapError, match="there is an implant form 'low-rank' already"):
        register(Again)
    with pytest.raises(HapError, match="unknown implant form 'low_rank'") as error:
        form_of("low_rank")
    assert error.match("did you mean 'low-rank'?")


def test_a_form_of_the_users(implant, monkeypatch) -> None:
    """A class with a name is all that it takes."""

    class Mean(Form):
        """All filters share one."""

        name = "mean"

        def applies(self, layer):
            return not layer.kernel

        def shapes(self, layer, rows, columns, rank):
            return (1, columns), (rows, 1)

        def fit(self, moments, geometry, rank):
            free = moments.solution()[0]
            return free.mean(0, keepdim=True), free.new_ones(len(free), 1)

        def build(self, factors, bias, geometry, rank):
            return nn.Sequential(geometry.layer(factors[0], None), geometry.layer(factors[1], bias))

        def dense(self, factors, geometry, rank):
            return factors[1] @ factors[0]

    monkeypatch.setitem(FORMS, "mean", Mean())
    layer = nn.Linear(3, 4)
    module = implant(layer, [1, 2], "mean")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    want = x @ layer.weight[[1, 2]].mean(0) + layer.bias[1]
    torch.testing.assert_close(module(x)[:, 1], want)
    torch.testing.assert_close(module.merged()(x), module(x))


def test_zeros_leave_the_gradient_of_the_last_factor(form, implant) -> None:
    name, rank = form
    conv = nn.Conv2d(4, 4, 3)
    fitted = from_weights(conv, Target([0, 1], range(4), form_of(name), rank), zeros=True)
    assert not fitted.factors[-1].any() and all(f.any() for f in fitted.factors[:-1])
    assert torch.equal(fitted.bias, conv.bias.detach()[:2])
    module = implant(conv, [0, 1], name, rank, fitted)
    module(torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert module.factors()[-1].grad.any()


def test_zeros_need_no_fit(form, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes are those of a fit; the factors are the same at every call."""
    name, rank = form
    conv = nn.Conv2d(4, 6, 3)
    target = Target([0, 2, 5], range(4), form_of(name), rank)
    fitted = from_weights(conv, target)

    def refuse(*_: object) -> None:
        raise AssertionError("a fit")

    monkeypatch.setattr(type(form_of(name)), "fit", refuse)
    once, again = (from_weights(conv, target, zeros=True) for _ in range(2))
    assert [f.shape for f in once.factors] == [f.shape for f in fitted.factors]
    assert all(f.dtype == conv.weight.dtype for f in once.factors)
    assert all(torch.equal(f, g) for f, g in zip(once.factors, again.factors, strict=True))
