from __future__ import annotations

import math
from typing import Any

import pytest

from hap.errors import HapError
from hap.report import Measured, Row, table


def cells(quantity: Any, dense: float | Measured, small: float | Measured) -> tuple[str, ...]:
    return table({quantity: (dense, small)}).rows[0].cells()


@pytest.mark.parametrize(
    ("quantity", "dense", "small", "expected"),
    [
        ("params", 269_722, 134_861, ("parameters", "269,722", "134,861", "0.50×")),
        ("params", 11_689_512, 999_999, ("parameters", "11.7 M", "999,999", "0.09×")),
        ("macs", 41_214_000, 4_120_000_000, ("MACs", "41.2 M", "4.12 G", "99.97×")),
        ("params", 1_234_000_000_000_000, 12, ("parameters", "1,234 T", "12", "0.00×")),
        ("bytes", 1_084_321, 512, ("file size", "1.08 MB", "512 B", "0.00×")),
        ("bytes", 45_400, 0, ("file size", "45.4 kB", "0 B", "0.00×")),
        ("latency_ms", 3.214, 0.05123, ("latency, 1 example", "3.21 ms", "0.0512 ms", "0.02×")),
        ("latency_ms", 12345.6, 0.0, ("latency, 1 example", "12,346 ms", "0 ms", "0.00×")),
        ("accuracy", 0.8731, 0.861, ("accuracy", "87.31 %", "86.10 %", "-1.21 points")),
        ("accuracy", 0.8731, 0.8731, ("accuracy", "87.31 %", "87.31 %", "+0.00 points")),
        ("f1", 0.8731, 0.861, ("F1", "87.31 %", "86.10 %", "-1.21 points")),
        ("matthews", 0.5462, -0.1, ("Matthews correlation", "0.546", "-0.100", "-0.646")),
        ("loss", 0.5462, 0.61, ("loss", "0.546", "0.610", "+0.064")),
        ("loss", 0.5, 0.4999, ("loss", "0.500", "0.500", "+0.000")),
    ],
)
def test_numbers_read_well(quantity: str, dense: float, small: float, expected: tuple[str, ...]) -> None:
    assert cells(quantity, dense, small) == expected


def test_uncertainty_has_the_digits_of_its_value() -> None:
    assert cells("latency_ms", Measured(3.214, 0.1), Measured(12.34, 0.26))[1:3] == ("3.21 ms ± 0.10", "12.3 ms ± 0.3")
    assert cells("accuracy", Measured(0.8731, 0.002), 0.86)[1:3] == ("87.31 % ± 0.20", "86.00 %")
    assert cells("macs", Measured(41.2e6, 1e5), Measured(20e6, 0.0))[1:3] == ("41.2 M ± 0.1", "20.0 M ± 0.0")


def test_ratio_is_the_quotient_unless_it_was_measured() -> None:
    rows: dict[Any, Any] = {"params": (200, 50), "latency_ms": (4.0, 2.0)}
    comparison = table(rows, ratios={"latency_ms": 0.55})
    assert [row.ratio for row in comparison.rows] == [0.25, 0.55]
    assert comparison.rows[1] == Row("latency_ms", Measured(4.0), Measured(2.0), 0.55)
    assert comparison.rows[1].cells()[3] == "0.55×"


def test_ratio_to_nothing_is_left_blank() -> None:
    row = table({"macs": (0, 3)}).rows[0]
    assert math.isnan(row.ratio) and row.cells()[3] == ""


def test_rows_that_a_model_lacks_are_left_out() -> None:
    comparison = table({"loss": (1.0, 2.0), "accuracy": (None, None), "latency_ms": (1.0, None)})
    assert [row.quantity for row in comparison.rows] == ["loss"]


def test_unknown_quantities_are_refused() -> None:
    wrong: Any = {"parms": (1, 2)}
    with pytest.raises(HapError, match="did you mean 'params'"):
        table(wrong)
    with pytest.raises(HapError, match="unknown quantity 'speed'"):
        table({"params": (1, 2)}, ratios={"speed": 1.0})  # type: ignore[dict-item]
    with pytest.raises(HapError, match="no row for macs"):
        table({"params": (1, 2)}, ratios={"macs": 1.0})
