"""Several rounds end as one plan for the dense model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import hap
from hap import zoo
from hap.pipeline import Training, run
from hap.pipeline.rounds import joined, schedule


def test_each_round_keeps_the_same_share() -> None:
    budgets = schedule(hap.Budget(params=0.343, macs=0.5), 3)
    assert [b.params for b in budgets] == pytest.approx([0.7, 0.49, 0.343])
    assert budgets[-1].macs == pytest.approx(0.5) and budgets[0].latency is None


@pytest.mark.parametrize("mode", ["paper", "optimal"])
def test_one_plan_for_the_dense_model(model: nn.Module, data: zoo.DataSplits, tmp_path: Path, mode: str) -> None:
    out, budget = tmp_path / "run", hap.Budget(params=0.4)
    options = {"implant_ratio": 0.3, "minimum": {"*": 0.25}, "samples": 128}
    done = run(model, data, budget, out, iterations=3, training=Training(epochs=1), mode=mode, **options)
    plan = done.result.plan
    assert plan.budget == budget and plan.structure == done.result.structure
    assert 0.398 <= plan.small.params / plan.dense.params <= 0.4
    assert all(len(d.keep) >= 0.25 * (len(d.keep) + len(d.prune)) for d in plan.decisions.values())
    costs = [found.cost.params / plan.dense.params for found in done.rounds]
    assert costs == pytest.approx([0.4 ** (n / 3) for n in (1, 2, 3)], rel=0.02)
    report = json.loads((out / "report.json").read_text())
    assert len(report["rounds"]) == 3 and report["options"]["iterations"] == 3
    small, again = hap.load(out, model)
    assert again == plan
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(small.eval()(x), done.result.model.eval()(x))


def test_each_round_reads_the_names(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    """Also where they come in an iterator."""
    names = {"protect": iter(["conv1"]), "ignore": (name for name in ["linear"]), "units": iter(["channel"])}
    options = {"implant_ratio": 0, "samples": 64, "training": Training(epochs=0), "recover": "none"}
    done = run(model, data, hap.Budget(params=0.6), tmp_path / "run", iterations=3, **names, **options)
    decisions = done.result.plan.decisions
    assert not decisions["conv1"].prune and sum(len(d.prune) for d in decisions.values()) > 0


def test_implants_come_in_the_last_round(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    done = run(
        model, data, hap.Budget(macs=0.5), tmp_path / "run", iterations=2, training=Training(epochs=0),
        implant_ratio=0.5, samples=64,
    )  # fmt: skip
    assert done.result.plan.implants and done.result.plan.options["implant_ratio"] == 0.5


def test_the_time_of_all_rounds_is_a_share_of_the_dense_model_s() -> None:
    """Each round's clock ran against the model that this round was given."""
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    whole = None
    for limit, ratio in ((0.7, 0.9), (0.6, 0.8), (0.5, 0.75)):
        structure = hap.trace(model, (torch.rand(2, 6),))
        sensitivity = hap.measure(model, None, None, structure, criterion="magnitude")
        plan = hap.decide(structure, sensitivity, hap.Budget(params=0.9), implant_ratio=0)
        plan = dataclasses.replace(plan, options={**plan.options, "latency_measured": ratio})
        model, whole = hap.apply(model, plan), joined(whole, plan, hap.Budget(latency=limit), 3)
    assert whole is not None and whole.options["latency_measured"] == pytest.approx(0.9 * 0.8 * 0.75)


def test_no_rounds_at_all_are_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    with pytest.raises(hap.HapError, match="iterations is out of range"):
        run(model, data, hap.Budget(params=0.5), tmp_path / "run", iterations=0)
    assert not list(tmp_path.iterdir())
