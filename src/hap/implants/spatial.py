"""The spatial form: 1 x k filters, then k x 1 filters."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from hap.implants.form import Factors, Form, Shapes, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.implants.regression import projected
from hap.types import Layer


@register
class Spatial(Form):
    """``W[o, c, i, j] = sum_r B[o, r, i] A[r, c, j]``: along the last axis to `rank` channels, then along the others.

    Separable filters (Jaderberg, Vedaldi, Zisserman 2014, scheme 2). This order is the faster one on CPUs.
    """

    name = "spatial"
    ranked = True

    def applies(self, layer: Layer) -> bool:
        """Convolutions of one group with a kernel larger than 1 along two axes or more."""
        return sum(k > 1 for k in layer.kernel) > 1 and layer.groups == 1 and not layer.transposed

    def suits(self, geometry: Geometry) -> bool:
        """Where there is an output at each place of the input: else places are computed that are left out later."""
        return geometry.dense

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """An eighth, a quarter and half of the filters."""
        return tuple(sorted({max(1, rows // part) for part in (8, 4, 2)}))

    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """Both parts; a rank above what either can use is that number."""
        assert rank is not None
        first, second = _kernels(layer.kernel)
        rank = min(rank, columns * prod(first), rows * prod(second))
        return (rank, columns, *first), (rows, rank, *second)

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """The first part is a projection that the filters share at all places along the other axes."""
        assert rank is not None
        first, second = _kernels(geometry.kernel)
        xx, xy, rows = moments.xx[0], moments.xy[0], moments.xy.shape[-1]
        taps, places = prod(first), prod(second)
        channels = len(xx) // (taps * places)
        inputs = channels * taps
        xx = xx.reshape(channels, places, taps, channels, places, taps).permute(0, 2, 1, 3, 5, 4)
        xy = xy.reshape(channels, places, taps, rows).transpose(1, 2)
        free = moments.solution()[0].reshape(rows, channels, places, taps).transpose(2, 3)
        shared, inner, last = projected(
            xx.reshape(inputs, places, inputs, places),
            xy.reshape(inputs, places, rows),
            free.reshape(rows, inputs, places),
            min(rank, inputs, rows * places),
            rows,
        )
        mixture = torch.tensordot(last, inner, dims=1)
        return shared.reshape(len(shared), channels, *first), mixture.reshape(rows, len(shared), *second)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """The two layers; the second has the bias."""
        first, second = (geometry.along(axes) for axes in _axes(geometry.kernel))
        return nn.Sequential(first.layer(factors[0], None), second.layer(factors[1], bias))

    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """The products, summed over the channels in between."""
        first, second = factors
        whole = torch.einsum("ori,rcj->ocij", second.flatten(2), first.flatten(2))
        return whole.reshape(*whole.shape[:2], *geometry.kernel)


def _axes(kernel: tuple[int, ...]) -> tuple[range, range]:
    """The axes from the last one along which the kernel is larger than 1, and those before."""
    last = max(axis for axis, size in enumerate(kernel) if size > 1)
    return range(last, len(kernel)), range(last)


def _kernels(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The kernels of the two parts."""
    return [tuple(size if axis in axes else 1 for axis, size in enumerate(kernel)) for axes in _axes(kernel)]
