"""From a plan to the order of what is left along every axis of every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hap.planning import Plan
from hap.surgery.carriers import orders
from hap.types import Family

Key = tuple[str, int]  # a tensor and one of its axes


@dataclass(frozen=True)
class Layout:
    """What is left: for each tensor axis that changes, the dense positions in their new order."""

    kept: dict[Key, tuple[int, ...]]

    def of(self, tensor: str, axis: int, size: int) -> Sequence[int]:
        """The positions left along an axis of dense length `size`."""
        return self.kept.get((tensor, axis), range(size))


def layout(plan: Plan) -> Layout:
    """Drops pruned units; moves the units of implanted filters, and narrow heads, to one end of their family.

    Implanted and other filters then lie side by side, so that the forward pass needs no scatter.
    """
    gone: dict[Key, set[int]] = {}
    moved: dict[Key, dict[int, int]] = {}
    sites = {heads.family.name: (heads, orders(plan, heads, implant)) for heads, implant in plan.narrowed.values()}
    for family in plan.structure.families:
        heads, own = sites.get(family.name, (None, {}))
        every = _order(plan, family)
        for member in family.members:
            key, order = (member.parameter, member.axis), own.get(member.parameter, every)
            lost = set(range(family.size)).difference(order)
            gone.setdefault(key, set()).update(i for u in lost for i in member.indices[u])
            for indices in [member.indices] if heads is None else heads.chunks(member):
                values = [i for u in order for i in indices[u]]
                if list(order) != sorted(order):
                    moved.setdefault(key, {}).update(zip(sorted(values), values, strict=True))
    kept = {}
    for key, lost in gone.items():
        places = moved.get(key, {})
        left = [i for i in range(plan.structure.tensors[key[0]].shape[key[1]]) if i not in lost]
        if lost or places:
            kept[key] = tuple(places.get(i, i) for i in left)
    return Layout(kept)


def _order(plan: Plan, family: Family) -> tuple[int, ...]:
    """The kept units in the order that serves most producers.

    A producer needs no gather if its implanted units, or its others, are a tail of the order. Tails are nested: the
    sets that most producers share come first, then the largest, and each that is nested with those before is served.
    """
    kept = plan.decisions[family.name].keep
    if not _movable(family):
        return kept
    sets = Counter(frozenset(found.intersection(kept)) for found in _implanted_units(plan, family))
    tails: list[frozenset[int]] = []
    for found, _ in sorted(sets.items(), key=lambda item: (-item[1], -len(item[0]))):
        for tail in (found, frozenset(kept) - found):
            if all(tail <= other or other <= tail for other in tails):
                tails.append(tail)
                break
    return tuple(sorted(kept, key=lambda unit: sum(unit in tail for tail in tails)))


def _implanted_units(plan: Plan, family: Family) -> list[set[int]]:
    """For each layer that writes the family, the units whose filters it implants."""
    found = []
    for layer in plan.structure.layers:
        implant = plan.filters.get(layer.module)
        for member in family.members if implant is not None else ():
            if (member.parameter, member.axis) == (layer.weight, layer.output_axis):
                rows = set(implant.indices) if implant is not None else set()
                found.append({u for u, indices in enumerate(member.indices) if rows.issuperset(indices)})
    return found


def _movable(family: Family) -> bool:
    """Whether units can change places: each takes a run of as many positions as every other, in order.

    Units that interleave (channel shuffle, the same place in several groups) stay where they are.
    """
    for member in family.members:
        lengths = {len(unit) for unit in member.indices}
        flat = [i for unit in member.indices for i in unit]
        if len(lengths) > 1 or flat != sorted(flat):
            return False
    return True
