"""What the trace refuses to guess, how it says so, and that it leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hap.errors import HapError
from hap.structure import trace
from hap.types import IGNORED, Structure

IMAGE = torch.zeros(2, 3, 8, 8)


def conv(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


def reasons(structure: Structure, parameter: str, axis: int) -> set[str]:
    return {f.reason for f in structure.frozen if (f.parameter, f.axis) == (parameter, axis)}


def alone(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    return s.b(torch.cat([y, y[:, 15:16]], 1))


# Operators on the 16 channels of `a`, and a word of the reason why these must stay. `b` reads what comes out.
FREEZES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "no rule": (lambda s, y: torch.fft.fft2(y).real, "no rule for operator aten.fft_fft2"),
    "index": (lambda s, y: y[:, [3, 1, 2]], "positions picked by index"),
    "no rule, assignment": (lambda s, y: torch.zeros_like(y).copy_(y), "no rule for operator aten.copy_"),
    "no rule, ellipsis": (
        lambda s, y: torch.einsum("nc...,cd->nd...", y, torch.eye(16)), "no rule for operator aten.einsum",
    ),
    "einsum with a constant": (lambda s, y: torch.einsum("nchw,cd->ndhw", y, torch.eye(16)), "summed over by einsum"),
    "sum": (lambda s, y: y - y.sum(1, keepdim=True), "sum runs over them"),
    "max with indices": (lambda s, y: y * y.max(1, keepdim=True)[0], "max runs over them"),
    "softmax": (lambda s, y: y.softmax(1), "softmax runs over them"),
    "topk": (lambda s, y: y.topk(2, 1)[0], "topk runs over them"),
    "sort": (lambda s, y: y.sort(1)[0], "sort runs over them"),
    "cumsum": (lambda s, y: y.cumsum(1), "cumsum runs over them"),
    "roll": (lambda s, y: y.roll(1, 1), "moved by roll"),
    "roll everything": (lambda s, y: y.roll(5), "moved by roll"),
    "flip": (lambda s, y: y.flip(1), "moved by flip"),
    "split": (lambda s, y: y.split(10, 1)[0], "uneven pieces by split"),
    "split into numbers": (lambda s, y: y.split((10, 6), 1)[0], "has its size written in the code: RuntimeError"),
    "split at a number": (lambda s, y: y.split(8, 1)[0], "has its size written in the code: RuntimeError"),
    "split and joined": (lambda s, y: torch.cat([p.relu() for p in y.split(8, 1)], 1), "changes a size inside"),
    "split at positions": (lambda s, y: y.tensor_split((8,), 1)[0], "cut at constant positions by tensor_split"),
    "index from units": (
        lambda s, y: y + torch.ones(2, 16)[(y > 0).long()].mean(-1), "used as an index",
    ),
    "uneven chunks": (lambda s, y: y.chunk(3, 1)[0], "uneven pieces"),
    "first channels": (lambda s, y: y[:, :8], "cut at constant positions by slice"),
    "last channels from the back": (lambda s, y: y[:, -8:-1], "cut at constant positions by slice"),
    "every other channel": (lambda s, y: y[:, ::2], "cut at constant positions by slice"),
    "one channel": (lambda s, y: y[:, 3].unsqueeze(1), "one position is taken by select"),
    "unbind": (lambda s, y: y.unbind(1)[0].unsqueeze(1), "taken apart by unbind"),
    "constant by channel": (lambda s, y: y + torch.arange(16.0).view(1, -1, 1, 1), "tensor of fixed size by add"),
    "expanded to a number": (lambda s, y: y * y.new_ones(1, 1, 1, 1).expand(-1, 16, -1, -1), "tensor of fixed size"),
    "groups of a function": (
        lambda s, y: F.conv2d(y, s.each, groups=16), "number of groups is written outside",
    ),
    "groups of a constant": (
        lambda s, y: y + F.conv2d(y, torch.ones(16, 1, 1, 1), groups=16), "number of groups is written outside",
    ),
    "weight in a buffer": (lambda s, y: F.conv2d(y, s.fixed), "a weight that is a buffer"),
}  # fmt: skip


@pytest.mark.parametrize("name", FREEZES)
def test_what_is_not_known_stays_and_says_why(name: str, make) -> None:
    function, reason = FREEZES[name]
    parts = lambda: {"a": conv(3, 16), "fixed": torch.ones(6, 16, 1, 1), "each": nn.Parameter(torch.ones(16, 1, 1, 1))}  # noqa: E731
    width = make(parts, lambda s, x: function(s, s.a(x)))(IMAGE).shape[1]
    model = make(lambda: {**parts(), "b": conv(width, 4)}, lambda s, x: s.b(function(s, s.a(x))))
    structure = trace(model, (IMAGE,))
    assert not any(m.parameter == "a.weight" for f in structure.families for m in f.members)
    assert any(reason in found for found in reasons(structure, "a.weight", 0))


def test_a_position_cut_out_alone_stays(make) -> None:
    structure = trace(make(lambda: {"a": conv(3, 16), "b": conv(17, 4)}, alone), (IMAGE,))
    assert structure.families == ()
    assert "cut out alone by slice" in reasons(structure, "a.weight", 0)


def test_inputs_and_outputs_stay() -> None:
    structure = trace(nn.Sequential(conv(3, 8), conv(8, 5)), (IMAGE,))
    assert reasons(structure, "0.weight", 1) == {"reads an input of fixed size"}
    assert reasons(structure, "1.weight", 0) == {"the model's output"}


def test_multihead_attention_with_extra_keys_stays(make) -> None:
    model = make(
        lambda: {
            "a": nn.Linear(6, 8),
            "m": nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True),
            "b": nn.Linear(8, 3),
        },
        lambda s, x: s.b(s.m(y := s.a(x), y, y)[0]),
    )
    structure = trace(model, (torch.zeros(2, 5, 6),))
    assert structure.families == ()
    assert any("bias of keys" in found for found in reasons(structure, "m.out_proj.weight", 0))


@pytest.mark.parametrize("function", [lambda y: y - y.mean(1, keepdim=True), lambda y: F.normalize(y, dim=1)])
def test_moments_over_units_are_inexact(function, make) -> None:
    structure = trace(make(lambda: {"a": conv(3, 8), "b": conv(8, 4)}, lambda s, x: s.b(function(s.a(x)))), (IMAGE,))
    assert [(f.name, f.exact) for f in structure.families] == [("a", False)]


def test_layer_norm_without_weight_stays(make) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)))
    structure = trace(model, (torch.zeros(2, 4),))
    assert structure.families == ()
    assert reasons(structure, "0.weight", 0) == {"layer_norm without a weight has their number written down"}


def test_unused_parameters_are_reported(make) -> None:
    model = make(lambda: {"a": conv(3, 8), "b": conv(8, 2), "c": conv(8, 8)}, lambda s, x: s.b(s.a(x)))
    structure = trace(model, (IMAGE,))
    unused = {f.parameter for f in structure.frozen if f.reason == "not used in the forward pass"}
    assert unused == {"c.weight", "c.bias"}


def test_parameters_of_one_element_count_as_used(make) -> None:
    model = make(
        lambda: {"a": conv(3, 8), "b": conv(8, 2), "p": nn.Parameter(torch.ones(1)), "q": nn.Parameter(torch.ones(()))},
        lambda s, x: s.b(s.a(x) * s.p * s.q),
    )
    assert not any("not used" in f.reason for f in trace(model, (IMAGE,)).frozen)


def test_an_auxiliary_head_follows_what_it_reads(make) -> None:
    model = make(
        lambda: {"a": conv(3, 8), "b": conv(8, 2), "aux": conv(8, 4)},
        lambda s, x: (s.b(y := s.a(x)), s.aux(y)) if s.training else s.b(y := s.a(x)),
    )
    structure = trace(model, (IMAGE,))
    assert {(m.parameter, m.axis) for m in structure.family("a").roles("consumer")} == {
        ("b.weight", 1),
        ("aux.weight", 1),
    }
    assert structure.layer("aux").positions == 0


def test_families_come_in_forward_order(make) -> None:
    model = make(lambda: {"z": conv(4, 2), "b": conv(8, 4), "a": conv(3, 8)}, lambda s, x: s.z(s.b(s.a(x))))
    assert [f.name for f in trace(model, (IMAGE,)).families] == ["a", "b"]


def test_roles_and_axes() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    (family,) = trace(model, (IMAGE,)).families
    assert {(m.parameter, m.axis, m.role) for m in family.members} == {
        ("0.weight", 0, "producer"), ("0.bias", 0, "follower"), ("3.weight", 1, "consumer"),
        *((f"1.{name}", 0, "follower") for name in ("weight", "bias", "running_mean", "running_var")),
    }  # fmt: skip
    assert (family.kind, family.size, family.exact) == ("channel", 8, True)
    assert all(m.indices == tuple((i,) for i in range(8)) for m in family.members)


def test_flattened_channels_take_a_run_of_columns() -> None:
    structure = trace(nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(512, 2)), (IMAGE,))
    (consumer,) = structure.families[0].roles("consumer")
    assert consumer.indices[1] == tuple(range(64, 128))


def test_costs_are_for_one_sample() -> None:
    structure = trace(nn.Sequential(conv(3, 8), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)), (IMAGE,))
    assert [(layer.module, layer.positions, layer.kernel) for layer in structure.layers] == [
        ("0", 64, (3, 3)), ("1", 9, (3, 3)), ("3", 1, ()),
    ]  # fmt: skip


def test_products_with_parameters_are_counted(make) -> None:
    model = make(
        lambda: {"p": nn.Parameter(torch.randn(8, 6)), "q": nn.Parameter(torch.randn(5, 4)), "b": nn.Linear(6, 2)},
        lambda s, x: s.b(s.q @ (x @ s.p).relu()),
    )
    structure = trace(model, (torch.randn(3, 4, 8),))
    assert [(layer.weight, layer.output_axis, layer.filters, layer.positions) for layer in structure.layers] == [
        ("p", 1, 6, 4), ("q", 0, 5, 6), ("b.weight", 0, 2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["body.1", "body.*", "b?dy.1", "*"])
def test_ignored_modules_stay(make, pattern: str) -> None:
    model = make(
        lambda: {"a": conv(3, 8), "body": nn.Sequential(conv(8, 6), conv(6, 8)), "b": conv(8, 2)},
        lambda s, x: s.b(s.body(s.a(x))),
    )
    structure = trace(model, (IMAGE,), ignore=[pattern])
    assert not any(m.parameter.startswith("body.1") for f in structure.families for m in f.members)
    assert IGNORED in reasons(structure, "body.1.weight", 0)


def test_ignoring_a_module_holds_the_weight_that_it_shares(make) -> None:
    def parts() -> dict[str, nn.Module]:
        found = {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 8), "d": conv(8, 2)}
        found["c"].weight = found["b"].weight
        return found

    model = make(parts, lambda s, x: s.d(s.c(s.b(s.a(x)))))
    assert [f.name for f in trace(model, (IMAGE,)).families] == ["a"]
    assert trace(model, (IMAGE,), ignore=["c"]).families == ()


def test_a_name_to_ignore_must_match() -> None:
    with pytest.raises(HapError, match="unknown module to ignore 'bodi'"):
        trace(nn.Sequential(conv(3, 8), conv(8, 2)), (IMAGE,), ignore=["bodi"])


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda s, x: s.a(x) if x.sum() > 0 else x, "if x.sum() > 0"),
        (lambda s, x: s.a(x).repeat(int(x.max()), 1, 1, 1), "int(x.max())"),
    ],
)
def test_a_model_that_branches_by_values_is_refused_where_it_does(function, line, make, capfd) -> None:
    with pytest.raises(HapError, match="Net branches, loops or takes a size by the values of tensors") as caught:
        trace(make(lambda: {"a": conv(3, 8)}, function), (IMAGE,))
    assert "test_trace.py:" in caught.value.what and line in caught.value.what
    assert "def forward" not in capfd.readouterr().err  # torch.export prints its graph


def test_a_model_that_cannot_be_exported_is_refused(make) -> None:
    with pytest.raises(HapError, match=r"could not trace Net, at .*test_trace.py:\d+ in .*numpy\(\)"):
        trace(make(lambda: {"a": conv(3, 8)}, lambda s, x: torch.from_numpy(s.a(x).numpy())), (IMAGE,))


def test_what_has_a_size_that_depends_on_data_stays(make) -> None:
    def picked(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.d(s.c(s.a(x).mean((2, 3))).relu())
        return s.b(y[x[:, 0, 0, 0] > 0.5])

    layers = lambda: {"a": conv(3, 8), "c": nn.Linear(8, 7), "d": nn.Linear(7, 6), "b": nn.Linear(6, 2)}  # noqa: E731
    structure = trace(make(layers, picked), (torch.rand(2, 3, 8, 8),))
    assert {f.name for f in structure.families} == {"a", "c"}
    assert any("a size that depends on data" in reason for reason in reasons(structure, "d.weight", 0))


def test_the_model_is_left_alone(make) -> None:
    """Modes, statistics, gradients and hooks, also after the second graph, in training mode."""
    model = make(
        lambda: {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 2), "unused": conv(8, 4)},
        lambda s, x: s.b(s.n(s.a(x))),
    )
    model(IMAGE + 1).sum().backward()
    model.n.eval()
    handle = model.a.register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    trace(model, (IMAGE,))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        want = gradients[name]
        assert parameter.grad is None if want is None else torch.equal(parameter.grad, want)
    assert list(model.a._forward_hooks) == [handle.id]


def test_code_that_refuses_zeros_is_traced(make) -> None:
    def lively(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.a(x)
        if not torch.compiler.is_exporting() and not y.any():
            raise ValueError("nothing there")
        return s.b(y)

    structure = trace(make(lambda: {"a": conv(3, 8), "b": conv(8, 4)}, lively), (IMAGE,))
    assert structure.families == ()  # it cannot be tried, which needs zeros
    assert any("nothing there" in reason for reason in reasons(structure, "a.weight", 0))


def test_says_that_the_small_model_may_not_train_where_training_has_no_graph(make, caplog) -> None:
    def branching(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.a(x)
        return s.aux(y) if s.training and x.sum() > 0 else s.b(y)

    model = make(lambda: {"a": conv(3, 8), "b": conv(8, 4), "aux": conv(8, 4)}, branching)
    assert [family.name for family in trace(model, (IMAGE,)).families] == ["a"]
    assert "may only serve for inference" in caplog.text and "x.sum() > 0" in caplog.text
