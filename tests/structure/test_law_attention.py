"""The law on attention, in the ways that people write it: heads are found by themselves, and leave as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.structure import trace

WIDTH, HEADS, HEAD = 12, 4, 6
SEQUENCE = (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3)),)
INNER = HEADS * HEAD


class Attention(nn.Module):
    """Four projections around a function of q, k and v, each (batch, positions, HEADS * HEAD), and this module."""

    def __init__(self, function: Callable[..., torch.Tensor], key_heads: int = HEADS, **parts: Any) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads, self.head_dim = HEADS, key_heads, HEAD
        self.inner_dim, self.width = INNER, WIDTH
        self.q, self.o = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, key_heads * HEAD), nn.Linear(WIDTH, key_heads * HEAD)
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.function(self, self.q(x), self.k(x), self.v(x)))


class Fused(nn.Module):
    """One projection for q, k and v, taken apart by a function."""

    def __init__(self, function: Callable[..., torch.Tensor], width: int = 3 * INNER) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = HEADS, HEAD, INNER
        self.qkv, self.o = nn.Linear(WIDTH, width), nn.Linear(INNER, WIDTH)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.function(self, self.qkv(x)))


class Stacked(nn.Module):
    """Weights of three axes, one matrix for each head, and products of labelled axes."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (parameter(HEADS, WIDTH, HEAD) for _ in range(3))
        self.bias, self.mix = parameter(HEADS, HEAD), parameter(HEADS, HEAD, 5)
        self.o, self.narrow, self.flat = (
            parameter(HEADS, HEAD, WIDTH),
            parameter(HEADS, 5, WIDTH),
            parameter(INNER, WIDTH),
        )
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("bnw,hwd->bhnd", x, weight) for weight in (self.q, self.k))
        v = torch.einsum("bnw,hwd->bnhd", x, self.v) + self.bias
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * HEAD**-0.5).softmax(-1)
        return x + self.function(self, torch.einsum("bhij,bjhd->bihd", weights, v))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def open_heads(s: Any, y: torch.Tensor) -> torch.Tensor:
    return y.view(*y.shape[:2], -1, s.head_dim).transpose(1, 2)


def counted(s: Any, y: torch.Tensor) -> torch.Tensor:
    return y.reshape(y.shape[0], y.shape[1], s.num_heads, s.head_dim).permute(0, 2, 1, 3)


def joined(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2).flatten(2)


def fused_kernel(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return joined(F.scaled_dot_product_attention(*(counted(s, y) for y in (q, k, v)), is_causal=True))


def by_hand(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (open_heads(s, y) for y in (q, k, v))
    mask = torch.ones(5, 5).tril().log()
    weights = (q @ k.transpose(-2, -1) / math.sqrt(s.head_dim) + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(*q.shape[::2], s.inner_dim)


def by_batches(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads and samples on one axis, as older models write it."""
    flat = lambda y: counted(s, y).reshape(-1, y.shape[1], s.head_dim)  # noqa: E731
    weights = torch.bmm(flat(q), flat(k).transpose(1, 2)).softmax(-1)
    y = torch.bmm(weights, flat(v)).view(q.shape[0], s.num_heads, q.shape[1], s.head_dim)
    return joined(y)


def positions_first(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As in nn.MultiheadAttention: (positions, batch * heads, width)."""
    flat = lambda y: y.transpose(0, 1).reshape(y.shape[1], -1, s.head_dim).transpose(0, 1)  # noqa: E731
    y = torch.bmm(torch.bmm(flat(q), flat(k).transpose(1, 2)).softmax(-1), flat(v))
    return y.transpose(0, 1).reshape(q.shape[1], q.shape[0], -1).transpose(0, 1)


def einsums(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (counted(s, y) for y in (q, k, v))
    weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)


def rotated(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(y: torch.Tensor) -> torch.Tensor:
        half = y.shape[-1] // 2
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

    q, k, v = (counted(s, y) for y in (q, k, v))
    return joined(F.scaled_dot_product_attention(turn(q), turn(k), v))


def normed(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (counted(s, y) for y in (q, k, v))
    return joined(F.scaled_dot_product_attention(s.norm(q), F.normalize(k, dim=-1), v))


def grouped(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two query heads for each key head, repeated by hand."""

    def repeat(y: torch.Tensor) -> torch.Tensor:
        y = y.view(*y.shape[:2], s.num_key_heads, s.head_dim).transpose(1, 2)
        return y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(y.shape[0], 2 * y.shape[1], *y.shape[2:])

    return joined(F.scaled_dot_product_attention(counted(s, q), repeat(k), repeat(v)))


def grouped_kernel(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return joined(F.scaled_dot_product_attention(*(open_heads(s, y) for y in (q, k, v)), enable_gqa=True))


def biased(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A learnt bias for each head, looked up by distance, and a temperature."""
    distance = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
    bias = s.table[distance.flatten()].view(5, 5, -1).permute(2, 0, 1)
    q, k, v = (open_heads(s, y) for y in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * s.temperature.exp() + bias).softmax(-1)
    return joined(weights @ v)


def one_key(s: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All query heads share one key head, which has no axis of its own."""
    weights = (counted(s, q) @ k[:, None].transpose(-2, -1)).softmax(-1)
    return joined(weights @ v[:, None])


def mixed(s: Any, y: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bnhe,hew->bnw", torch.einsum("bnhd,hde->bnhe", y, s.mix).relu(), s.narrow)


def three_axes(s: Any, y: torch.Tensor) -> torch.Tensor:
    q, k, v = y.reshape(*y.shape[:2], 3, s.num_heads, s.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return joined(F.scaled_dot_product_attention(q, k, v))


def indexed(s: Any, y: torch.Tensor) -> torch.Tensor:
    qkv = y.reshape(*y.shape[:2], 3, -1, s.head_dim).permute(2, 0, 3, 1, 4)
    return joined(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]))


def cut(s: Any, y: torch.Tensor) -> torch.Tensor:
    return joined(F.scaled_dot_product_attention(*(open_heads(s, p) for p in y.split(s.split_size, dim=2))))


def grouped_pieces(s: Any, y: torch.Tensor) -> torch.Tensor:
    """Four query heads and two key heads in one projection: 24 + 12 + 12 of 48 features, cut by their share."""
    part = y.shape[-1] // 4
    q, k, v = (open_heads(s, p) for p in y.split([2 * part, part, part], -1))
    return joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def chunked(s: Any, y: torch.Tensor) -> torch.Tensor:
    return joined(F.scaled_dot_product_attention(*(counted(s, p) for p in y.chunk(3, -1))))


def stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.Linear(WIDTH, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sdpa": (lambda: Attention(fused_kernel), "q:4"),
    "by hand": (lambda: Attention(by_hand), "q:4"),
    "bmm": (lambda: Attention(by_batches), "q:4"),
    "positions first": (lambda: Attention(positions_first), "q:4"),
    "einsum": (lambda: Attention(einsums), "q:4"),
    "rotary": (lambda: Attention(rotated), "q:4"),
    "normed": (lambda: Attention(normed, norm=nn.LayerNorm(HEAD)), "q:4"),
    "grouped": (lambda: Attention(grouped, key_heads=2), "q:2"),
    "grouped sdpa": (lambda: Attention(grouped_kernel, key_heads=2), "q:2"),
    "one key": (lambda: Attention(one_key, key_heads=1), "q:4"),
    "biased": (lambda: Attention(biased, table=parameter(5, HEADS), temperature=parameter(HEADS, 1, 1)), "q:4"),
    "fused": (lambda: Fused(three_axes), "qkv:4"),
    "fused, indexed": (lambda: Fused(indexed), "qkv:4"),
    "fused, split": (lambda: Fused(cut), "qkv:4"),
    "fused, chunks": (lambda: Fused(chunked), "qkv:4"),
    "fused, grouped": (lambda: Fused(grouped_pieces, 2 * INNER), "qkv:2"),
    "three axes": (lambda: Stacked(lambda s, y: torch.einsum("bnhd,hdw->bnw", y, s.o)), "q:4 v:6"),
    "three axes, mixed by head": (lambda: Stacked(mixed), "q:4 v:6 mix:5"),
    "three axes, then two": (lambda: Stacked(lambda s, y: torch.einsum("bnk,kw->bnw", y.flatten(2), s.flat)), "q:4"),
    "torch's encoder layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True),
        "self_attn.in_proj_weight:4 linear1:20",
    ),
    "torch's decoder layer": (
        lambda: Decoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 20, batch_first=True)),
        "layer.self_attn.in_proj_weight:4 layer.multihead_attn.in_proj_weight:4 layer.linear1:20",
    ),
}  # fmt: skip


class Decoder(nn.Module):
    """Attends to its own input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x.flip(1))


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str, make, law) -> None:
    build, families = CASES[name]
    structure = law(make(build), SEQUENCE, {}, families)
    heads = [family for family in structure.families if family.kind == "head"]
    assert heads and all(family.exact for family in heads)


def test_attributes_follow_the_heads(make) -> None:
    structure = trace(make(lambda: Attention(by_hand)), SEQUENCE)
    names = {"num_heads", "num_key_heads", "inner_dim"}
    assert {(a.name, a.tensor) for a in structure.attributes} == {(name, "q.weight") for name in names}


def test_a_head_width_computed_from_the_stream_stays(make) -> None:
    """Swin in torchvision: with fewer heads, the code would make them wider."""

    def wide(s: Any, y: torch.Tensor) -> torch.Tensor:
        q, k, v = y.reshape(2, 5, 3, s.num_heads, 2 * WIDTH // s.num_heads).permute(2, 0, 3, 1, 4)
        return joined(F.scaled_dot_product_attention(q, k, v))

    structure = trace(make(lambda: Fused(wide)), SEQUENCE)
    assert structure.families == ()
    assert any("has its size written in the code" in f.reason for f in structure.frozen if f.parameter == "qkv.weight")


def test_a_number_of_heads_written_in_the_code_stays(make) -> None:
    """With the width left open, fewer heads would become narrower ones, of the same shapes in the end."""
    view = lambda y: y.view(2, 5, HEADS, -1).transpose(1, 2)  # noqa: E731
    attention = lambda s, *qkv: joined(F.scaled_dot_product_attention(*map(view, qkv)))  # noqa: E731
    structure = trace(make(lambda: Attention(attention)), SEQUENCE)
    assert not [family for family in structure.families if family.kind == "head"]


def test_layers_that_share_one_number_stay(make) -> None:
    """Two layers written flat, with one count of heads for both."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_head = HEADS
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * INNER) for _ in range(2))
            self.o = nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for qkv, o in zip(self.qkv, self.o, strict=True):
                parts = (y.view(2, 5, self.n_head, -1).transpose(1, 2) for y in qkv(x).chunk(3, -1))
                x = x + o(joined(F.scaled_dot_product_attention(*parts)))
            return x

    assert trace(make(Flat), SEQUENCE).families == ()


def test_inputs_and_buffers_are_left_alone(make) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.b(self.a(x.relu_()))

    model, x = make(Counting), SEQUENCE[0].clone()
    assert trace(model, (x,)).families
    assert torch.equal(x, SEQUENCE[0]) and not model.calls


def test_summed_axes_stay(make) -> None:
    """Attention over channels: nothing gates a channel that a product sums over."""
    build = lambda: {"q": nn.Linear(WIDTH, 8), "k": nn.Linear(WIDTH, 8), "o": nn.Linear(5, 3)}  # noqa: E731
    structure = trace(make(build, lambda s, x: s.o(s.q(x) @ s.k(x).mT)), SEQUENCE)
    assert structure.families == ()
    assert {f.reason for f in structure.frozen if f.parameter == "q.weight" and f.axis == 0} == {
        "summed over by matmul"
    }
