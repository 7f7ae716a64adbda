"""An optimizer goes on with a model that was cut in place: its moments are cut like the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hap.planning import Plan
from hap.surgery.layout import Layout, layout


def follow_(optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], model: nn.Module, plan: Plan) -> None:
    """Makes `optimizer` the one of a model after `hap.apply_`.

    What it keeps for a parameter in tensors of the parameter's shape (momentum, Adam's moments) is cut to what is left
    of it, exactly; where it keeps anything of another shape, that parameter starts anew. Parameters of implants come
    in without a state, in the group of those that they replace; narrow heads go on with what was kept for the heads
    whose places they take.

    Args:
        optimizer: its parameter groups and state change.
        before: ``dict(model.named_parameters())`` from before `hap.apply_`, which keeps parameters that shrink.
        model: after it.
        plan: what was carried out.
    """
    places = layout(plan)
    for name, parameter in before.items():
        if parameter in optimizer.state:
            _cut_(optimizer.state, parameter, plan.structure.tensors[name].shape, _kept(places, name))
    left = set(model.parameters())
    known = set(before.values())  # also those that the optimizer was not given
    fresh = [parameter for parameter in model.parameters() if parameter not in known and parameter.requires_grad]
    for group in optimizer.param_groups:
        lost = [parameter for parameter in group["params"] if parameter not in left]
        for parameter in lost:
            optimizer.state.pop(parameter, None)
        kinds = {parameter.ndim > 1 for parameter in lost}  # groups part matrices, which decay, from vectors
        group["params"] = [parameter for parameter in group["params"] if parameter in left]
        group["params"] += [parameter for parameter in fresh if (parameter.ndim > 1) in kinds]
        fresh = [parameter for parameter in fresh if (parameter.ndim > 1) not in kinds]
    optimizer.param_groups[0]["params"] += fresh


def _kept(places: Layout, name: str) -> dict[int, tuple[int, ...]]:
    """By axis, the positions that are left."""
    return {axis: positions for (tensor, axis), positions in places.kept.items() if tensor == name}


def _cut_(state: Any, parameter: nn.Parameter, shape: tuple[int, ...], kept: Mapping[int, tuple[int, ...]]) -> None:
    if not kept:
        return
    tensors = {key: value for key, value in state[parameter].items() if isinstance(value, torch.Tensor) and value.ndim}
    if any(tuple(value.shape) != shape for value in tensors.values()):
        del state[parameter]
        return
    for key, value in tensors.items():
        for axis, positions in kept.items():
            value = value.index_select(axis, torch.tensor(positions, device=value.device))
        state[parameter][key] = value
