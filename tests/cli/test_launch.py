"""How the verbs find out who has started them, and where their numbers go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hap.cli import launch
from hap.errors import HapError

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WORLD_SIZE", *launch.LAUNCHER, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_needs_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.accelerator(CPU) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launch.accelerator(CPU) is None


def test_mixed_precision_of_one_process_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --mixed_precision bf16 --num_processes 1` says so in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch.accelerator(CPU).mixed_precision == "bf16"


def test_several_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(HapError, match="no launcher") as caught:
        launch.accelerator(CPU)
    assert caught.value.got == "no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"


def test_weights_and_biases_is_told_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's tracker for it asks at every call which process this is."""
    told: list[Any] = []
    run = SimpleNamespace(log=lambda values, step=None, **_: told.append((step, values)), finish=lambda: None)
    config = SimpleNamespace(update=lambda values, **_: told.append(values))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, config=config))
    with launch.tracking("wandb", tmp_path / "run", {"out": tmp_path}) as log:
        assert log is not None
        log({"train/loss": 1.0}, 50)
    assert told == [{"out": str(tmp_path)}, (50, {"train/loss": 1.0})]


def test_mlflow_writes_where_its_own_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for artifacts would have to be text, and is none of ours to choose."""
    told: list[Any] = []
    mlflow = SimpleNamespace(
        search_experiments=lambda **_: [],
        create_experiment=lambda **given: told.append(given),
        start_run=lambda **given: told.append(given["run_name"]),
        set_experiment=lambda **_: None,
        log_params=lambda values: told.append(values),
        log_metrics=lambda values, step: told.append((step, values)),
        end_run=lambda: told.append("end"),
        utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with launch.tracking("mlflow", tmp_path / "run", {"seed": 0}) as log:
        assert log is not None
        log({"train/loss": 1.0}, 50)
    first, *rest = told
    assert first["name"] == "hap" and first["artifact_location"] is None
    assert rest == ["run", {"seed": 0}, (50, {"train/loss": 1.0}), "end"]


@pytest.mark.parametrize(("name", "remedy"), [("wandb", "pip install wandb"), ("tensorboard", r"torch-hap\[log\]")])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HapError, match=remedy), launch.tracking(name, tmp_path / "run", {}):
        pass
