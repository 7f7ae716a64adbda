"""How long each layer takes at every width, as it is and implanted, measured on the user's own device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hap.errors import HapError

Way = tuple[str, int | None]  # an implant's form and rank


@dataclass(frozen=True)
class Grid:
    """Times at some widths.

    Attributes:
        rows: numbers of filters, ascending.
        columns: numbers of inputs that each filter reads, ascending.
        milliseconds: for each number of filters, the times by number of inputs.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    milliseconds: Sequence[Sequence[float]]

    def at(self, rows: int, columns: int) -> float:
        """Bilinear interpolation; outside of the grid its nearest edge."""
        i, k, s = _place(self.rows, rows)
        j, n, t = _place(self.columns, columns)
        low = self.milliseconds[i][j] * (1 - s) + self.milliseconds[k][j] * s
        high = self.milliseconds[i][n] * (1 - s) + self.milliseconds[k][n] * s
        return low * (1 - t) + high * t


def _place(knots: Sequence[int], value: int) -> tuple[int, int, float]:
    """The knots on either side of a value, and how far it is from the first, in [0, 1]."""
    low = max(bisect_right(knots, value) - 1, 0)
    high = min(low + 1, len(knots) - 1)
    return low, high, min(max((value - knots[low]) / max(knots[high] - knots[low], 1), 0.0), 1.0)


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's layers, and of what lies between them; their sum is the time of the whole dense model.

    An implanted layer is two layers side by side and what joins them.

    Attributes:
        device: what it was measured on.
        scale: what the layers' times count, at most 1: less where all together take longer than the model.
        layers: by module.
        implants: by module and way, the times of the implant alone.
        joins: by module, what it costs to join two parts, by the number of filters of both (one column).
        between: by module, its share of what lies between the layers (normalisations, activations), by the number of
            its filters (one column).
    """

    device: str
    scale: float
    layers: Mapping[str, Grid]
    implants: Mapping[str, Mapping[Way, Grid]] = field(default_factory=dict)
    joins: Mapping[str, Grid] = field(default_factory=dict)
    between: Mapping[str, Grid] = field(default_factory=dict)

    def milliseconds(
        self, module: str, rows: int, columns: int, implanted: int = 0, way: Way = ("pointwise", None)
    ) -> float:
        """The time of a layer at these widths, `implanted` of its rows in a way; 0 for a layer that never runs.

        Raises:
            HapError: this way was not timed.
        """
        grid = self.layers.get(module)
        if grid is None:
            return 0.0
        own = self._parts(module, rows, columns, implanted, way) if implanted else grid.at(rows, columns)
        between = self.between.get(module)
        return self.scale * own + (0.0 if between is None else between.at(rows, 1))

    def _parts(self, module: str, rows: int, columns: int, implanted: int, way: Way) -> float:
        ways = self.implants.get(module, {})
        if way not in ways:
            raise HapError(
                f"the latency table has no times of {way[0]} implants in {module!r}",
                expected="times of every form and rank that may be chosen",
                got=", ".join(f"{form} {rank or ''}".strip() for form, rank in ways) or "none",
                remedy="hap.planning.time_layers(..., implants=...), or implant_ratio=0",
            )
        implant = ways[way].at(implanted, columns)
        if implanted == rows:
            return implant
        return self.layers[module].at(rows - implanted, columns) + implant + self.joins[module].at(rows, 1)
