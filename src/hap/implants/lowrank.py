"""The low-rank form: filters that share a basis."""

from __future__ import annotations

import torch
from torch import nn

from hap.implants.form import Factors, Form, Shapes, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.implants.regression import reduced
from hap.types import Layer


@register
class LowRank(Form):
    """``y = V U x``: a layer of the dense kernel to `rank` channels, then a 1 x 1 layer to the filters.

    For a linear layer, the factors of its truncated SVD, weighted by the covariance of its inputs.
    """

    name = "low-rank"
    ranked = True

    def applies(self, layer: Layer) -> bool:
        """Linear layers, and convolutions of one group."""
        return layer.groups == 1 and not layer.transposed

    def offered(self, geometry: Geometry) -> bool:
        """Not where filters can be separable, which leaves less undone in less time."""
        return not geometry.dense or sum(k > 1 for k in geometry.kernel) < 2

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """An eighth, a quarter and half of the filters."""
        return tuple(sorted({max(1, rows // part) for part in (8, 4, 2)}))

    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """The basis, and its mixture; a rank above the number of rows is that number."""
        assert rank is not None
        rank = min(rank, rows)
        return (rank, columns, *layer.kernel), (rows, rank, *(1 for _ in layer.kernel))

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """Reduced-rank regression: the best of all chains of this rank."""
        assert rank is not None
        first, basis = reduced(moments.solution()[0], moments.xy[0], rank)
        ones = [1] * len(geometry.kernel)
        return first.reshape(len(first), -1, *geometry.kernel), basis.reshape(*basis.shape, *ones)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """The two layers; the second has the bias."""
        first, second = factors
        return nn.Sequential(geometry.layer(first, None), geometry.after().layer(second, bias))

    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """The product."""
        first, second = factors
        return torch.tensordot(second.flatten(1), first, dims=1)
