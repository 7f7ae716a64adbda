from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.implants import Fitted, Target, build, form_of, from_weights

FORMS = pytest.mark.parametrize(
    ("form", "rank"), [("pointwise", None), ("low-rank", 2), ("depthwise", 2), ("spatial", 1), ("tucker", 2)]
)


def test_implants_at_the_end_need_no_gather(implant) -> None:
    module = implant(nn.Conv2d(2, 4, 3, padding=1), [2, 3])
    assert module.order is None and module.input_order is None and not module.implant_first
    assert (module.dense.out_channels, module.implant.out_channels) == (2, 2)


def test_nor_do_implants_at_the_start(implant) -> None:
    module = implant(nn.Conv2d(2, 4, 3), [0])
    assert module.order is None and module.implant_first


def test_implants_elsewhere_need_one(implant) -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1)
    module = implant(conv, [0, 2])
    assert module.order.tolist() == [2, 0, 3, 1]
    assert torch.equal(module.dense.weight, conv.weight[[1, 3]])
    torch.testing.assert_close(module.implant.weight, conv.weight[[0, 2], :, 1:2, 1:2])


def test_a_grouped_convolution_reads_its_groups(implant) -> None:
    """Groups 0 and 2 are implanted: the dense part reads channels 2 and 3, the implant 0, 1, 4, 5."""
    module = implant(nn.Conv2d(6, 6, 3, padding=1, groups=3), [0, 1, 4, 5])
    assert module.input_order.tolist() == [2, 3, 0, 1, 4, 5]
    assert (module.dense.groups, module.implant.groups) == (1, 2)
    assert (module.dense.in_channels, module.implant.in_channels) == (2, 4)


def test_pruned_rows_and_columns_are_gone() -> None:
    """What is left of a convolution 5 -> 4 after surgery: 3 inputs, 3 filters, one of them implanted."""
    conv = nn.Conv2d(5, 4, 3, padding=1)
    left, bias = conv.weight.detach()[[0, 1, 3]][:, [0, 2, 4]], conv.bias.detach()[[0, 1, 3]]
    fitted = from_weights(conv, Target([3], [0, 2, 4], form_of("pointwise")))
    module = build(conv, left, bias, [False, False, True], fitted)
    x = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    want = nn.functional.conv2d(x, left, bias, padding=1)
    got = module(x)
    torch.testing.assert_close(got[:, :2], want[:, :2])
    torch.testing.assert_close(got[:, 2], (x * left[2, :, 1, 1][:, None, None]).sum(1) + bias[2])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_dtype_and_bias_are_the_layers(form, rank, dtype, bias, implant) -> None:
    module = implant(nn.Conv2d(2, 4, 3, bias=bias, dtype=dtype), [1, 2], form, rank)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert sum("bias" in name for name, _ in module.named_parameters()) == (2 if bias else 0)
    assert (module.layers()[-1].bias is not None) == bias


@FORMS
def test_frozen_and_evaluating_layers_stay_so(form, rank, implant) -> None:
    conv = nn.Conv2d(2, 4, 3).eval()
    conv.weight.requires_grad_(False)
    module = implant(conv, [1, 2], form, rank)
    assert {(name.endswith("bias"), p.requires_grad) for name, p in module.named_parameters()} == {
        (True, True),
        (False, False),
    }
    assert not any(m.training for m in module.modules())


@FORMS
def test_memory_format_is_kept(form, rank, implant) -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    module = implant(conv, [0, 2], form, rank)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in (module.dense.weight, *module.factors()))


def test_hooks_are_kept_and_their_handles_remove_them(implant) -> None:
    conv, calls = nn.Conv2d(2, 4, 3), []
    handles = [
        conv.register_forward_hook(lambda *_: calls.append("forward")),
        conv.register_forward_pre_hook(lambda m, args, kwargs: calls.append("before"), with_kwargs=True),
        conv.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    module = implant(conv, [2, 3])
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    module(x).sum().backward()
    assert calls == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    module(x).sum().backward()
    assert len(calls) == 3


def test_the_layer_shares_no_memory_with_the_implant() -> None:
    conv = nn.Conv2d(2, 4, 3)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    fitted = Fitted(Target([3], [0, 1], form_of("pointwise")), (torch.ones(1, 2, 1, 1),), torch.ones(1))
    module = build(conv, weight, bias, [False, False, False, True], fitted)
    mine = (weight, bias, *fitted.factors, fitted.bias)
    before = [t.clone() for t in mine]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(before, mine, strict=True))


def test_several_kernels_for_each_channel_are_one_depthwise_layer(implant) -> None:
    """A call costs more than the arithmetic on few channels; the same shape for every group keeps the fast kernel."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    repeat, kernels, mixture = implant(conv, range(4), "depthwise", 2).implant
    assert repeat.copies == 2 and repr(repeat) == "Repeat(copies=2)"
    assert (kernels.in_channels, kernels.out_channels, kernels.groups) == (8, 8, 8)
    assert (mixture.in_channels, mixture.kernel_size) == (8, (1, 1))
    assert len(implant(conv, range(4), "depthwise", 1).implant) == 2  # nothing to repeat
