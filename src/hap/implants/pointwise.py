"""The pointwise implant: some filters of a k x k convolution become 1 x 1 ones (HAP, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd


def centre(kernel: int) -> int:
    """The tap of a kernel that a 1 x 1 filter keeps; the earlier one of the two middle taps."""
    return (kernel - 1) // 2


def shifts(conv: _ConvNd) -> list[tuple[int, int]]:
    """For each spatial axis, how far to pad (or, below 0, crop) so that tap `centre` reads its input.

    The centre tap of output i reads position ``i * stride + centre * dilation - padding``: after
    this padding, a 1 x 1 convolution with the same stride reads the same place.
    """
    result = []
    for axis, kernel in enumerate(conv.kernel_size):
        dilation, span = conv.dilation[axis], conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if conv.padding == "same":
            before, after = span // 2, span - span // 2
        elif conv.padding == "valid":
            before = after = 0
        else:
            before = after = int(conv.padding[axis])
        offset = centre(kernel) * dilation
        result.append((before - offset, after - (span - offset)))
    return result


def shifted(x: torch.Tensor, amounts: Sequence[tuple[int, int]], mode: str) -> torch.Tensor:
    """Pads and crops the spatial axes of `x` by `shifts`."""
    if not any(any(pair) for pair in amounts):
        return x
    grow = [max(0, n) for pair in reversed(amounts) for n in pair]
    crop = [min(0, n) for pair in reversed(amounts) for n in pair]
    if any(grow):
        x = F.pad(x, grow, "constant" if mode == "zeros" else mode)
    return F.pad(x, crop) if any(crop) else x


class ImplantedConv(nn.Module):
    """A convolution of which some filters are k x k (`dense`) and the others 1 x 1 (`implant`).

    The output is ``cat([dense(x), implant(x)])`` over the channels; the surgery orders the channels
    so that this is the order that the consumers expect. Where it cannot (producers of one stream
    that disagree), `order` puts the channels right with one gather. In a grouped convolution each
    part reads its own groups.

    Attributes:
        dense: the filters that were kept, or None if every filter is implanted.
        implant: the 1 x 1 filters.
        grouped: whether the two parts read different channels, one after the other.
        order: for each output channel, its place in the concatenation; None where it is the identity.
        input_order: for each input channel read by the two parts (grouped convolutions), its place
            in the input; None where it is the identity.
    """

    order: torch.Tensor | None
    input_order: torch.Tensor | None

    def __init__(
        self,
        dense: _ConvNd | None,
        implant: _ConvNd,
        *,
        shifts: Sequence[tuple[int, int]],
        padding_mode: str = "zeros",
        grouped: bool = False,
        order: torch.Tensor | None = None,
        input_order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.implant = implant
        self.shifts = tuple(shifts)
        self.padding_mode = padding_mode
        self.grouped = grouped
        self.register_buffer("order", order)
        self.register_buffer("input_order", input_order)

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.implant.out_channels + (self.dense.out_channels if self.dense is not None else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(N, in, *spatial)`` to ``(N, out, *spatial')``, as the dense convolution did."""
        large = small = x
        if self.grouped:
            if self.input_order is not None:
                x = x.index_select(1, self.input_order)
            large, small = x.tensor_split([x.shape[1] - self.implant.in_channels], dim=1)
        y = self.implant(shifted(small, self.shifts, self.padding_mode))
        if self.dense is not None:
            y = torch.cat([self.dense(large), y], dim=1)
        return y if self.order is None else y.index_select(1, self.order)

    def extra_repr(self) -> str:
        """Says whether a gather is left."""
        return "" if self.order is None else "reordered=True"
