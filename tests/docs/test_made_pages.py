"""Pages whose tables are made from raw results show what these give."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks as running its script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_implants(load) -> None:
    names = ("implant_forms", "implant_budgets", "implant_predicted", "implant_latency", "implant_goals")
    made = {name: table for part in names for name, table in load(part).tables(RESULTS).items()}
    page = (ROOT / "docs" / "implants.md").read_text()
    assert load("curvature_tables").filled(page, made) == page


def test_structure(load) -> None:
    page = (ROOT / "docs" / "structure.md").read_text()
    assert load("curvature_tables").filled(page, load("structure").made(RESULTS)) == page


def test_training(load) -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    assert load("curvature_tables").filled(page, load("training").tables(RESULTS)) == page
