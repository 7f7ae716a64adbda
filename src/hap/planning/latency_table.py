"""How long each layer takes at every width, measured on the user's own device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Grid:
    """A layer's times at some widths.

    Attributes:
        rows: numbers of filters, ascending.
        columns: numbers of inputs that each filter reads, ascending.
        milliseconds: shape ``(len(rows), len(columns))``.
    """

    rows: np.ndarray
    columns: np.ndarray
    milliseconds: np.ndarray

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bilinear interpolation; outside of the grid its nearest edge."""
        i, k, s = _place(self.rows, rows)
        j, n, t = _place(self.columns, columns)
        low = self.milliseconds[i, j] * (1 - s) + self.milliseconds[k, j] * s
        high = self.milliseconds[i, n] * (1 - s) + self.milliseconds[k, n] * s
        found: np.ndarray = low * (1 - t) + high * t
        return found


def _place(grid: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each value, the knots on either side of it, and how far it is from the first, in [0, 1]."""
    low = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 1)
    high = np.minimum(low + 1, len(grid) - 1)
    return low, high, np.clip((values - grid[low]) / np.maximum(grid[high] - grid[low], 1), 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of a model's layers, scaled so that their sum is the time of the whole dense model.

    What lies between the layers (normalisations, activations) shrinks with them, so that each layer is charged
    its share of it. An implanted filter counts as the full one: implants are not taken for faster than measured.

    Attributes:
        device: what it was measured on.
        scale: milliseconds of the dense model for each millisecond of its layers alone.
        layers: by module.
    """

    device: str
    scale: float
    layers: Mapping[str, Grid]

    def milliseconds(self, module: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | float:
        """The time of a layer at these widths; 0 for a layer that never runs."""
        grid = self.layers.get(module)
        return 0.0 if grid is None else self.scale * grid.at(rows, columns)
