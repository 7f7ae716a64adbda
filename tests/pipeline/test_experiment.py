"""The whole experiment, on digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
