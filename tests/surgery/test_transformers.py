"""What users do with a transformer after its heads are pruned."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hap
from hap.planning import CostModel, Decision, Implant, Plan
from hap.surgery import dense_config
from hap.types import Structure

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
TOKENS = torch.arange(2, 16).view(2, 7)


def build(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | options)
        head = "ForCausalLM" if name == "Llama" else "ForSequenceClassification"
        return getattr(transformers, name + head)(config).eval()


def without(structure: Structure, lost: Callable[[str], tuple[int, ...]]) -> Plan:
    """The plan that removes the heads `lost` gives for each family of heads."""
    decisions, masks = {}, {}
    for family in structure.families:
        gone = lost(family.name) if family.kind == "head" else ()
        decisions[family.name] = Decision(tuple(i for i in range(family.size) if i not in gone), gone)
        masks[family.name] = np.isin(np.arange(family.size), gone)
    cost = CostModel(structure)
    return Plan(structure, decisions, {}, hap.Budget(params=1.0), "by hand", cost.dense, cost(masks, {}))


@pytest.fixture
def bert() -> nn.Module:
    return build("Bert")


@pytest.fixture
def half(bert: nn.Module) -> Plan:
    structure = hap.trace(bert, (), {"input_ids": TOKENS})
    return without(structure, lambda name: (0, 3) if "layer.0" in name else (1, 2))


def test_numbers_agree_with_the_tensors(bert: nn.Module, half: Plan) -> None:
    small = hap.apply(bert, half)
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (2, 4, 8)
        assert repr(attention.query) == "Linear(in_features=16, out_features=8, bias=True)"
    assert small.config.num_attention_heads == 2
    assert bert.config.num_attention_heads == 4 and bert.bert.encoder.layer[0].attention.self.num_attention_heads == 4


def test_the_configuration_stays_where_layers_differ(bert: nn.Module) -> None:
    structure = hap.trace(bert, (), {"input_ids": TOKENS})
    small = hap.apply(bert, without(structure, lambda name: (0,) if "layer.0" in name else (1, 2)))
    assert [layer.attention.self.num_attention_heads for layer in small.bert.encoder.layer] == [3, 2]
    assert small.config.num_attention_heads == 4


def test_the_configuration_stays_where_a_layer_has_heads_that_stay(bert: nn.Module) -> None:
    structure = hap.trace(bert, (), {"input_ids": TOKENS}, ignore=["*.layer.1.attention"])
    small = hap.apply(bert, without(structure, lambda name: (0, 1)))
    assert [layer.attention.self.num_attention_heads for layer in small.bert.encoder.layer] == [2, 4]
    assert small.config.num_attention_heads == 4


def test_groups_of_query_heads_leave_with_their_key_head() -> None:
    model = build("Llama", num_key_value_heads=2, use_cache=False)
    structure = hap.trace(model, (), {"input_ids": TOKENS})
    plan = without(structure, lambda name: (1,))
    small = hap.apply(model, plan)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert hap.verify(model, small, plan, (), {"input_ids": TOKENS}).ok


def test_an_error_leaves_numbers_and_tensors(bert: nn.Module, half: Plan, monkeypatch) -> None:
    before = copy.deepcopy(bert)
    steps = iter([None])  # one replacement works, the next does not
    monkeypatch.setattr(sys.modules["hap.surgery.apply"], "_replace", lambda *_: next(steps))
    with pytest.raises(StopIteration):
        hap.apply_(bert, half)
    assert bert.config.num_attention_heads == 4
    assert all(torch.equal(a, b) for a, b in zip(bert.parameters(), before.parameters(), strict=True))
    assert bert.bert.encoder.layer[0].attention.self.all_head_size == 16


def test_saved_and_loaded_alone(bert: nn.Module, half: Plan, tmp_path) -> None:
    small = hap.apply(bert, half)
    hap.save(small, half, tmp_path / "run")
    assert small.config.num_attention_heads == 2
    again, _ = hap.load(tmp_path / "run")
    assert again.config.num_attention_heads == 2
    with torch.no_grad():
        assert torch.equal(small(TOKENS).logits, again(TOKENS).logits)


def test_trains_copies_casts_and_compiles(bert: nn.Module, half: Plan) -> None:
    calls: list[int] = []
    bert.bert.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    bert.bert.embeddings.requires_grad_(False)
    small = hap.apply(bert, half)
    want = small(TOKENS).logits
    assert calls  # hooks survive
    assert not any(p.requires_grad for p in small.bert.embeddings.parameters())
    assert torch.equal(copy.deepcopy(small)(TOKENS).logits, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(small(TOKENS).logits.float(), want, atol=0.05)
    compiled = torch.compile(small, backend="aot_eager")
    assert torch.allclose(compiled(TOKENS).logits, want, atol=1e-5)
    small.train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = small(TOKENS, labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert small.bfloat16()(TOKENS).logits.dtype == torch.bfloat16


def test_torch_attention_is_a_narrow_one() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    plan = without(hap.trace(model, (x,)), lambda name: (2,))
    small = hap.apply(model, plan)
    attention = small.layers[0].self_attn
    assert repr(attention).startswith("OpenAttention") and "num_heads=3" in repr(attention)
    assert attention.in_proj_weight.shape == (27, 12) and attention.out_proj.in_features == 9
    assert hap.verify(model, small, plan, (x,)).ok
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        assert small(x, src_key_padding_mask=padding).isfinite().all()


@pytest.mark.parametrize("part", ["linear1", "linear2", "self_attn.out_proj"])
def test_a_torch_encoder_with_an_implant_runs_as_any_other(part: str, tmp_path) -> None:
    """PyTorch's fused kernel would read the weights of the layer that the implant is in."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    structure = hap.trace(model, (x,))
    name = f"layers.0.{part}"
    decisions = {family.name: Decision(tuple(range(family.size)), ()) for family in structure.families}
    implants = {name: Implant(tuple(range(structure.layer(name).filters)), "low-rank", 2)}
    cost = CostModel(structure)
    plan = Plan(structure, decisions, implants, hap.Budget(params=1.0), "by hand", cost.dense, cost({}, implants))
    small = hap.apply(model, plan)
    assert hap.verify(model, small, plan, (x,)).ok
    hap.save(small, plan, tmp_path / "run")
    want = small(x).detach()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    padded = small(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        for found in (small, copy.deepcopy(small), hap.load(tmp_path / "run", model)[0]):
            torch.testing.assert_close(found(x), want)
            torch.testing.assert_close(found(x, src_key_padding_mask=padding), padded)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), want)


def test_dense_numbers_come_from_the_structure(bert: nn.Module) -> None:
    """Also where rounds of pruning left the configuration behind."""
    structure = hap.trace(bert, (), {"input_ids": TOKENS})
    small = hap.apply(bert, without(structure, lambda name: (0, 1)))
    small.config.num_attention_heads = 4  # as a first round that was not uniform would leave it
    with dense_config(small, without(structure, lambda name: (0, 1))):
        assert small.config.num_attention_heads == 4
    llama = build("Llama", num_key_value_heads=2, use_cache=False)
    plan = without(hap.trace(llama, (), {"input_ids": TOKENS}), lambda name: (1,))
    with dense_config(small := hap.apply(llama, plan), plan):
        assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
