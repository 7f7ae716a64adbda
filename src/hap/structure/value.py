"""What a tensor of the traced graph carries: for its axes, arrays of unit ids.

A `Value` has *factors*: id arrays that broadcast to the tensor's shape, each over its own axes (its
support). An element of the tensor belongs to the unit that each factor names at its place, and it
is gone when any of these units is. Most tensors have one factor over their channel axis; after a
view from ``g * n`` to ``(g, n)`` one factor spans both. Axes without ids have a fixed size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hap.structure.units import Ids, Units


@dataclass(frozen=True)
class Value:
    """A tensor's shape and factors. Supports of different factors are disjoint."""

    shape: tuple[int, ...]
    factors: tuple[Ids, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def all_ids(self) -> list[Ids]:
        """The ids of every factor."""
        return [f.ravel() for f in self.factors]


def support(factor: Ids) -> frozenset[int]:
    """The axes along which a factor has ids."""
    return frozenset(a for a, n in enumerate(factor.shape) if n > 1)


def along(ids: Ids, axis: int, ndim: int) -> Ids:
    """One-dimensional ids as a factor over `axis`."""
    shape = [1] * ndim
    shape[axis] = ids.size
    return ids.reshape(shape)


def touching(value: Value, axes: set[int]) -> list[Ids]:
    """The factors with ids on any of these axes."""
    return [f for f in value.factors if support(f) & axes]


def axis_ids(units: Units, value: Value, axis: int) -> Ids | None:
    """One id per position along `axis`, or None if it has none.

    A factor that spans other axes too is tied across them: whoever reads one axis as a whole
    cannot tell those units apart.
    """
    axis %= value.ndim
    for factor in touching(value, {axis}):
        rows = np.moveaxis(factor, axis, 0).reshape(value.shape[axis], -1)
        if rows.shape[1] > 1:
            units.tie(rows[:, :1], rows[:, 1:])
        return rows[:, 0]
    return None


def across(units: Units, value: Value, axes: set[int]) -> Value:
    """Ties units along `axes` where they differ along other axes too, so that the others alone may shrink.

    For operators that act along one axis of a split one, such as a softmax over the groups: the
    size of that axis stays, the heads or groups can still leave.
    """
    factors = []
    for factor in value.factors:
        if support(factor) & axes and support(factor) - axes:
            first = factor[tuple(slice(1) if a in axes else slice(None) for a in range(value.ndim))]
            units.tie(first, factor)
            factor = first
        factors.append(factor)
    return Value(value.shape, tuple(factors))


def without(value: Value, axes: set[int]) -> tuple[Ids, ...]:
    """The factors that have no ids on these axes."""
    return tuple(f for f in value.factors if not support(f) & axes)


def align(units: Units, values: list[Value], shape: tuple[int, ...], where: str) -> Value:
    """The result of an element-wise operator: aligned ids become one unit each (broadcasting)."""
    padded = [_left_pad(v, len(shape)) for v in values]
    merged: list[Ids] = []
    for value in padded:
        for factor in value.factors:
            merged = _merge(units, merged, factor, where)
    for value in padded:
        own = frozenset().union(*map(support, value.factors)) if value.factors else frozenset()
        merged = [f if own & support(f) else _beside(units, f, value.shape, where) for f in merged]
    return Value(shape, tuple(merged))


def _beside(units: Units, factor: Ids, shape: tuple[int, ...], where: str) -> Ids:
    """A factor that meets a tensor without units: where that is longer than 1, nothing can leave."""
    fixed = {a for a in support(factor) if shape[a] > 1}
    if fixed == support(factor):
        units.freeze(factor, f"combined with a tensor of fixed size by {where}")
        return factor
    (rest,) = across(units, Value(shape, (factor,)), fixed).factors
    return rest


def _left_pad(value: Value, ndim: int) -> Value:
    extra = (1,) * (ndim - value.ndim)
    return Value(extra + value.shape, tuple(f.reshape(extra + f.shape) for f in value.factors))


def _merge(units: Units, merged: list[Ids], factor: Ids, where: str) -> list[Ids]:
    overlapping = [m for m in merged if support(m) & support(factor)]
    if not overlapping:
        return [*merged, factor]
    nested = all(support(m) <= support(factor) or support(factor) <= support(m) for m in overlapping)
    if len(overlapping) > 1 or not nested:
        for ids in (*overlapping, factor):
            units.freeze(ids, f"axes that are split differently meet in {where}")
        return merged
    units.tie(overlapping[0], factor)
    smaller = min(overlapping[0], factor, key=lambda f: len(support(f)))
    return [smaller if m is overlapping[0] else m for m in merged]


def reshape(units: Units, value: Value, shape: tuple[int, ...], where: str, open_axis: int | None = None) -> Value:
    """The ids rearranged as a view, reshape, flatten, squeeze or unsqueeze rearranges the data.

    `open_axis` is the one whose size is left open (-1): where an axis is split, units can leave there.
    """
    blocks = _blocks(value.shape, shape)
    touched = [[i for i, (source, _) in enumerate(blocks) if support(f) & set(source)] for f in value.factors]
    merged = {i for i, block in enumerate(blocks) if not _same(value.shape, shape, block)}
    shared = {i for i in merged if sum(i in own for own in touched) > 1}
    factors: list[Ids] = []
    for factor, own in zip(value.factors, touched, strict=True):
        if shared & set(own) and not units.are_heads(factor):  # heads leave as a whole, whatever their width
            units.freeze(factor, f"two axes of units are merged by {where}")
            continue
        source = [a for i in own for a in blocks[i][0]]
        target = [a for i in own for a in blocks[i][1]]
        local = factor.reshape([factor.shape[a] for a in source])
        full = np.broadcast_to(local, [value.shape[a] for a in source]).reshape([shape[a] for a in target])
        factors.append(_note_grid(units, factor, _place(_compress(full), target, len(shape)), open_axis))
    return Value(shape, tuple(f for f in factors if support(f)))


def rearranged(value: Value, shape: tuple[int, ...]) -> list[tuple[Ids, tuple[int, ...]]]:
    """Each factor that a reshape to `shape` names sizes of, with the sizes of the finer axes."""
    found = []
    for source, target in _blocks(value.shape, shape):
        finer = max(([value.shape[a] for a in source], [shape[a] for a in target]), key=len)
        found += [(f, tuple(finer)) for f in value.factors if support(f) & set(source)]
    return found


def _same(source: tuple[int, ...], target: tuple[int, ...], block: tuple[list[int], list[int]]) -> bool:
    """Whether a reshape leaves the axes of this block as they are."""
    return [source[a] for a in block[0]] == [target[a] for a in block[1]]


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of the smallest runs of axes with equal products, in order."""
    blocks = []
    i = j = 0
    while i < len(source) or j < len(target):
        left, right = [i] if i < len(source) else [], [j] if j < len(target) else []
        i, j = i + len(left), j + len(right)
        a, b = math.prod(source[k] for k in left), math.prod(target[k] for k in right)
        while a != b:
            if a < b:
                left.append(i)
                a *= source[i]
                i += 1
            else:
                right.append(j)
                b *= target[j]
                j += 1
        blocks.append((left, right))
    return blocks


def _compress(ids: Ids) -> Ids:
    """Drops the axes along which the ids repeat."""
    for axis in range(ids.ndim):
        first = np.take(ids, [0], axis)
        if (ids == first).all():
            ids = first
    return ids


def _place(ids: Ids, axes: list[int], ndim: int) -> Ids:
    shape = [1] * ndim
    for axis, size in zip(axes, ids.shape, strict=True):
        shape[axis] = size
    return ids.reshape(shape)


def _note_grid(units: Units, before: Ids, after: Ids, open_axis: int | None) -> Ids:
    """Remembers an axis that has been split; returns the ids to go on with."""
    axes = sorted(support(after))
    if len(axes) <= len(support(before)) or len(axes) < 2:
        return after
    if open_axis in axes[:-1]:  # the others have constant sizes: each position of this one leaves as a whole
        whole = after[tuple(slice(None) if a == open_axis else slice(1) for a in range(after.ndim))]
        units.tie(whole, after)
        return whole
    units.grids.append(after.reshape([after.shape[a] for a in axes]))
    return after
