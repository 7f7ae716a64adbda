"""User code: one model for each habit, with inputs."""

from __future__ import annotations

from collections.abc import Callable

import support_user_attention as attention
import support_user_models as models
import torch
from support_case import Case, Example
from torch import nn

GROUP = "user code"


def _image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def _tokens(count: int = 6) -> torch.Tensor:
    return torch.randint(1, 50, (2, count))


def _attention(kind: type[nn.Module]) -> Callable[[], Example]:
    return lambda: Example(attention.BlockClassifier(kind), (torch.randn(2, 6, 12),))


def _padding() -> torch.Tensor:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    return mask


def _several() -> Example:
    return Example(models.SeveralInputs(), (_image(), torch.randn(2, 6)), {"mask": torch.tensor([True, False])})


_MODELS: dict[str, Callable[[], Example]] = {
    "attention: fused qkv, reshape": _attention(attention.FusedQKV),
    "attention: chunk, written out": _attention(attention.Chunked),
    "attention: split, grouped queries": _attention(attention.Split),
    "attention: einsum on weights": _attention(attention.Einsum),
    "attention: einsum on tensors": _attention(attention.LinearThenEinsum),
    "attention: rotary, one key": _attention(attention.Rotary),
    "attention: linear": _attention(attention.LinearAttention),
    "nn.MultiheadAttention": _attention(models.SelfAttention),
    "nn.MultiheadAttention, crossed": lambda: Example(
        models.CrossAttention(), (torch.randn(2, 6, 12), torch.randn(2, 5, 20))
    ),
    "nn.TransformerEncoder": lambda: Example(models.Encoder(False), (_tokens(), _padding())),
    "nn.TransformerEncoder, norm first": lambda: Example(models.Encoder(True), (_tokens(), _padding())),
    "nn.Transformer": lambda: Example(models.Translator(), (_tokens(), _tokens(5))),
    "LSTM": lambda: Example(models.LSTMTagger(), (_tokens(),)),
    "recurrence by hand": lambda: Example(models.Recurrent(), (torch.randn(2, 4, 6),)),
    "U-Net": lambda: Example(models.UNet(), (_image(),)),
    "bare parameters": lambda: Example(models.BareParameters(), (torch.randn(2, 12),)),
    "gather and index": lambda: Example(models.Gather(), (_tokens(4), torch.tensor([3, 1]))),
    "split, shuffle, glu": lambda: Example(models.Pieces(), (_image(),)),
    "squeeze, depthwise, groups": lambda: Example(models.Squeezed(), (_image(),)),
    "1-D, gated, weight norm": lambda: Example(models.Signal(), (torch.randn(2, 2, 20),)),
    "3-D": lambda: Example(models.Volume(), (torch.randn(2, 1, 8, 8, 8),)),
    "mixer, gated feed-forward": lambda: Example(models.Mixer(), (_image(),)),
    "shared layers, tied embedding": lambda: Example(models.Shared(), (_tokens(),)),
    "stacked experts": lambda: Example(models.Experts(), (torch.randn(2, 12),)),
    "tuple outputs": lambda: Example(models.TupleOutputs(), (_image(),)),
    "dict outputs": lambda: Example(models.DictOutputs(), (_image(),)),
    "dataclass outputs": lambda: Example(models.DataclassOutputs(), (_image(),)),
    "dataclass outputs, registered": lambda: Example(models.KnownDataclassOutputs(), (_image(),)),
    "several inputs, keyword inputs": _several,
}

CASES = (
    *(Case(GROUP, name, "torch", make) for name, make in _MODELS.items()),
    Case(GROUP, "attention: einops", "einops", _attention(attention.Einops)),
)
