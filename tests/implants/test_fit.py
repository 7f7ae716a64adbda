from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError
from hap.implants import Fitted, Target, build, centre_taps, least_squares


def rows_of(conv: _ConvNd) -> list[int]:
    """Some filters, not in order; whole groups of a grouped convolution."""
    if conv.groups == 1:
        return [4, 0, 3]
    block = conv.out_channels // conv.groups
    return [b * block + i for b in (2, 0) for i in range(block)]


def batches(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, None]]:
    return iter([(x[:1], None), (x[1:], None)])


def fit(conv: _ConvNd, x: torch.Tensor, target: Target) -> Fitted:
    return least_squares(nn.Sequential(conv), {"0": target}, batches(x))["0"]


def centre_inputs(conv: _ConvNd, x: torch.Tensor) -> torch.Tensor:
    """The input at each filter's centre tap, unfolded by convolutions with one-hot kernels: (N, in, *out)."""
    probe = type(conv)(6, 6, conv.kernel_size, conv.stride, conv.padding, conv.dilation, 6, False, conv.padding_mode)
    probe = probe.double().requires_grad_(False)
    probe.weight.zero_()
    probe.weight[(slice(None), 0, *[(k - 1) // 2 for k in conv.kernel_size])] = 1
    return probe(x)


def oracle(conv: _ConvNd, x: torch.Tensor, row: int, columns: list[int]) -> torch.Tensor:
    """The weights, and the bias at the end, of one filter by `torch.linalg.lstsq` on all patches."""
    per_group, width = conv.out_channels // conv.groups, conv.weight.shape[1]
    inputs = [row // per_group * width + c for c in columns]
    design = centre_inputs(conv, x)[:, inputs].movedim(1, -1).reshape(-1, len(columns))
    if conv.bias is not None:
        design = torch.cat([design, torch.ones_like(design[:, :1])], 1)
    return torch.linalg.lstsq(design, conv(x)[:, row].detach().reshape(-1, 1)).solution[:, 0]


def test_equals_lstsq_on_the_patches(conv, x) -> None:
    rows, columns = rows_of(conv), list(range(conv.weight.shape[1]))[::-1][:4]
    fitted = fit(conv, x, Target(rows, columns))
    want = torch.stack([oracle(conv, x, row, columns) for row in rows])
    got = fitted.weight.flatten(1)
    if conv.bias is not None:
        got = torch.cat([got, fitted.bias[:, None]], 1)
    else:
        assert fitted.bias is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # the ridge is 1e-6 of the energy


def residual(conv: _ConvNd, x: torch.Tensor, target: Target, fitted: Fitted) -> float:
    flags = [i in target.rows for i in range(conv.out_channels)]
    order = [list(target.rows).index(i) for i in sorted(target.rows)]
    in_place = Fitted(fitted.weight[order], None if fitted.bias is None else fitted.bias[order])
    bias = None if conv.bias is None else conv.bias.detach()
    module = build(conv, conv.weight.detach(), bias, flags, in_place)
    return float((module(x) - conv(x)).detach().square().sum())


def test_never_worse_than_the_centre_taps_on_the_data(conv, x) -> None:
    target = Target(rows_of(conv), list(range(conv.weight.shape[1])))
    best = residual(conv, x, target, fit(conv, x, target))
    assert best < residual(conv, x, target, centre_taps(conv, target))


def test_not_worse_where_the_centre_taps_are_right(conv, x) -> None:
    """A filter that is its centre tap already is found again."""
    target = Target(rows_of(conv), list(range(conv.weight.shape[1])))
    taps = centre_taps(conv, target)
    with torch.no_grad():
        for i, row in enumerate(target.rows):
            conv.weight[row] = 0
            conv.weight[(row, slice(None), *[(k - 1) // 2 for k in conv.kernel_size])] = taps.weight[i].flatten()
    fitted = fit(conv, x, target)
    torch.testing.assert_close(fitted.weight, taps.weight, rtol=1e-9, atol=1e-9)


def test_the_centre_taps_are_those_of_the_filters() -> None:
    conv = nn.Conv2d(3, 4, (3, 4))
    found = centre_taps(conv, Target([2, 0], [1, 2]))
    assert torch.equal(found.weight, conv.weight[[2, 0]][:, [1, 2], 1:2, 1:2])
    assert torch.equal(found.bias, conv.bias[[2, 0]])
    assert not found.weight.requires_grad
    assert centre_taps(nn.Conv2d(3, 4, 3, bias=False), Target([0], [0])).bias is None


@pytest.mark.parametrize("dead", ["one channel", "all"])
def test_dead_inputs_keep_their_centre_taps(dead) -> None:
    """Zeros would stay zero in training; the data say nothing about them."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    x = torch.randn(3, 6, 8, 8, generator=generator)
    x[:, 2 if dead == "one channel" else slice(None)] = 0
    target = Target([1, 5], range(6))
    fitted, taps = fit(conv, x, target), centre_taps(conv, target)
    torch.testing.assert_close(fitted.weight[:, 2], taps.weight[:, 2])
    if dead == "all":
        torch.testing.assert_close(fitted.weight, taps.weight)
        torch.testing.assert_close(fitted.bias, taps.bias)


def test_doubled_inputs_are_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    x = torch.randn(3, 6, 8, 8, generator=generator)
    x[:, 3] = x[:, 2]
    fitted = fit(conv, x, Target([0, 1], range(6)))
    assert fitted.weight.isfinite().all() and fitted.weight.abs().max() < 10 * conv.weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype) -> None:
    """Moments of a half would overflow (the inputs' energy is over 65,504) and lose the small digits."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    conv = conv.to(dtype)
    x = (10 * torch.randn(4, 6, 32, 32, generator=generator)).to(dtype)
    target = Target([1, 5], range(6))
    fitted = fit(conv, x, target)
    want = fit(copy.deepcopy(conv).double(), x.double(), target)
    assert fitted.weight.dtype == fitted.bias.dtype == dtype
    tolerance = {torch.float32: 1e-4}.get(dtype, 2e-2)
    torch.testing.assert_close(fitted.weight.double(), want.weight, rtol=tolerance, atol=tolerance)


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
    twice = least_squares(model, {"shared": Target([0, 1], [0, 1])}, iter([(clip(), None)]))["shared"]
    inner = model.shared(clip()).relu().detach()
    both = least_squares(
        nn.Sequential(model.shared), {"0": Target([0, 1], [0, 1])}, iter([(clip(), None), (inner, None)])
    )
    torch.testing.assert_close(twice.weight, both["0"].weight)


def test_the_model_is_left_as_it_was() -> None:
    """Bit for bit, with its modes; nothing is drawn from the global generator."""
    model = Calls().train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    targets = {"shared": Target([0], [0, 1]), "last": Target([1], [0])}
    found = least_squares(model, targets, iter([(clip(), None)]))
    assert set(found) == {"shared", "last"} and found["last"].weight.shape == (1, 1, 1)
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
    targets = {"shared": Target([0], [0, 1]), "last": Target([1], [0])}
    if error is None:
        least_squares(model, targets, data())
    else:
        with pytest.raises(error):
            least_squares(model, targets, data())
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value) -> None:
    x = clip()
    x[0, 0, 3] = value
    with pytest.raises(HapError, match="last cannot be fitted: its inputs or outputs are not finite"):
        least_squares(Calls(), {"last": Target([1], [0])}, iter([(x, None)]))
