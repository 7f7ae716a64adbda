"""From tied unit ids to families, and to the reasons why other axes are frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hap.structure.units import Units
from hap.types import Family, Frozen, Kind, Member, Role

Key = tuple[str, int]  # a tensor and one of its axes
Array = np.ndarray

_FREE = -1


@dataclass(frozen=True, eq=False)
class _Table:
    """The units, numbered from 0, as arrays: a network has as many as all its axes have positions.

    Attributes:
        axes: for each tensor axis, the unit at each of its positions.
        roles: what each axis does with its units.
        exact, head: for each unit, whether no norm mixes it, and whether attention treats it beside others.
        texts: every reason to stay.
        reason: for each unit its reason's place in `texts`; -1 if it can leave.
    """

    axes: Mapping[Key, Array]
    roles: Mapping[Key, Role]
    exact: Array
    head: Array
    texts: tuple[str, ...]
    reason: Array


def families(units: Units, convolutions: set[str]) -> tuple[tuple[Family, ...], tuple[Frozen, ...]]:
    """Groups the units by the axes on which they lie, in the order of the forward pass.

    Units that attention treats side by side are heads; others whose first producer is the weight of
    one of the `convolutions` are channels, and the rest neurons.
    """
    table = _table(units)
    used = dict.fromkeys(tensor for tensor, _ in (*units.roles, *units.owners))  # roles in forward order
    rank = {name: i for i, name in enumerate(used)}
    built = [_family(table, members, rank, convolutions) for members in _groups(table)]
    built.sort(key=lambda f: [(rank[m.parameter], m.indices[0], m.axis) for m in f.roles("producer")[:1]])
    return _named(built), _frozen(table)


def _table(units: Units) -> _Table:
    roots = {key: units.roots(ids) for key, ids in units.owners.items()}
    every = np.unique(np.concatenate([np.arange(0), *roots.values()]))
    axes = {key: np.searchsorted(every, found) for key, found in roots.items()}
    roles: dict[Key, Role] = {key: units.roles.get(key, "follower") for key in axes}
    texts, reason = _reasons(units, every, axes, roles)
    exact = ~_marked([_numbers(units, every, units.inexact)], len(every))
    return _Table(axes, roles, exact, _marked([_numbers(units, every, units.heads)], len(every)), texts, reason)


def _numbers(units: Units, every: Array, ids: Iterable[int]) -> Array:
    """The units' numbers: places of their roots in `every`; past its end for those that lie on no tensor."""
    roots = units.roots(np.array([*ids], dtype=np.int64))
    return np.where(np.isin(roots, every), np.searchsorted(every, roots), len(every))


def _marked(numbers: Iterable[Array], size: int) -> Array:
    """A flag for each of `size` units, set for those with these numbers."""
    flags = np.zeros(size + 1, dtype=bool)
    for found in numbers:
        flags[found] = True
    return flags[:-1]


def _reasons(
    units: Units, every: Array, axes: Mapping[Key, Array], roles: Mapping[Key, Role]
) -> tuple[tuple[str, ...], Array]:
    """Why units cannot leave: what the rules said, or that nothing writes or reads them."""
    texts = tuple(dict.fromkeys((*units.frozen.values(), "", "no layer produces it", "no layer reads it")))
    code = {text: i for i, text in enumerate(texts)}
    reason = np.full(len(every) + 1, _FREE)
    given = np.array([code[text] for text in units.frozen.values()], dtype=np.int64)
    reason[_numbers(units, every, units.frozen)[::-1]] = given[::-1]  # the first one stands: it is written last
    reason = reason[:-1]
    produced, consumed = (
        _marked([own for key, own in axes.items() if roles[key] == role], len(every))
        for role in ("producer", "consumer")
    )
    for text, lacking in (
        ("", ~produced & ~consumed),  # no layer has to do with it: nothing to report
        ("no layer produces it", ~produced & consumed),
        ("no layer reads it", produced & ~consumed),
    ):
        reason[(reason == _FREE) & lacking] = code[text]
    return texts, reason


def _groups(table: _Table) -> list[dict[Key, Array]]:
    """For each set of units that can leave and lie on the same axes: their positions there, (units, positions)."""
    labels = _labels(table)
    groups: dict[int, dict[Key, Array]] = defaultdict(dict)
    for key, own in table.axes.items():
        places = np.flatnonzero(table.reason[own] == _FREE)
        places = places[np.lexsort((own[places], labels[own[places]]))]  # by label, then unit, then position
        found, starts = np.unique(labels[own[places]], return_index=True)
        for label, start, end in zip(found.tolist(), starts, [*starts, len(places)][1:], strict=True):
            block = places[start:end]
            groups[label][key] = block.reshape(len(np.unique(own[block])), -1)
    return list(groups.values())


def _labels(table: _Table) -> Array:
    """A number for each unit; the same for those that lie on the same axes, at as many positions of each."""
    labels = 2 * table.exact.astype(np.int64) + table.head
    unused = 4
    for own in table.axes.values():
        inside, counts = np.unique(own, return_counts=True)
        both = labels[inside] * (counts.max() + 1) + counts
        found, places = np.unique(both, return_inverse=True)
        labels[inside] = unused + places
        unused += len(found)
    return labels


def _family(table: _Table, members: dict[Key, Array], rank: Mapping[str, int], convolutions: set[str]) -> Family:
    keys = sorted(members, key=lambda key: (rank[key[0]], key))
    first = next(key for key in keys if table.roles[key] == "producer")
    order = np.argsort(members[first][:, 0])
    unit = table.axes[first][members[first][0, 0]]
    places = {positions.tobytes(): positions for positions in members.values()}  # most members have theirs in common
    indices = {key: tuple(zip(*positions[order].T.tolist(), strict=True)) for key, positions in places.items()}
    kind: Kind = "head" if table.head[unit] else "channel" if first[0] in convolutions else "neuron"
    return Family(
        name=first[0].removesuffix(".weight"),
        kind=kind,
        size=len(order),
        exact=bool(table.exact[unit]),
        members=tuple(Member(*key, indices[members[key].tobytes()], table.roles[key]) for key in keys),
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


def _frozen(table: _Table) -> tuple[Frozen, ...]:
    found = []
    for (tensor, axis), own in table.axes.items():
        reasons = table.reason[own]
        for reason in np.unique(reasons[reasons != _FREE]).tolist():
            if table.texts[reason]:
                places = np.flatnonzero(reasons == reason).tolist()
                found.append(Frozen(tensor, axis, tuple(places), table.texts[reason]))
    return tuple(sorted(found, key=lambda f: (f.parameter, f.axis, f.reason)))
