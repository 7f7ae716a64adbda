"""Operators that rearrange elements: they act on the ids as they act on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hap.structure.rules.registry import Context, freeze_all, rule
from hap.structure.units import Ids
from hap.structure.value import Value, align, along, axis_ids, reshape, support, touching, without


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
def rearrange(context: Context, shape: tuple[int, ...], x: Value, *_: Any) -> Value:
    """Only the shapes matter."""
    return reshape(context.units, x, shape, context.where)


@rule("permute")
def permute(context: Context, shape: tuple[int, ...], x: Value, axes: Sequence[int]) -> Value:
    """Reorders the axes."""
    return Value(shape, tuple(f.transpose([a % x.ndim for a in axes]) for f in x.factors))


@rule("transpose", "swapaxes", "swapdims")
def transpose(context: Context, shape: tuple[int, ...], x: Value, first: int, second: int) -> Value:
    """Swaps two axes."""
    return Value(shape, tuple(f.swapaxes(first, second) for f in x.factors))


@rule("t", "numpy_T")
def matrix_transpose(context: Context, shape: tuple[int, ...], x: Value) -> Value:
    """Swaps the axes of a matrix."""
    return Value(shape, tuple(f.T for f in x.factors))


@rule("expand", "expand_as")
def expand(context: Context, shape: tuple[int, ...], x: Value, *_: Any) -> Value:
    """Repeats axes of size 1, which have no ids; new axes come in front."""
    extra = (1,) * (len(shape) - x.ndim)
    return Value(shape, tuple(f.reshape(extra + f.shape) for f in x.factors))


@rule("cat", "concat", "concatenate")
def cat(context: Context, shape: tuple[int, ...], tensors: Sequence[Value], axis: int = 0) -> Value:
    """Joins the ids along `axis`; the other axes are tied."""
    units = context.units
    axis %= len(shape)
    parts = []
    for value in tensors:
        ids = axis_ids(units, value, axis)
        if ids is None:
            ids = units.fresh(value.shape[axis])
            units.freeze(ids, f"concatenated with a tensor of fixed size by {context.where}")
        parts.append(ids)
    labelled = any(touching(value, {axis}) for value in tensors)
    joined = (along(np.concatenate(parts), axis, len(shape)),) if labelled and shape[axis] > 1 else ()
    others = [Value(_one(v.shape, axis), without(v, {axis})) for v in tensors]
    return Value(shape, (*joined, *align(context.units, others, _one(shape, axis), context.where).factors))


@rule("chunk", "tensor_split")
def chunk(context: Context, shapes: list[tuple[int, ...]], x: Value, pieces: int, axis: int = 0) -> list[Value]:
    """Pieces are cut at fractions of the axis, so all pieces must lose the same positions."""
    axis %= x.ndim
    ids = axis_ids(context.units, x, axis)
    sizes = [shape[axis] for shape in shapes]
    if ids is not None:
        if len(set(sizes)) == 1:
            grid = ids.reshape(len(sizes), -1)
            context.units.tie(grid[:1], grid[1:])
        else:
            context.units.freeze(ids, f"cut into uneven pieces by {context.where}")
    return _cut(x, ids, axis, shapes)


@rule("split", "split_with_sizes", "unbind", "unsafe_split")
def split(context: Context, shapes: list[tuple[int, ...]], x: Value, sizes: Any = 0, axis: int = 0) -> Any:
    """Pieces of constant sizes: nothing may move."""
    if shapes and len(shapes[0]) < x.ndim:  # unbind(x, axis)
        axis = int(sizes) % x.ndim
        freeze_all(context, [Value(x.shape, tuple(touching(x, {axis})))], f"taken apart by {context.where}")
        rest = tuple(np.squeeze(f, axis) for f in without(x, {axis}))
        return [Value(shape, rest) for shape in shapes]
    axis %= x.ndim
    ids = axis_ids(context.units, x, axis)
    if ids is not None:
        context.units.freeze(ids, f"cut at constant positions by {context.where}")
    return _cut(x, ids, axis, shapes)


@rule("slice", "narrow")
def slice_(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    axis: int = 0,
    start: int | None = 0,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """``x[:, start:end:step]`` with constants stays right only if nothing before `end` leaves.

    An end at or past the last position follows the axis when it shrinks.
    """
    axis %= x.ndim
    size = x.shape[axis]
    span = slice(start, size if end is None else end, step)
    if context.where.endswith("narrow"):
        span = slice(start, (start or 0) + (end or 0))
    ids = axis_ids(context.units, x, axis)
    first, last, stride = span.indices(size)
    if ids is not None and (first, last, stride) != (0, size, 1):
        held = size if stride != 1 else first if last == size else last
        if held:
            context.units.freeze(ids[:held], f"cut at constant positions by {context.where}")
    return _cut(x, None if ids is None else ids[span], axis, [shape])[0]


@rule("select")
def select(context: Context, shape: tuple[int, ...], x: Value, axis: int, index: int) -> Value:
    """One position of an axis; units on that axis must stay."""
    axis %= x.ndim
    for factor in touching(x, {axis}):
        context.units.freeze(factor, f"one position is taken by {context.where}")
    return Value(shape, tuple(np.squeeze(f, axis) for f in without(x, {axis})))


@rule("pad", "constant_pad_nd")
def pad(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    amounts: Sequence[int],
    mode: str | float = "constant",
    value: float | None = None,
) -> Value:
    """Constant padding adds positions that never leave (option A shortcuts); the others may."""
    units = context.units
    factors = list(x.factors)
    for k in range(len(amounts) // 2):
        axis, before, after = x.ndim - 1 - k, amounts[2 * k], amounts[2 * k + 1]
        ids = axis_ids(units, Value(x.shape, tuple(factors)), axis) if before or after else None
        if ids is None:
            continue
        factors = [f for f in factors if axis not in support(f)]
        if isinstance(mode, str) and mode != "constant" or before < 0 or after < 0:
            units.freeze(ids, f"changed in length by {context.where}")
            continue
        edges = [units.fresh(before), units.fresh(after)]
        for edge in edges:
            units.freeze(edge, f"a constant number of channels is padded by {context.where}")
        factors.append(along(np.concatenate([edges[0], ids, edges[1]]), axis, x.ndim))
    return Value(shape, tuple(factors))


@rule("roll", "flip")
def keep_order(context: Context, shape: tuple[int, ...], x: Value, first: Sequence[int], axes: Any = None) -> Value:
    """Moves positions along the given axes, whose units must stay; the others pass."""
    moved = {a % x.ndim for a in (axes if axes is not None else first)}
    for factor in touching(x, moved):
        context.units.freeze(factor, f"positions are moved by {context.where}")
    return Value(shape, x.factors)


def _one(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _cut(x: Value, ids: Ids | None, axis: int, shapes: list[tuple[int, ...]]) -> list[Value]:
    """The pieces along `axis`, one after the other, with their share of `ids`."""
    rest = without(x, {axis})
    pieces, start = [], 0
    for shape in shapes:
        part = None if ids is None else ids[start : start + shape[axis]]
        start += shape[axis]
        own = (along(part, axis, len(shape)),) if part is not None and part.size > 1 else ()
        pieces.append(Value(shape, (*rest, *own)))
    return pieces
