"""The low-rank form: filters that share a basis."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from hap.implants.form import Factors, Form, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
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

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """An eighth, a quarter and half of the filters."""
        return tuple(sorted({max(1, rows // part) for part in (8, 4, 2)}))

    def weights(self, layer: Layer, rows: int, columns: int, rank: int | None) -> int:
        """The basis, and its mixture; a rank above the number of rows is that number."""
        assert rank is not None
        return min(rank, rows) * (columns * prod(layer.kernel) + rows)

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """Reduced-rank regression (Izenman 1975): the best of all chains of this rank.

        The least-squares filters, projected on the leading eigenvectors of the covariance of their outputs.
        """
        free = moments.solution()[0]  # (rows, inputs)
        outputs = free @ moments.xy[0]
        basis = torch.linalg.eigh((outputs + outputs.T) / 2).eigenvectors.flip(-1)[:, :rank]
        first = basis.T @ free
        ones = [1] * len(geometry.kernel)
        return first.reshape(len(first), -1, *geometry.kernel), basis.reshape(*basis.shape, *ones)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry) -> nn.Module:
        """The two layers; the second has the bias."""
        first, second = factors
        return nn.Sequential(geometry.layer(first, None), geometry.after().layer(second, bias))

    def dense(self, factors: Factors, geometry: Geometry) -> torch.Tensor:
        """The product."""
        first, second = factors
        return torch.tensordot(second.flatten(1), first, dims=1)
