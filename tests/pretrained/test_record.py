"""A pruned model of transformers is saved, opened alone, and goes on working with what its users have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hap
from hap.errors import HapError
from hap.pretrained import is_pretrained, load_text_classifier, rebuild, tokenizer_of

transformers = pytest.importorskip("transformers")
LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def pruned(tiny_bert: Path):
    """A dense model, its pruned form with the plan, its tokenizer, and a batch."""
    model, tokenizer = load_text_classifier(tiny_bert, LABELS)
    batch = dict(tokenizer(["a very good film", "bad"], padding=True, return_tensors="pt"))
    structure = hap.trace(model, (), batch)
    sensitivity = hap.measure(model, None, None, structure, criterion="random")
    plan = hap.decide(structure, sensitivity, hap.Budget(params=0.85), implant_ratio=0)
    assert any(decision.prune for decision in plan.decisions.values())
    return hap.apply(model, plan), plan, tokenizer, batch


def test_a_saved_model_opens_alone(pruned, tmp_path: Path) -> None:
    small, plan, _, batch = pruned
    hap.save(small, plan, tmp_path / "small")
    loaded, again = hap.load(tmp_path / "small")
    assert again == plan
    assert type(loaded) is type(small) and not loaded.training
    assert torch.equal(loaded(**batch).logits, small(**batch).logits)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert 'hap.load(".")' in (tmp_path / "small" / "README.md").read_text()


def test_a_loaded_model_is_saved_again(pruned, tmp_path: Path) -> None:
    small, plan, _, batch = pruned
    hap.save(small, plan, tmp_path / "first")
    loaded, _ = hap.load(tmp_path / "first")
    hap.save(loaded, plan, tmp_path / "second")
    assert torch.equal(hap.load(tmp_path / "second")[0](**batch).logits, small(**batch).logits)


def test_the_tokenizer_is_kept_and_pipelines_work(pruned, tmp_path: Path) -> None:
    small, plan, tokenizer, batch = pruned
    hap.save(small, plan, tmp_path / "found")  # where the dense model was opened
    hap.save(small, plan, tmp_path / "given", tokenizer=tokenizer)
    for name in ("found", "given"):
        kept = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert kept("a very good film").input_ids == tokenizer("a very good film").input_ids
    loaded, _ = hap.load(tmp_path / "given")
    classify = transformers.pipeline("text-classification", model=loaded, tokenizer=kept)
    found = [answer["label"] for answer in classify(["a very good film", "bad"])]
    assert found == [LABELS[i] for i in small(**batch).logits.argmax(1)]


def test_half_precision_is_kept(pruned, tmp_path: Path) -> None:
    _, _, _, batch = pruned
    model, _ = load_text_classifier(Path(pruned[0].name_or_path), LABELS)
    half = model.to(torch.bfloat16)
    structure = hap.trace(half, (), batch)
    plan = hap.decide(
        structure, hap.measure(half, None, None, structure, criterion="magnitude"), hap.Budget(params=0.9)
    )
    small = hap.apply(half, plan)
    hap.save(small, plan, tmp_path / "half")
    loaded, _ = hap.load(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(**batch).logits, small(**batch).logits)


def test_rebuilding_leaves_the_global_generator_alone(pruned, tmp_path: Path) -> None:
    small, plan, _, _ = pruned
    hap.save(small, plan, tmp_path / "small")
    state = torch.get_rng_state()
    rebuild(tmp_path / "small")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_directory_without_configuration(pruned, tmp_path: Path) -> None:
    small, plan, _, _ = pruned
    hap.save(small, plan, tmp_path / "small")
    (tmp_path / "small" / "config.json").unlink()
    with pytest.raises(HapError, match="does not say how its dense model is built") as error:
        hap.load(tmp_path / "small")
    assert error.value.remedy == "pass the dense model: hap.load(directory, model)"


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"model_type": "bert", "architectures": ["NoSuchModel"]})])
def test_a_damaged_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HapError, match="cannot be read"):
        rebuild(tmp_path)


def test_a_configuration_of_another_model(pruned, tmp_path: Path) -> None:
    small, plan, _, _ = pruned
    hap.save(small, plan, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    with pytest.raises(HapError, match="not the model that the plan was made for"):
        hap.load(tmp_path / "small")


def test_other_models_have_no_configuration(tmp_path: Path) -> None:
    assert not is_pretrained(torch.nn.Linear(2, 2))
    assert tokenizer_of(torch.nn.Linear(2, 2)) is None


def test_how_a_model_generates_is_kept(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=40)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = [3, 5]
    structure = hap.trace(model, (), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    sensitivity = hap.measure(model, None, None, structure, criterion="random")
    plan = hap.decide(structure, sensitivity, hap.Budget(params=0.9), implant_ratio=0)
    hap.save(hap.apply(model, plan), plan, tmp_path / "small")
    assert hap.load(tmp_path / "small")[0].generation_config.eos_token_id == [3, 5]
