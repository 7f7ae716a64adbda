"""The page on criteria names them all, and its Python blocks run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hap.curvature import CRITERIA
from hap.planning import Plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "criteria.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_table_names_every_criterion() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(name for name, c in CRITERIA.items() if c.__module__.startswith("hap."))


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    module = ModuleType("criteria_page")
    monkeypatch.setitem(sys.modules, "criteria_page", module)
    monkeypatch.chdir(tmp_path)
    before = dict(CRITERIA)
    try:
        for block in blocks:
            exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], str(PAGE), "exec"), vars(module))
    finally:
        CRITERIA.clear()
        CRITERIA.update(before)
    assert isinstance(module.plan, Plan)
    assert module.plan.criterion == "bias"
