"""The pointwise form: k x k filters become 1 x 1 ones (HAP, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from hap.implants.form import Factors, Form, Shapes, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.types import Layer


@register
class Pointwise(Form):
    """``y = W u``, where u is the input at the filters' centre tap. Groups stay groups."""

    name = "pointwise"
    centre = True

    def applies(self, layer: Layer) -> bool:
        """Convolutions larger than 1."""
        return prod(layer.kernel) > 1 and not layer.transposed

    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """One weight for each filter and input."""
        return ((rows, columns, *(1 for _ in layer.kernel)),)

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """Ordinary least squares."""
        solution = moments.solution()
        return (solution.reshape(-1, solution.shape[-1], *[1] * len(geometry.kernel)),)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """A 1 x 1 convolution; it pads by itself where it can, and follows a `Shift` where it cannot."""
        (weight,) = factors
        shifts = geometry.shifts()
        plain = replace(geometry.after(), stride=geometry.stride, groups=geometry.groups)
        if all(before == after >= 0 for before, after in shifts) and geometry.padding_mode == "zeros":
            return replace(plain, padding=tuple(before for before, _ in shifts)).layer(weight, bias)
        if not any(any(pair) for pair in shifts):
            return plain.layer(weight, bias)
        return nn.Sequential(Shift(shifts, geometry.padding_mode), plain.layer(weight, bias))

    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """Zeros around the centre taps."""
        weight = factors[0].flatten(1)
        whole = weight.new_zeros(*weight.shape, geometry.taps)
        whole[:, :, geometry.centre] = weight
        return whole.reshape(*weight.shape, *geometry.kernel)


class Shift(nn.Module):
    """Pads or (below 0) crops the spatial axes, by `Geometry.shifts`."""

    def __init__(self, amounts: Sequence[tuple[int, int]], mode: str) -> None:
        super().__init__()
        self.grow = [max(0, n) for pair in reversed(amounts) for n in pair]
        self.crop = [min(0, n) for pair in reversed(amounts) for n in pair]
        self.mode = "constant" if mode == "zeros" else mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(N, channels, *spatial)`` to ``(N, channels, *spatial')``."""
        if any(self.grow):
            x = F.pad(x, self.grow, self.mode)
        for axis, (before, after) in enumerate(zip(self.crop[::2], self.crop[1::2], strict=True), start=1):
            if before or after:  # a view, where F.pad would copy
                x = x.narrow(-axis, -before, x.shape[-axis] + before + after)
        return x

    def extra_repr(self) -> str:
        """What it pads and crops."""
        return f"grow={self.grow}, crop={self.crop}"
