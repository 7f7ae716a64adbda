from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hap
from hap.pipeline.together import by_the_first, is_first

SOURCE = Path(hap.__file__).parents[1]
WORKER = Path(__file__).with_name("together_worker.py")


def launch(out: Path, *arguments: str, count: int) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [sys.executable, *(torchrun if count > 1 else []), str(WORKER), str(out), *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_alone_this_process_is_the_first() -> None:
    assert is_first() and by_the_first(lambda: 3) == 3


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    both = launch(tmp_path / "both", count=2)
    assert both.returncode == 0, both.stderr[-3000:]
    first, second = (read(tmp_path / "both" / f"{rank}.json") for rank in range(2))
    assert first == second  # the weights, the plan and even the times
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"run", "0.json", "1.json"}
    report = read(tmp_path / "both" / "run" / "report.json")
    assert report["comparison"]["accuracy"]["small"] == first["accuracy"][0]
    alone = launch(tmp_path / "one", count=1)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert read(tmp_path / "one" / "alone.json")["plan"]["decisions"] == first["plan"]["decisions"]


@pytest.mark.slow
def test_the_first_process_alone_decides_by_the_clock(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    both = launch(tmp_path / "both", "clock", count=2)
    assert both.returncode == 0, both.stderr[-3000:]
    first, second = (read(tmp_path / "both" / f"{rank}.json") for rank in range(2))
    assert first["plan"] == second["plan"] and first["plan"]["options"]["latency_measured"] > 0


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    start = time.monotonic()
    failed = launch(tmp_path / "both", "fail", count=2)
    assert failed.returncode != 0 and "told to fail" in failed.stderr
    assert time.monotonic() - start < 200
    assert not list((tmp_path / "both").iterdir())
