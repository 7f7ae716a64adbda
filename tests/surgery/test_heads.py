"""Narrow heads in real models: what they compute, what they cost, and what users do with them afterwards."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hap
from hap.errors import HapError
from hap.implants import HEAD, VALUES, heads_of
from hap.planning import CostModel, Decision, Implant, Plan
from hap.types import Structure

Inputs = dict[str, torch.Tensor]
LENGTHS = torch.arange(16) % 5 + 3


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


def bert() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    tokens = torch.arange(16 * 7).view(16, 7) * 11 % 38 + 2
    mask = (torch.arange(7) < LENGTHS[:, None]).long()
    model = seeded(lambda: transformers.BertForSequenceClassification(config))
    return model, {"input_ids": tokens, "attention_mask": mask}


def gpt() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=40, use_cache=False, initializer_range=0.3
    )
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    return model, {"input_ids": torch.arange(16 * 7).view(16, 7) * 11 % 38 + 2}


def vit() -> tuple[nn.Module, Inputs]:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = seeded(lambda: timm.models.VisionTransformer(**options))
    return model, {"x": torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def torch_encoder(*, batch_first: bool = True) -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(32, 4, 20, batch_first=batch_first)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    shape = (16, 7, 32) if batch_first else (7, 16, 32)
    padding = torch.arange(7) >= LENGTHS[:, None]
    return model, {
        "src": torch.randn(*shape, generator=torch.Generator().manual_seed(0)),
        "src_key_padding_mask": torch.zeros(16, 7).masked_fill(padding, -torch.inf),
    }


MODELS = {
    "bert": bert,
    "gpt": gpt,
    "vit": vit,
    "torch": torch_encoder,
    "torch, tokens first": lambda: torch_encoder(batch_first=False),
}


@functools.cache
def traced(name: str) -> tuple[nn.Module, Inputs, Structure]:
    """A model that no test changes, its inputs and its structure."""
    model, inputs = MODELS[name]()
    return model, inputs, hap.trace(model, (), inputs)


def planned(
    structure: Structure, narrow: Sequence[int], *, parts: int = 2, lost: Sequence[int] = (), form: str = HEAD
) -> Plan:
    """The plan that removes and narrows the same heads everywhere."""
    decisions, masks = {}, {}
    for family in structure.families:
        gone = tuple(lost) if family.kind == "head" else ()
        decisions[family.name] = Decision(tuple(i for i in range(family.size) if i not in gone), gone)
        masks[family.name] = np.isin(np.arange(family.size), gone)
    implants = {name: Implant(tuple(narrow), form, heads.width // parts) for name, heads in heads_of(structure).items()}
    cost = CostModel(structure)
    return Plan(structure, decisions, implants, hap.Budget(params=1.0), "by hand", cost.dense, cost(masks, implants))


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("narrow", "parts", "lost"), [((0, 3), 2, ()), ((1, 2), 2, (0,)), ((0, 1, 2, 3), 4, ()), ((3, 1, 0), 2, (2,))]
)
def test_law(name: str, narrow: Sequence[int], parts: int, lost: Sequence[int]) -> None:
    """The small model computes what full heads of the same rank compute, and is as small as the plan says."""
    model, inputs, structure = traced(name)
    before = copy.deepcopy(model.state_dict())
    plan = planned(structure, sorted(narrow), parts=parts, lost=lost)
    assert len(plan.narrowed) == 2
    small = hap.apply(model, plan, [inputs])
    found = hap.verify(model, small, plan, (), inputs)
    assert found.ok and found.params == plan.small.params < plan.dense.params
    assert hap.Plan.from_json(plan.to_json()) == plan
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_promised_multiplications(name: str) -> None:
    model, inputs, structure = traced(name)
    plan = planned(structure, (0, 1, 3), lost=(2,))
    small = hap.apply(model, plan, [inputs])
    counts = []
    for each in (model, small):
        with FlopCounterMode(display=False) as counter:
            outputs(each, inputs)
        total = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        counts.append(sum(n for op, n in total.items() if "attention" not in op) // 2 // 16)
    assert (counts[0], counts[1]) == (plan.dense.macs, plan.small.macs)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt"])
def test_heads_that_are_of_low_rank_stay_what_they_are(name: str) -> None:
    """Where half of the width of every head is idle, half of the width is enough."""
    model, inputs = MODELS[name]()
    model = model.double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    structure = hap.trace(model, (), inputs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for heads in heads_of(structure).values():
            for layer in heads.projections:
                member = heads.member(layer.weight)
                for positions in heads.chunks(member):
                    for rows in positions:
                        basis = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64, generator=generator))[0]
                        for tensor, axis in ((layer.weight, member.axis), (layer.bias, 0)):
                            view = model.get_parameter(tensor).movedim(axis, -1)
                            view[..., list(rows)] = view[..., list(rows)] @ basis @ basis.T
    plan = planned(structure, (0, 1, 2, 3))
    small = hap.apply(model, plan, [inputs])
    want = outputs(model, inputs)
    assert (outputs(small, inputs) - want).abs().max() < 1e-7 * want.abs().max()
    narrower = hap.apply(model, planned(structure, (0, 1, 2, 3), parts=4), [inputs])
    assert (outputs(narrower, inputs) - want).abs().max() > 1e-4 * want.abs().max()


def test_padding_and_masks_of_any_kind() -> None:
    """One text alone gives what it gives beside longer ones."""
    model, inputs, structure = traced("bert")
    small = hap.apply(model, planned(structure, (0, 2)), [inputs])
    whole = outputs(small, inputs)
    for i in range(3):
        alone = {"input_ids": inputs["input_ids"][[i], : LENGTHS[i]]}
        assert torch.allclose(outputs(small, alone), whole[[i]], atol=1e-5)


def test_attributes_configuration_and_names() -> None:
    model, inputs, structure = traced("bert")
    small = hap.apply(model, planned(structure, (0, 2), lost=(1,)), [inputs])
    attention = small.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 16) and small.config.num_attention_heads == 2
    assert isinstance(attention, type(model.bert.encoder.layer[0].attention.self))
    assert list(small.state_dict()) == list(model.state_dict())


def test_saved_and_loaded(tmp_path) -> None:
    model, inputs, structure = traced("bert")
    plan = planned(structure, (0, 2), lost=(1,))
    small = hap.apply(model, plan, [inputs])
    hap.save(small, plan, tmp_path / "run")
    want = outputs(small, inputs)
    for again, _ in (hap.load(tmp_path / "run"), hap.load(tmp_path / "run", model)):
        assert torch.equal(outputs(again, inputs), want)


def test_copies_trains_casts_and_compiles() -> None:
    model, inputs, structure = traced("bert")
    small = hap.apply(model, planned(structure, (0, 2)), [inputs])
    want = outputs(small, inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(outputs(other, inputs), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(outputs(small, inputs).float(), want, atol=0.2)
    assert torch.allclose(outputs(torch.compile(small, backend="aot_eager"), inputs), want, atol=1e-5)
    small.train().activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(24):
        loss = small(**inputs, labels=torch.arange(16) % 2).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in small.bert.encoder.layer[0].attention.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["bert", "vit", "torch"])
def test_exported(name: str) -> None:
    model, inputs, structure = traced(name)
    small = hap.apply(model, planned(structure, (0, 2)), [inputs])
    program = torch.export.export(small, (), inputs, strict=False)
    assert torch.allclose(outputs(program.module(), inputs), outputs(small, inputs), atol=1e-5)
    calls = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(calls) == 4  # full and narrow heads, in two layers


@pytest.mark.slow
def test_onnx(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = vit()
    small = hap.apply(model, planned(hap.trace(model, (), inputs), (0, 2)), [inputs])
    path = str(tmp_path / "small.onnx")
    torch.onnx.export(small, (inputs["x"],), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs["x"].numpy()})
    assert np.abs(found - outputs(small, inputs).numpy()).max() < 1e-4


def test_refit_solves_the_output_projection_anew() -> None:
    model, inputs, structure = traced("bert")
    plan = planned(structure, (0, 2), lost=(1,))
    small = hap.apply(model, plan, [inputs])
    error = (outputs(small, inputs) - outputs(model, inputs)).square().mean()
    query = small.bert.encoder.layer[0].attention.self.query.weight.clone()
    hap.refit_(small, model, plan, [inputs])
    assert torch.equal(small.bert.encoder.layer[0].attention.self.query.weight, query)
    assert (outputs(small, inputs) - outputs(model, inputs)).square().mean() < error


def test_without_data_they_cannot_be_fitted() -> None:
    model, inputs, structure = traced("bert")
    plan = planned(structure, (0, 2))
    with pytest.raises(HapError, match="narrow heads cannot be fitted without data"):
        hap.apply(model, plan)
    started = hap.apply(model, plan, init="zeros")  # add nothing: as if these heads had been pruned
    pruned = dataclasses.replace(planned(structure, (), lost=(0, 2)), implants={})
    assert torch.allclose(outputs(started, inputs), outputs(hap.apply(model, pruned), inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_is_narrow_is_left_alone_by_the_next_trace(name: str) -> None:
    model, inputs, structure = traced(name)
    small = hap.apply(model, planned(structure, (0, 2)), [inputs])
    found = hap.trace(small, (), inputs)
    assert not [family for family in found.families if family.kind == "head"]
    again = hap.prune(
        small,
        [(inputs["x"], torch.arange(16) % 3)] if name == "vit" else [inputs | {"labels": torch.arange(16) % 2}],
        None,
        hap.Budget(params=0.9),
    )
    assert again.verification.ok


def test_eager_attention_is_refused() -> None:
    model, inputs = bert()
    plan = planned(hap.trace(model, (), inputs), (0, 2))
    small = hap.apply(model, plan, [inputs])
    small.set_attn_implementation("eager")
    with pytest.raises(HapError, match="did not call scaled_dot_product_attention"):
        outputs(small, inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(HapError, match="no call of scaled_dot_product_attention"):
        hap.apply(model, plan, [inputs])


def test_an_error_leaves_the_model_as_it_was(monkeypatch) -> None:
    model, inputs = bert()
    plan = planned(hap.trace(model, (), inputs), (0, 2))
    before = copy.deepcopy(model)
    types = [type(module) for module in model.modules()]
    monkeypatch.setattr(sys.modules["hap.surgery.apply"], "mirrors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hap.apply_(model, plan, [inputs])
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_refit_comes_closer(name: str) -> None:
    """Whatever layout the batches have, and whatever linear layers the model."""
    model, inputs, structure = traced(name)
    plan = dataclasses.replace(planned(structure, (), lost=(1,)), implants={})
    small = hap.apply(model, plan)
    error = (outputs(small, inputs) - outputs(model, inputs)).square().mean()
    hap.refit_(small, model, plan, [inputs])
    assert (outputs(small, inputs) - outputs(model, inputs)).square().mean() < 0.9 * error


def test_a_lone_narrow_head_at_the_end() -> None:
    """No tensor shrinks, and its place is half empty."""
    model, inputs, structure = traced("bert")
    plan = planned(structure, (3,))
    assert hap.verify(model, hap.apply(model, plan, [inputs]), plan, (), inputs).ok
    pruned = dataclasses.replace(planned(structure, (), lost=(3,)), implants={})
    started, without = hap.apply(model, plan, init="zeros"), hap.apply(model, pruned)
    assert torch.allclose(outputs(started, inputs), outputs(without, inputs), atol=1e-5)


def test_a_forward_of_the_instance_is_refused() -> None:
    """It bypasses the class that sees narrow heads; accelerate's hooks are such."""
    model, inputs = bert()
    plan = planned(hap.trace(model, (), inputs), (0, 2))
    attention = model.bert.encoder.layer[1].attention.self
    attention.forward = attention.forward
    before, kind = copy.deepcopy(model.state_dict()), type(attention)
    for init, batches in (("zeros", None), ("least-squares", [inputs])):
        with pytest.raises(HapError, match="the instance has a forward of its own"):
            hap.apply_(model, plan, batches, init=init)
    assert type(attention) is kind
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


class Beside(nn.Module):
    """Attention and neurons that one layer reads together, in this order; few `outputs` span less than a head does."""

    def __init__(self, order: str, outputs: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 32) for _ in range(3))
        self.up, self.order = nn.Linear(12, 20), order
        self.o = nn.Linear(52, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        parts = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), F.gelu(self.up(x))]
        return self.o(torch.cat(parts if self.order == "heads first" else parts[::-1], -1)).flatten(1)


@pytest.mark.parametrize("form", [HEAD, VALUES])
@pytest.mark.parametrize(("order", "outputs"), [("heads first", 12), ("heads last", 12), ("heads first", 3)])
def test_law_where_the_output_layer_reads_more_than_heads(form: str, order: str, outputs: int) -> None:
    """What is not of heads is read as before, and so it is where heads start with nothing to add."""
    model = seeded(lambda: Beside(order, outputs)).double()
    x = torch.randn(16, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    structure = hap.trace(model, (x,))
    for narrow, lost in [((0, 3), ()), ((0, 1), (2,)), ((1,), ())]:
        plan = planned(structure, narrow, lost=lost, form=form)
        assert len(plan.narrowed) == 1
        found = hap.verify(model, hap.apply(model, plan, [(x, None)]), plan, (x,))
        assert found.ok and found.params == plan.small.params
        silent = hap.apply(model, plan, init="zeros")
        gone = hap.apply(model, dataclasses.replace(planned(structure, (), lost=(*narrow, *lost)), implants={}))
        assert torch.allclose(silent(x), gone(x), atol=1e-12)
