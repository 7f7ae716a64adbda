"""What a model costs after units have left and filters have been implanted: exactly, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hap.types import Cost, Family, Layer, Structure

POINTWISE = "pointwise"


def filter_weights(form: str, kernel: tuple[int, ...]) -> int:
    """Weights of one filter for each input channel: of the dense form, or of an implant's."""
    return 1 if form == POINTWISE else math.prod(kernel)


@dataclass(frozen=True)
class _Axis:
    """How many positions of a tensor's axis each unit of a family takes."""

    tensor: str
    axis: int
    family: str
    lengths: np.ndarray


class CostModel:
    """Parameters and MACs as a function of the choices made.

    Each tensor has as many elements as the product of its axes' kept positions, so that coupled
    layers are priced together: what a channel saves depends on its neighbours' widths.
    """

    def __init__(self, structure: Structure) -> None:
        self._tensors = {name: spec.shape for name, spec in structure.tensors.items() if spec.is_parameter}
        self._layers = {layer.weight: layer for layer in structure.layers}
        self._axes = [axis for family in structure.families for axis in _axes(family)]
        self.dense = self({}, {})

    def __call__(self, pruned: Mapping[str, np.ndarray], implanted: Mapping[str, int]) -> Cost:
        """The cost when `pruned` (for each family, a mask over its units) units are gone.

        Args:
            pruned: boolean masks of shape ``(size,)``; families that are left out lose nothing.
            implanted: for each layer (by module), how many of its kept filters are pointwise.
        """
        shapes = {name: list(shape) for name, shape in self._tensors.items()}
        for axis in self._axes:
            mask = pruned.get(axis.family)
            if mask is not None and axis.tensor in shapes:
                shapes[axis.tensor][axis.axis] -= int(axis.lengths[mask].sum())
        params = macs = 0
        for name, shape in shapes.items():
            layer = self._layers.get(name)
            count = math.prod(shape) if layer is None else _weights(layer, shape, implanted.get(layer.module, 0))
            params += count
            macs += count * layer.positions if layer is not None else 0
        return Cost(params, macs)


def _axes(family: Family) -> list[_Axis]:
    return [
        _Axis(m.parameter, m.axis, family.name, np.array([len(unit) for unit in m.indices])) for m in family.members
    ]


def _weights(layer: Layer, shape: list[int], implanted: int) -> int:
    total = math.prod(shape)
    if not implanted:
        return total
    per_filter = total // shape[layer.output_axis]
    small = per_filter // math.prod(layer.kernel) * filter_weights(POINTWISE, layer.kernel)
    return total - implanted * (per_filter - small)
