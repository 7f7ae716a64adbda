from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import hap
from hap.implants import FORMS, Geometry, Target, form_of, from_weights, least_squares, options


class Net(nn.Module):
    """Convolutions with and without bias, strided and in groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.fc = nn.Linear(12, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.fc(self.drop(self.depthwise(self.inner(x).relu()).mean((2, 3))))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 9, 9, generator=generator, dtype=torch.float64), None) for _ in range(3)]


@pytest.fixture
def structure(net, data) -> hap.Structure:
    return hap.trace(net, (data[0][0],))


def activations(net: Net, data, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads and gives on all data, in evaluation mode."""
    found = []
    handle = net.get_submodule(name).register_forward_hook(lambda _, args, y: found.append((args[0], y)))
    with torch.no_grad():
        net.eval()(torch.cat([x for x, _ in data]))
    handle.remove()
    return found[0]


@pytest.mark.usefixtures("every_position")
def test_undone_is_what_the_fit_misses_of_the_variance(net, data, structure) -> None:
    """Written out: the variance of the residual over that of the output."""
    found = options(net.train(), structure, data)
    assert net.training
    for name, choices in found.items():
        layer = net.get_submodule(name)
        x, y = activations(net, data, name)
        axis = 1 if y.ndim > 2 else -1
        rows = y.movedim(axis, 0).flatten(1)
        for option in choices:
            target = Target(range(len(layer.weight)), range(layer.weight.shape[1]), form_of(option.form), option.rank)
            biased = type(layer)(**arguments(layer)).double()  # the same with a bias, which sees to the mean
            biased.weight.data = layer.weight.detach().clone()
            biased.bias.data = torch.zeros(len(layer.weight), dtype=torch.float64)
            fitted = least_squares(nn.Sequential(biased), {"0": target}, [(x, None)])["0"]
            with torch.no_grad():
                weight = target.form.dense(fitted.factors, Geometry.of(layer), target.rank)
                biased.weight.data = weight
                missed = y - biased(x)
            want = missed.movedim(axis, 0).flatten(1).var(1) / rows.var(1)
            torch.testing.assert_close(option.undone, want, rtol=1e-3, atol=1e-4)


def arguments(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in names}


def test_offers_what_applies_and_costs_less(net, data, structure) -> None:
    found = options(net, structure, data)
    assert list(found) == ["stem", "inner", "depthwise", "fc"]
    assert {option.form for option in found["stem"]} == {"pointwise", "depthwise", "spatial"}
    assert {option.form for option in found["inner"]} == {"pointwise", "low-rank", "depthwise"}  # strided
    assert {option.form for option in found["depthwise"]} == {"pointwise"}
    assert {option.form for option in found["fc"]} == {"low-rank"}
    for name, choices in found.items():
        layer, weight = structure.layer(name), net.get_submodule(name).weight
        for option in choices:
            price = FORMS[option.form].weights(layer, layer.filters, weight.shape[1], option.rank)
            assert price < weight.numel()
            assert option.undone.shape == (layer.filters,) and option.undone.dtype == torch.float64
            assert float(option.undone.min()) >= 0 and float(option.undone.max()) <= 1


def test_higher_ranks_leave_less_undone(net, data, structure) -> None:
    for choices in options(net, structure, data).values():
        by_rank = [float(o.undone.mean()) for o in choices if o.form == "low-rank"]
        assert by_rank == sorted(by_rank, reverse=True)


def test_forms_and_layers_can_be_chosen(net, data, structure) -> None:
    found = options(net, structure, data, forms=["pointwise"], layers=["inner"])
    assert [(name, [o.form for o in choices]) for name, choices in found.items()] == [("inner", ["pointwise"])]
    found = options(net, structure, data, forms=["tucker", "low-rank"])
    assert {name: {o.form for o in choices} for name, choices in found.items()} == {
        "stem": {"tucker", "low-rank"},
        "inner": {"low-rank"},  # strided: a part of a tucker form would read what is left out
        "fc": {"low-rank"},
    }
    with pytest.raises(hap.HapError, match="unknown implant form 'pontwise'"):
        options(net, structure, data, forms=["pontwise"])
    with pytest.raises(hap.HapError, match="no data"):
        options(net, structure, [])


def test_turns_under_a_memory_bound_change_nothing(net, data, structure) -> None:
    """And a layer that does not fit alone is offered what reads its centre taps."""
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = options(net, structure, iter(data))
    assert len(passes) == len(data)
    turns = options(net, structure, iter(data), memory=8 * 72 * (72 + 12))  # what the largest layer needs
    assert len(passes) > 2 * len(data)
    for name, choices in whole.items():
        for one, other in zip(choices, turns[name], strict=True):
            assert (one.form, one.rank) == (other.form, other.rank)
            assert torch.equal(one.undone, other.undone)
    few = options(net, structure, data, memory=8 * 72 * (72 + 12) - 1)
    assert [option.form for option in few["inner"]] == ["pointwise"]
    pointwise = next(option for option in whole["inner"] if option.form == "pointwise")
    torch.testing.assert_close(few["inner"][0].undone, pointwise.undone, rtol=1e-6, atol=1e-9)


def test_dead_filters_leave_nothing_undone(net, data, structure) -> None:
    net.inner.weight.data[3] = 0
    for option in options(net, structure, data)["inner"]:
        assert option.undone[3] == 0


def test_a_filter_of_a_form_leaves_nothing_undone(net, data, structure) -> None:
    target = Target(range(12), range(8), form_of("pointwise"))
    net.inner.weight.data = form_of("pointwise").dense(
        from_weights(net.inner, target).factors, Geometry.of(net.inner), None
    )
    found = options(net, structure, data)["inner"]
    assert {o.form: float(o.undone.max()) < 1e-5 for o in found if o.form != "low-rank"} == {
        "pointwise": True,
        "depthwise": True,
    }


class Lender(nn.Module):
    """Lends the weight of one layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.called = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(nn.functional.linear(x, self.lent.weight).relu())


def test_layers_that_are_never_called_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Lender(), torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    structure = hap.trace(net, (x,))
    assert [layer.module for layer in structure.layers] == ["lent", "called"]
    with caplog.at_level(logging.INFO, logger="hap.implants.options"):
        found = options(net, structure, [(x, None)])
    assert list(found) == ["called"]
    assert "1 layers that are never called as modules: lent" in caplog.text


def test_filters_that_give_a_constant_leave_nothing_undone(net, data, structure) -> None:
    """What rounding makes of their variance is not looked at."""
    net.stem.weight.data *= 1e-7
    net.stem.bias.data[:] = torch.arange(1, 9) / 3
    assert not any(option.undone.any() for option in options(net, structure, data, layers=["stem"])["stem"])
