"""The law of the package, checked on one small model: random plans for it, applied and verified.

A case is ``(build, forward, families)``: `build` gives a dict of modules and parameters or a whole model;
`forward` is called with that model, whose attributes they are, and its inputs; `families` is what the
trace must find, as ``"name:size"``, with ``~`` behind an inexact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap.batches import evaluating
from hap.planning import CostModel, Decision, Implant, Plan
from hap.planning.candidates import block, implantable
from hap.structure import trace
from hap.surgery import apply, verify
from hap.types import Budget, Structure

SHARE = 0.3  # of the units of every family, and of the filters of every convolution that can have implants


class Net(nn.Module):
    """Modules, parameters and buffers by name, and a function that runs them."""

    def __init__(self, parts: Mapping[str, Any], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def random_statistics(model: nn.Module, generator: torch.Generator) -> None:
    """Norms far from the identity, and no vanishing biases, so that every unit matters."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            if name.endswith(("weight", "running_var")):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.data.normal_(0, 0.3, generator=generator)


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """Builds a case's model in training mode, the same one every time."""

    def build(parts: Callable[[], Any], forward: Callable[..., Any] | None = None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = parts()
        model = made if isinstance(made, nn.Module) else Net(made, forward)
        random_statistics(model, torch.Generator().manual_seed(1))
        return model.train()

    return build


def summary(structure: Structure) -> str:
    return " ".join(f"{f.name}:{f.size}{'' if f.exact else '~'}" for f in structure.families)


def random_plan(structure: Structure, generator: torch.Generator, *, implants: bool) -> Plan:
    """Prunes a share of the units of every exact family, and implants a share of the filters that are left."""
    pick = lambda n, k: sorted(torch.randperm(n, generator=generator)[:k].tolist())  # noqa: E731
    decisions, masks = {}, {}
    gone: dict[tuple[str, int], set[int]] = {}
    for family in structure.families:
        count = min(family.size - 1, math.ceil(SHARE * family.size)) if family.exact else 0
        prune = pick(family.size, count)
        decisions[family.name] = Decision(tuple(sorted({*range(family.size)} - {*prune})), tuple(prune))
        masks[family.name] = torch.tensor([u in prune for u in range(family.size)]).numpy()
        for m in family.members:
            gone.setdefault((m.parameter, m.axis), set()).update(i for u in prune for i in m.indices[u])
    chosen = {}
    for layer in implantable(structure) if implants else ():
        step = block(layer)
        starts = [s for s in range(0, layer.filters, step) if s not in gone.get((layer.weight, 0), ())]
        rows = [starts[i] + k for i in pick(len(starts), math.ceil(SHARE * len(starts))) for k in range(step)]
        chosen[layer.module] = Implant(tuple(rows), "pointwise")
    cost = CostModel(structure)
    small = cost(masks, chosen)
    return Plan(structure, decisions, chosen, Budget(params=1.0), "random", cost.dense, small)


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def run(model: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    with evaluating(model), torch.no_grad():
        return tensors(model(*args, **kwargs))


@pytest.fixture
def law() -> Callable[..., Structure]:
    """Checks the law on a model and returns its structure."""

    def check(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], families: str) -> Structure:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        structure = trace(model, args, kwargs)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert summary(structure) == families

        nothing = {f.name: Decision(tuple(range(f.size)), ()) for f in structure.families}
        dense = CostModel(structure).dense
        same = apply(model, Plan(structure, nothing, {}, Budget(params=1.0), "random", dense, dense))
        want = run(model, args, kwargs)
        assert all(torch.equal(a, b) for a, b in zip(want, run(same, args, kwargs), strict=True))

        for implants in (False, True):
            plan = random_plan(structure, torch.Generator().manual_seed(2), implants=implants)
            small = apply(model, plan)
            found = verify(model, small, plan, args, kwargs)
            assert found.max_relative_error < 1e-10
            assert found.params == found.promised_params < dense.params
            have = run(small, args, kwargs)
            assert max(float((a - b).abs().max()) for a, b in zip(want, have, strict=True)) > 1e-6
            model_outputs = small(*args, **kwargs)  # the smaller model trains too
            sum(t.sum() for t in tensors(model_outputs) if t.is_floating_point()).backward()
        return structure

    return check
