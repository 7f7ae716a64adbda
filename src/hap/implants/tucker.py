"""The Tucker form: 1 x 1 filters on both sides of a narrow convolution."""

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
class Tucker(Form):
    """1 x 1 to `rank` channels, a convolution of these to `rank` channels, 1 x 1 to the filters.

    The Tucker-2 decomposition of the filters (Kim et al. 2016).
    """

    name = "tucker"
    ranked = True

    def applies(self, layer: Layer) -> bool:
        """Convolutions larger than 1, of one group."""
        return prod(layer.kernel) > 1 and layer.groups == 1 and not layer.transposed

    def suits(self, geometry: Geometry) -> bool:
        """Where there is an output at each place of the input: else places are computed that are left out later."""
        return geometry.dense

    def offered(self, geometry: Geometry) -> bool:
        """Not unasked: where it is good, the spatial form at a rank of the same price is as good."""
        return False

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """A quarter and half of the filters."""
        return tuple(sorted({max(1, rows // part) for part in (4, 2)}))

    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """The three parts; a rank above the number of inputs or rows is that number."""
        assert rank is not None
        inputs, outputs, ones = min(rank, columns), min(rank, rows), [1] * len(layer.kernel)
        return (inputs, columns, *ones), (outputs, inputs, *layer.kernel), (rows, outputs, *ones)

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """The first part is a projection that the filters share at all taps."""
        assert rank is not None
        taps, ones = geometry.taps, [1] * len(geometry.kernel)
        xx, xy = moments.xx[0], moments.xy[0]
        columns, rows = len(xx) // taps, xy.shape[-1]
        free = moments.solution()[0].reshape(rows, columns, taps)
        first, core, last = projected(
            xx.reshape(columns, taps, columns, taps),
            xy.reshape(columns, taps, rows),
            free,
            min(rank, columns),
            min(rank, rows),
        )
        return (
            first.reshape(*first.shape, *ones),
            core.reshape(*core.shape[:2], *geometry.kernel),
            last.reshape(*last.shape, *ones),
        )

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """The three layers; the last has the bias."""
        first, core, last = factors
        around = geometry.after()
        return nn.Sequential(around.layer(first, None), geometry.layer(core, None), around.layer(last, bias))

    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """The product."""
        first, core, last = factors
        whole = torch.einsum("oq,qpt,pc->oct", last.flatten(1), core.flatten(2), first.flatten(1))
        return whole.reshape(*whole.shape[:2], *geometry.kernel)
