from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError
from hap.implants import Fitted, Geometry, Target, depthwise, form_of, from_weights, least_squares, regression

pytestmark = pytest.mark.usefixtures("every_position")


def rows_of(conv: _ConvNd) -> list[int]:
    """Some filters, not in order; whole groups of a grouped convolution."""
    if conv.groups == 1:
        return [4, 0, 3]
    block = conv.out_channels // conv.groups
    return [b * block + i for b in (2, 0) for i in range(block)]


def target(rows: Sequence[int], columns: Sequence[int], form: str = "pointwise", rank: int | None = None) -> Target:
    return Target(rows, columns, form_of(form), rank)


def batches(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, None]]:
    return iter([(x[:1], None), (x[1:], None)])


def fit(layer: nn.Module, x: torch.Tensor, wanted: Target) -> Fitted:
    return least_squares(nn.Sequential(layer), {"0": wanted}, batches(x))["0"]


def patches(layer: nn.Module, x: torch.Tensor, columns: Sequence[int], *, centre: bool) -> torch.Tensor:
    """One row for each output position: what a filter of group 0 reads, with a 1 for the bias."""
    views = Geometry.of(layer).views(x, centre=centre)[:, columns]
    design = views.flatten(1, 2).movedim(1, -1).reshape(-1, views.shape[1] * views.shape[2])
    return design if layer.bias is None else torch.cat([design, torch.ones_like(design[:, :1])], 1)


def outputs(layer: nn.Module, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    y = layer(x).detach()
    return (y if isinstance(layer, nn.Linear) else y.movedim(1, -1)).flatten(0, -2)[:, rows]


def weights_and_bias(fitted: Fitted, layer: nn.Module) -> torch.Tensor:
    wanted = fitted.target
    dense = wanted.form.dense(fitted.factors, Geometry.of(layer), wanted.rank).flatten(1)
    return dense if fitted.bias is None else torch.cat([dense, fitted.bias[:, None]], 1)


def test_pointwise_equals_lstsq_on_the_patches(conv, x) -> None:
    rows, columns = rows_of(conv), list(range(conv.weight.shape[1]))[::-1][:4]
    fitted = fit(conv, x, target(rows, columns))
    per_group, width = conv.out_channels // conv.groups, conv.weight.shape[1]
    for i, row in enumerate(rows):
        inputs = [row // per_group * width + c for c in columns]
        design = patches(conv, x, inputs, centre=True)
        want = torch.linalg.lstsq(design, outputs(conv, x, [row])).solution[:, 0]
        got = fitted.factors[0][i].flatten()
        got = got if fitted.bias is None else torch.cat([got, fitted.bias[i : i + 1]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # the ridge is 1e-6 of the energy
    assert (fitted.bias is None) == (conv.bias is None)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (40, 6)),
        (nn.Linear(6, 5, bias=False), (9, 4, 6)),
        (nn.Conv2d(6, 5, 3, padding=1, stride=2), (3, 6, 9, 9)),
        (nn.Conv1d(6, 5, 3, bias=False), (4, 6, 11)),
    ],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_best_of_its_rank(layer, shape, rank) -> None:
    """Eckart and Young: the error is the tail of the singular values of the whitened regression."""
    layer = copy.deepcopy(layer).double()
    x = correlated(*shape)
    if layer.weight.ndim > 2:
        x = x.reshape(shape)
    rows, columns = [4, 0, 1, 3], [0, 2, 3, 5]
    fitted = fit(layer, x, target(rows, columns, "low-rank", rank))
    design, y = patches(layer, x, columns, centre=False), outputs(layer, x, rows)
    missed = y - design @ weights_and_bias(fitted, layer).T
    if layer.bias is not None:
        design, y = design[:, :-1] - design[:, :-1].mean(0), y - y.mean(0)
    free = design @ torch.linalg.lstsq(design, y).solution
    tail = torch.linalg.svdvals(free)[rank:].square().sum() + (y - free).square().sum()
    assert 0 <= float(missed.square().sum() / tail) - 1 < 1e-6


def test_low_rank_minds_the_inputs() -> None:
    """Not the truncated SVD of the weights: a direction that no input has is not worth a rank."""
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.diag(torch.tensor([5.0, 1.0])).double()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([0.01, 1])
    wanted = target([0, 1], [0, 1], "low-rank", 1)
    assert weights_and_bias(fit(layer, x, wanted), layer)[1, 1] > 0.99
    assert weights_and_bias(from_weights(layer, wanted), layer)[0, 0] > 4.99


def correlated(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    axis = 1 if len(shape) > 2 and shape[1] == 6 else -1
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.tensordot(x, mix, dims=([axis], [0])).movedim(-1, axis) + 0.5


@pytest.mark.parametrize(
    ("form", "rank", "module"),
    [("depthwise", 1, depthwise), ("depthwise", 2, depthwise), ("spatial", 3, regression), ("tucker", 3, regression)],
)
def test_alternation_goes_down_to_a_minimum(form, rank, module, monkeypatch) -> None:
    """With many sweeps, the error's gradient by every factor vanishes; with the usual few it is near; none goes up."""
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=False).double()
    conv.weight.data = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, geometry, wanted = correlated(8, 6, 7, 7), Geometry.of(conv), target(range(5), range(6), form, rank)

    def error(fitted: Fitted) -> tuple[float, float]:
        factors = tuple(f.clone().requires_grad_() for f in fitted.factors)
        missed = conv(x).detach() - nn.functional.conv2d(x, wanted.form.dense(factors, geometry, rank), padding=1)
        missed.square().mean().backward()
        return float(missed.detach().square().mean()), max(float(f.grad.norm() * f.detach().norm()) for f in factors)

    start, slope = error(from_weights(conv, wanted))
    few, _ = error(fit(conv, x, wanted))
    monkeypatch.setattr(module, "RISE", 0)
    errors = []
    for sweeps in (0, 1, 2, 5, 300):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
        errors.append(error(fit(conv, x, wanted)))
    values = [found for found, _ in errors]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(values))
    assert errors[-1][1] < 1e-3 * slope
    assert values[-1] <= few * (1 + 1e-9) < 1.05 * values[-1] < start


def test_separable_filters_of_white_inputs_are_the_truncated_svd() -> None:
    """Eckart and Young: of the filters as a matrix of what one part reads by what the other gives."""
    conv = nn.Conv2d(4, 6, 3, bias=False).double()
    found = from_weights(conv, target(range(6), range(4), "spatial", 2))
    missed = conv.weight.detach() - found.target.form.dense(found.factors, Geometry.of(conv), 2)
    matrix = conv.weight.detach().permute(1, 3, 0, 2).flatten(2).flatten(0, 1)  # (channel and column, filter and row)
    tail = torch.linalg.svdvals(matrix)[2:].square().sum()
    torch.testing.assert_close(missed.square().sum(), tail, rtol=1e-8, atol=0)


def residual(conv: _ConvNd, x: torch.Tensor, fitted: Fitted, implant: Callable[..., nn.Module]) -> float:
    wanted = fitted.target
    order = sorted(range(len(wanted.rows)), key=lambda i: wanted.rows[i])
    in_place = Fitted(
        wanted,
        (*fitted.factors[:-1], fitted.factors[-1][order]),
        None if fitted.bias is None else fitted.bias[order],
    )
    module = implant(conv, wanted.rows, wanted.form.name, wanted.rank, in_place)
    return float((module(x) - conv(x)).detach().square().sum())


def test_the_data_help(conv, x, form, implant, layer_of) -> None:
    """No form is farther from the dense outputs when it is fitted to them."""
    name, rank = form
    if not form_of(name).applies(layer_of(conv)):
        pytest.skip("has groups")
    wanted = target(rows_of(conv), range(conv.weight.shape[1]), name, rank)
    with_data, without = fit(conv, x, wanted), from_weights(conv, wanted)
    assert residual(conv, x, with_data, implant) < residual(conv, x, without, implant) + 1e-12


def test_the_weights_alone_give_the_centre_taps() -> None:
    conv = nn.Conv2d(3, 4, (3, 4))
    found = from_weights(conv, target([2, 0], [1, 2]))
    torch.testing.assert_close(found.factors[0], conv.weight[[2, 0]][:, [1, 2], 1:2, 1:2].detach())
    assert torch.equal(found.bias, conv.bias[[2, 0]])
    assert not found.factors[0].requires_grad
    assert from_weights(nn.Conv2d(3, 4, 3, bias=False), target([0], [0])).bias is None


@pytest.mark.parametrize("dead", ["one channel", "all"])
def test_dead_inputs_keep_their_weights(dead) -> None:
    """Zeros would stay zero in training; the data say nothing about them."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    x = torch.randn(3, 6, 8, 8, generator=generator)
    x[:, 2 if dead == "one channel" else slice(None)] = 0
    wanted = target([1, 5], range(6))
    fitted, taps = fit(conv, x, wanted), from_weights(conv, wanted)
    torch.testing.assert_close(fitted.factors[0][:, 2], taps.factors[0][:, 2])
    if dead == "all":
        torch.testing.assert_close(fitted.factors[0], taps.factors[0])
        torch.testing.assert_close(fitted.bias, taps.bias)


@pytest.mark.parametrize("name", ["pointwise", "low-rank", "depthwise", "spatial", "tucker"])
def test_doubled_inputs_are_solved(name) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    x = torch.randn(3, 6, 8, 8, generator=generator)
    x[:, 3] = x[:, 2]
    fitted = fit(conv, x, target([0, 1], range(6), name, None if name == "pointwise" else 1))
    weight = weights_and_bias(fitted, conv)
    assert weight.isfinite().all() and weight.abs().max() < 10 * conv.weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, form) -> None:
    """Moments of a half would overflow (the inputs' energy is over 65,504) and lose the small digits."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    conv = conv.to(dtype)
    x = (10 * torch.randn(4, 6, 32, 32, generator=generator)).to(dtype)
    wanted = target([1, 5], range(6), *form)
    fitted = fit(conv, x, wanted)
    want = fit(copy.deepcopy(conv).double(), x.double(), wanted)
    assert all(t.dtype == dtype for t in (*fitted.factors, fitted.bias))
    tolerance = {torch.float32: 1e-3}.get(dtype, 4e-2)
    got = weights_and_bias(Fitted(wanted, tuple(f.double() for f in fitted.factors), fitted.bias.double()), conv)
    torch.testing.assert_close(got, weights_and_bias(want, conv), rtol=tolerance, atol=tolerance)


class Calls(nn.Module):
    """Calls one convolution twice, once by keyword, and another after dropout and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv1d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv1d(2, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == 13:
            raise ValueError("unlucky")
        return self.last(self.drop(self.norm(self.shared(input=self.shared(x).relu()))))


def clip(length: int = 9) -> torch.Tensor:
    return torch.randn(4, 2, length, generator=torch.Generator().manual_seed(0))


def test_all_calls_of_a_layer_count() -> None:
    model = Calls()
    twice = least_squares(model, {"shared": target([0, 1], [0, 1])}, iter([(clip(), None)]))["shared"]
    inner = model.shared(clip()).relu().detach()
    both = least_squares(
        nn.Sequential(model.shared), {"0": target([0, 1], [0, 1])}, iter([(clip(), None), (inner, None)])
    )
    torch.testing.assert_close(twice.factors[0], both["0"].factors[0])


def test_the_model_is_left_as_it_was() -> None:
    """Bit for bit, with its modes; nothing is drawn from the global generator."""
    model = Calls().train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    wanted = {"shared": target([0], [0, 1]), "last": target([1], [0])}
    found = least_squares(model, wanted, iter([(clip(), None)]))
    assert set(found) == {"shared", "last"} and found["last"].factors[0].shape == (1, 1, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.last.training and not model.drop.training
    assert torch.equal(random, torch.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def broken() -> Iterator[tuple[torch.Tensor, None]]:
    yield clip(), None
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "data, error",
    [
        (lambda: iter([(clip(), None)]), None),
        (lambda: iter([(clip(13), None)]), HapError),
        (lambda: iter([(clip()[:, :1], None)]), HapError),
        (broken, KeyboardInterrupt),
    ],
    ids=["fine", "the model raises", "wrong shape", "interrupt"],
)
def test_hooks_are_removed(data, error) -> None:
    model = Calls().train()
    wanted = {"shared": target([0], [0, 1]), "last": target([1], [0])}
    if error is None:
        least_squares(model, wanted, data())
    else:
        with pytest.raises(error):
            least_squares(model, wanted, data())
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value) -> None:
    x = clip()
    x[0, 0, 3] = value
    with pytest.raises(HapError, match="last cannot be fitted: its inputs or outputs are not finite"):
        least_squares(Calls(), {"last": target([1], [0])}, iter([(x, None)]))
