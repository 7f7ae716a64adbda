from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hap.errors import HapError
from hap.pretrained import is_classifier, load_image_classifier, load_text_classifier

transformers = pytest.importorskip("transformers")
LABELS = ("negative", "positive")


def test_an_encoder_gets_a_head_from_the_seed(tiny_bert: Path) -> None:
    state = torch.get_rng_state()
    (first, tokenizer), (same, _), (other, _) = (load_text_classifier(tiny_bert, LABELS, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    encoder = transformers.AutoModel.from_pretrained(tiny_bert)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)
    assert first.config.id2label == {0: "negative", 1: "positive"} and first.config.label2id["positive"] == 1
    assert not first.training and first.dtype == torch.float32
    assert tokenizer("good").input_ids == [2, 12, 3]


def test_a_classifier_keeps_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    model, tokenizer = load_text_classifier(tiny_bert, LABELS, seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_text_classifier(tmp_path, LABELS)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    with pytest.raises(HapError, match="was trained for other labels") as error:
        load_text_classifier(tmp_path, ("a", "b", "c"))
    assert error.value.got == "2 classes: negative, positive"
    with pytest.raises(HapError, match="labels in another order"):
        load_text_classifier(tmp_path, LABELS[::-1])


def test_a_model_of_the_gpt_type_pads_with_its_last_token(tiny_bert: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=3)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_text_classifier(tmp_path, LABELS)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 3


def test_bad_paths(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HapError, match="there is no model in") as error:
        load_text_classifier(tmp_path / "none", LABELS)
    assert error.value.got == "no such directory"
    with pytest.raises(HapError, match="there is no model in") as error:
        load_text_classifier(tmp_path, LABELS)
    assert error.value.got == "a directory without config.json"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HapError, match="cannot be opened"):
        load_text_classifier(tmp_path, LABELS)
    without = tmp_path / "without"
    shutil.copytree(tiny_bert, without)
    (without / "model.safetensors").unlink()
    with pytest.raises(HapError, match="cannot be opened"):
        load_text_classifier(without, LABELS)


def test_weights_of_another_model(tiny_bert: Path, tmp_path: Path) -> None:
    transformers.GPT2Model(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    shutil.copy(tiny_bert / "config.json", tmp_path)
    with pytest.raises(HapError, match="are not those of BertForSequenceClassification"):
        load_text_classifier(tmp_path, LABELS)


def test_a_tokenizer_that_does_not_fit(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(["splendid"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HapError, match="the tokenizer in .* does not fit the model") as error:
        load_text_classifier(tmp_path, LABELS)
    assert error.value.got == "22 tokens"


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    model = load_image_classifier(tmp_path, 10)
    assert model(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 10)
    (tmp_path / "plan.json").write_text("{}")
    with monkeypatch.context() as home, pytest.raises(HapError, match="is a pruned model"):
        home.setenv("HOME", str(tmp_path.parent))
        load_image_classifier(f"~/{tmp_path.name}", 10)


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("LevitForImageClassification", True),
        ("LevitForImageClassificationWithTeacher", True),
        ("LevitModel", False),
    ],
)
def test_what_is_a_classifier(tmp_path: Path, model: str, trained: bool) -> None:
    """By the class that wrote the configuration, whatever follows in its name, and by the number of classes."""
    transformers.LevitConfig(num_labels=10, architectures=[model]).save_pretrained(tmp_path)
    assert is_classifier(tmp_path, 10) is trained
    assert not is_classifier(tmp_path, 9)


def test_a_model_of_texts_is_no_model_of_images(tiny_bert: Path) -> None:
    with pytest.raises(HapError, match=r"is no model of images[\s\S]*bert[\s\S]*--task"):
        load_image_classifier(tiny_bert, 10)
