"""From tied unit ids to families, and to the reasons why other axes are frozen."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from hap.structure.units import Units
from hap.types import Family, Frozen, Kind, Member, Role

Key = tuple[str, int]  # a tensor and one of its axes
Places = dict[Key, list[int]]  # where a unit lies


def families(units: Units, convolutions: set[str]) -> tuple[tuple[Family, ...], tuple[Frozen, ...]]:
    """Groups the units by the axes on which they lie, in the order of the forward pass.

    Units that attention treats side by side are heads; others whose first producer is the weight of
    one of the `convolutions` are channels, and the rest neurons.
    """
    places = _places(units)
    reasons = _reasons(units, places)
    inexact, heads = (
        set(units.roots(np.array([*ids], dtype=np.int64)).tolist()) for ids in (units.inexact, units.heads)
    )
    used = dict.fromkeys(tensor for tensor, _ in (*units.roles, *units.owners))  # roles in forward order
    rank = {name: i for i, name in enumerate(used)}
    groups: dict[tuple[Any, ...], list[Places]] = defaultdict(list)
    for root, where in places.items():
        if root not in reasons:
            signature = (root not in inexact, root in heads, *sorted((key, len(where[key])) for key in where))
            groups[signature].append(where)
    built = [_family(units, found, key[0], key[1], rank, convolutions) for key, found in groups.items()]
    built.sort(key=lambda f: [(rank.get(m.parameter, len(rank)), m.indices[0]) for m in f.roles("producer")[:1]])
    return _named(built), _frozen(units, places, reasons)


def _places(units: Units) -> dict[int, Places]:
    """For each unit, its positions on every tensor axis."""
    places: dict[int, Places] = defaultdict(dict)
    for key, owner in units.owners.items():
        for index, root in enumerate(units.roots(owner.ids).tolist()):
            places[root].setdefault(key, []).append(index)
    return places


def _role(units: Units, key: Key) -> Role:
    return units.roles.get(key, "follower")


def _reasons(units: Units, places: dict[int, Places]) -> dict[int, str]:
    """Why a unit cannot leave: what the rules said, or that nothing writes or reads it."""
    reasons: dict[int, str] = {}
    frozen = units.roots(np.array([*units.frozen], dtype=np.int64)).tolist()
    for root, reason in zip(frozen, units.frozen.values(), strict=True):
        reasons.setdefault(root, reason)
    for root, where in places.items():
        roles = {_role(units, key) for key in where}
        if "producer" not in roles:
            reasons.setdefault(root, "no layer produces it" if "consumer" in roles else "")
        elif "consumer" not in roles:
            reasons.setdefault(root, "no layer reads it")
    return reasons


def _family(
    units: Units, members: list[Places], exact: bool, head: bool, rank: dict[str, int], convolutions: set[str]
) -> Family:
    keys = sorted(members[0], key=lambda key: (rank.get(key[0], len(rank)), key))
    first = next(key for key in keys if _role(units, key) == "producer")
    members = sorted(members, key=lambda where: where[first])
    kind: Kind = "head" if head else "channel" if first[0] in convolutions else "neuron"
    return Family(
        name=first[0].removesuffix(".weight"),
        kind=kind,
        size=len(members),
        exact=exact,
        members=tuple(Member(k[0], k[1], tuple(tuple(w[k]) for w in members), _role(units, k)) for k in keys),
    )


def _named(found: list[Family]) -> tuple[Family, ...]:
    """Gives families that start at the same layer (parts of a stream) a number."""
    count: dict[str, int] = defaultdict(int)
    named = []
    for family in found:
        count[family.name] += 1
        suffix = f"/{count[family.name]}" if count[family.name] > 1 else ""
        named.append(Family(family.name + suffix, family.kind, family.size, family.exact, family.members))
    return tuple(named)


def _frozen(units: Units, places: dict[int, Places], reasons: dict[int, str]) -> tuple[Frozen, ...]:
    found: dict[tuple[Key, str], list[int]] = defaultdict(list)
    for root, where in places.items():
        reason = reasons.get(root)
        if reason:
            for key, indices in where.items():
                found[key, reason].extend(indices)
    return tuple(Frozen(key[0], key[1], tuple(sorted(i)), reason) for (key, reason), i in sorted(found.items()))
