"""Makes an `ImplantedConv` out of a convolution that has lost its pruned channels already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.implants.fit import Fitted
from hap.implants.pointwise import ImplantedConv, shifts


def build(
    conv: _ConvNd, weight: torch.Tensor, bias: torch.Tensor | None, implanted: Sequence[bool], fitted: Fitted
) -> ImplantedConv:
    """The implanted convolution that gives the channels of `weight` in their order.

    Args:
        conv: the dense convolution; gives kernel, stride, padding, dilation, groups, dtype, device.
        weight: what is left of its weight, ``(out, in / groups, *kernel)``; rows of implanted filters
            are there but not used.
        bias: what is left of its bias.
        implanted: for each row of `weight`, whether it is replaced.
        fitted: the implanted filters, in the order of these rows.
    """
    device = weight.device
    large = [i for i, flag in enumerate(implanted) if not flag]
    small = [i for i, flag in enumerate(implanted) if flag]
    block = conv.out_channels // conv.groups if conv.groups > 1 else 0
    dense = None
    if large:
        # indexing keeps the memory format, which index_select does not
        dense = _like(conv, len(large), block, weight[large], None if bias is None else bias[large])
    implant = _like(conv, len(small), block, fitted.weight, fitted.bias, pointwise=True)
    return ImplantedConv(
        dense,
        implant,
        shifts=shifts(conv),
        padding_mode=conv.padding_mode,
        grouped=conv.groups > 1,
        order=_inverse([*large, *small], device),
        input_order=_input_order([*large, *small], block, weight.shape[1], device),
    )


def _like(
    conv: _ConvNd, out: int, block: int, weight: torch.Tensor, bias: torch.Tensor | None, pointwise: bool = False
) -> _ConvNd:
    """A convolution with the settings of `conv` and these weights."""
    groups = out // block if block else 1
    make: type[Any] = type(conv)
    new: _ConvNd = make(
        weight.shape[1] * groups,
        out,
        1 if pointwise else conv.kernel_size,
        conv.stride,
        0 if pointwise else conv.padding,
        1 if pointwise else conv.dilation,
        groups,
        bias is not None,
        "zeros" if pointwise else conv.padding_mode,
        device="meta",
    )
    new.weight = nn.Parameter(weight.clone(), conv.weight.requires_grad)
    if bias is not None:
        assert conv.bias is not None
        new.bias = nn.Parameter(bias.clone(), conv.bias.requires_grad)
    return new.train(conv.training)


def _inverse(sequence: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Where each channel stands in `sequence`; None if it is sorted."""
    if list(sequence) == sorted(sequence):
        return None
    return torch.tensor(sequence, device=device).argsort()


def _input_order(sequence: Sequence[int], block: int, columns: int, device: torch.device) -> torch.Tensor | None:
    """The input channels that the two parts of a grouped convolution read, one part after the other."""
    if not block or list(sequence) == sorted(sequence):
        return None
    groups = list(dict.fromkeys(i // block for i in sequence))
    return torch.tensor([g * columns + c for g in groups for c in range(columns)], device=device)
