"""`hap.prune` and the whole experiment, on digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap import zoo
from hap.pipeline import Training, run


@pytest.fixture(scope="module")
def data() -> zoo.DataSplits:
    return zoo.load_data("digits", batch_size=64)


@pytest.fixture(scope="module")
def model(data: zoo.DataSplits) -> nn.Module:
    trained = zoo.build("digits-cnn")
    hap.finetune(trained, data.train, epochs=4, lr=0.05)
    return trained


@pytest.mark.parametrize("budget", [hap.Budget(params=0.5), hap.Budget(macs=0.5), hap.Budget(params=0.6, macs=0.5)])
def test_prune_lands_within_one_percent(model: nn.Module, data: zoo.DataSplits, budget: hap.Budget) -> None:
    result = hap.prune(model, data.calibration, None, budget, samples=128)
    dense, small = result.plan.dense, result.plan.small
    used = [
        kept / total / limit
        for kept, total, limit in ((small.params, dense.params, budget.params), (small.macs, dense.macs, budget.macs))
        if limit is not None
    ]
    assert 0.99 <= max(used) <= 1.0
    assert result.verification.ok


def test_prune_leaves_the_model_alone(model: nn.Module, data: zoo.DataSplits) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]


def test_prune_is_deterministic(model: nn.Module, data: zoo.DataSplits) -> None:
    one, two = (hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=128, seed=7) for _ in range(2))
    assert one.plan == two.plan
    states = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_data_can_be_a_generator(model: nn.Module, data: zoo.DataSplits) -> None:
    """The calibration examples are read once."""
    result = hap.prune(model, (b for b in data.calibration), None, hap.Budget(params=0.5), samples=100)
    assert result.sensitivity.samples == 100


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no data"),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], "cannot|could not"),
        ([(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64))], "not finite"),
        ([torch.zeros(4, 1, 8, 8)], "not a batch"),
        ([(torch.zeros(4, 1, 8, 8), torch.full((4,), 10))], "out of range"),
    ],
)
def test_bad_data_is_refused(model: nn.Module, batches: list[Any], message: str) -> None:
    with pytest.raises(hap.HapError, match=message):
        hap.prune(model, batches, None, hap.Budget(params=0.5), criterion="taylor")


def test_a_wrong_result_is_refused(model: nn.Module, data: zoo.DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prune` returns nothing that it could not verify."""
    failed = hap.Verification(ok=False, max_relative_error=0.1, params=1, promised_params=1)
    monkeypatch.setattr("hap.pipeline.verify", lambda *_: failed)
    with pytest.raises(hap.HapError, match="does not compute what the plan promised"):
        hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=64)


def test_run_writes_a_directory_that_loads(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(model, data, hap.Budget(params=0.5), out, training=Training(epochs=1), samples=128)
    names = {"README.md", "model.safetensors", "plan.json", "report.json", "sensitivity.png", "widths.png"}
    assert {path.name for path in out.iterdir()} == names
    loaded, plan = hap.load(out, model)
    assert plan == done.result.plan
    accuracy = hap.evaluate(loaded, data.test).accuracy
    report = json.loads((out / "report.json").read_text())
    assert report["comparison"]["accuracy"]["small"] == accuracy
    assert report["comparison"]["params"]["small"] == sum(p.numel() for p in loaded.parameters())
    assert report["comparison"]["bytes"]["small"] == (out / "model.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert f"{plan.small.params:,}" in card and f"{100 * accuracy:.2f} %" in card


@pytest.mark.parametrize("recover", ["refit", "none"])
def test_run_recovers_as_told(model: nn.Module, data: zoo.DataSplits, tmp_path: Path, recover: Any) -> None:
    """The closed form brings back most of what the cut lost; without anything it stays lost."""
    no_training = Training(epochs=0)
    done = run(model, data, hap.Budget(params=0.4), tmp_path / "run", recover=recover, training=no_training)
    assert done.as_cut.accuracy is not None
    assert done.as_cut.accuracy > 0.85 if recover == "refit" else done.as_cut.accuracy < 0.75
    assert json.loads((tmp_path / "run" / "report.json").read_text())["options"]["recover"] == recover


def test_run_refuses_an_existing_directory_before_any_work(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr("hap.pipeline.prune", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(hap.HapError, match="exists already"):
        run(model, data, hap.Budget(params=0.5), tmp_path)


def test_an_interrupt_leaves_nothing(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the last file is written: no run directory, no temporary one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hap.pipeline.width_plot", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, hap.Budget(params=0.5), tmp_path / "run", training=Training(epochs=0), samples=64)
    assert list(tmp_path.iterdir()) == []


def test_auto_measures_until_settled_at_the_budget(
    model: nn.Module, data: zoo.DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def noting(*args: Any, **options: Any) -> hap.Sensitivity:
        asked.update(options)
        return hap.measure(*args, **{**options, "risk": 0.5})

    monkeypatch.setattr("hap.pipeline.measure", noting)
    result = hap.prune(model, data.calibration, None, hap.Budget(params=0.7, macs=0.6), samples="auto")
    assert (asked["samples"], asked["keep"], asked["cap"]) == ("auto", 0.6, 8192)
    assert result.sensitivity.samples == 128
    assert result.verification.ok
