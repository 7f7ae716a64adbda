"""Whether a model's own code bears fewer heads of values than of keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.errors import HapError
from hap.implants import VALUES, head_options, heads_of, narrow_heads
from hap.implants.tried import bears

HEADS, WIDTH, INPUTS = 4, 8, 12


class Turned(nn.Module):
    """Attention with rotary positions; `kind` says how it counts its heads."""

    def __init__(self, kind: str = "free", groups: int = 1) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        self.q = nn.Linear(INPUTS, HEADS * WIDTH)
        self.k, self.v = (nn.Linear(INPUTS, HEADS * WIDTH // groups) for _ in range(2))
        self.o = nn.Linear(HEADS * WIDTH, INPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = (self.q, self.k, self.v) if self.kind != "values first" else (self.v, self.k, self.q)
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in order)
        if self.kind == "values first":
            q, v = v, q
        if self.kind == "activated":
            v = v.relu()
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        q, k = (y * angle.cos() + y.roll(WIDTH // 2, -1) * angle.sin() for y in (q, k))
        if self.groups > 1:
            k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        if self.kind == "shaped like keys":
            v = v.reshape(k.shape)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if self.kind == "gated by queries":
            y = y * q.transpose(1, 2).sigmoid().mean(-1, keepdim=True)
        if self.kind == "by name":
            return F.linear(y.flatten(2), weight=self.o.weight, bias=self.o.bias)
        return self.o(y.flatten(2))


def build(*kinds: str, groups: int = 1) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = [Turned(kind, groups) for kind in kinds]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * INPUTS, 3)).double().eval()
        return net, torch.randn(16, 6, INPUTS, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2])
def test_only_modules_that_bear_it_are_offered(groups: int) -> None:
    """Each is tried alone where not all run; the model stays as it is."""
    net, x = build("free", "shaped like keys", "free", groups=groups)
    structure, before = hap.trace(net, (x,)), net(x)
    sites = heads_of(structure)
    assert list(sites) == ["0", "1", "2"] and {heads.group for heads in sites.values()} == {groups}
    assert list(bears(net, sites, (x, None))) == ["0", "2"] and list(bears(net, {"1": sites["1"]}, (x, None))) == []
    options = head_options(net, structure, [(x, None)])
    assert {name: {option.form for option in found} for name, found in options.items()} == {
        "0": {VALUES},
        "2": {VALUES},
    }
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("kind", ["activated", "gated by queries", "values first"])
def test_what_stands_between_is_looked_up_on_the_data(kind: str) -> None:
    """Where values are not what the last of three linear layers gives, or contexts not what the output layer reads."""
    net, x = build(kind)
    assert head_options(net, hap.trace(net, (x,)), [(x, None)]) == {}


def test_linear_layers_called_by_name() -> None:
    net, x = build("by name")
    structure = hap.trace(net, (x,))
    assert {option.form for option in head_options(net, structure, [(x, None)])["0"]} == {VALUES}


def test_why_a_module_is_left_out_is_logged(caplog) -> None:
    net, x = build("shaped like keys", "activated")
    with caplog.at_level("INFO", "hap"):
        assert head_options(net, hap.trace(net, (x,)), [(x, None)]) == {}
    assert "in '0': RuntimeError: shape" in caplog.text
    assert "the heads of '1' cannot become narrow: its key, query, value are not" in caplog.text


def test_a_lack_of_memory_says_nothing_of_the_code(monkeypatch) -> None:
    net, x = build("free")
    sites = heads_of(hap.trace(net, (x,)))

    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Turned, "forward", short)
    with pytest.raises(torch.OutOfMemoryError):
        bears(net, sites, (x, None))


def test_a_plan_for_values_of_another_layer_is_refused() -> None:
    net, x = build("values first")
    heads = heads_of(hap.trace(net, (x,)))["0"]
    with pytest.raises(HapError, match="not what the last of three linear layers gives"):
        narrow_heads(net, {"0": (heads, VALUES, 4)}, [(x, None)])


def test_what_is_offered_runs() -> None:
    net, x = build("free", "free", groups=2)
    structure = hap.trace(net, (x,))
    plan = hap.decide(
        structure,
        hap.measure(net, [(x, torch.arange(16) % 3)], None, structure, criterion="magnitude"),
        hap.Budget(heads=0.8),
        options=head_options(net, structure, [(x, None)]),
        mode="optimal",
        floor=2,
    )
    assert {implant.form for implant in plan.implants.values()} == {VALUES}
    small = hap.apply(net, plan, [(x, None)])
    assert hap.verify(net, small, plan, (x,)).ok
