"""Narrow heads in the places of full ones: the attention call takes them apart."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.errors import HapError
from hap.implants import Packing, packed_type

WIDTH, TOKENS = 8, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(packing: Packing, q, k, v, bias=None) -> torch.Tensor:
    """Head by head, part by part, with matrix products; `bias` (examples, heads, tokens, tokens) is added to scores."""
    heads = []
    for h in range(q.shape[1]):
        parts = packing.parts if h >= q.shape[1] - packing.packed else 1
        for a, b, c in zip(*(x[:, h].chunk(parts, -1) for x in (q, k, v)), strict=True):
            scores = a @ b.mT / WIDTH**0.5 + (0 if bias is None else bias[:, h if bias.shape[1] > 1 else 0])
            heads.append(scores.softmax(-1) @ c)
    return torch.cat(heads, -1)


@pytest.mark.parametrize("packing", [Packing(1, 2), Packing(2, 4), Packing(3, 2)])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads", "causal"])
def test_attends_as_written_out(packing: Packing, mask: str) -> None:
    q, k, v = (draw(2, 3, TOKENS, WIDTH, seed=i) for i in range(3))
    visible = torch.tensor([[True] * TOKENS, [True] * 3 + [False] * 2])[:, None, None]
    masks = {
        "bool": visible.expand(-1, -1, TOKENS, -1),
        "float": draw(2, 1, TOKENS, TOKENS),
        "heads": draw(1, 3, TOKENS, TOKENS),
    }
    given = masks.get(mask)
    bias = given
    if mask == "bool":
        bias = torch.zeros(2, 1, TOKENS, TOKENS).double().masked_fill(~visible, -torch.inf)
    if mask == "causal":
        bias = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    y = packing.attend(q, k, v, given, is_causal=mask == "causal")
    want = written_out(packing, q, k, v, bias if bias is None else bias.expand(2, -1, -1, -1))
    assert torch.allclose(y.transpose(1, 2).flatten(2), want, atol=1e-12)


class Attention(nn.Module):
    def __init__(self, *, eager: bool = False) -> None:
        super().__init__()
        self.q, self.eager = nn.Linear(6, 3 * WIDTH), eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        if self.eager:
            return (q @ q.mT).softmax(-1) @ q
        return F.scaled_dot_product_attention(q, q, q)


def packed(module: nn.Module, packing: Packing) -> nn.Module:
    module.__class__ = packed_type(type(module), packing)
    return module


def test_a_module_stays_what_it_was() -> None:
    module = packed(Attention().double(), Packing(1, 2))
    assert isinstance(module, Attention) and list(module.state_dict()) == ["q.weight", "q.bias"]
    assert type(module) is packed_type(Attention, Packing(1, 2)) and "1 heads of 2 narrow ones each" in repr(module)
    x = draw(2, TOKENS, 6)
    q = module.q(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
    assert torch.equal(module(x), Packing(1, 2).attend(q, q, q))


def test_copies_and_pickles() -> None:
    module = packed(Attention().double(), Packing(2, 4))
    x = draw(2, TOKENS, 6)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) and other.q is not module.q
        assert torch.equal(other(x), module(x))


def test_an_attention_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(HapError, match="did not call scaled_dot_product_attention"):
        packed(Attention(eager=True), Packing(1, 2))(torch.zeros(2, TOKENS, 6))


class Raising(nn.Module):
    """Raises before or after it attends."""

    def __init__(self, error: Exception, *, after: bool) -> None:
        super().__init__()
        self.error, self.after = error, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.after:
            F.scaled_dot_product_attention(x, x, x)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("sizes"), IndexError("sizes"), torch.OutOfMemoryError("sizes")])
@pytest.mark.parametrize("after", [False, True])
def test_an_error_of_shapes_before_the_call_is_told_as_one_of_narrow_heads(error: Exception, after: bool) -> None:
    """Others are what they are."""
    told = not after and type(error) is not torch.OutOfMemoryError
    with pytest.raises(HapError if told else type(error), match="sizes") as caught:
        packed(Raising(error, after=after), Packing(1, 2))(draw(2, 3, TOKENS, WIDTH))
    assert caught.value is error or caught.value.__cause__ is error


class Twice(nn.Module):
    """Attends twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, F.scaled_dot_product_attention(x, x, x), x)


def test_a_second_call_is_refused() -> None:
    """Its heads are not those that became narrow."""
    net = Twice()
    net.__class__ = packed_type(Twice, Packing(1, 2))
    with pytest.raises(HapError, match="several times"):
        net(draw(2, 3, TOKENS, WIDTH))
