"""The Hessian's quadratic form along the weights that a removal takes away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.draws import averaged, need_draws
from hap.curvature.hutchinson import Product, hessian, random_signs
from hap.curvature.objectives import Settled
from hap.curvature.reduce import Groups, groups_of, scale_rows
from hap.errors import HapError
from hap.types import Role

Along = Literal["producers", "consumers"]


def role_of(along: Along) -> Role:
    """The role of the members along which a unit is removed.

    Raises:
        HapError: `along` is neither of its values.
    """
    roles: dict[Along, Role] = {"producers": "producer", "consumers": "consumer"}
    if along not in roles:
        raise HapError("there is no such removal", expected="along 'producers' or 'consumers'", got=repr(along))
    return roles[along]


def label_of(name: str, along: Along) -> str:
    """The name of a criterion in results; says so when it goes along the consumers."""
    return name if along == "producers" else f"{name} along {along}"


@register
@dataclass(frozen=True, kw_only=True)
class HessianQuadratic(Criterion):
    """``1/2 w_p' H_pp w_p``: the second-order rise of the loss when the weights w_p go to 0 (OBD, LeCun et al. 1990).

    Unlike the trace, it asks about the one direction that removal takes. It may be negative. For every p at once:
    with one random sign s_p for each p and ``v_p = s_p w_p``, ``E[v_p . (H v)_p] = w_p' H_pp w_p`` (Hutchinson 1990).

    Units and filters differ in what must share a sign: a unit all its rows, a filter its own row alone. So
    probes take turns, one with a sign for each filter, one with a sign for each unit. A filter that is the only
    row of its unit is read off both, so that a network without ties spends nothing on this; if no unit has more
    rows than one, filters' signs serve alone. (A filter's signs could serve tied units too, as the sum of its rows'
    signs times the sum of its rows' products, but with as many times the variance as the unit has rows; taking turns
    costs a factor of two.)

    Attributes:
        along: a unit's weights: ``producers``, the rows that compute it, or ``consumers``, the slices that read it.
            Either removes it, where no norm or bias lies between. Filters always go along their own row.
    """

    name: ClassVar[str] = "hessian-quadratic"
    default_draws: ClassVar[int] = 16
    additive: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    predicts_loss: ClassVar[bool] = True
    along: Along = "producers"

    @property
    def label(self) -> str:
        """The name; says so when it goes along the consumers."""
        return label_of(self.name, self.along)

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: fewer than two draws for each kind of probe, or units that overlap.
        """
        groups = groups_of(problem.model, problem.structure, roles=(role_of(self.along),))
        patterns = _patterns(groups)
        need_draws(problem, self.name, least=2 * len(patterns), default=self.default_draws)
        settled = Settled(problem.model, problem.loss)
        turns = [patterns[draw % len(patterns)] for draw in range(problem.draws)]

        def draws(batch: batches.Batch, number: int) -> tuple[torch.Tensor, float]:
            generators = [problem.generator("probe", number, draw) for draw in range(problem.draws)]
            with hessian(problem, groups, batch) as (multiply, outputs):
                terms = settled.terms(outputs, batch)
                pairs = zip(turns, generators, strict=True)
                probes = torch.stack([_probe(groups, pattern, multiply, generator) for pattern, generator in pairs])
            return probes, terms

        says = torch.stack([pattern.says for pattern in turns])
        found = averaged(problem, self.label, draws, says=says, skipped=settled.skipped)
        return groups.layout.scores(
            found.mean / 2, found.stderr / 2, samples=found.samples, draws=problem.draws, terms=found.terms
        )


@dataclass(frozen=True, eq=False)
class _Pattern:
    """Which rows of the weights share a sign.

    Attributes:
        block: for every row, in the order of `Groups.rows`, the unit or filter whose sign it has; -1 for a row that
            stays out of the probe.
        says: for every unit and filter, whether its rows are exactly those of one sign.
    """

    block: torch.Tensor
    says: torch.Tensor


def _patterns(groups: Groups) -> list[_Pattern]:
    """The sign patterns that together say something about every unit and filter: one or two."""
    units = sum(family.size for family in groups.layout.families)
    filters = _pattern(groups, groups.target >= units)
    if filters.says.all():
        return [filters]
    by_unit = _pattern(groups, groups.target < units)
    return [by_unit] if by_unit.says.all() else [filters, by_unit]


def _pattern(groups: Groups, chosen: torch.Tensor) -> _Pattern:
    """One sign for each of the units, or each of the filters: those that the `chosen` rows belong to."""
    lengths = _lengths(groups)
    source, target = groups.source, groups.target
    block = torch.full((sum(lengths),), -1)
    block[source[chosen]] = target[chosen]
    _need_apart(groups, block.split(lengths))
    # A unit or filter is read off, if it has as many rows as the block that one of them is in.
    rows = torch.bincount(target, minlength=groups.layout.size)
    length = torch.bincount(block[block >= 0], minlength=groups.layout.size)
    of_one = torch.full_like(rows, -1)
    of_one[target] = block[source]
    return _Pattern(block, rows == torch.where(of_one >= 0, length[of_one], 0))


def _lengths(groups: Groups) -> list[int]:
    """The number of rows in each of `groups.rows`."""
    return [stacked * groups.weights[name].shape[axis] for name, axis, stacked in groups.rows]


def _need_apart(groups: Groups, blocks: tuple[torch.Tensor, ...]) -> None:
    used = [name for (name, _, _), block in zip(groups.rows, blocks, strict=True) if (block >= 0).any()]
    for name in used:
        if used.count(name) > 1:
            raise HapError(
                f"units overlap in {name!r}",
                expected="units that own a weight along one of its axes",
                got="two axes",
                remedy="use ggn-quadratic, which can tell them apart",
            )


def _probe(groups: Groups, pattern: _Pattern, multiply: Product, generator: torch.Generator) -> torch.Tensor:
    """``v * Hv`` summed over every unit and filter, for ``v_p = s_p w_p`` with random signs s."""
    signs = random_signs({"": torch.zeros(groups.layout.size)}, generator)[""]
    factors = torch.where(pattern.block >= 0, signs[pattern.block], 0).split(_lengths(groups))
    vector = {name: torch.zeros_like(weight) for name, weight in groups.weights.items()}
    for (name, axis, stacked), factor in zip(groups.rows, factors, strict=True):
        vector[name] += scale_rows(groups.weights[name], factor.to(vector[name].device), axis, stacked)
    products = multiply(vector)
    return groups.sums({name: vector[name] * products[name] for name in vector})
