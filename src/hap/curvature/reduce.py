"""From a quantity for each weight to its sum over every unit and every filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hap.curvature.layout import Layout
from hap.errors import HapError
from hap.types import Layer, Role, Structure

Rows = tuple[str, int, int]  # weight, the axis whose rows are summed, number of groups laid along axis 0


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of weights that belong to each unit and each filter.

    A unit owns its rows in *all* members of some roles; a filter is one row of one layer.

    Attributes:
        layout: order of the flat result.
        weights: every weight that a unit or filter owns rows of, by name.
        rows: the row sums that are needed, each once.
        source, target: row ``source[i]`` of all row sums adds to unit or filter ``target[i]``.
    """

    layout: Layout
    weights: Mapping[str, torch.Tensor]
    rows: tuple[Rows, ...]
    source: torch.Tensor
    target: torch.Tensor

    def sums(self, quantity: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum a quantity, one tensor like each weight, over every unit and filter: flat, float64, CPU."""
        return self.gather([_row_sums(quantity[name], axis, groups) for name, axis, groups in self.rows])

    def gather(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum a value for each row, one tensor for each of `rows`, over every unit and filter: flat, float64, CPU."""
        flat = torch.zeros(self.layout.size, dtype=torch.float64)
        every = torch.cat([value.to("cpu").double() for value in values])
        return flat.index_add_(0, self.target, every[self.source])

    def only_require_grad(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Let these weights alone require gradients, so that autograd does no work for others; returns them."""
        model.requires_grad_(False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return {name: parameters[name].requires_grad_() for name in self.weights}


def groups_of(model: nn.Module, structure: Structure, *, roles: Sequence[Role] | None = None) -> Groups:
    """The `Groups` of a model.

    Args:
        roles: the members that make up a unit; of followers and consumers, the parameters among them. None for those
            that make it up in HAP: the producers, and of an attention head also the consumer, W_O. A weight
            that a unit owns by two axes (a recurrent one) has the elements where they cross counted twice.

    Raises:
        HapError: a unit is produced by something that is not a parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layout = Layout.of(structure)
    starts: dict[Rows, int] = {}
    end = 0
    source: list[int] = []
    target: list[int] = []

    def start(rows: Rows, count: int) -> int:
        nonlocal end
        if rows not in starts:
            starts[rows] = end
            end += count
        return starts[rows]

    for family, offset in layout.unit_offsets():
        wanted = roles if roles is not None else ("producer", "consumer") if family.kind == "head" else ("producer",)
        for member in family.members:
            if member.role not in wanted:
                continue
            if member.parameter not in parameters:
                if member.role != "producer":
                    continue  # a buffer, such as a running mean
                raise HapError(
                    f"family {family.name!r} is produced by {member.parameter!r}, which is not a parameter",
                    expected="producers that are trained weights",
                    remedy=f"leave it out: hap.trace(..., ignore=[{family.name!r}])",
                )
            first = start((member.parameter, member.axis, 1), parameters[member.parameter].shape[member.axis])
            for unit, positions in enumerate(member.indices):
                source.extend(first + position for position in positions)
                target.extend([offset + unit] * len(positions))
    for layer, offset in layout.filter_offsets():
        first = start((layer.weight, layer.output_axis, _stacked(layer)), layer.filters)
        source.extend(range(first, first + layer.filters))
        target.extend(range(offset, offset + layer.filters))
    weights = {name: parameters[name].detach() for name, _, _ in starts}
    return Groups(layout, weights, tuple(starts), torch.tensor(source), torch.tensor(target))


def _stacked(layer: Layer) -> int:
    """A grouped transposed convolution stacks its groups along axis 0, each with its own filters on axis 1."""
    return layer.groups if layer.transposed else 1


def rows_of(tensor: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """The rows of a tensor along an axis, each laid flat: (rows, elements), as `Groups.rows` counts them."""
    rows = tensor.unflatten(0, (groups, -1)).movedim(axis + 1, 1).flatten(0, 1)
    return rows.reshape(len(rows), -1)


def scale_rows(tensor: torch.Tensor, factors: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """The tensor with each of its rows, as `rows_of` lays them, multiplied by a factor.

    >>> scale_rows(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]), 1, 1).tolist()
    [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    stacked = tensor.unflatten(0, (groups, -1))
    shape = [1] * stacked.ndim
    shape[0], shape[axis + 1] = groups, stacked.shape[axis + 1]
    return (stacked * factors.view(shape).to(tensor)).flatten(0, 1)


def _row_sums(tensor: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    # The rows are short enough for the weights' own precision; half precision is not enough.
    return rows_of(tensor, axis, groups).sum(1, dtype=torch.promote_types(tensor.dtype, torch.float32))
