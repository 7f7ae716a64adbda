"""`hap.prune`, on digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap import zoo


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


@pytest.mark.parametrize(
    "options", [{"protect": ["typo"]}, {"minimum": {"typo": 3}}, {"round_to": 0}, {"mode": "foo"}, {"units": ["x"]}]
)
def test_options_are_checked_before_anything_is_measured(
    model: nn.Module, data: zoo.DataSplits, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hap.pipeline.stages.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(hap.HapError, match="unknown|out of range"):
        hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=64, **options)


def test_a_loss_of_the_same_name_is_another_run(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    def weighted(weight: float) -> Any:
        weights = torch.tensor([weight] + [1.0] * 9)
        return lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1], weights)

    given = {"samples": 64, "criterion": "taylor", "state": tmp_path}
    hap.prune(model, data.calibration, weighted(1.0), hap.Budget(params=0.5), **given)
    hap.prune(model, data.calibration, weighted(1.0), hap.Budget(params=0.5), **given)
    with pytest.raises(hap.HapError, match="loss"):
        hap.prune(model, data.calibration, weighted(100.0), hap.Budget(params=0.5), **given)


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
    monkeypatch.setattr("hap.pipeline.stages.verify", lambda *_: failed)
    with pytest.raises(hap.HapError, match="does not compute what the plan promised"):
        hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=64)


def test_auto_measures_until_settled_at_the_budget(
    model: nn.Module, data: zoo.DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def noting(*args: Any, **options: Any) -> hap.Sensitivity:
        asked.update(options)
        return hap.measure(*args, **{**options, "risk": 0.5})

    monkeypatch.setattr("hap.pipeline.stages.measure", noting)
    result = hap.prune(model, data.calibration, None, hap.Budget(params=0.7, macs=0.6), samples="auto")
    assert (asked["samples"], asked["keep"], asked["cap"]) == ("auto", 0.6, 8192)
    assert result.sensitivity.samples == 128
    assert result.verification.ok


def test_pairs_are_measured_where_nothing_is_implanted_or_when_told(model: nn.Module, data: zoo.DataSplits) -> None:
    def pruned(**options: Any) -> Any:
        return hap.prune(model, data.calibration, None, hap.Budget(params=0.5), samples=128, **options)

    implanted, alone, told = pruned(), pruned(implant_ratio=0), pruned(joint=True)
    assert implanted.plan.predicted is not None and implanted.plan.implants and not alone.plan.implants
    for found, together in ((implanted, False), (alone, True), (told, True)):
        assert (found.sensitivity.gram is not None) == found.plan.options["joint"] == together
        assert found.verification.ok and 0.98 <= found.plan.small.params / found.plan.dense.params / 0.5 <= 1


def test_heads_are_chosen_together_with_implants_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Flatten(), nn.Linear(80, 3)).eval()
    x, fewer, smaller = torch.randn(64, 5, 6), hap.Budget(heads=0.5), hap.Budget(params=0.95)
    for budget, units, together in ((fewer, None, True), (smaller, ["head"], True), (smaller, None, False)):
        result = hap.prune(model, [(x, torch.arange(64) % 3)], None, budget, units=units)
        assert result.plan.options["joint"] == together


def test_other_criteria_choose_one_by_one(model: nn.Module, data: zoo.DataSplits) -> None:
    budget = hap.Budget(params=0.5)
    result = hap.prune(model, data.calibration, None, budget, mode="optimal", criterion="magnitude", implant_ratio=0)
    assert not result.plan.options["joint"]
    with pytest.raises(hap.HapError, match="knows nothing of pairs"):
        hap.prune(model, data.calibration, None, budget, mode="optimal", criterion="magnitude", joint=True)


def test_a_latency_budget(
    model: nn.Module, data: zoo.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are timed here, and the times kept; the whole model is timed at the end, here by a constant clock."""
    monkeypatch.setattr("hap.pipeline.stages.clock", lambda *_: lambda plan: 0.8)
    cache = tmp_path / "latency.json"
    budget = hap.Budget(latency=0.8)
    result = hap.prune(model, data.calibration, None, budget, samples=64, latency_batch=100, latency_cache=cache)
    assert cache.exists() and result.verification.ok
    assert 0 < result.plan.small.latency <= 0.8 * result.plan.dense.latency
    again = hap.prune(model, data.calibration, None, budget, samples=64, latency_batch=100, latency_cache=cache)
    assert again.plan == result.plan
    assert result.plan.options["latency_measured"] == 0.8 and result.plan.budget == budget
    with pytest.raises(hap.HapError, match="latency_batch is out of range"):
        hap.prune(model, data.calibration, None, budget, latency_batch=0)


def test_a_budget_can_be_of_another_model(model: nn.Module, data: zoo.DataSplits) -> None:
    first = hap.prune(model, data.calibration, None, hap.Budget(params=0.7), samples=64, implant_ratio=0)
    second = hap.prune(first.model, data.calibration, None, hap.Budget(params=0.5), samples=64, after=first.plan)
    assert 0.495 <= second.plan.small.params / first.plan.dense.params <= 0.5


def test_a_budget_of_latency_can_be_of_another_model(
    model: nn.Module, data: zoo.DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the clock said of it: two tables may be of a quiet and of a busy machine."""
    settings = {"samples": 64, "implant_ratio": 0, "criterion": "magnitude"}
    monkeypatch.setattr("hap.pipeline.stages.clock", lambda *_: lambda plan: 0.8)
    first = hap.prune(model, data.calibration, None, hap.Budget(params=0.7, latency=1.0), **settings)
    seen = []

    def noted(decide: Any, limits: hap.Budget, measured: Any) -> hap.Plan:
        seen.append(limits)
        return decide(limits)

    monkeypatch.setattr("hap.pipeline.stages.by_the_clock", noted)
    hap.prune(first.model, data.calibration, None, hap.Budget(params=0.6, latency=0.9), after=first.plan, **settings)
    assert seen[0].latency == pytest.approx(0.9 / 0.8)
    first = hap.prune(model, data.calibration, None, hap.Budget(params=0.7), **settings)
    with pytest.raises(hap.HapError, match="nothing says how much faster"):
        hap.prune(first.model, data.calibration, None, hap.Budget(latency=0.6), after=first.plan, **settings)


def test_a_budget_of_what_is_not_there_is_refused_before_anything_is_measured(
    model: nn.Module, data: zoo.DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hap.pipeline.stages.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(hap.HapError, match="no attention heads"):
        hap.prune(model, data.calibration, None, hap.Budget(heads=0.5))


@pytest.mark.parametrize("joint", ["auto", False])
def test_a_model_without_units_gets_implants(joint: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12))
    x = torch.randn(256, 4) @ torch.randn(4, 48)  # of rank 4: as many filters can stand for all
    result = hap.prune(model, [(x, torch.arange(256) % 12)], None, hap.Budget(params=0.6), joint=joint)
    assert not result.structure.families and result.plan.implants and result.verification.ok
    assert result.plan.small.params <= 0.6 * result.plan.dense.params
