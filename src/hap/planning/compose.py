"""Two plans, one after the other, as one plan for the dense model: what a checkpoint of several rounds replays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hap.errors import HapError
from hap.implants import NARROW, heads_of
from hap.planning.cost import CostModel
from hap.planning.plan import Decision, Implant, Plan

Key = tuple[str, int]  # a tensor and one of its axes


def compose(first: Plan, second: Plan) -> Plan:
    """The plan that does to the dense model what `first` and then `second` do.

    Args:
        first: a plan without implants, for the dense model.
        second: a plan for the model that `first` makes.

    Returns:
        A plan for the dense model, with the budget, criterion and options of `second`. Its predicted rise of the
        loss is the sum of both, whatever was regained in between.

    Raises:
        HapError: `first` has implants, or `second` is for another model.
    """
    if first.implants:
        raise HapError(
            "plans can follow only on one that prunes",
            expected="a first plan without implants",
            got=f"implants in {len(first.implants)} layers",
            remedy="implant in the last round: implant_ratio=0 before",
        )
    left = _left(first)
    _check(first, second, left)
    dense = {
        (member.parameter, member.axis, position): (family.name, unit)
        for family in first.structure.families
        for member in family.members
        for unit, positions in enumerate(member.indices)
        for position in positions
    }
    gone = {name: set(decision.prune) for name, decision in first.decisions.items()}
    for family in second.structure.families:
        member = family.members[0]
        places = left.get((member.parameter, member.axis))
        for unit in second.decisions[family.name].prune:
            position = member.indices[unit][0]
            name, before = dense[member.parameter, member.axis, position if places is None else places[position]]
            gone[name].add(before)
    decisions = {
        family.name: Decision(
            tuple(u for u in range(family.size) if u not in gone[family.name]), tuple(sorted(gone[family.name]))
        )
        for family in first.structure.families
    }
    predicted = None if first.predicted is None or second.predicted is None else first.predicted + second.predicted
    implants = {module: _mapped(first, module, implant, left) for module, implant in second.implants.items()}
    masks = {
        family.name: np.isin(np.arange(family.size), list(gone[family.name])) for family in first.structure.families
    }
    small = dataclasses.replace(CostModel(first.structure)(masks, implants), latency=_latency(first, second))
    return dataclasses.replace(
        second,
        structure=first.structure,
        decisions=decisions,
        implants=implants,
        dense=first.dense,
        small=small,  # by the dense model's families: heads that are alone in their layer are none of the second's
        predicted=predicted,
    )


def _latency(first: Plan, second: Plan) -> float | None:
    """By two tables, each of which is sure of shares only: they may be of other days."""
    times = first.small.latency, second.small.latency, second.dense.latency
    if any(time is None for time in times):
        return None
    before, small, dense = times
    return before * small / dense  # type: ignore[operator]


def _left(plan: Plan) -> dict[Key, list[int]]:
    """The dense positions that are left along each axis that shrinks, in their order."""
    lost: dict[Key, set[int]] = {}
    for family in plan.structure.families:
        for unit in plan.decisions[family.name].prune:
            for member in family.members:
                lost.setdefault((member.parameter, member.axis), set()).update(member.indices[unit])
    return {
        (name, axis): [i for i in range(plan.structure.tensors[name].shape[axis]) if i not in found]
        for (name, axis), found in lost.items()
    }


def _check(first: Plan, second: Plan, left: dict[Key, list[int]]) -> None:
    """Raises a HapError if the second plan's model is not the one that the first plan makes."""
    made = {
        name: tuple(len(left.get((name, axis), range(size))) for axis, size in enumerate(spec.shape))
        for name, spec in first.structure.tensors.items()
    }
    given = {name: spec.shape for name, spec in second.structure.tensors.items()}
    if made != given:
        names = sorted({*made, *given})
        wrong = next(name for name in names if made.get(name) != given.get(name))
        raise HapError(
            "the second plan is not for the model that the first one makes",
            expected=f"{wrong!r} of shape {made.get(wrong)}",
            got=f"{given.get(wrong)}",
            remedy="trace, measure and decide again on the pruned model",
        )


def _mapped(first: Plan, module: str, implant: Implant, left: dict[Key, list[int]]) -> Implant:
    if implant.form in NARROW:
        kept = first.decisions[heads_of(first.structure)[module].family.name].keep
        return dataclasses.replace(implant, indices=tuple(kept[i] for i in implant.indices))
    layer = first.structure.layer(module)
    places: Sequence[int] = left.get((layer.weight, layer.output_axis), range(layer.filters))
    return dataclasses.replace(implant, indices=tuple(places[i] for i in implant.indices))
