"""The page on transformers shows what the raw results give."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmark as running its script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_page_shows_the_raw_results(load) -> None:
    tables = load("glue_tables").tables(ROOT / "benchmarks" / "results")
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert load("curvature_tables").filled(page, tables) == page


def row(contender: str, seed: int, keep: float, before: float, after: float) -> dict:
    both = {"before": before, "after": after}
    found = {when: {"accuracy": value, "metrics": {"f1": value / 2}} for when, value in both.items()}
    return {"task": "glue/mrpc", "contender": contender, "seed": seed, "keep": keep, **found}


def test_tables_by_hand(load) -> None:
    tables = load("glue_tables")
    rows = [
        {"task": "glue/mrpc", "contender": "dense", "seed": 0, "test": {"accuracy": 0.8, "metrics": {"f1": 0.9}}},
        row("head-gradient", 0, 0.4, 0.70, 0.76),
        row("head-gradient", 1, 0.4, 0.72, 0.76),
        row("gate-ggn, joint", 0, 0.4, 0.76, 0.77),
        row("gate-ggn, joint", 1, 0.4, 0.78, 0.78),
        row("gate-ggn, joint", 0, 0.8, 0.79, 0.79),
    ]
    accuracy = tables.outcomes(rows, "glue/mrpc", "accuracy").splitlines()
    assert accuracy[0] == "|  | 80 % kept | 40 % kept | seeds |"
    assert accuracy[2:4] == ["| dense | 80.0 | 80.0 |  |", "| head-gradient |  | 71.0 ± 1.4 → 76.0 ± 0.0 | 0-2 |"]
    assert "| gate-ggn, joint | 39.5 → 39.5 | 38.5 ± 0.7 → 38.8 ± 0.4 | 1-2 |" in tables.outcomes(
        rows, "glue/mrpc", "f1"
    )
    assert "| glue/mrpc | gate-ggn, joint − head-gradient | 6.0 ± 0.0 | 1.5 ± 0.7 |" in tables.goals(rows)
