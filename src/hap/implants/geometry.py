"""How a layer reads its input: kernel, stride, padding, dilation and groups, without its weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

Dense = nn.Linear | _ConvNd  # what implants can stand for

_CONVOLUTIONS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution; a linear layer has an empty kernel.

    Attributes:
        kernel, stride, dilation: for each spatial axis.
        padding: for each spatial axis, or ``"same"`` or ``"valid"``.
        padding_mode: as in `torch.nn.Conv2d`.
        groups: number of groups.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    padding_mode: str = "zeros"
    groups: int = 1

    @staticmethod
    def of(layer: Dense) -> Geometry:
        """That of a convolution or linear layer."""
        if isinstance(layer, nn.Linear):
            return Geometry()
        padding: Any = layer.padding
        return Geometry(
            tuple(layer.kernel_size),
            tuple(layer.stride),
            tuple(layer.dilation),
            padding if isinstance(padding, str) else tuple(padding),
            layer.padding_mode,
            layer.groups,
        )

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return prod(self.kernel)

    @property
    def centre(self) -> int:
        """The tap that a 1 x 1 filter keeps, counted along the flattened kernel; the earlier of two middle ones."""
        place = 0
        for kernel in self.kernel:
            place = place * kernel + (kernel - 1) // 2
        return place

    @property
    def channel_axis(self) -> int:
        """Where inputs and outputs carry their channels or features."""
        return 1 if self.kernel else -1

    def pads(self) -> list[tuple[int, int]]:
        """Padding before and after, for each spatial axis."""
        if self.padding == "same":
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return [(span // 2, span - span // 2) for span in spans]
        return [(0, 0)] * len(self.kernel) if self.padding == "valid" else [(int(p), int(p)) for p in self.padding]

    def shifts(self) -> list[tuple[int, int]]:
        """For each spatial axis, how far to pad (or, below 0, crop) so that a 1 x 1 filter reads the centre tap.

        The centre tap of output i reads position ``i * stride + centre * dilation - padding``: after this padding, a
        1 x 1 convolution with the same stride reads the same place.

        >>> Geometry.of(nn.Conv2d(1, 1, (3, 5), stride=2, padding=1)).shifts()
        [(0, 0), (-1, -1)]
        """
        found = []
        for kernel, dilation, (before, after) in zip(self.kernel, self.dilation, self.pads(), strict=True):
            offset = (kernel - 1) // 2 * dilation
            found.append((before - offset, after - (dilation * (kernel - 1) - offset)))
        return found

    def layer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """A layer with these settings and weights; the kernel is the weight's."""
        out, columns, *kernel = weight.shape
        new: Dense
        if kernel:
            new = _CONVOLUTIONS[len(kernel)](
                columns * self.groups, out, kernel, self.stride, self.padding, self.dilation, self.groups,
                bias is not None, self.padding_mode, device="meta",
            )  # fmt: skip
        else:
            new = nn.Linear(columns, out, bias is not None, device="meta")
        new.weight = nn.Parameter(weight.clone())
        if bias is not None:
            new.bias = nn.Parameter(bias.clone())
        return new

    def after(self) -> Geometry:
        """The settings of a 1 x 1 layer that reads the outputs of such a layer."""
        ones = (1,) * len(self.kernel)
        return Geometry(ones, ones, ones, (0,) * len(ones))

    def along(self, axes: range) -> Geometry:
        """The settings along these spatial axes; along the others a kernel of 1, and nothing padded or left out."""

        def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else other for axis, value in enumerate(values))

        kernel, stride, dilation = (only(values, 1) for values in (self.kernel, self.stride, self.dilation))
        padding = self.padding if isinstance(self.padding, str) else only(self.padding, 0)
        return replace(self, kernel=kernel, stride=stride, dilation=dilation, padding=padding)

    @property
    def dense(self) -> bool:
        """Whether there is an output at each place of the input, and nowhere else."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        return set(self.stride) <= {1} and [before + after for before, after in self.pads()] == spans

    def grouped(self, groups: int) -> Geometry:
        """The same with another number of groups."""
        return replace(self, groups=groups)

    def views(self, x: torch.Tensor, *, centre: bool = False, at: Any = None) -> torch.Tensor:
        """What the filters multiply: (N, inputs, taps, *positions), or ``taps = 1`` of the centre only.

        Strided views of the padded input, stacked; for a linear layer (N, inputs, 1, positions).

        Args:
            at: of a convolution, the index ``(..., rows, columns)`` of the outputs of interest: then one axis.
        """
        if not self.kernel:
            return x.reshape(len(x), -1, x.shape[-1]).movedim(-1, 1).unsqueeze(2)
        pads = [n for pair in reversed(self.pads()) for n in pair]
        x = F.pad(x, pads, "constant" if self.padding_mode == "zeros" else self.padding_mode) if any(pads) else x
        places = list(itertools.product(*map(range, self.kernel)))
        taps = (self._tap(x, tap) for tap in (places[self.centre :][:1] if centre else places))
        return torch.stack([tap if at is None else tap[at] for tap in taps], dim=2)

    def _tap(self, x: torch.Tensor, tap: tuple[int, ...]) -> torch.Tensor:
        spans = []
        for n, t, k, d, s in zip(x.shape[2:], tap, self.kernel, self.dilation, self.stride, strict=True):
            count = (n - d * (k - 1) - 1) // s + 1
            spans.append(slice(t * d, t * d + (count - 1) * s + 1, s))
        return x[(slice(None), slice(None), *spans)]
