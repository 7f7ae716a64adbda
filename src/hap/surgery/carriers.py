"""Which full heads' places narrow heads take."""

from __future__ import annotations

from dataclasses import dataclass

from hap.implants import HEAD, Heads, Packed, Packing, ValuePacking, packs
from hap.planning import Decision, Implant, Plan


@dataclass(frozen=True)
class Carriers:
    """The first heads with implants carry all of them: each the narrow heads of several, side by side along its width.

    Attributes:
        units: the heads whose places are taken, in their order; the last heads of the small model.
        parts: narrow heads in each.
        rank: the width of a narrow head.
    """

    units: tuple[int, ...]
    parts: int
    rank: int

    @staticmethod
    def of(heads: Heads, implant: Implant) -> Carriers:
        """Those of one attention module."""
        assert implant.rank is not None
        parts = heads.width // implant.rank
        return Carriers(implant.indices[: packs(len(implant.indices), parts)], parts, implant.rank)

    def place(self, number: int) -> tuple[int, slice]:
        """The head, and the part of its width, that the narrow head of this number takes."""
        part = number % self.parts * self.rank
        return self.units[number // self.parts], slice(part, part + self.rank)


def packing(plan: Plan, heads: Heads, implant: Implant) -> Packed:
    """What the attention module has to know."""
    carriers, narrow = Carriers.of(heads, implant), len(implant.indices)
    if implant.form == HEAD:
        return Packing(len(carriers.units), carriers.parts)
    return ValuePacking(len(plan.decisions[heads.family.name].keep) - narrow, narrow, carriers.parts)


def orders(plan: Plan, heads: Heads, implant: Implant) -> dict[str, tuple[int, ...]]:
    """For each tensor with heads, those whose places stay, in their new order: full ones first, then narrow ones.

    Where narrow ones share places, those that carry them stay.
    """
    narrow = set(implant.indices)
    full = tuple(unit for unit in plan.decisions[heads.family.name].keep if unit not in narrow)
    found = {member.parameter: (*full, *implant.indices) for member in heads.members}
    carried = (*full, *Carriers.of(heads, implant).units)
    return found | {member.parameter: carried for member in heads.carrying(implant.form)}


def stored(plan: Plan) -> dict[str, Decision]:
    """The decisions as the tensors of queries show them, which tell how many heads there are."""
    decisions = dict(plan.decisions)
    for heads, implant in plan.narrowed.values():
        order = orders(plan, heads, implant)[heads.projections[0].weight]
        gone = tuple(unit for unit in range(heads.family.size) if unit not in order)
        decisions[heads.family.name] = Decision(order, gone)
    return decisions
