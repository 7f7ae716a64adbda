"""`verify` must see what is wrong: each kind of damage to a correct small model is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from hap.errors import HapError
from hap.planning import CostModel, Decision, Plan
from hap.structure import trace
from hap.surgery import apply, verify
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
            return super().forward(x.float())

    model = Single(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    structure = trace(model, (image,))
    dense = CostModel(structure).dense
    plan = Plan(structure, {"0": Decision(tuple(range(8)), ())}, {}, Budget(params=1.0), "by hand", dense, dense)
    with pytest.raises(HapError, match="the dense model does not run in float64"):
        verify(model, apply(model, plan), plan, (image,))
