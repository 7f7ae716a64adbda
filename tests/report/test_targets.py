from __future__ import annotations

import pytest

from hap.errors import HapError
from hap.report import Target, reached

ACCURACIES = (0.90, 0.88)
KEPT = {"params": 0.40, "macs": 0.55, "heads": 0.5}


@pytest.mark.parametrize(
    ("of", "value", "found", "met"),
    [
        ("accuracy", 0.87, 0.88, True),
        ("accuracy", 0.89, 0.88, False),
        ("lost", 0.03, 0.02, True),
        ("lost", 0.01, 0.02, False),
        ("lost", 0.02, 0.02, True),  # 0.90 - 0.88 is more than 0.02 in floating point
        ("gain", 0.01, 0.03, True),
        ("gain", 0.04, 0.03, False),
        ("kept_params", 0.40, 0.40, True),
        ("kept_macs", 0.50, 0.55, False),
        ("kept_heads", 0.60, 0.50, True),
    ],
)
def test_reached(of: str, value: float, found: float, met: bool) -> None:
    (one,) = reached([Target(of, value, "table 1")], ACCURACIES, KEPT, rival=0.85)
    assert one.value == pytest.approx(found)
    assert one.difference == pytest.approx(found - value) and one.met is met
    assert one.cells()[1].startswith(">=" if of in ("accuracy", "gain") else "<=")


@pytest.mark.parametrize("of", ["gain", "accuracy", "lost", "kept_heads"])
def test_what_was_not_measured(of: str) -> None:
    (one,) = reached([Target(of, 0.5, "table 1")], (None, None), {})
    assert (one.value, one.difference, one.met) == (None, None, None)
    assert one.cells()[2:] == ("not measured", "", "table 1")


def test_unknown_target() -> None:
    with pytest.raises(HapError, match=r"unknown target 'acuracy'[\s\S]*did you mean 'accuracy'"):
        Target("acuracy", 0.5, "table 1")
