"""The law on random networks: programs made of the operators that have rules, shrunk to a readable list of steps.

    HAP_EXAMPLES=20000 pytest tests/structure/test_programs.py --hypothesis-show-statistics

tries more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hap.planning import CostModel, Decision, Plan
from hap.structure import trace
from hap.surgery import apply, verify
from hap.types import Budget, Structure

EXAMPLES = int(os.environ.get("HAP_EXAMPLES", "40"))
HEAD = 3


@dataclass(frozen=True)
class Step:
    """One operator: on which of the tensors that there are so far, and with which numbers."""

    name: str
    of: tuple[int, ...]
    numbers: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}{self.of}{list(self.numbers) or ''}"


class Program(nn.Module):
    """Runs the steps on the input; every step adds a tensor, the last one is classified."""

    def __init__(self, steps: list[Step], operators: dict[str, Any], stem: nn.Module) -> None:
        super().__init__()
        self.steps, self.operators, self.stem = steps, operators, stem
        widths = [8]
        self.parts = nn.ModuleList()
        for step in steps:
            parts, width = operators[step.name].make([widths[i] for i in step.of], step.numbers)
            self.parts.append(parts)
            widths.append(width)
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.stem(x)]
        for step, parts in zip(self.steps, self.parts, strict=True):
            values.append(self.operators[step.name].run(parts, *(values[i] for i in step.of), *step.numbers))
        last = values[-1]
        return self.head(last.mean((2, 3)) if last.ndim == 4 else last.mean(1))


@dataclass(frozen=True)
class Operator:
    """Modules and output width for input widths and numbers; and the computation."""

    make: Callable[[list[int], tuple[int, ...]], tuple[nn.Module, int]]
    run: Callable[..., torch.Tensor]
    arity: int = 1
    numbers: tuple[tuple[int, ...], ...] = ()
    fits: Callable[[list[int], tuple[int, ...]], bool] = lambda widths, numbers: True


def layer(make: Callable[..., nn.Module], width: Callable[..., int] | None = None, **options: Any) -> Operator:
    """A module of its own, called on one tensor."""
    return Operator(
        lambda w, n: (make(w[0], *n), w[0] if width is None else width(w[0], *n)), lambda m, x, *_: m(x), **options
    )


def function(run: Callable[..., torch.Tensor], width: Callable[..., int] | None = None, **options: Any) -> Operator:
    """No module."""
    first = lambda w, n: w[0]  # noqa: E731
    found = first if width is None else lambda w, n: width(*w, *n)
    return Operator(lambda w, n: (nn.Identity(), found(w, n)), lambda m, *values: run(*values), **options)


def same(widths: list[int], _: tuple[int, ...]) -> bool:
    return widths[0] == widths[1]


def divides(widths: list[int], numbers: tuple[int, ...]) -> bool:
    return widths[0] % numbers[-1] == 0


def excite(c: int, inner: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, inner, 1), nn.SiLU(), nn.Conv2d(inner, c, 1), nn.Sigmoid()
    )


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


OUT = (4, 6, 8)
ELEMENTWISE = {
    "relu": function(lambda x: x.relu()),
    "shifted sigmoid": function(lambda x: (x + 1).sigmoid()),
    "add": function(lambda x, y: x + y, arity=2, fits=same),
    "mul": function(lambda x, y: x * y.tanh(), arity=2, fits=same),
}
IMAGES: dict[str, Operator] = ELEMENTWISE | {
    "conv": layer(lambda c, o, k: nn.Conv2d(c, o, k, padding=k // 2), lambda c, o, k: o, numbers=(OUT, (1, 3))),
    "grouped conv": layer(
        lambda c, o, g: nn.Conv2d(c, o, 3, padding=1, groups=g), lambda c, o, g: o,
        numbers=((4, 8), (2, 4)), fits=lambda w, n: w[0] % n[1] == 0,
    ),
    "depthwise": layer(lambda c, m: nn.Conv2d(c, c * m, 3, padding=1, groups=c), lambda c, m: c * m, numbers=((1, 2),)),
    "transposed": layer(lambda c, o: nn.ConvTranspose2d(c, o, 3, padding=1), lambda c, o: o, numbers=(OUT,)),
    "batch norm": layer(nn.BatchNorm2d),
    "group norm": layer(lambda c, g: nn.GroupNorm(g, c), numbers=((2,),), fits=divides),
    "pool": layer(lambda c: nn.AvgPool2d(3, 1, 1)),
    "prelu": layer(nn.PReLU),
    "cat": function(lambda x, y: torch.cat([x, y], 1), lambda a, b: a + b, arity=2),
    "first half": function(lambda x: x.chunk(2, 1)[0], lambda c: c // 2, fits=lambda w, n: w[0] % 2 == 0),
    "gated halves": function(lambda x: F.glu(x, 1), lambda c: c // 2, fits=lambda w, n: w[0] % 2 == 0),
    "shuffle": function(shuffle, lambda c, g: c, numbers=((2,),), fits=divides),
    "pad": function(lambda x, n: F.pad(x, (0, 0, 0, 0, n, n)), lambda c, n: c + 2 * n, numbers=((1, 2),)),
    "tail": function(lambda x: x[:, 2:], lambda c: c - 2, fits=lambda w, n: w[0] > 3),
    "excite": Operator(lambda w, n: (excite(w[0], n[0]), w[0]), lambda m, x, *_: x * m(x), numbers=((2, 4),)),
}  # fmt: skip


class Attention(nn.Module):
    """Attention with an own number of key heads, in one of several ways to write it."""

    def __init__(self, width: int, heads: int, key_heads: int, style: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads, self.style = heads, key_heads, style
        self.q, self.o = nn.Linear(width, HEAD * heads), nn.Linear(HEAD * heads, width)
        self.kv = nn.Linear(width, 2 * HEAD * key_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(*x.shape[:2], self.num_heads, HEAD).transpose(1, 2)
        if self.style == 0:
            k, v = self.kv(x).chunk(2, -1)
            k, v = (y.view(*x.shape[:2], -1, HEAD).transpose(1, 2) for y in (k, v))
        else:
            k, v = self.kv(x).reshape(*x.shape[:2], 2, self.num_key_heads, HEAD).permute(2, 0, 3, 1, 4)
        if self.style == 1:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
            y = (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


TOKENS: dict[str, Operator] = ELEMENTWISE | {
    "linear": layer(nn.Linear, lambda c, o: o, numbers=(OUT,)),
    "layer norm": layer(nn.LayerNorm),
    "attention": layer(
        Attention, lambda c, *_: c, numbers=((2, 4), (1, 2), (0, 1, 2)), fits=lambda w, n: n[0] % n[1] == 0
    ),
    "torch attention": Operator(
        lambda w, n: (nn.MultiheadAttention(w[0], 2, batch_first=True), w[0]),
        lambda m, x: m(x, x, x, need_weights=False)[0], fits=lambda w, n: w[0] % 2 == 0,
    ),
    "gated mlp": layer(GatedMLP, lambda c, i: c, numbers=((4, 6),)),
    "cat": function(lambda x, y: torch.cat([x, y], -1), lambda a, b: a + b, arity=2),
    "longer": function(lambda x, y: torch.cat([x, y], 1).mean(1, keepdim=True) + x, arity=2, fits=same),
    "gated halves": function(lambda x: F.glu(x, -1), lambda c: c // 2, fits=lambda w, n: w[0] % 2 == 0),
    "flip positions": function(lambda x: x.flip(1)),
}  # fmt: skip


@st.composite
def programs(draw: st.DrawFn, operators: dict[str, Operator]) -> list[Step]:
    """Steps whose widths fit; later tensors are likelier to be read."""
    widths, steps = [8], []
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(sorted(operators)))
        found = operators[name]
        of = tuple(len(widths) - 1 - draw(st.integers(0, min(3, len(widths) - 1))) for _ in range(found.arity))
        numbers = tuple(draw(st.sampled_from(choices)) for choices in found.numbers)
        read = [widths[i] for i in of]
        if found.fits(read, numbers):
            steps.append(Step(name, of, numbers))
            widths.append(found.make(read, numbers)[1])
    return steps


def random_plan(structure: Structure, seed: int) -> Plan:
    """Prunes up to half of each exact family."""
    generator = np.random.default_rng(seed)
    decisions, masks = {}, {}
    for family in structure.families:
        count = int(generator.integers(0, family.size // 2 + 1)) if family.exact else 0
        gone = sorted(generator.permutation(family.size)[:count].tolist())
        kept = tuple(i for i in range(family.size) if i not in gone)
        decisions[family.name] = Decision(kept, tuple(gone))
        masks[family.name] = np.isin(np.arange(family.size), gone)
    cost = CostModel(structure)
    return Plan(structure, decisions, {}, Budget(params=1.0), "random", cost.dense, cost(masks, {}))


def check(steps: list[Step], operators: dict[str, Operator], stem: nn.Module, x: torch.Tensor, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Program(steps, operators, stem).double().eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.rand_like(tensor) + 0.5 if name.endswith("var") else 0.7 * torch.randn_like(tensor)
    structure = trace(model, (x,))
    plan = random_plan(structure, seed)
    small = apply(model, plan)
    found = verify(model, small, plan, (x,))
    assert found.ok, (found, [(f.name, f.size) for f in structure.families])
    small.train()(x).sum().backward()


RUN = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@RUN
@given(programs(IMAGES), st.integers(0, 99))
def test_convolutional_programs(steps: list[Step], seed: int) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(steps, IMAGES, nn.Conv2d(3, 8, 3, padding=1), x, seed)


@RUN
@given(programs(TOKENS), st.integers(0, 99))
def test_programs_on_tokens(steps: list[Step], seed: int) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(steps, TOKENS, nn.Linear(4, 8), x, seed)
