"""The tables of the documentation are the ones that the raw results give."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_criteria_table() -> None:
    benchmark = load(ROOT / "benchmarks" / "criteria.py")
    setting = {"model": "resnet20", "data": "CIFAR-10 (JPEG)", "keep_params": 0.5, "epochs": 1}
    rows = benchmark._read(ROOT / "benchmarks" / "results" / "criteria.jsonl", setting)
    assert len(rows) >= 6
    assert benchmark._table(rows) in (ROOT / "docs" / "results.md").read_text()


def test_sampling_table_and_promise() -> None:
    benchmark = load(ROOT / "benchmarks" / "sampling.py")
    rows = json.loads((ROOT / "benchmarks" / "results" / "sampling.json").read_text())["rows"]
    page = (ROOT / "docs" / "curvature.md").read_text()
    assert benchmark.filled(page, rows) == page
    for row in rows:
        wrong = [run["misplaced"] for run in benchmark.settled_runs(row)]
        assert len(wrong) >= 20 and sum(wrong) / len(wrong) < row["risk"]


def test_recovery_table() -> None:
    benchmark = load(ROOT / "benchmarks" / "recover.py")
    assert benchmark.table(benchmark.RESULTS) in (ROOT / "docs" / "results.md").read_text()


def test_recipe_tables() -> None:
    benchmark = load(ROOT / "benchmarks" / "recipes.py")
    page = (ROOT / "docs" / "results.md").read_text()
    for table in benchmark.tables(benchmark.read(benchmark.RESULTS)):
        assert table in page
