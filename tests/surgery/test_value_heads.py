"""Heads of narrow values in real models, where queries and keys must stay: rotary positions, norms, grouped queries."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hap
from hap.errors import HapError
from hap.implants import HEAD, VALUES, head_options, heads_of, narrow_heads
from hap.planning import CostModel, Decision, Implant, Plan, compose
from hap.types import Structure

transformers = pytest.importorskip("transformers")

Inputs = dict[str, torch.Tensor]
LENGTHS = torch.arange(16) % 5 + 3
TOKENS = torch.arange(16 * 7).view(16, 7) * 11 % 38 + 2
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 40, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def made(kind: str, **sizes: Any) -> nn.Module:
    """A model of random weights, in float64."""
    name = kind.partition("For")[0] + "Config"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, name)(**SIZES, **sizes)).double().eval()


MODELS = {
    "llama": lambda: made("LlamaForCausalLM", num_attention_heads=4, num_key_value_heads=4, use_cache=False),
    "llama, grouped": lambda: made("LlamaForCausalLM", num_attention_heads=8, num_key_value_heads=4, use_cache=False),
    "qwen2, biases": lambda: made("Qwen2ForCausalLM", num_attention_heads=4, num_key_value_heads=4, use_cache=False),
    "qwen3, norms": lambda: made(
        "Qwen3ForCausalLM", num_attention_heads=12, num_key_value_heads=4, head_dim=8, use_cache=False
    ),
    "mistral, sliding": lambda: made(
        "MistralForSequenceClassification", num_attention_heads=8, num_key_value_heads=4, sliding_window=4,
        num_labels=2, use_cache=False,
    ),  # fmt: skip
    "eurobert": lambda: made(
        "EuroBertForSequenceClassification", num_attention_heads=4, num_key_value_heads=4, num_labels=2,
        mask_token_id=2,
    ),  # fmt: skip
    "esm, rotary": lambda: made(
        "EsmForSequenceClassification", num_attention_heads=4, position_embedding_type="rotary", num_labels=2,
        mask_token_id=2,
    ),  # fmt: skip
}  # fmt: skip


@functools.cache
def traced(name: str) -> tuple[nn.Module, Inputs, Structure]:
    """A model that no test changes, its inputs and its structure."""
    model = MODELS[name]()
    inputs = {"input_ids": TOKENS, "attention_mask": (torch.arange(7) < LENGTHS[:, None]).long()}
    return model, inputs, hap.trace(model, (), inputs)


def planned(structure: Structure, narrow: Sequence[int], *, parts: int = 2, lost: Sequence[int] = ()) -> Plan:
    """The plan that removes and narrows the same heads everywhere."""
    decisions, masks = {}, {}
    for family in structure.families:
        gone = tuple(lost) if family.kind == "head" else ()
        decisions[family.name] = Decision(tuple(i for i in range(family.size) if i not in gone), gone)
        masks[family.name] = np.isin(np.arange(family.size), gone)
    implants = {
        name: Implant(tuple(narrow), VALUES, heads.width // parts)
        for name, heads in heads_of(structure).items()
        if narrow
    }
    cost = CostModel(structure)
    return Plan(structure, decisions, implants, hap.Budget(params=1.0), "by hand", cost.dense, cost(masks, implants))


def outputs(model: nn.Module, inputs: Inputs, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


def written_in(model: nn.Module, plan: Plan, batches: list[Inputs]) -> nn.Module:
    """The dense model with the products of low rank in its output weights, and nothing where heads left."""
    dense = copy.deepcopy(model)
    for name, (heads, implant) in plan.narrowed.items():
        assert implant.rank is not None
        (fit,) = narrow_heads(model, {name: (heads, implant.form, implant.rank)}, batches).values()
        weight = dense.get_parameter(heads.output.weight)
        columns = weight.detach().unflatten(1, (heads.family.size, heads.group, heads.width))
        for unit in implant.indices:
            for member, output in enumerate(fit.narrow.output[unit].chunk(heads.group, -1)):
                columns[:, unit, member] = output @ fit.narrow.value[unit].T
            if heads.output.bias is not None:
                dense.get_parameter(heads.output.bias).data += fit.narrow.shift[unit]
        columns[:, list(plan.decisions[heads.family.name].prune)] = 0
    return dense


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("narrow", "parts", "lost"),
    [((0, 3), 2, ()), ((1, 2), 2, (0,)), ((0, 1, 2, 3), 4, ()), ((0, 1, 3), 2, (2,)), ((2,), 2, ())],
)
def test_law(name: str, narrow: Sequence[int], parts: int, lost: Sequence[int]) -> None:
    """The small model computes what weights of low rank compute in the dense one, and is as small as the plan says."""
    model, inputs, structure = traced(name)
    before = copy.deepcopy(model.state_dict())
    plan = planned(structure, narrow, parts=parts, lost=lost)
    assert len(plan.narrowed) == 2
    small = hap.apply(model, plan, [inputs])
    want, have = outputs(written_in(model, plan, [inputs]), inputs), outputs(small, inputs)
    rounded = 1e-6 if "esm" not in name else 1e-12  # the norms of the others round to float32
    assert (have - want).abs().max() <= rounded * want.abs().max()
    found = hap.verify(model, small, plan, (), inputs)
    assert found.ok and found.params == plan.small.params
    assert len(narrow) == 1 or plan.small.params < plan.dense.params
    assert hap.Plan.from_json(plan.to_json()) == plan
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("name", ["llama, grouped", "esm, rotary"])
def test_all_heads_of_full_rank_are_the_model_itself(name: str) -> None:
    """Where values span half of the width, half of the width is enough."""
    model, inputs, structure = traced(name)
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for heads in heads_of(structure).values():
        assert heads.values is not None
        half = heads.width // 2
        basis = torch.randn(heads.family.size, heads.width, half, dtype=torch.float64, generator=generator)
        span = basis @ torch.linalg.pinv(basis)
        for tensor in filter(None, (heads.values.weight, heads.values.bias)):
            view = model.get_parameter(tensor).data
            view.copy_((span @ view.unflatten(0, (heads.family.size, heads.width, -1)).flatten(2)).reshape(view.shape))
    small = hap.apply(model, planned(structure, (0, 1, 2, 3)), [inputs])
    want = outputs(model, inputs)
    assert (outputs(small, inputs) - want).abs().max() < 1e-6 * want.abs().max()
    narrower = hap.apply(model, planned(structure, (0, 1, 2, 3), parts=4), [inputs])
    assert (outputs(narrower, inputs) - want).abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", ["llama", "llama, grouped", "qwen3, norms", "eurobert"])
@pytest.mark.parametrize("narrow", [(0, 1, 3), (0, 1, 2, 3)])
def test_padding_and_no_mask(name: str, narrow: Sequence[int]) -> None:
    """One text alone, which takes other ways through the attention, gives what it gives beside longer ones."""
    model, inputs, structure = traced(name)
    small = hap.apply(model, planned(structure, narrow), [inputs])
    whole = outputs(small, inputs)
    for i in range(3):
        alone = outputs(small, {"input_ids": TOKENS[[i], : LENGTHS[i]]})
        want = whole[[i], : LENGTHS[i]] if whole.ndim == 3 else whole[[i]]
        assert torch.allclose(alone, want, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama, grouped", "qwen3, norms"])
@pytest.mark.parametrize("narrow", [(0, 1, 3), (0, 1, 2, 3), (2,)])
def test_with_a_cache(name: str, narrow: Sequence[int]) -> None:
    """Token by token, and in generation, as without: the cache of values has fewer heads than that of keys."""
    model, inputs, structure = traced(name)
    small = hap.apply(model, planned(structure, narrow), [inputs])
    tokens = TOKENS[:3]
    want, past = outputs(small, {"input_ids": tokens}), None
    steps = []
    for piece in (tokens[:, :3], *tokens[:, 3:].split(1, 1)):
        with torch.no_grad():
            found = small(input_ids=piece, past_key_values=past, use_cache=True)
        past = found.past_key_values
        steps.append(found.logits)
    assert torch.allclose(torch.cat(steps, 1), want, atol=1e-5)
    layer = past.layers[0]
    assert layer.keys.shape[1] == 4 and layer.values.shape[1] == 4 - len(narrow) // 2
    texts = [small.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


def test_configuration_and_names() -> None:
    """They count heads of queries and keys, whatever their values are."""
    model, inputs, structure = traced("llama, grouped")
    small = hap.apply(model, planned(structure, (0, 1), lost=(2,)), [inputs])
    attention = small.model.layers[0].self_attn
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (6, 3)
    features = [attention.get_submodule(f"{name}_proj").out_features for name in "qkv"]
    assert features == [24, 12, 8] and attention.o_proj.in_features == 16
    assert isinstance(attention, type(model.model.layers[0].self_attn))
    assert list(small.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(("narrow", "parts"), [((0, 1), 2), ((0, 1, 2, 3), 8)])
def test_a_cache_of_fixed_size_and_eager_attention_are_refused(narrow: Sequence[int], parts: int) -> None:
    """They take as many heads of values as of keys, or one for all: their own errors of shapes would say little."""
    model, inputs, structure = traced("llama")
    small = hap.apply(model, planned(structure, narrow, parts=parts), [inputs])
    with pytest.raises(HapError, match="no cache_implementation='static'") as caught:
        small.generate(TOKENS[:2], max_new_tokens=3, cache_implementation="static", use_cache=True)
    assert isinstance(caught.value.__cause__, RuntimeError) and str(caught.value.__cause__) in caught.value.got
    small.set_attn_implementation("eager")
    with pytest.raises(HapError, match="did not call scaled_dot_product_attention"):
        outputs(small, inputs)


@pytest.mark.parametrize("name", ["llama, grouped", "esm, rotary"])
def test_saved_and_loaded(tmp_path, name: str) -> None:
    inputs, model = traced(name)[1], MODELS[name]().float()
    plan = planned(hap.trace(model, (), inputs), (0, 1, 3), lost=(2,))
    small = hap.apply(model, plan, [inputs])
    hap.save(small, plan, tmp_path / "run")
    want = outputs(small, inputs)
    for again, _ in (hap.load(tmp_path / "run"), hap.load(tmp_path / "run", model)):
        assert torch.equal(outputs(again, inputs), want)


def test_copies_trains_casts_and_compiles() -> None:
    model, inputs, structure = traced("llama, grouped")
    small = hap.apply(model, planned(structure, (0, 1, 3)), [inputs])
    want = outputs(small, inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(outputs(other, inputs), want)
    assert "3 heads of narrow values, 2 in a place" in repr(small)
    assert torch.allclose(outputs(torch.compile(small, backend="aot_eager"), inputs), want, atol=1e-5)
    small.float().train().activation_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(outputs(small, inputs).float(), want.float(), atol=0.5)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = small(**inputs, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in small.model.layers[0].self_attn.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["llama, grouped", "eurobert"])
def test_exported(name: str) -> None:
    model, inputs, structure = traced(name)
    small = hap.apply(model, planned(structure, (0, 1)), [inputs])
    program = torch.export.export(small, (), inputs, strict=False)
    assert torch.allclose(outputs(program.module(), inputs), outputs(small, inputs), atol=1e-5)
    calls = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(calls) == 2  # one in each layer


@pytest.mark.slow
def test_onnx(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs, structure = traced("llama, grouped")
    small = hap.apply(model, planned(structure, (0, 1)), [inputs]).float()
    path = str(tmp_path / "small.onnx")
    torch.onnx.export(small, (), path, kwargs=inputs, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    found, *_ = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    assert np.abs(found - outputs(small, inputs).numpy()).max() < 1e-4


@pytest.mark.parametrize("mode", ["paper", "optimal"])
@pytest.mark.parametrize("name", ["eurobert", "mistral, sliding"])
def test_the_whole_way(mode: str, name: str) -> None:
    """Measured, offered, planned, applied and verified, in one call."""
    model, inputs, _ = traced(name)
    batches = [{**inputs, "labels": torch.arange(16) % 2}]
    options = {"paper": {"implant_ratio": 1.0}, "optimal": {"floor": 4}}[mode]  # nothing may leave
    result = hap.prune(model, batches, None, hap.Budget(heads=0.8), mode=mode, units=["head"], **options)
    assert result.verification.ok and result.plan.small.heads <= 0.8 * result.plan.dense.heads
    assert {implant.form for implant in result.plan.implants.values()} == {VALUES}
    assert (result.plan.predicted is None) == (mode == "paper")
    assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["llama, grouped", "qwen2, biases"])
def test_without_a_fit_they_add_nothing(name: str) -> None:
    """As if they had left."""
    model, inputs, structure = traced(name)
    silent = hap.apply(model, planned(structure, (0, 1, 3)), init="zeros")
    gone = hap.apply(model, planned(structure, (), lost=(0, 1, 3)))
    assert torch.allclose(outputs(silent, inputs), outputs(gone, inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["llama, grouped", "esm, rotary"])
def test_the_promised_multiplications(name: str) -> None:
    model, inputs, structure = traced(name)
    plan = planned(structure, (0, 1, 3), lost=(2,))
    counts = []
    for each in (model, hap.apply(model, plan, [inputs])):
        with FlopCounterMode(display=False) as counter:
            outputs(each, inputs)
        total = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        counts.append(total.get("aten.mm", 0) + total.get("aten.addmm", 0))
    saved = (counts[0] - counts[1]) // 2 // len(TOKENS)
    assert saved == plan.dense.macs - plan.small.macs


@pytest.mark.parametrize("name", ["llama, grouped", "esm, rotary"])
def test_refit_solves_all_layers_but_that_of_the_values_anew(name: str) -> None:
    model, inputs, structure = traced(name)
    plan = planned(structure, (0, 1, 3), lost=(2,))
    small = hap.apply(model, plan, [inputs])
    error = (outputs(small, inputs) - outputs(model, inputs)).square().mean()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    hap.refit_(small, model, plan, [inputs])
    changed = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    (heads, _), *_ = plan.narrowed.values()
    assert heads.values is not None and heads.values.weight not in changed
    assert {heads.projections[0].weight, heads.projections[1].weight, heads.output.weight} <= changed
    assert (outputs(small, inputs) - outputs(model, inputs)).square().mean() < error


def test_a_second_plan_follows_on_one_that_prunes() -> None:
    model, inputs, structure = traced("llama, grouped")
    batches = [{**inputs, "labels": TOKENS}]
    first = hap.prune(model, batches, None, hap.Budget(heads=0.75), implant_ratio=0)
    then = hap.trace(first.model, (), inputs)
    sizes = {name: heads.family.size for name, heads in heads_of(then).items()}
    plan = dataclasses.replace(
        planned(then, ()),
        implants={name: Implant((0, size - 1), VALUES, 2) for name, size in sizes.items() if size > 1},
    )
    second = hap.apply(first.model, plan, [inputs])
    whole = compose(first.plan, plan)
    assert hap.Plan.from_json(whole.to_json()) == whole and whole.implants
    again = hap.apply(model, whole, init="zeros")
    again.load_state_dict(second.state_dict())
    assert torch.equal(outputs(again, inputs), outputs(second, inputs))


def test_a_plan_with_another_form_or_rank_is_refused() -> None:
    _, _, structure = traced("llama, grouped")
    plan = planned(structure, (0, 1))
    (name, heads), *_ = heads_of(structure).items()
    assert heads.forms() == (VALUES,)
    for bad in (Implant((0, 1), HEAD, 2), Implant((0, 1), VALUES, 3), Implant((0, 1), VALUES, None)):
        with pytest.raises(HapError, match="this plan is damaged"):
            hap.Plan.from_json(dataclasses.replace(plan, implants={name: bad}).to_json())


def test_an_attention_that_counts_the_heads_of_its_values_stays_full() -> None:
    """What one layer writes together, and what the code gives a number of heads, cannot be narrower than the rest."""
    fused = made(
        "ModernBertForSequenceClassification", num_attention_heads=4, num_labels=2, cls_token_id=1, sep_token_id=1
    )
    inputs = traced("llama")[1]
    structure = hap.trace(fused, (), inputs)
    assert list(heads_of(structure)) == ["model.layers.0.attn", "model.layers.1.attn"]
    assert head_options(fused, structure, [inputs]) == {}
    (name, heads), *_ = heads_of(structure).items()
    with pytest.raises(HapError, match="not for its layers"):
        narrow_heads(fused, {name: (heads, VALUES, 4)}, [inputs])
