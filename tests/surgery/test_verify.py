"""`verify` must see what is wrong: each kind of damage to a correct small model is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import hap
from hap.errors import HapError
from hap.planning import CostModel, Decision, Implant, Plan
from hap.structure import trace
from hap.surgery import apply, merge, verify
from hap.surgery.verify import _relative_error
from hap.types import Budget, Cost


def test_a_correct_model_passes(net, plan, image) -> None:
    found = verify(net, apply(net, plan, [(image, None)]), plan, (image,))
    assert found.ok
    assert found.max_relative_error < 1e-12
    assert found.params == found.promised_params == plan.small.params


@pytest.mark.parametrize("name", ["stem.dense.weight", "norm.running_mean", "depthwise.bias", "fc.weight"])
def test_a_changed_tensor_is_found(net, plan, image, name: str) -> None:
    small = apply(net, plan)
    tensor = dict((*small.named_parameters(), *small.named_buffers()))[name]
    tensor.data = tensor.data + 1e-3
    found = verify(net, small, plan, (image,))
    assert not found.ok
    assert found.max_relative_error > 1e-7


def test_channels_in_a_wrong_order_are_found(net, plan, image) -> None:
    small = apply(net, plan)
    small.depthwise.weight.data = small.depthwise.weight.data.flip(0)
    assert not verify(net, small, plan, (image,)).ok


def test_nan_is_found(net, plan, image) -> None:
    small = apply(net, plan)
    small.fc.bias.data[0] = torch.nan
    found = verify(net, small, plan, (image,))
    assert not found.ok
    assert found.max_relative_error == float("inf")


def test_a_broken_promise_is_found(net, plan, image) -> None:
    promised = dataclasses.replace(plan, small=Cost(plan.small.params - 1, plan.small.macs))
    found = verify(net, apply(net, plan), promised, (image,))
    assert not found.ok
    assert found.max_relative_error < 1e-12


def test_the_tolerance_decides(net, plan, image) -> None:
    small = apply(net, plan)
    small.fc.bias.data += 1e-3
    assert not verify(net, small, plan, (image,)).ok
    assert verify(net, small, plan, (image,), tolerance=0.1).ok


def test_models_and_modes_are_left_alone(net, plan, image) -> None:
    small = apply(net, plan)
    before = {name: tensor.clone() for m in (net, small) for name, tensor in m.state_dict().items()}
    verify(net, small, plan, (image,))
    assert all(torch.equal(before[name], tensor) for m in (small,) for name, tensor in m.state_dict().items())
    assert {p.dtype for m in (net, small) for p in m.parameters()} == {torch.float32}
    assert all(module.training for m in (net, small) for module in m.modules())


class Fixed(nn.Module):
    """A forward pass that holds on to the dense size in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.fc = nn.Linear(8 * 16, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        if self.way == "view":
            return self.fc(y.view(-1, 8 * 16))
        if self.way == "assert":
            assert y.shape[1] == 8, "eight channels"
        if self.way == "lookup":
            y = y * {8: 1.0}[y.shape[1]]
        return self.b(y)


@pytest.mark.parametrize(
    ("way", "text"), [("view", "RuntimeError"), ("assert", "eight channels"), ("lookup", "KeyError: 6")]
)
def test_a_written_size_is_an_error_with_a_remedy(way: str, text: str, image) -> None:
    model = Fixed(way)
    assert trace(model, (image,)).families == ()
    structure = trace(Fixed("not"), (image,))  # as if the trial had not seen it
    dense = CostModel(structure).dense
    plan = Plan(structure, {"a": Decision((0, 1, 2, 4, 5, 7), (3, 6))}, {}, Budget(params=1.0), "by hand", dense, dense)
    with pytest.raises(HapError, match="the pruned model does not run") as error:
        verify(model, apply(model, plan), plan, (image,))
    assert error.match(text)
    assert error.match(r"trace\(ignore=\)")


def test_a_dense_model_that_fixes_its_dtype_is_an_error(image) -> None:
    class Single(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(torch.ones(1)))

    model = Single(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    structure = trace(model, (image,))
    dense = CostModel(structure).dense
    plan = Plan(structure, {"0": Decision(tuple(range(8)), ())}, {}, Budget(params=1.0), "by hand", dense, dense)
    with pytest.raises(HapError, match="the dense model does not run in float64"):
        verify(model, apply(model, plan), plan, (image,))


def test_units_that_a_normalisation_mixes_leave_where_asked_for() -> None:
    torch.manual_seed(0)
    layers = [layer for i in (3, 16) for layer in (nn.Conv2d(i, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    data = [(torch.randn(32, 3, 8, 8), torch.randint(3, (32,)))]
    result = hap.prune(model, data, None, hap.Budget(params=0.6), inexact=True)
    found = result.verification
    assert found.ok and not found.exact and found.params == found.promised_params
    assert found.max_relative_error > 1e-3  # gates closed in front of the norm are another function
    assert "runs" in repr(result) and "verified" not in repr(result)
    result.model[-1].bias.data[0] = torch.nan
    assert not verify(model, result.model, result.plan, data[0][:1]).ok


class Residual(nn.Module):
    """A residual stream whose norm computes in float32 whatever it reads, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.out = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h = h + self.b(h).relu()
        if self.way == "to":
            mean = h.to(torch.float32).square().mean(-1, keepdim=True)
        elif self.way == "float":
            mean = h.float().square().mean(-1, keepdim=True)
        else:
            mean = torch.mean(h.square(), -1, keepdim=True, dtype=torch.float32)
        return self.out(h * mean.rsqrt().to(h.dtype))


@pytest.mark.parametrize("way", ["to", "float", "dtype"])
def test_a_norm_in_single_precision_is_run_in_double(way: str) -> None:
    torch.manual_seed(0)
    model, x = Residual(way), torch.randn(5, 6)
    structure = trace(model, (x,))
    decisions = {f.name: Decision(tuple(range(f.size)), ()) for f in structure.families}
    implants = {"b": Implant((0, 1, 5, 7), "low-rank", 2)}  # moves these to one end of the stream
    cost = CostModel(structure)
    plan = Plan(structure, decisions, implants, Budget(params=1.0), "by hand", cost.dense, cost({}, implants))
    found = verify(model, apply(model, plan), plan, (x,))
    assert found.ok and found.exact
    assert found.max_relative_error < 1e-12


class Encoder(nn.Sequential):
    """One encoder layer of PyTorch's own, which has a fused kernel, and a linear layer."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        super().__init__(nn.TransformerEncoder(layer, 1), nn.Linear(16, 3))


def encoder_plan(model: nn.Module, x: torch.Tensor, *names: str) -> Plan:
    structure = trace(model, (x,))
    decisions = {f.name: Decision(tuple(range(f.size)), ()) for f in structure.families}
    rows = {name: structure.layer(name).filters for name in names}
    implants = {name: Implant(tuple(range(count // 2, count)), "low-rank", 2) for name, count in rows.items()}
    cost = CostModel(structure)
    return Plan(structure, decisions, implants, Budget(params=1.0), "by hand", cost.dense, cost({}, implants))


def test_what_only_ordinary_inference_shows_is_found() -> None:
    """PyTorch's fused kernels read sizes and weights past the modules, and only where nothing looks on."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 4, 16)
    plan = encoder_plan(model, x)
    small = apply(model, plan)
    assert verify(model, small, plan, (x,)).ok
    small[0].layers[0].self_attn.embed_dim = 8
    with pytest.raises(HapError, match="the pruned model does not run in ordinary inference"):
        verify(model, small, plan, (x,))
    small = apply(model, plan)
    small[0].layers[0].activation_relu_or_gelu = 2  # the kernel's GELU, in place of the module's ReLU
    found = verify(model, small, plan, (x,))
    assert not found.ok and found.max_relative_error > 1e-3


def test_a_model_without_its_implants_is_an_error(net, plan, image) -> None:
    for small in (merge(apply(net, plan)), nn.Identity()):
        with pytest.raises(HapError, match="'stem' has no implant") as error:
            verify(net, small, plan, (image,))
        assert error.match("hap.apply")


def test_masked_classes_do_not_differ() -> None:
    """Logits of minus infinity in both, and nowhere else."""
    want = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert _relative_error(want, want.clone()) == 0
    assert _relative_error(want, torch.tensor([[1.5, -torch.inf, 2.0]])) == 0.25
    for other in ([1.0, 0.0, 2.0], [-torch.inf, -torch.inf, 2.0], [1.0, torch.inf, 2.0], [1.0, torch.nan, 2.0]):
        assert _relative_error(want, torch.tensor([other])) == torch.inf
