"""Narrow values side by side in the place of one head of values: the attention call takes them apart."""

from __future__ import annotations

import pytest
import torch

from hap.errors import HapError
from hap.implants import ValuePacking

WIDTH, TOKENS = 8, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(packing: ValuePacking, q, k, values, bias) -> torch.Tensor:
    """Head by head, as the output layer reads it: (examples, tokens, places of queries * width).

    `values` has a tensor for each head of keys; `bias` (examples, heads of queries, tokens, tokens) is added to scores.
    """
    group = q.shape[1] // k.shape[1]
    full, rank = packing.full, WIDTH // packing.parts
    places = -(-packing.narrow // packing.parts)
    read = torch.zeros(len(q), TOKENS, full + places, group, WIDTH, dtype=q.dtype)
    for head in range(q.shape[1]):
        unit, member = divmod(head, group)
        y = (q[:, head] @ k[:, unit].mT / WIDTH**0.5 + bias[:, head]).softmax(-1) @ values[unit]
        place, part = (unit, 0) if unit < full else divmod(unit - full, packing.parts)
        read[:, :, place + (full if unit >= full else 0), member, part * rank : part * rank + y.shape[-1]] = y
    return read.flatten(2)


@pytest.mark.parametrize("packing", [ValuePacking(1, 2, 2), ValuePacking(0, 3, 2), ValuePacking(2, 5, 4)])
@pytest.mark.parametrize("way", ["one each", "repeated", "enable_gqa"])
@pytest.mark.parametrize("mask", ["none", "bool", "heads", "causal"])
def test_attends_as_written_out(packing: ValuePacking, way: str, mask: str) -> None:
    heads, group = packing.full + packing.narrow, 1 if way == "one each" else 3
    q, k = draw(2, heads * group, TOKENS, WIDTH), draw(2, heads, TOKENS, WIDTH, seed=1)
    places = -(-packing.narrow // packing.parts)
    v = draw(2, packing.full + places, TOKENS, WIDTH, seed=2)
    values = [
        *v[:, : packing.full].unbind(1),
        *(y for x in v[:, packing.full :].unbind(1) for y in x.chunk(packing.parts, -1)),
    ]
    bias = torch.zeros(2, heads * group, TOKENS, TOKENS, dtype=torch.float64)
    given = None
    if mask == "bool":
        given = torch.tensor([[True] * TOKENS, [True] * 3 + [False] * 2])[:, None, None].expand(-1, -1, TOKENS, -1)
        bias = bias.masked_fill(~given, -torch.inf)
    if mask == "heads":
        given = bias = draw(2, heads * group, TOKENS, TOKENS, seed=3)
    if mask == "causal":
        bias = bias + torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)
    calls = {"one each": (k, v), "repeated": (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))}
    options = {"enable_gqa": True} if way == "enable_gqa" else {}
    y = packing.attend(q, *calls.get(way, (k, v)), given, is_causal=mask == "causal", **options)
    assert torch.allclose(y.transpose(1, 2).flatten(2), written_out(packing, q, k, values, bias), atol=1e-12)


def test_a_group_side_by_side_among_the_tokens() -> None:
    """As transformers does for one query: (examples, heads of keys, group, width), which it takes apart again."""
    packing, group = ValuePacking(1, 3, 2), 3
    q, k, v = draw(2, 4, group, WIDTH), draw(2, 4, TOKENS, WIDTH, seed=1), draw(2, 3, TOKENS, WIDTH, seed=2)
    apart = packing.attend(q.flatten(1, 2)[:, :, None], k, v, enable_gqa=True)
    assert torch.allclose(packing.attend(q, k, v).flatten(1, 2)[:, :, None], apart, atol=1e-12)


def test_other_heads_of_values_than_it_has_are_refused() -> None:
    q, v = draw(2, 4, TOKENS, WIDTH), draw(2, 4, TOKENS, WIDTH)
    with pytest.raises(HapError, match="did not get as many heads"):
        ValuePacking(1, 3, 2).attend(q, q, v)
