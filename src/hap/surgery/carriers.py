"""Which full heads' places narrow heads take."""

from __future__ import annotations

from dataclasses import dataclass

from hap.implants import Heads, Packing, packs
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

    @property
    def packing(self) -> Packing:
        """What the attention module has to know."""
        return Packing(len(self.units), self.parts)

    def place(self, number: int) -> tuple[int, slice]:
        """The head, and the part of its width, that the narrow head of this number takes."""
        part = number % self.parts * self.rank
        return self.units[number // self.parts], slice(part, part + self.rank)


def stored(plan: Plan) -> dict[str, Decision]:
    """The decisions as the tensors show them: of heads with implants, those that carry them stay, as the last ones."""
    decisions = dict(plan.decisions)
    for heads, implant in plan.narrowed.values():
        keep, narrow = plan.decisions[heads.family.name].keep, set(implant.indices)
        order = (*(unit for unit in keep if unit not in narrow), *Carriers.of(heads, implant).units)
        gone = tuple(unit for unit in range(heads.family.size) if unit not in order)
        decisions[heads.family.name] = Decision(order, gone)
    return decisions
