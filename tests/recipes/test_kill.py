"""Real processes, really killed at some stage, go on when they are started again, with the same result."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SRC = Path(__file__).parents[2] / "src"
Processes = list[subprocess.Popen[bytes]]


def start(recipe: Path, out: Path, ranks: int) -> Processes:
    """The command, as one process or as torchrun starts several; without torchrun they can all be killed at once."""
    command = [sys.executable, "-m", "hap", "run", str(recipe), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            command,
            env=environment if ranks == 1 else {**environment, **rendezvous, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=pipe,
            stderr=pipe,
        )
        for n in range(ranks)
    ]


def finish(processes: Processes) -> None:
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors.decode()
    assert [b"this test" in output for output, _ in outputs] == [True] + [False] * (len(processes) - 1)


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(
    request: pytest.FixtureRequest, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The number of processes, and the run directory."""
    if request.param > 1:
        pytest.importorskip("accelerate")
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(recipe_file, out, request.param))
    return request.param, out


@pytest.mark.slow
@pytest.mark.parametrize(
    "seen", ["recipe.json", "dense", "round1/plan.json", "round1/recovered.*", "round1/finetune.*"]
)
def test_killed_and_resumed(recipe_file: Path, undisturbed: tuple[int, Path], tmp_path: Path, seen: str) -> None:
    """Killed as soon as a file is there, which is in the middle of what comes next."""
    ranks, whole = undisturbed
    out = tmp_path / "run"
    processes = start(recipe_file, out, ranks)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(f"run.work/{seen}")) and processes[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert {process.returncode for process in processes} == {-signal.SIGKILL} and not out.exists()
    finish(start(recipe_file, out, ranks))
    for name in ("model.safetensors", "dense/model.safetensors"):
        one, two = load_file(whole / name), load_file(out / name)
        assert one.keys() == two.keys() and all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert (out / "plan.json").read_text() == (whole / "plan.json").read_text()
    assert not (tmp_path / "run.work").exists()
