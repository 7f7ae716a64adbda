"""The dense and the small model side by side, in numbers that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hap.errors import HapError, unknown

Quantity = Literal[
    "params",
    "macs",
    "heads",
    "head_params",
    "latency_ms",
    "batch_latency_ms",
    "bytes",
    "accuracy",
    "f1",
    "matthews",
    "loss",
]

_LABELS: dict[Quantity, str] = {
    "params": "parameters",
    "macs": "MACs",
    "heads": "attention heads",
    "head_params": "weights of heads",
    "latency_ms": "latency, 1 example",
    "batch_latency_ms": "latency, 32 examples",
    "bytes": "file size",
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "loss": "loss",
}


@dataclass(frozen=True)
class Measured:
    """A value and its uncertainty (a standard deviation, or half an interval), in the same unit."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Row:
    """One quantity of both models.

    Attributes:
        quantity: what it is; ``latency_ms`` is in milliseconds, ``accuracy`` and ``f1`` fractions in [0, 1].
        dense, small: the values.
        ratio: small / dense; NaN where the dense model's value is 0.
    """

    quantity: Quantity
    dense: Measured
    small: Measured
    ratio: float

    @property
    def label(self) -> str:
        """The quantity in words."""
        return _LABELS[self.quantity]

    def cells(self) -> tuple[str, str, str, str]:
        """Label, dense, small and how they compare, as text.

        Costs compare by their ratio; accuracy and the like by their difference, in which a small change shows.
        """
        return self.label, _text(self.quantity, self.dense), _text(self.quantity, self.small), self._change()

    def _change(self) -> str:
        difference = self.small.value - self.dense.value
        if self.quantity in ("accuracy", "f1"):
            return f"{_signed(100 * difference, 2)} points"
        if self.quantity in ("matthews", "loss"):
            return _signed(difference, 3)
        return "" if math.isnan(self.ratio) else f"{self.ratio:.2f}×"


@dataclass(frozen=True)
class Comparison:
    """The rows of a before/after table."""

    rows: tuple[Row, ...]


def table(
    rows: Mapping[Quantity, tuple[float | Measured | None, float | Measured | None]],
    *,
    ratios: Mapping[Quantity, float] | None = None,
) -> Comparison:
    """A comparison of (dense, small) values, in the order given.

    Args:
        rows: for each quantity the two values; one that either model lacks (None) is left out.
        ratios: small / dense where it was measured itself, as for latency the median over paired
            runs, which disturbs less than the quotient of two medians.

    Raises:
        HapError: there is no such quantity.

    >>> comparison = table({"params": (269_722, 134_861), "accuracy": (0.873, 0.861)})
    >>> comparison.rows[0].ratio
    0.5
    >>> comparison.rows[1].cells()
    ('accuracy', '87.30 %', '86.10 %', '-1.20 points')
    """
    for name in (*rows, *(ratios or {})):
        if name not in get_args(Quantity):
            raise unknown("quantity", name, get_args(Quantity))
    for name in ratios or {}:
        if name not in rows:
            raise HapError(f"there is a ratio but no row for {name}", expected=f"ratios of {', '.join(rows)}", got=name)
    made = []
    for name, (dense, small) in rows.items():
        if dense is not None and small is not None:
            before, after = _measured(dense), _measured(small)
            quotient = after.value / before.value if before.value else math.nan
            made.append(Row(name, before, after, (ratios or {}).get(name, quotient)))
    return Comparison(tuple(made))


def _measured(value: float | Measured) -> Measured:
    return value if isinstance(value, Measured) else Measured(value)


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _text(quantity: Quantity, measured: Measured) -> str:
    """Value, unit and uncertainty; the latter to the digits of the value."""
    scale, digits, unit = _format(quantity, measured.value)
    text = f"{measured.value / scale:,.{digits}f}{unit and ' ' + unit}"
    return text if measured.error is None else f"{text} ± {measured.error / scale:,.{digits}f}"


def _format(quantity: Quantity, value: float) -> tuple[float, int, str]:
    """By what to divide, the digits after the point, and the unit."""
    if quantity in ("accuracy", "f1"):
        return 0.01, 2, "%"
    if quantity in ("matthews", "loss"):
        return 1.0, 3, ""
    if quantity in ("latency_ms", "batch_latency_ms"):
        return 1.0, _digits(value), "ms"
    prefixes = ["", "k", "M", "G", "T"]
    thousands = min(int(math.log10(value)) // 3, len(prefixes) - 1) if value >= 1 else 0
    if quantity != "bytes" and value < 1e6:
        thousands = 0  # a count is written in full as long as that is short
    unit = prefixes[thousands] + ("B" if quantity == "bytes" else "")
    scale = 1000.0**thousands
    return scale, _digits(value / scale) if thousands else 0, unit


def _digits(value: float) -> int:
    """Digits after the point for three figures in all."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
