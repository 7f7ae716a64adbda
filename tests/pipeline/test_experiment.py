"""The whole experiment, on digits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap import zoo
from hap.pipeline import Training, run


def test_run_writes_a_directory_that_loads(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(model, data, hap.Budget(params=0.5), out, training=Training(epochs=1), samples=128)
    names = {"README.md", "model.safetensors", "plan.json", "report.json", "sensitivity.png", "widths.png"}
    assert {path.name for path in out.iterdir()} == names
    loaded, plan = hap.load(out, model)
    assert plan == done.result.plan
    accuracy = hap.evaluate(loaded, data.test).accuracy
    report = json.loads((out / "report.json").read_text())
    assert report["options"]["recover"] == "refit"
    assert report["comparison"]["accuracy"]["small"] == accuracy
    assert report["comparison"]["params"]["small"] == sum(p.numel() for p in loaded.parameters())
    assert report["comparison"]["bytes"]["small"] == (out / "model.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert f"{plan.small.params:,}" in card and f"{100 * accuracy:.2f} %" in card


@pytest.mark.parametrize("recover", ["refit", "none"])
def test_run_recovers_as_told(model: nn.Module, data: zoo.DataSplits, tmp_path: Path, recover: Any) -> None:
    """The closed form brings back most of what the cut lost; without anything it stays lost."""
    options: Any = {"recover": recover, "training": Training(epochs=0), "mode": "paper"}
    done = run(model, data, hap.Budget(params=0.4), tmp_path / "run", **options)
    assert done.as_cut.accuracy is not None
    assert done.as_cut.accuracy > 0.85 if recover == "refit" else done.as_cut.accuracy < 0.75
    assert json.loads((tmp_path / "run" / "report.json").read_text())["options"]["recover"] == recover


def test_one_count_of_steps_over_all_stages(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    """Weights & Biases drops what comes with a smaller step than before."""
    told: list[tuple[int, set[str]]] = []
    options: Any = {"training": Training(epochs=1), "iterations": 2, "implant_ratio": 0.0, "samples": 64}
    log = lambda values, step: told.append((step, set(values)))  # noqa: E731
    run(model, data, hap.Budget(params=0.5), tmp_path / "run", log=log, **options)
    steps, names = [step for step, _ in told], [name for _, name in told]
    assert steps == sorted(steps) and steps[0] == 0
    assert steps[-1] == 2 * len(data.train) and "test/accuracy" in names[-1]
    second = next(step for step, found in told if "round2/validation/loss" in found)
    assert second == len(data.train)


def test_run_refuses_an_existing_directory_before_any_work(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr("hap.pipeline.experiment.prune", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(hap.HapError, match="exists already"):
        run(model, data, hap.Budget(params=0.5), tmp_path)


def test_an_interrupt_leaves_nothing(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the last file is written: no run directory, no temporary one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hap.pipeline.record.width_plot", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, hap.Budget(params=0.5), tmp_path / "run", training=Training(epochs=0), samples=64)
    assert list(tmp_path.iterdir()) == []


QUICK: dict[str, Any] = {"recover": "none", "training": Training(epochs=0), "mode": "paper", "samples": 64}


def test_without_matplotlib_only_the_plots_miss(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    run(model, data, hap.Budget(params=0.7), tmp_path / "run", **QUICK)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "README.md", "model.safetensors", "plan.json", "report.json",
    }  # fmt: skip


def test_errors_that_are_not_known_are_null(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    """One batch tells nothing of how much a score varies."""
    run(model, data, hap.Budget(params=0.7), tmp_path / "run", criterion="taylor", **QUICK)
    measured = json.loads((tmp_path / "run" / "report.json").read_text())["sensitivity"]
    assert measured["conv1"]["stderr"] == [None] * len(measured["conv1"]["scores"])


def test_the_last_weights_are_kept_unless_told(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    worse = {"epochs": 1, "lr": 0.5}  # than what the refit gives
    for select, chosen in (("last", 1), ("best", 0)):
        training = Training(**worse, **({} if select == "last" else {"select": select}))
        done = run(model, data, hap.Budget(params=0.7), tmp_path / select, training=training, samples=64)
        assert done.history.chosen == chosen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"zeros": lambda outputs, labels: 0.0}}, "unknown metric 'zeros'"),
        ({"validation": [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))]}, "a label is out of range"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_any_work(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr("hap.pipeline.experiment.prune", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(hap.HapError, match=message):
        run(model, dataclasses.replace(data, **change), hap.Budget(params=0.7), tmp_path / "run")


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hap.pipeline.experiment.prune", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(hap.HapError, match="could not write"):
        run(model, data, hap.Budget(params=0.7), tmp_path / "file" / "deep" / "run")
