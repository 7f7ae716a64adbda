from __future__ import annotations

import pytest
import torch
from torch import nn

from hap.attention import OpenAttention, closed, opened

B, L, S, E, H = 2, 5, 4, 12, 4


def make(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, H, **options).double()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    return attention


def inputs(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, n, E, dtype=torch.float64, generator=generator) for n in lengths]


CALLS = {
    "itself": (L, {}),
    "without weights": (L, {"need_weights": False}),
    "weights of each head": (L, {"average_attn_weights": False}),
    "padding": (L, {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}),
    "a mask": (L, {"attn_mask": torch.ones(L, L).triu(1).bool()}),
    "a mask of numbers": (L, {"attn_mask": torch.linspace(-1, 1, L * L, dtype=torch.float64).view(L, L)}),
    "a mask for each head": (L, {"attn_mask": torch.arange(B * H * L * L).view(B * H, L, L) % 7 == 3}),
    "causal": (L, {"attn_mask": torch.ones(L, L).triu(1).bool(), "is_causal": True, "need_weights": False}),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_computes_what_torch_computes(call: str, bias: bool, batch_first: bool) -> None:
    length, options = CALLS[call]
    dense = make(bias=bias, batch_first=batch_first)
    (x,) = inputs(length)
    x = x if batch_first else x.transpose(0, 1)
    for want, have in zip(dense(x, x, x, **options), OpenAttention(dense)(x, x, x, **options), strict=True):
        assert (want is None and have is None) or torch.allclose(want, have, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 12}, {"kdim": 7, "vdim": 3}])
def test_of_other_inputs(options: dict[str, int]) -> None:
    dense = make(batch_first=True, **options)
    query, key, value = inputs(L, S, S)
    key, value = key[..., : options.get("kdim", E)], value[..., : options.get("vdim", E)]
    for want, have in zip(dense(query, key, value), OpenAttention(dense)(query, key, value), strict=True):
        assert torch.allclose(want, have, atol=1e-12)


def test_unbatched() -> None:
    dense, x = make(), inputs(L)[0][0]
    for want, have in zip(dense(x, x, x), OpenAttention(dense)(x, x, x), strict=True):
        assert want.shape == have.shape
        assert torch.allclose(want, have, atol=1e-12)


def test_opened_shares_parameters_and_names_and_is_undone() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 8, batch_first=True), 2).double().eval()
    (x,) = inputs(L)
    want, before = model(x), dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), opened(model):
        assert not closed(model)
        after = dict(model.named_parameters())
        assert set(after) == set(before) and all(after[name] is before[name] for name in before)
        assert model.layers[0].self_attn.num_heads == H
        assert torch.allclose(model(x), want, atol=1e-12)
        1 / 0  # noqa: B018
    assert len(closed(model)) == 2


def test_what_it_cannot_stand_for_is_left() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleList(
        [nn.MultiheadAttention(E, H, add_bias_kv=True), nn.MultiheadAttention(E, H, add_zero_attn=True)]
    )
    model.append(Own(E, H))
    assert not closed(model)
