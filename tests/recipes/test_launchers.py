"""A recipe on two processes, started by the commands that users start theirs with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SRC = Path(__file__).parents[2] / "src"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launched(launcher: list[str], recipe: Path, out: Path) -> dict[str, torch.Tensor]:
    command = [*launcher, "-m", "hap", "run", str(recipe), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("run directory") == 1  # the first process alone speaks
    return load_file(out / "model.safetensors")


@pytest.mark.slow
def test_torchrun_and_accelerate_launch_do_the_same(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one, two = (launched(how, recipe_file, tmp_path / how[0]) for how in (TORCHRUN, ACCELERATE))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    plans = [(tmp_path / how[0] / "plan.json").read_text() for how in (TORCHRUN, ACCELERATE)]
    assert plans[0] == plans[1]
