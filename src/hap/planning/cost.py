"""What a model costs after units have left and filters have been implanted: exactly, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hap.implants import form_of
from hap.planning.latency_table import LatencyTable
from hap.planning.plan import Implant
from hap.types import Cost, Layer, Structure


@dataclass(frozen=True)
class Share:
    """How many of a layer's kept filters are implanted, and how."""

    rows: int
    form: str
    rank: int | None = None


@dataclass(frozen=True)
class _Weight:
    """Where a layer's weight lies among tensors and axes.

    Attributes:
        layer: the layer.
        tensor: index of its weight.
        rows, columns: indices of the axes that hold its filters and what each of them reads.
    """

    layer: Layer
    tensor: int
    rows: int
    columns: int


class CostModel:
    """Parameters, MACs and (with a table) latency as a function of the choices made.

    Each tensor has as many elements as the product of its axes' kept positions, so that coupled
    layers are priced together: what a channel saves depends on its neighbours' widths. The units of a
    family are alike: the cost depends on how many of them leave.

    Args:
        structure: from `hap.trace`.
        latency: the layers' times on the user's device; without it costs have no latency.
    """

    def __init__(self, structure: Structure, latency: LatencyTable | None = None) -> None:
        shapes = {name: spec.shape for name, spec in structure.tensors.items() if spec.is_parameter}
        keys = [(name, axis) for name, shape in shapes.items() for axis in range(max(1, len(shape)))]
        place = {key: i for i, key in enumerate(keys)}
        self._full = np.array([(shapes[name] or (1,))[axis] for name, axis in keys], dtype=np.int64)
        self._starts = np.array([i for i, (_, axis) in enumerate(keys) if axis == 0], dtype=np.int64)
        self._taken = np.zeros((len(structure.families), len(keys)), dtype=np.int64)  # positions of one unit
        for i, family in enumerate(structure.families):
            for member in family.members:
                if (member.parameter, member.axis) in place:
                    self._taken[i, place[member.parameter, member.axis]] += len(member.indices[0])
        self._families = [family.name for family in structure.families]
        tensor = {name: i for i, name in enumerate(shapes)}
        self._weights = {
            layer.module: _Weight(
                layer,
                tensor[layer.weight],
                place[layer.weight, layer.output_axis],
                place[layer.weight, 1 - layer.output_axis],
            )
            for layer in structure.layers
        }
        self._positions = np.zeros(len(shapes), dtype=np.int64)
        for weight in self._weights.values():
            self._positions[weight.tensor] = weight.layer.positions
        heads = {m.parameter for family in structure.families if family.kind == "head" for m in family.members}
        self._heads = np.array([name in heads and len(shape) > 1 for name, shape in shapes.items()], dtype=bool)
        self._latency = latency
        self.dense = self({}, {})

    def __call__(self, pruned: Mapping[str, np.ndarray], implants: Mapping[str, Implant]) -> Cost:
        """The cost when `pruned` (for each family, a mask over its units) units are gone.

        Args:
            pruned: boolean masks of shape ``(size,)``; families that are left out lose nothing.
            implants: by module; only filters that are kept.
        """
        gone = np.array([int(pruned[name].sum()) if name in pruned else 0 for name in self._families], dtype=np.int64)
        return self.at(gone, {name: Share(len(i.indices), i.form, i.rank) for name, i in implants.items() if i.indices})

    def at(self, gone: np.ndarray, shares: Mapping[str, Share]) -> Cost:
        """The cost when of each family `gone` units have left, shape ``(families,)``."""
        params, macs, heads, *latency = self.costs(gone[None], shares)[:, 0].tolist()
        return Cost(round(params), round(macs), latency[0] if latency else None, round(heads))

    def costs(self, gone: np.ndarray, shares: Mapping[str, Share]) -> np.ndarray:
        """The costs at several places at once.

        Args:
            gone: units that have left, shape ``(places, families)``.
            shares: the implants, the same at all places (but never more than there are filters).

        Returns:
            float64 of shape ``(quantities, places)``: parameters, MACs, parameters of heads and, with a table,
            milliseconds.
        """
        axes = self._full - gone @ self._taken
        counts = np.multiply.reduceat(axes, self._starts, axis=1)
        for module, share in shares.items():
            weight = self._weights[module]
            table = zip(
                axes[:, weight.rows].tolist(),
                axes[:, weight.columns].tolist(),
                counts[:, weight.tensor].tolist(),
                strict=True,
            )
            counts[:, weight.tensor] = [_elements(weight.layer, share, *row) for row in table]
        heads = counts[:, self._heads].sum(1, dtype=np.float64)
        found = [counts.sum(1, dtype=np.float64), counts @ self._positions.astype(np.float64), heads]
        if self._latency is not None:
            found.append(self._milliseconds(self._latency, axes))
        return np.stack(found)

    def of_heads(self, module: str) -> bool:
        """Whether a layer is a projection of attention heads."""
        return bool(self._heads[self._weights[module].tensor])

    def widths(self, module: str, gone: np.ndarray) -> tuple[int, int]:
        """A layer's filters, and the inputs that each of them reads, when `gone` units have left."""
        axes, weight = self._full - gone @ self._taken, self._weights[module]
        return int(axes[weight.rows]), int(axes[weight.columns])

    def weights(self, module: str, gone: np.ndarray, share: Share) -> int:
        """Elements of a layer's weights when `gone` units have left and some of its filters are implanted."""
        axes, weight = self._full - gone @ self._taken, self._weights[module]
        count = int(np.multiply.reduceat(axes, self._starts)[weight.tensor])
        return _elements(weight.layer, share, int(axes[weight.rows]), int(axes[weight.columns]), count)

    def _milliseconds(self, table: LatencyTable, axes: np.ndarray) -> np.ndarray:
        total = np.zeros(len(axes))
        for module, weight in self._weights.items():
            total += table.milliseconds(module, axes[:, weight.rows], axes[:, weight.columns])
        return total


def _elements(layer: Layer, share: Share, rows: int, columns: int, count: int) -> int:
    """Elements of a layer's weights, `count` if none of its `rows` filters is implanted."""
    implanted = min(share.rows, rows)
    if not implanted:
        return count
    return count // rows * (rows - implanted) + form_of(share.form).weights(layer, implanted, columns, share.rank)
