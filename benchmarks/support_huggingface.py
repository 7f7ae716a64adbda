"""Hugging Face: small random configurations, with the eager attention and with PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support_case import Case, Example

GROUP = "Hugging Face"

_ENCODER: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
_CLASSES = {"num_labels": 3, "problem_type": "single_label_classification"}

Inputs = Callable[[], dict[str, torch.Tensor]]


def _tokens() -> dict[str, torch.Tensor]:
    """Two sentences, the second one padded."""
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return {"input_ids": torch.randint(3, 99, (2, 12)), "attention_mask": mask}


def _causal() -> dict[str, Any]:
    return {**_tokens(), "use_cache": False}


def _translation() -> dict[str, Any]:
    return {**_tokens(), "decoder_input_ids": torch.randint(3, 99, (2, 7)), "use_cache": False}


def _pixels(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 16, 60)}


def _pairs() -> dict[str, torch.Tensor]:
    return {**_tokens(), **_pixels()}


def _make(model: str, config: str, options: dict[str, Any], inputs: Inputs, attention: str | None) -> Example:
    import transformers

    chosen = {} if attention is None else {"attn_implementation": attention}
    settings = getattr(transformers, config)(**options, **chosen)
    return Example(getattr(transformers, model)(settings), (), inputs())


def _whisper_encoder(attention: str | None) -> Example:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_source_positions=30,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return Example(transformers.WhisperModel(config).encoder, (), _speech())


def _clip(attention: str | None) -> Example:
    import transformers

    text = {**_ENCODER, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1, "projection_dim": 24}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    config._attn_implementation = attention
    return Example(transformers.CLIPModel(config), (), _pairs())


_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
_DISTILBERT = {
    "vocab_size": 99,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 40,
}
_T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
_OPT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
    "max_position_embeddings": 40, "word_embed_proj_dim": 32,
}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}

_BERT_LIKE = {**_ENCODER, **_CLASSES}
_FACTORISED = {**_BERT_LIKE, "embedding_size": 24}
_GATED_T5 = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_IMAGES = {**_VISION, **_CLASSES}

# Name, model class, configuration class, its options and the inputs.
_MODELS: tuple[tuple[str, str, str, dict[str, Any], Inputs], ...] = (
    ("bert", "BertForSequenceClassification", "BertConfig", _BERT_LIKE, _tokens),
    ("roberta", "RobertaForSequenceClassification", "RobertaConfig", _BERT_LIKE, _tokens),
    ("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", {**_DISTILBERT, **_CLASSES}, _tokens),
    ("electra", "ElectraForSequenceClassification", "ElectraConfig", _FACTORISED, _tokens),
    ("albert", "AlbertForSequenceClassification", "AlbertConfig", _FACTORISED, _tokens),
    ("t5", "T5ForConditionalGeneration", "T5Config", _T5, _translation),
    ("t5 v1.1, gated", "T5ForConditionalGeneration", "T5Config", _GATED_T5, _translation),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, _causal),
    ("opt", "OPTForCausalLM", "OPTConfig", _OPT, _causal),
    ("llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, _causal),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _DECODER, _causal),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}, _causal),
    ("vit", "ViTForImageClassification", "ViTConfig", _IMAGES, _pixels),
    ("deit", "DeiTForImageClassification", "DeiTConfig", _IMAGES, _pixels),
    ("swin", "SwinForImageClassification", "SwinConfig", {**_SWIN, **_CLASSES}, _pixels),
    ("beit", "BeitForImageClassification", "BeitConfig", {**_IMAGES, "use_relative_position_bias": True}, _pixels),
)

# Without a choice of attention.
_OTHERS: tuple[tuple[str, str, str, dict[str, Any], Inputs], ...] = (
    ("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", {**_DEBERTA, **_CLASSES}, _tokens),
    ("convnext", "ConvNextForImageClassification", "ConvNextConfig", {**_CONVNEXT, **_CLASSES}, partial(_pixels, 64)),
)


def _cases(name: str, make: Callable[[str | None], Example]) -> tuple[Case, ...]:
    return tuple(Case(GROUP, f"{name}, {a}", "transformers", partial(make, a)) for a in ("eager", "sdpa"))


def _cached() -> dict[str, Any]:
    return {**_tokens(), "use_cache": True}


CASES = (
    *(case for name, *row in _MODELS for case in _cases(name, partial(_make, *row))),
    *_cases("whisper encoder", _whisper_encoder),
    *_cases("clip", _clip),
    *(Case(GROUP, name, "transformers", partial(_make, *row, None)) for name, *row in _OTHERS),
    Case(GROUP, "llama, with its cache", "transformers",
         partial(_make, "LlamaForCausalLM", "LlamaConfig", _DECODER, _cached, None)),
)  # fmt: skip
