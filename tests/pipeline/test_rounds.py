"""Several rounds end as one plan for the dense model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap import zoo
from hap.pipeline import Training, run
from hap.pipeline.rounds import in_rounds, joined, schedule
from hap.planning import compose


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
        model, whole = hap.apply(model, plan), joined(whole, plan, hap.Budget(latency=limit), 3, {})
    assert whole is not None and whole.options["latency_measured"] == pytest.approx(0.9 * 0.8 * 0.75)


def test_no_rounds_at_all_are_refused(model: nn.Module, data: zoo.DataSplits, tmp_path: Path) -> None:
    with pytest.raises(hap.HapError, match="iterations is out of range"):
        run(model, data, hap.Budget(params=0.5), tmp_path / "run", iterations=0)
    assert not list(tmp_path.iterdir())


def tiny_bert(hidden: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=40
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    tokens = torch.arange(16 * 7).view(16, 7) * 11 % 38 + 2
    return model, [{"input_ids": tokens, "labels": torch.arange(16) % 2}]


def rounds_of_heads(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], share: float, times: int, **settings: Any
) -> hap.Result:
    def cut(dense: nn.Module, part: hap.Budget, **more: Any) -> hap.Result:
        options = {"criterion": "magnitude", "mode": "paper", "implant_ratio": 0.0, **settings, **more}
        return hap.prune(dense, batches, None, part, **options)

    result, _ = in_rounds(model, hap.Budget(heads=share), times, cut, lambda *_: None, implant_ratio=0.0)
    return result


def test_a_head_that_is_alone_in_its_layer_counts() -> None:
    """Traced anew it is no unit any more; the budget is of all heads, and is met by the others."""
    model, batches = tiny_bert(32)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.dense.weight *= 0.01  # these leave first
        model.bert.encoder.layer[1].attention.self.value.weight *= 0.01
    result = rounds_of_heads(model, batches, 0.375, 3)
    kept = [len(d.keep) for name, d in result.plan.decisions.items() if result.structure.family(name).kind == "head"]
    assert kept == [2, 1]
    masks = {f.name: torch.tensor([u in d.prune for u in range(f.size)]).numpy() for f, d in zip(
        result.structure.families, result.plan.decisions.values(), strict=True
    )}  # fmt: skip
    assert (
        hap.CostModel(result.structure)(masks, {}).heads == result.plan.small.heads == 0.375 * result.plan.dense.heads
    )
    with pytest.raises(hap.HapError, match="every layer keeps a head"):
        rounds_of_heads(model, batches, 0.2, 3)


@pytest.mark.parametrize("hidden", [32, 48])
def test_layers_that_had_as_many_heads_for_a_while(hidden: int, tmp_path: Path) -> None:
    """The configuration followed the first round; what is written is the dense model's, also after the second."""
    model, batches = tiny_bert(hidden)
    first = hap.prune(
        model, batches, None, hap.Budget(heads=0.75), criterion="magnitude", mode="paper", implant_ratio=0.0,
        minimum={"*": 3},
    )  # fmt: skip
    assert first.model.config.num_attention_heads == 3
    second = hap.prune(
        first.model, batches, None, hap.Budget(heads=0.625), criterion="magnitude", mode="paper", implant_ratio=0.0,
        after=first.plan,
    )  # fmt: skip
    plan = compose(first.plan, second.plan)
    hap.save(second.model, plan, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_attention_heads"] == 4
    loaded, again = hap.load(tmp_path / "small")
    assert again == plan
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batches[0]).logits, second.model.eval()(**batches[0]).logits)


def test_attention_that_a_round_has_opened_gets_narrow_heads_in_the_next() -> None:
    """`nn.MultiheadAttention` is another class once it has lost heads; the plan is for the dense model's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0), nn.Linear(16, 3))
    model, x = model.eval(), torch.rand(8, 5, 16)
    batches = [(x, torch.zeros(8, 5, 3))]

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs - batch[1]).square().mean()

    def cut(dense: nn.Module, part: hap.Budget, **more: Any) -> hap.Result:
        options = {"implant_ratio": 0.6, "units": ["head"], **more}
        return hap.prune(dense, batches, loss, part, **options)

    result, _ = in_rounds(model, hap.Budget(heads=0.6), 2, cut, lambda *_: None, units=["head"])
    assert [name for name, _ in result.plan.narrowed.items()] == ["0.self_attn"]
    assert result.plan.options["units"] == ["head"]
    torch.testing.assert_close(hap.apply(model, result.plan, batches)(x).shape, result.model(x).shape)


@pytest.mark.parametrize("settings", [{}, {"units": ("head",)}])
def test_a_budget_that_an_earlier_round_has_met_is_no_more(settings: dict[str, Any]) -> None:
    """Of two heads in each layer one is left after the first round: in the second there are no units of the kind."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batches = tiny_bert(16)[1]
    options = {"criterion": "magnitude", "mode": "paper", "implant_ratio": 0.0, **settings}
    cut = lambda dense, part, **more: hap.prune(dense, batches, None, part, **{**options, **more})  # noqa: E731
    result, _ = in_rounds(model, hap.Budget(heads=0.5), 2, cut, lambda *_: None, **settings)
    assert result.plan.small.heads == result.plan.dense.heads / 2
    with pytest.raises(hap.HapError, match=r"heads kept >= 0\.5000"):
        in_rounds(model, hap.Budget(heads=0.3), 2, cut, lambda *_: None, **settings)


def test_the_widths_that_were_asked_for_are_on_record(model: nn.Module, data: zoo.DataSplits) -> None:
    asked = {"minimum": {"*": 0.25}, "implant_ratio": 0.0}

    def cut(dense: nn.Module, part: hap.Budget, **more: Any) -> hap.Result:
        return hap.prune(dense, data.calibration, None, part, criterion="magnitude", **{**asked, **more})

    result, _ = in_rounds(model, hap.Budget(params=0.6), 2, cut, lambda *_: None, **asked)
    assert result.plan.options["minimum"] == {"*": 0.25} and result.plan.options["maximum"] == {}


def test_what_can_be_reached_is_said_of_the_dense_model(model: nn.Module, data: zoo.DataSplits) -> None:
    """A later round finds out; what it can reach itself would mislead."""
    settings = {"minimum": {"*": 0.7}, "implant_ratio": 0.0}

    def cut(dense: nn.Module, part: hap.Budget, **more: Any) -> hap.Result:
        return hap.prune(dense, data.calibration, None, part, criterion="magnitude", **{**settings, **more})

    with pytest.raises(hap.HapError, match="cannot be reached") as once:
        cut(model, hap.Budget(params=0.3))
    with pytest.raises(hap.HapError, match="cannot be reached") as later:
        in_rounds(model, hap.Budget(params=0.3), 4, cut, lambda *_: None, **settings)
    found = [float(re.findall(r"params kept >= ([\d.]+)", str(error.value))[0]) for error in (once, later)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
