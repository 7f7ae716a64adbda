from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from hap.curvature import CRITERIA

WORKER = Path(__file__).with_name("distributed_worker.py")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What two processes found, together and alone."""
    folder = tmp_path_factory.mktemp("ranks")
    source = Path(sys.modules["hap"].__file__ or "").parent.parent
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, str(WORKER), str(r), "2", str(folder)], env=env) for r in range(2)]
    try:
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1)), name


def test_both_ranks_hold_the_same_bits(ranks):
    assert set(CRITERIA) - {"bn-scale"} < set(ranks[0]["together"])
    same(ranks[0]["together"], ranks[1]["together"])


def test_two_processes_find_what_one_does(ranks):
    for name, values in ranks[0]["one process"].items():
        torch.testing.assert_close(ranks[0]["together"][name], values, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)


def test_criteria_without_data_find_the_very_same(ranks):
    one, two = ranks[0]["one process"], ranks[0]["together"]
    for name in ("magnitude", "random"):
        assert torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1)), name


def test_a_model_wrapped_for_training_is_unwrapped(ranks):
    same(ranks[0]["wrapped"], ranks[0]["together"])
    same(ranks[1]["wrapped"], ranks[0]["together"])


def test_an_error_on_one_rank_ends_the_others(ranks):
    assert "measuring failed on rank 1 of 2" in ranks[0]["failed"]
    assert ranks[1]["failed"] == "division by zero"


def test_an_interrupted_run_goes_on_to_the_same_bits(ranks):
    assert "measuring failed on rank 1 of 2" in ranks[0]["interrupted"]
    assert set(ranks[0]["kept"]) | set(ranks[1]["kept"]) == {
        "gate-fisher.state.0-of-2",
        "gate-fisher.state.1-of-2",
    }
    same(ranks[0]["resumed"], ranks[0]["together"])
    same(ranks[1]["resumed"], ranks[0]["together"])


def test_all_ranks_go_on_from_the_chunk_that_the_furthest_had_saved(ranks):
    for found in (ranks[0]["chunks"], ranks[1]["chunks"]):
        assert found["saved"] == ["1", "0"]
        assert torch.equal(found["resumed"], found["undisturbed"])
    assert "measuring failed on rank 1" in ranks[0]["chunks"]["failed"]


def test_ranks_that_read_other_data_are_refused(ranks):
    for found in ranks:
        assert "the processes have read different data" in found["other data"]


def test_a_group_of_one_is_alone(ranks):
    same(ranks[0]["alone"], ranks[0]["one process"])
    assert not torch.equal(ranks[1]["alone"]["gate-fisher"], ranks[0]["alone"]["gate-fisher"])
    for found in ranks:
        assert "this process is not in the group" in found["stranger"]
