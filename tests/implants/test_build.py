from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.implants import Fitted, Target, build, centre_taps


def parts(conv: nn.Conv2d, flags: list[bool], **changes: bool):
    rows = [i for i, flag in enumerate(flags) if flag]
    fitted = centre_taps(conv, Target(rows, range(conv.weight.shape[1])))
    return build(conv, conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), flags, fitted)


def test_implants_at_the_end_need_no_gather() -> None:
    module = parts(nn.Conv2d(2, 4, 3), [False, False, True, True])
    assert module.order is None and module.input_order is None
    assert (module.dense.out_channels, module.implant.out_channels) == (2, 2)


def test_implants_elsewhere_need_one() -> None:
    conv = nn.Conv2d(2, 4, 3)
    module = parts(conv, [True, False, True, False])
    assert module.order.tolist() == [2, 0, 3, 1]
    assert torch.equal(module.dense.weight, conv.weight[[1, 3]])
    assert torch.equal(module.implant.weight, conv.weight[[0, 2], :, 1:2, 1:2])


def test_a_grouped_convolution_reads_its_groups() -> None:
    """Groups 0 and 2 are implanted: the dense part reads channels 2 and 3, the implant 0, 1, 4, 5."""
    module = parts(nn.Conv2d(6, 6, 3, groups=3), [True, True, False, False, True, True])
    assert module.input_order.tolist() == [2, 3, 0, 1, 4, 5]
    assert (module.dense.groups, module.implant.groups) == (1, 2)
    assert (module.dense.in_channels, module.implant.in_channels) == (2, 4)


def test_pruned_rows_and_columns_are_gone() -> None:
    """What is left of a convolution 5 -> 4 after surgery: 3 inputs, 3 filters, one of them implanted."""
    conv = nn.Conv2d(5, 4, 3, padding=1)
    left, bias = conv.weight.detach()[[0, 1, 3]][:, [0, 2, 4]], conv.bias.detach()[[0, 1, 3]]
    fitted = centre_taps(conv, Target([3], [0, 2, 4]))
    module = build(conv, left, bias, [False, False, True], fitted)
    x = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    want = nn.functional.conv2d(x, left, bias, padding=1)
    got = module(x)
    torch.testing.assert_close(got[:, :2], want[:, :2])
    torch.testing.assert_close(got[:, 2], (x * left[2, :, 1, 1][:, None, None]).sum(1) + bias[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_dtype_and_bias_are_the_convolutions(dtype, bias) -> None:
    module = parts(nn.Conv2d(2, 4, 3, bias=bias, dtype=dtype), [False, True, True, False])
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert len(list(module.parameters())) == (4 if bias else 2)


def test_frozen_and_evaluating_convolutions_stay_so() -> None:
    conv = nn.Conv2d(2, 4, 3).eval()
    conv.weight.requires_grad_(False)
    module = parts(conv, [False, True, True, False])
    assert [p.requires_grad for _, p in sorted(module.named_parameters())] == [True, False, True, False]
    assert not module.dense.training and not module.implant.training


def test_memory_format_is_kept() -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    module = parts(conv, [True, False, True, False])
    assert module.dense.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_convolution_shares_no_memory_with_the_implant() -> None:
    conv = nn.Conv2d(2, 4, 3)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    fitted = Fitted(torch.ones(1, 2, 1, 1), torch.ones(1))
    module = build(conv, weight, bias, [False, False, False, True], fitted)
    before = [t.clone() for t in (weight, bias, fitted.weight, fitted.bias)]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, bias, fitted.weight, fitted.bias), strict=True))
