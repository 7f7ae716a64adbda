"""One flat vector for all units and filters, so that statistics are written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from hap.curvature.criterion import Scores
from hap.types import Family, Layer, Structure


@dataclass(frozen=True)
class Layout:
    """Where each family's units and each layer's filters lie in a flat vector: units first."""

    families: tuple[Family, ...]
    layers: tuple[Layer, ...]

    @staticmethod
    def of(structure: Structure) -> Layout:
        """The layout of a structure."""
        return Layout(structure.families, structure.layers)

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts, in order."""
        return [f.size for f in self.families] + [layer.filters for layer in self.layers]

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    @property
    def units(self) -> int:
        """Number of units: the length of the families' part."""
        return sum(f.size for f in self.families)

    @property
    def offsets(self) -> list[int]:
        """Where each part starts: the families' first, then the layers'."""
        return list(accumulate(self.sizes[:-1], initial=0))

    def unit_offsets(self) -> Sequence[tuple[Family, int]]:
        """Each family with the position of its first unit."""
        return list(zip(self.families, self.offsets, strict=False))

    def filter_offsets(self) -> Sequence[tuple[Layer, int]]:
        """Each layer with the position of its first filter."""
        return list(zip(self.layers, self.offsets[len(self.families) :], strict=True))

    def split(self, flat: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The parts of a flat vector, by family name and by layer module, float64 on the CPU."""
        parts = [part.clone() for part in flat.to("cpu").double().split(self.sizes)]
        units = {family.name: part for family, part in zip(self.families, parts, strict=False)}
        filters = {layer.module: part for layer, part in zip(self.layers, parts[len(units) :], strict=True)}
        return units, filters

    def scores(
        self, values: torch.Tensor, stderr: torch.Tensor, *, samples: int, draws: int, terms: float | None = None
    ) -> Scores:
        """`Scores` from flat vectors of values and their standard errors."""
        units, filters = self.split(values)
        units_stderr, filters_stderr = self.split(stderr)
        return Scores(samples, draws, units, units_stderr, filters, filters_stderr, terms=terms)
