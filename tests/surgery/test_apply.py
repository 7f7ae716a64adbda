from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from hap.errors import HapError
from hap.implants import Implanted
from hap.planning import CostModel, Decision, Implant, Plan
from hap.structure import trace
from hap.surgery import apply, apply_, verify
from hap.types import Budget, TensorSpec


def everything(model: nn.Module) -> dict[str, object]:
    """All that an operation could change: tensors and gradients (as copies), their identity, and attributes."""
    found: dict[str, object] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (id(tensor), tensor.detach().clone(), tensor.stride(), tensor.requires_grad, id(tensor.grad))
        found[f"{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
    for name, module in model.named_modules():
        found[f"{name}()"] = (id(module), list(module._modules), repr(module), module.training)
    return found


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, tuple) and isinstance(y, tuple):
            return len(x) == len(y) and all(equal(*pair) for pair in zip(x, y, strict=True))
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x, y)
        return x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def test_the_dense_model_is_left_alone(net, plan, image) -> None:
    before = everything(net)
    small = apply(net, plan, [(image, None)])
    assert same(before, everything(net))
    assert sum(p.numel() for p in small.parameters()) == plan.small.params


def test_sizes_follow_the_tensors(net, plan) -> None:
    small = apply(net, plan)
    assert isinstance(small.stem, Implanted)
    assert isinstance(small.inner, Implanted)
    assert small.stem.dense is not None
    assert (small.stem.dense.out_channels, small.stem.implant.out_channels) == (4, 2)
    depthwise = small.depthwise
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 6, 6)
    assert (small.norm.num_features, small.norm.running_var.shape[0]) == (6, 6)
    assert (small.fc.in_features, small.fc.out_features) == (80, 4)
    assert "BatchNorm2d(6" in repr(small)


@pytest.mark.parametrize("step", range(0, 25, 4))
def test_an_error_in_the_middle_changes_nothing(net, plan, image, monkeypatch, step: int) -> None:
    """Whichever step of the commit fails, all steps before it are taken back."""
    globals_ = apply_.__globals__  # the package gives its function `apply` the name of the module
    count = 0

    def failing(function):
        def call(*args):
            nonlocal count
            function(*args)
            count += 1
            if count > step:
                raise RuntimeError("injected")

        return call

    for name in ("_set_data", "_set_attribute"):
        monkeypatch.setitem(globals_, name, failing(globals_[name]))
    before = everything(net)
    want = net(image)
    after_forward = everything(net)  # the statistics of the batch norm have moved
    with pytest.raises(RuntimeError, match="injected"):
        apply_(net, plan)
    assert count == step + 1
    assert same(after_forward, everything(net))
    assert before.keys() == after_forward.keys()
    assert torch.equal(net(image), want)


def test_in_place_keeps_the_module_and_its_parameters(net, plan, image) -> None:
    weight, hooks = net.fc.weight, []
    net.fc.weight.requires_grad_(False)
    net.norm.eval()
    handle = net.norm.register_forward_hook(lambda *_: hooks.append(1))
    assert apply_(net, plan) is net
    assert net.fc.weight is weight
    assert not weight.requires_grad
    assert weight.grad is None  # that of the dense shape
    assert not net.norm.training
    assert net.inner.training
    net(image)
    assert hooks == [1]
    handle.remove()


def test_a_frozen_convolution_stays_frozen_when_implanted(net, plan) -> None:
    net.stem.requires_grad_(False)
    small = apply(net, plan)
    assert not any(p.requires_grad for p in small.stem.parameters())
    assert all(p.requires_grad for p in small.inner.parameters())


def test_the_smaller_model_is_ordinary(net, plan, image) -> None:
    """It copies, saves its state, and trains with an optimizer built after."""
    small = apply(net, plan)
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin.eval()(image), small.eval()(image))
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.1)
    small(image).square().sum().backward()
    optimizer.step()
    assert all(p.shape == p.grad.shape for p in small.parameters() if p.grad is not None)
    changed = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert {"stem.implant.weight", "stem.dense.weight", "fc.weight"} <= changed


def test_dtype_and_memory_format_are_kept(net, plan, image) -> None:
    net = net.to(torch.bfloat16).to(memory_format=torch.channels_last)
    with pytest.raises(HapError, match="not the model"):
        apply(net, plan)
    plan = dataclasses.replace(plan, structure=trace(net, (image.to(torch.bfloat16),)), implants={})
    small = apply(net, plan)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.inner.weight.shape == (5, 6, 3, 3)
    assert small.inner.weight.is_contiguous(memory_format=torch.channels_last)


def test_memory_format_in_three_dimensions() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 2, 3)).to(memory_format=torch.channels_last_3d)
    structure = trace(model, (torch.zeros(1, 2, 6, 6, 6),))
    dense = CostModel(structure).dense
    plan = Plan(structure, {"0": Decision((0, 1, 3), (2,))}, {}, Budget(params=1.0), "by hand", dense, dense)
    assert apply(model, plan)[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(m, "fc", nn.Linear(96, 5)), r"tensor 'fc.bias': traced \[4\] float32, now \[5\] float32"),
        (lambda m: setattr(m, "norm", nn.InstanceNorm2d(8)), "module 'norm': traced BatchNorm2d, now InstanceNorm2d"),
        (lambda m: m.fc.double(), r"tensor 'fc.weight': traced \[4, 96\] float32, now \[4, 96\] float64"),
        (lambda m: delattr(m, "fc"), "module 'fc': traced Linear, now absent"),
        (lambda m: setattr(m, "more", nn.ReLU()), "module 'more': traced absent, now ReLU"),
    ],
)
def test_another_model_is_refused_and_told_apart(net, plan, image, change, text: str) -> None:
    change(net)
    before = everything(net)
    for function in (apply, apply_, lambda m, p: verify(m, m, p, (image,))):
        with pytest.raises(HapError, match="not the model that the plan was made for") as error:
            function(net, plan)
        assert error.match(text)
    assert same(before, everything(net))


def test_a_pruned_model_cannot_be_pruned_with_the_same_plan(net, plan) -> None:
    with pytest.raises(HapError, match="not the model that the plan was made for"):
        apply(apply(net, plan), plan)


def test_empty_batches_change_nothing(net, plan) -> None:
    before = everything(net)
    with pytest.raises(HapError, match="there is no data"):
        apply_(net, plan, [])
    assert same(before, everything(net))


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Twice()
    structure = trace(model, (torch.zeros(1, 4, 6),))
    cost = CostModel(structure)
    nothing = {f.name: Decision(tuple(range(f.size)), ()) for f in structure.families}
    plan = Plan(structure, nothing, {"a": Implant((1, 2), "pointwise")}, Budget(params=1.0), "by hand", cost.dense,
                cost({}, {"a": Implant((1, 2), "pointwise")}))  # fmt: skip
    small = apply(model, plan)
    assert small.a is small.b
    assert verify(model, small, plan, (torch.randn(1, 4, 6),)).ok


def test_the_check_names_five_differences_at_most(net, plan) -> None:
    tensors = {name: TensorSpec((1, *spec.shape), spec.dtype, True) for name, spec in plan.structure.tensors.items()}
    other = dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, tensors=tensors))
    with pytest.raises(HapError) as error:
        apply(net, other)
    assert error.value.got.count("traced") == 5
    assert f"and {len(tensors) - 5} more" in error.value.got
