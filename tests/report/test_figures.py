from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hap.errors import HapError
from hap.planning.plan import Plan
from hap.report import width_plot


def test_a_missing_matplotlib_is_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HapError, match=r"(?s)plots need the package 'matplotlib'.*pip install 'torch-hap\[report\]'"):
        width_plot(plan, tmp_path / "widths.png")


def test_matplotlib_is_imported_only_to_plot() -> None:
    code = "import sys, hap.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
