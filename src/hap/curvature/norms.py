"""Criteria that look at the weights alone; none of them reads data."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.reduce import groups_of, rows_of
from hap.errors import HapError
from hap.types import Family, Role


class _Norm(Criterion):
    """``(sum_{w in p} |w|^power)^(1 / power)``, the norm of the weights of some members of a unit, or of a filter."""

    needs_data: ClassVar[bool] = False
    power: ClassVar[int]
    roles: ClassVar[tuple[Role, ...] | None] = None  # see `groups_of`

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure, roles=self.roles)
        powers = {name: weight.abs() ** self.power for name, weight in groups.weights.items()}
        norms = groups.sums(powers) ** (1 / self.power)
        return groups.layout.scores(norms, torch.zeros_like(norms), samples=0, draws=0)


@register
class Magnitude(_Norm):
    """The L2 norm of a unit's or filter's weights (Li et al., ICLR 2017, use L1). Reads no data."""

    name: ClassVar[str] = "magnitude"
    power: ClassVar[int] = 2


@register
class L1(_Norm):
    """The L1 norm of a unit's or filter's weights (Li et al., ICLR 2017, section 3.1). Reads no data."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1


@register
class GroupL1(_Norm):
    """The L1 norm of all parameters that leave with a unit: producers, followers and consumers. Reads no data.

    As the group magnitude of Fang et al. (DepGraph, CVPR 2023), but one norm of the whole group, biases included, and
    not scaled to each layer's mean. A filter's is that of its own row.
    """

    name: ClassVar[str] = "group-l1"
    power: ClassVar[int] = 1
    roles: ClassVar[tuple[Role, ...] | None] = ("producer", "follower", "consumer")


@register
class GroupL2(_Norm):
    """The L2 norm of all parameters that leave with a unit: producers, followers and consumers. Reads no data.

    As `GroupL1`, with the other norm.
    """

    name: ClassVar[str] = "group-l2"
    power: ClassVar[int] = 2
    roles: ClassVar[tuple[Role, ...] | None] = ("producer", "follower", "consumer")


@register
class WHC(Criterion):
    """``||F_i|| sum_{j != i} ||F_j|| (1 - |cos(F_i, F_j)|)`` over the filters F of a layer. Reads no data.

    The weighted hybrid criterion (Chen, Sun and Huang, ICASSP 2023): large filters matter, and those that no other
    large filter resembles. A unit has the sum over its rows in all its producers.
    """

    name: ClassVar[str] = "whc"
    needs_data: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure)
        scores = groups.gather([_whc(rows_of(groups.weights[name], axis, n)) for name, axis, n in groups.rows])
        return groups.layout.scores(scores, torch.zeros_like(scores), samples=0, draws=0)


def _whc(filters: torch.Tensor) -> torch.Tensor:
    """The scores of the rows; ``||F_i|| ||F_j|| cos(F_i, F_j)`` is their product, so that nothing is divided by 0."""
    filters = filters.to(torch.promote_types(filters.dtype, torch.float32))
    norms = filters.norm(dim=1)
    differences = torch.outer(norms, norms) - (filters @ filters.T).abs()
    return differences.fill_diagonal_(0).sum(1)


@register
class BatchNormScale(Criterion):
    """``|gamma|`` of the batch norms behind a unit, their mean if there are several. Reads no data.

    Network slimming (Liu et al., ICCV 2017), which trains with an L1 penalty on gamma first. A filter has the
    scale of its unit, if it is all that produces it; layers with other filters have no filter scores.
    """

    name: ClassVar[str] = "bn-scale"
    needs_data: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: a family has no batch norm with a scale.
        """
        families = problem.structure.families
        scores = {family.name: _scale(problem, family) for family in families}
        filters = {}
        for layer in problem.structure.layers:
            for family in families:
                producers = [(m.parameter, m.axis, m.indices) for m in family.roles("producer")]
                if producers == [(layer.weight, layer.output_axis, tuple((i,) for i in range(layer.filters)))]:
                    filters[layer.module] = scores[family.name].clone()
        errors, filter_errors = ({n: torch.zeros_like(v) for n, v in d.items()} for d in (scores, filters))
        return Scores(0, 0, scores, errors, filters, filter_errors)


def _scale(problem: Problem, family: Family) -> torch.Tensor:
    """The mean of ``|gamma|`` over all channels of all batch norms of each unit."""
    modules = dict(problem.model.named_modules(remove_duplicate=False))
    total = torch.zeros(family.size, dtype=torch.float64)
    count = torch.zeros_like(total)
    for member in family.roles("follower"):
        module, _, parameter = member.parameter.rpartition(".")
        if parameter != "weight" or not isinstance(modules.get(module), _BatchNorm):
            continue
        scale = problem.model.get_parameter(member.parameter).detach().to("cpu").double().abs()
        total += torch.stack([scale[list(positions)].sum() for positions in member.indices])
        count += torch.tensor([len(positions) for positions in member.indices])
    if not count.all():
        raise HapError(
            f"bn-scale finds no batch norm behind family {family.name!r}",
            expected="a batch norm with a scale behind every unit",
            remedy=f"leave it out: hap.trace(..., ignore=[{family.name!r}]); or choose another criterion",
        )
    return total / count
