"""The support page shows what the raw results give."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GREEN = {
    "group": "g", "name": "a", "status": "green", "trace_seconds": 0.25, "families": {"head": 2, "neuron": 1},
    "units": {"head": 8, "neuron": 1200}, "reachable": 0.51, "reachable_inexact": 0.9, "kept": 0.7, "error": 3e-15,
    "frozen": {"the model's output": 0.25, "rows of a look-up table": 0.004}, "fisher": "ok", "code": "c",
    "versions": {"torch": "2"},
}  # fmt: skip
REFUSED = {
    "group": "g", "name": "b", "status": "refused", "step": "trace", "message": "no | way", "code": "c",
    "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmark as running its script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_page_shows_the_raw_results(load) -> None:
    rows = load("curvature_records").read(ROOT / "benchmarks" / "results" / "support.jsonl")
    assert load("support_page").page(rows) == (ROOT / "docs" / "support.md").read_text()


def test_results_hold_every_model_of_the_list(load) -> None:
    rows = load("curvature_records").read(ROOT / "benchmarks" / "results" / "support.jsonl")
    assert [(row["group"], row["name"]) for row in rows] == [(c.group, c.name) for c in load("support_cases").CASES]


def test_a_line_for_each_model(load) -> None:
    page = load("support_page").page([GREEN, REFUSED])
    assert "| a | green | 1,200 in 1 | 8 in 2 | 51 % | 90 % | 70 % | 3e-15 | 0.2 | yes |" in page
    assert "| b | refused |  |  |  |  |  |  |  |  |" in page
    assert "- **b**, refused (trace): no / way" in page
    lost = {**GREEN, "name": "c", "fisher": "1 of 3 families without a score", "fisher_seconds": 0.1}
    assert "| 0.2 | partly |" in load("support_page").page([lost])
    assert "- c, default criterion: 1 of 3" in load("support_page").page([lost])
    assert "- a: the model's output (25 %)\n" in page and "look-up" not in page
    assert "| g | 2 | 1 | 1 | 0 | 0 | 50.0 |" in page and "| **all** | 2 | 1 | 1 | 0 | 0 | 50.0 |" in page


def test_results_of_two_sources_make_no_page(load) -> None:
    with pytest.raises(ValueError, match="results of 2 different sources"):
        load("support_page").page([GREEN, {**REFUSED, "code": "d"}])
