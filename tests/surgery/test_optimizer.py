from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hap
from hap.surgery import follow_

DATA = [(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )


def groups(model: nn.Module) -> list[dict]:
    """As trainers part them: vectors do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    optimizer.step()


def planned(model: nn.Module, implant_ratio: float = 0.0) -> hap.Plan:
    structure = hap.trace(model, (DATA[0][0],))
    sensitivity = hap.measure(model, None, None, structure, criterion="magnitude")
    return hap.decide(structure, sensitivity, hap.Budget(params=0.6), implant_ratio=implant_ratio)


def cut(tensor: torch.Tensor, plan: hap.Plan, name: str) -> torch.Tensor:
    """What is left of a tensor, from the plan alone; families of plain convolutions are in order."""
    for family in plan.structure.families:
        for member in family.members:
            if member.parameter == name:
                left = [i for unit in plan.decisions[family.name].keep for i in member.indices[unit]]
                tensor = tensor.index_select(member.axis, torch.tensor(left))
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, amsgrad=True),
    ],
    ids=["sgd", "adamw"],
)
def test_moments_are_cut_like_the_weights(model: nn.Module, make) -> None:
    optimizer = make(groups(model))
    for _ in range(3):
        step(model, optimizer)
    before = dict(model.named_parameters())
    names = {parameter: name for name, parameter in before.items()}
    old = {
        names[p]: {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)}
        for p, s in optimizer.state.items()
    }
    plan = planned(model)
    hap.apply_(model, plan)
    follow_(optimizer, before, model, plan)
    changed = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor):
                continue
            expected = cut(old[name][key], plan, name) if value.ndim else old[name][key]
            assert torch.equal(value, expected), (name, key)
            changed += value.ndim and value.shape != old[name][key].shape
    assert changed
    weights = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_implants_come_in_and_what_they_replace_goes(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    step(model, optimizer)
    before = dict(model.named_parameters())
    plan = planned(model, implant_ratio=0.6)
    assert plan.implants
    hap.apply_(model, plan, DATA)
    follow_(optimizer, before, model, plan)
    matrices, vectors = (set(group["params"]) for group in optimizer.param_groups)
    assert matrices | vectors == set(model.parameters())
    assert {p.ndim > 1 for p in matrices} == {True} and {p.ndim > 1 for p in vectors} == {False}
    assert set(optimizer.state) <= set(model.parameters())
    step(model, optimizer)


def test_a_state_of_another_shape_starts_anew(model: nn.Module) -> None:
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)  # keeps rows and columns of the second moment
    step(model, optimizer)
    before = dict(model.named_parameters())
    plan = planned(model)
    hap.apply_(model, plan)
    follow_(optimizer, before, model, plan)
    assert model[0].weight not in optimizer.state
    step(model, optimizer)
