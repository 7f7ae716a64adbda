"""The law on operators that rearrange, combine, summarise or copy channels, and on forms of inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(3))


def conv(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def between(
    function: Callable[[Any, torch.Tensor], torch.Tensor], families: str = "a:16 d:8", read: int = 16, **parts: Any
) -> tuple[Any, Any, str]:
    """A case with a function between two convolutions, the first with 16 channels, the second reading `read`."""

    def build() -> dict[str, Any]:
        made = {name: part() for name, part in parts.items()}
        return {"a": conv(3, 16), "n": nn.BatchNorm2d(16), "d": conv(read, 8), "fc": nn.Linear(8, 5), **made}

    return build, lambda s, x: s.fc(s.d(function(s, s.n(s.a(x)))).relu().mean((2, 3))), families


def inplace(s: Any, y: torch.Tensor) -> torch.Tensor:
    z = s.b(y.relu_())
    z += y
    return y + z.mul_(0.5).sigmoid_()


def under_modes(s: Any, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        y = s.b(y.relu())
    with torch.enable_grad():
        return s.c(y)


def halves(y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, 1)
    return a * b.sigmoid()


def statistics(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    flat = y.flatten(2)
    parts = [y.mean((2, 3)), y.std((2, 3)), flat.max(2)[0], flat.topk(3, dim=2)[0].mean(2), flat.sort(2)[0][..., 0]]
    return s.fc(torch.cat([*parts, flat.argmax(2).to(x.dtype), flat.logsumexp(-1), flat.norm(dim=2)], 1))


def tokens(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x).movedim(1, -1)
    return s.c(s.b(y.flatten(1, 2)).relu()).mean(1)


def qkv(s: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = s.a(x).unflatten(-1, (3, -1)).unbind(-2)
    return s.b((q * k).tanh() * v)


def auxiliary(s: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = s.a(x).relu()
    out = {"out": s.fc(s.b(y).relu().mean((2, 3)))}
    return {**out, "aux": s.aux(y)} if s.training else out


CASES: dict[str, tuple[Any, Any, str]] = {
    # parameters and buffers that meet channels
    "scale and shift": between(
        lambda s, y: y * s.p + s.q, p=lambda: parameter(16, 1, 1), q=lambda: parameter(1, 16, 1, 1),
    ),
    "scalar parameter": between(lambda s, y: y * s.p, p=lambda: parameter(1)),
    "parameter in a view": between(lambda s, y: y * s.p[None, :, None, None].exp(), p=lambda: parameter(16)),
    "row of a parameter": between(lambda s, y: y * s.p[1].view(1, -1, 1, 1), p=lambda: parameter(2, 16)),
    "parameter per place": between(lambda s, y: y * s.p, p=lambda: parameter(8, 8), families="a:16 d:8"),
    "parameter per element": between(lambda s, y: y * s.p, p=lambda: parameter(16, 8, 8)),
    "buffers": between(
        lambda s, y: (y - s.p) / s.q, p=lambda: torch.randn(1, 16, 1, 1), q=lambda: torch.ones(1, 16, 1, 1) * 2,
    ),
    "like": between(lambda s, y: torch.where(y > 0, y, torch.zeros_like(y)) + torch.full_like(y, 0.3)),
    "new tensors": between(lambda s, y: y * y.new_ones(1, 1, 8, 8)),
    # element-wise, in place, and under other modes
    "clamp and compare": between(lambda s, y: y.clamp(-1, 3) + (y > 0).to(y.dtype) + torch.maximum(y, -y).type_as(y)),
    "in place": between(inplace, b=lambda: conv(16, 16)),
    "autocast and grad modes": between(
        under_modes, "a:16 b:12 c:16 d:8", b=lambda: conv(16, 12), c=lambda: conv(12, 16)
    ),
    "matrices transposed": between(lambda s, y: y.flatten(2).mT.softmax(1).mT.reshape_as(y) * 50),
    "appended to an empty cache": between(lambda s, y: torch.cat([torch.tensor([]), y], dim=-2)),
    # cuts
    "first channels": between(lambda s, y: torch.cat([y[:, :5].relu(), y[:, 5:]], 1), "a:11 d:8"),
    "last channels": between(lambda s, y: y[:, 8:], "a:8 d:8", read=8),
    "all but the last channels": between(lambda s, y: y[:, :-4], "a:12 d:8", read=12),
    "once more the last channels": between(lambda s, y: torch.cat([y, y[:, -4:]], 1), "a:12 d:8", read=20),
    "places": between(lambda s, y: y[:, :, 1:-1, ::2] + y[..., 2:, 1::2], families="a:16 d:8"),
    "chunks": between(lambda s, y: halves(y), "a:8 d:8", read=8),
    "uneven use of chunks": between(
        lambda s, y: torch.cat([t.relu() for t in y.chunk(4, 1)][:3], 1), "a:4 d:8", read=12,
    ),
    "glu": between(lambda s, y: F.glu(y, 1), "a:8 d:8", read=8),
    "unbind places": between(lambda s, y: torch.stack([t * 2 for t in y.unbind(-1)], -1)),
    "unbind groups": (lambda: {"a": nn.Linear(8, 24), "b": nn.Linear(8, 3)}, qkv, "a:8"),
    # joins
    "concatenated with itself": between(lambda s, y: torch.cat([y, y.relu()], 1), read=32),
    "concatenated with the input": (
        lambda: {"a": conv(3, 5), "n": conv(8, 8, groups=8), "b": conv(8, 3)},
        lambda s, x: s.b(s.n(torch.cat([s.a(x), x], 1))),
        "a:5",
    ),
    "concatenated places": between(lambda s, y: torch.cat([torch.cat([y, -y], 3), torch.cat([y, y], 3)], 2)),
    "stacked and summed": between(lambda s, y: torch.stack([y, s.b(y)], 0).sum(0), b=lambda: conv(16, 16)),
    "stacked into channels": between(lambda s, y: torch.stack([y, y.tanh()], 2).flatten(1, 2), read=32),
    "repeated": between(lambda s, y: y.repeat(1, 2, 1, 1), read=32),
    "interleaved": between(lambda s, y: y.repeat_interleave(2, 1), read=32),
    "expanded": between(lambda s, y: y * s.p(y).sigmoid().expand_as(y), p=lambda: nn.Conv2d(16, 1, 1)),
    # views and permutations
    "pixel shuffle": between(lambda s, y: F.pixel_shuffle(y, 2), "a:4 d:8", read=4),
    "pixel unshuffle": between(lambda s, y: F.pixel_unshuffle(y, 2), read=64),
    "space to depth": between(lambda s, y: torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2]], 1), read=32),
    "shuffle": between(lambda s, y: y.reshape(2, 4, -1, 8, 8).transpose(1, 2).flatten(1, 2), "a:4 d:8"),
    "shuffle, open groups": between(lambda s, y: y.reshape(2, -1, 4, 8, 8).transpose(1, 2).flatten(1, 2), "a:4 d:8"),
    "maxout over groups": between(lambda s, y: y.view(2, 4, -1, 8, 8).max(1)[0], "a:4 d:8", read=4),
    "maxout in groups": between(lambda s, y: y.view(2, -1, 4, 8, 8).amax(2), "a:4 d:8", read=4),
    "softmax over places": between(lambda s, y: y.flatten(2).softmax(-1).view_as(y) * 50),
    "softmax over groups": between(lambda s, y: y.view(2, 2, -1, 8, 8).softmax(1).flatten(1, 2), "a:8 d:8"),
    "height and width swapped": between(lambda s, y: y.transpose(2, 3).permute(0, 1, 3, 2).transpose(-1, -2)),
    "rolled and flipped places": between(lambda s, y: y.roll((1, 2), (2, 3)) + y.flip(2, 3)),
    "sampled": between(lambda s, y: F.grid_sample(y, torch.zeros(2, 8, 8, 2, dtype=y.dtype), align_corners=False)),
    "normalised places": between(
        lambda s, y: y / y.norm(dim=(2, 3), keepdim=True) - torch.var_mean(y, (2, 3), keepdim=True)[1],
    ),
    "tokens": (
        lambda: {"a": conv(3, 16), "b": nn.Linear(16, 12), "c": nn.Linear(12, 5)}, tokens, "a:16 b:12",
    ),
    "flattened, channels last": (
        lambda: {"a": conv(3, 8), "fc": nn.Linear(512, 5)},
        lambda s, x: s.fc(s.a(x).permute(0, 2, 3, 1).flatten(1)),
        "a:8",
    ),
    "batch norm of tokens": (
        lambda: {"a": nn.Linear(8, 12), "n": nn.BatchNorm1d(12), "b": nn.Linear(12, 5)},
        lambda s, x: s.b(s.n(s.a(x).transpose(1, 2)).transpose(1, 2).relu()),
        "a:12",
    ),
    "batch norm over tokens": (
        lambda: {"a": nn.Linear(8, 12), "n": nn.BatchNorm1d(7), "b": nn.Linear(12, 5)},
        lambda s, x: s.b(s.n(s.a(x)).relu()),
        "a:12",
    ),
    "statistics of places": (lambda: {"a": conv(3, 8), "fc": nn.Linear(64, 5)}, statistics, "a:8"),
    # inputs and outputs
    "several inputs": (
        lambda: {"a": conv(3, 8), "b": nn.Linear(8, 10), "fc": nn.Linear(26, 5)},
        lambda s, x, y: s.fc(torch.cat([s.a(x).relu().mean((2, 3)), s.b(y).relu(), y], 1)),
        "a:8 b:10",
    ),
    "keyword inputs": (
        lambda: {"a": conv(3, 8), "b": conv(8, 2)},
        lambda s, x, mask=None, unused=None: s.b((s.a(x) * mask).relu()),
        "a:8",
    ),
    "several outputs, one in the middle": (
        lambda: {"a": conv(3, 8), "b": conv(8, 6), "c": conv(6, 2), "d": conv(6, 3)},
        lambda s, x: (s.c(z := s.b((y := s.a(x)).relu())), [y], {"d": s.d(z)}),
        "b:6",
    ),
    "scalar output": (lambda: {"a": conv(3, 8), "b": conv(8, 8)}, lambda s, x: s.b(s.a(x).relu()).mean(), "a:8"),
    "unbatched": (lambda: {"a": conv(3, 8), "b": conv(8, 2)}, lambda s, x: s.b(s.a(x).relu()), "a:8"),
    "parts that are not called": between(lambda s, y: y, unused=lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))),
    "auxiliary head in training": (
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "aux": nn.Sequential(conv(8, 6), conv(6, 2)), "fc": nn.Linear(8, 5)},
        auxiliary,
        "a:8 b:8",
    ),
}  # fmt: skip

ARGS: dict[str, tuple[Any, ...]] = {
    "unbind groups": (image(2, 5, 8),),
    "batch norm of tokens": (image(2, 7, 8),),
    "batch norm over tokens": (image(2, 7, 8),),
    "several inputs": (image(), image(2, 8)),
    "unbatched": (image(3, 8, 8),),
}
KWARGS = {"keyword inputs": {"mask": image(2, 1, 8, 8)}}


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str, make, law) -> None:
    build, forward, families = CASES[name]
    law(make(build, forward), ARGS.get(name, (image(),)), KWARGS.get(name, {}), families)
