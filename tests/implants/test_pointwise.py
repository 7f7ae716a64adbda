"""An implanted convolution is the k x k convolution whose implanted filters are zero but for the centre tap."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.implants import ImplantedConv, Target, build, centre, centre_taps
from hap.implants.pointwise import shifted, shifts


def implanted(conv: _ConvNd, rows: list[int]) -> ImplantedConv:
    fitted = centre_taps(conv, Target(rows, range(conv.weight.shape[1])))
    flags = [i in rows for i in range(conv.out_channels)]
    bias = None if conv.bias is None else conv.bias.detach()
    return build(conv, conv.weight.detach(), bias, flags, fitted)


def masked(conv: _ConvNd, rows: list[int]) -> _ConvNd:
    """The definition: all taps but the centre are zero in these filters."""
    reference = copy.deepcopy(conv)
    taps = tuple((k - 1) // 2 for k in conv.kernel_size)
    with torch.no_grad():
        for row in rows:
            kept = conv.weight[(row, slice(None), *taps)].clone()
            reference.weight[row] = 0
            reference.weight[(row, slice(None), *taps)] = kept
    return reference


def choices(conv: _ConvNd) -> list[list[int]]:
    """Filters at the end, at the start (with a gather), in between, and all: whole groups, if there are any."""
    block = conv.out_channels // conv.groups if conv.groups > 1 else 1
    blocks = conv.out_channels // block
    return [
        [b * block + i for b in chosen for i in range(block)]
        for chosen in ([blocks - 1], [0], [*range(0, blocks, 2)], range(1, blocks), range(blocks))
    ]


def test_equals_the_masked_convolution(conv, x) -> None:
    for rows in choices(conv):
        module = implanted(conv, rows)
        want = masked(conv, rows)(x)
        torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(want, conv(x)), "the masked filters matter"
        assert module.out_channels == conv.out_channels
        assert (module.dense is None) == (len(rows) == conv.out_channels)


def test_gradients_are_the_masked_convolutions(conv, x) -> None:
    rows = choices(conv)[1]
    gradients = []
    for module in (implanted(conv, rows), masked(conv, rows)):
        inputs = x.clone().requires_grad_()
        module(inputs).sin().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_centre_is_the_earlier_middle_tap() -> None:
    assert [centre(k) for k in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]


def test_shifts_of_the_usual_convolution_are_nothing() -> None:
    """3 x 3 with padding 1: the implant reads its input as it is, at no cost."""
    conv = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.zeros(1, 1, 4, 4)
    assert shifts(conv) == [(0, 0), (0, 0)]
    assert shifted(x, shifts(conv), "zeros") is x


def test_shifts_crop_and_pad() -> None:
    assert shifts(nn.Conv2d(1, 1, (3, 4), padding=(0, 3))) == [(-1, -1), (2, 1)]
    x = torch.arange(1.0, 4.0)[None, None]
    assert shifted(x, [(-1, 2)], "zeros").tolist() == [[[2, 3, 0, 0]]]
    assert shifted(x, [(-1, 1)], "replicate").tolist() == [[[2, 3, 3]]]


# -- an ordinary module ----------------------------------------------------------------------


def example(rows: list[int], groups: int = 1) -> tuple[ImplantedConv, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups, padding_mode="reflect")
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return implanted(conv, rows), torch.randn(2, 6, 8, 8, generator=generator)


KINDS = pytest.mark.parametrize(
    "rows, groups",
    [([4, 5], 1), ([0, 3], 1), ([0, 3], 6), (list(range(6)), 1)],
    ids=["tail", "gather", "depthwise", "all"],
)


@KINDS
def test_exports_and_needs_no_scatter(rows, groups) -> None:
    module, x = example(rows, groups)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:1]), module(x[:1]))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("scatter" in name or "index_put" in name for name in operators)
    assert any("index_select" in name for name in operators) == (module.order is not None or groups > 1)


@KINDS
def test_deepcopy_and_state_dict(rows, groups) -> None:
    module, x = example(rows, groups)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
        assert not torch.equal(twin(x), module(x))
        twin.load_state_dict(module.state_dict())
        assert torch.equal(twin(x), module(x))


@KINDS
def test_channels_last(rows, groups) -> None:
    module, x = example(rows, groups)
    want = module(x)
    module.to(memory_format=torch.channels_last)
    got = module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if module.order is None and module.input_order is None:  # PyTorch's gathers write the other format
        assert got.is_contiguous(memory_format=torch.channels_last)


@KINDS
def test_runs_under_autocast(rows, groups) -> None:
    module, x = example(rows, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(x), rtol=0.05, atol=0.2)


def test_shows_whether_a_gather_is_left() -> None:
    assert "reordered" not in repr(example([4, 5])[0])
    assert "reordered=True" in repr(example([0])[0])
