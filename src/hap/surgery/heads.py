"""Narrow heads in the tensors of the small model: how they get there, and how they are read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hap.errors import HapError
from hap.implants import FittedHeads, Heads, packed_type
from hap.planning import Implant, Plan
from hap.surgery.carriers import Carriers, packing
from hap.surgery.layout import Layout


@dataclass(frozen=True)
class _Spot:
    """One narrow head in one tensor.

    Attributes:
        tensor, axis: of a weight or bias of queries, keys or values, or of the weight that reads the heads.
        chunk: which of queries, keys and values it is, where the tensor holds several; or which of a group.
        unit: the dense head.
        dense: its positions along the axis in the dense model.
        small: those of the narrow head in the small model.
    """

    tensor: str
    axis: int
    chunk: int
    unit: int
    dense: tuple[int, ...]
    small: tuple[int, ...]


def _spots(plan: Plan, places: Layout, heads: Heads, implant: Implant) -> Iterator[_Spot]:
    carriers = Carriers.of(heads, implant)
    for member in heads.carrying(implant.form):
        size = plan.structure.tensors[member.parameter].shape[member.axis]
        index = {dense: i for i, dense in enumerate(places.of(member.parameter, member.axis, size))}
        for chunk, positions in enumerate(heads.chunks(member)):
            for number, unit in enumerate(implant.indices):
                carrier, part = carriers.place(number)
                small = tuple(index[i] for i in positions[carrier][part])
                yield _Spot(member.parameter, member.axis, chunk, unit, positions[unit], small)


def narrowed(
    model: nn.Module,
    plan: Plan,
    places: Layout,
    tensors: Mapping[str, torch.Tensor],
    fitted: Mapping[str, FittedHeads],
) -> dict[str, torch.Tensor]:
    """The tensors that change, with the narrow heads in their places; a lone one may change nothing else.

    Args:
        model: the dense model.
        plan: what is done to it.
        places: the layout of the small model.
        tensors: those that change, cut.
        fitted: by module; heads of modules without a fit start with nothing to add.
    """
    old, new = dict(model.named_parameters()), {name: tensor.clone() for name, tensor in tensors.items()}
    for module, (heads, implant) in plan.narrowed.items():
        output, fit = heads.output, fitted.get(module)
        for member in heads.carrying(implant.form):
            if member.parameter not in new:
                new[member.parameter] = old[member.parameter].detach().clone()
        read = heads.member(output.weight)
        taken = {i for unit in Carriers.of(heads, implant).units for i in read.indices[unit]}
        left = places.of(read.parameter, read.axis, plan.structure.tensors[read.parameter].shape[read.axis])
        new[read.parameter].movedim(read.axis, -1)[..., [i for i, dense in enumerate(left) if dense in taken]] = 0
        if fit is None:
            continue
        for spot in _spots(plan, places, heads, implant):
            if spot.tensor == output.weight:
                values = fit.narrow.output[spot.unit].unflatten(-1, (heads.group, -1))[:, spot.chunk]
            else:
                full = old[spot.tensor].detach().movedim(spot.axis, -1)[..., list(spot.dense)]
                values = full.double() @ fit.basis(spot.tensor, spot.chunk)[spot.unit]
            whole = new[spot.tensor]
            whole.movedim(spot.axis, -1)[..., list(spot.small)] = _left(values, spot, plan, places).to(whole.dtype)
        if output.bias is not None:
            bias = new.get(output.bias, old[output.bias].detach().clone())
            shift = fit.narrow.shift[list(implant.indices)].sum(0)
            new[output.bias] = bias + shift[list(places.of(output.bias, 0, len(shift)))].to(bias.dtype)
    return new


def _left(values: torch.Tensor, spot: _Spot, plan: Plan, places: Layout) -> torch.Tensor:
    """Of the axis that does not carry the heads, the positions that are left."""
    if values.ndim == 1:
        return values
    return values[list(places.of(spot.tensor, 1 - spot.axis, len(values)))]


@torch.no_grad()
def widened_(reference: nn.Module, small: nn.Module, plan: Plan, places: Layout) -> None:
    """Gives a dense model full heads that compute what the small model's narrow ones do: the rest of them is zero."""
    wide, narrow = dict(reference.named_parameters()), dict(small.named_parameters())
    for heads, implant in plan.narrowed.values():
        for spot in _spots(plan, places, heads, implant):
            whole = wide[spot.tensor].movedim(spot.axis, -1)
            part = narrow[spot.tensor].detach().movedim(spot.axis, -1)[..., list(spot.small)].to(whole.dtype)
            whole[..., list(spot.dense)] = 0
            dense = list(spot.dense[: part.shape[-1]])
            if part.ndim == 1:
                whole[dense] = part
            else:
                rows = torch.tensor(list(places.of(spot.tensor, 1 - spot.axis, len(whole))), device=whole.device)
                whole[rows[:, None], torch.tensor(dense, device=whole.device)] = part
        if (bias := heads.output.bias) is not None:
            left = list(places.of(bias, 0, len(wide[bias])))
            wide[bias][left] = narrow[bias].detach().to(wide[bias].dtype)


def packed_types(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The attention modules that get narrow heads, each with the class that it must have.

    Raises:
        HapError: a module has a forward of its own, which would be called in place of its class's.
    """
    for name, (heads, implant) in plan.narrowed.items():
        module = model.get_submodule(name)
        if "forward" in vars(module):
            raise HapError(
                f"{name!r} cannot have narrow heads: the instance has a forward of its own",
                expected="the forward of its class",
                got="an attribute of the module, as accelerate's hooks set it",
                remedy="remove the hooks, then `del module.forward`; or protect the module",
            )
        yield module, packed_type(type(module), packing(plan, heads, implant))
