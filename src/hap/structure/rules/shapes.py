"""Operators that rearrange elements: they act on the ids as they act on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hap.structure.rules.registry import Context, freeze_all, rule
from hap.structure.units import Ids
from hap.structure.value import Value, across, align, along, axis_ids, rearranged, reshape, support, touching, without


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def rearrange(context: Context, shape: tuple[int, ...], x: Value, *sizes: Any) -> Value:
    """Only the shapes matter, and which size is left open (-1)."""
    open_axis = None
    if context.where in ("view", "reshape") and sizes and -1 in sizes[0]:
        open_axis = sizes[0].index(-1)
    _write(context, x, shape)
    return reshape(context.units, x, shape, context.where, open_axis)


def _write(context: Context, x: Value, shape: tuple[int, ...]) -> None:
    for factor, sizes in rearranged(x, shape):
        context.write(factor, sizes)


@rule("view_as", "reshape_as")
def rearrange_as(context: Context, shape: tuple[int, ...], x: Value, other: Value) -> Value:
    """Takes another tensor's shape, so that their units are the same."""
    _write(context, x, shape)
    return align(context.units, [reshape(context.units, x, shape, context.where), other], shape, context.where)


@rule("permute")
def permute(context: Context, shape: tuple[int, ...], x: Value, axes: Sequence[int]) -> Value:
    """Reorders the axes."""
    return Value(shape, tuple(f.transpose([a % x.ndim for a in axes]) for f in x.factors))


@rule("transpose", "swapaxes", "swapdims")
def transpose(context: Context, shape: tuple[int, ...], x: Value, first: int, second: int) -> Value:
    """Swaps two axes."""
    return Value(shape, tuple(f.swapaxes(first, second) for f in x.factors))


@rule("movedim", "moveaxis")
def move_axis(context: Context, shape: tuple[int, ...], x: Value, source: Any, target: Any) -> Value:
    """Moves axes to other places."""
    return Value(shape, tuple(np.moveaxis(f, source, target) for f in x.factors))


@rule("t", "numpy_T", "mT")
def matrix_transpose(context: Context, shape: tuple[int, ...], x: Value) -> Value:
    """Swaps the axes of a matrix, or of a batch of them."""
    return Value(shape, tuple(f.swapaxes(-2, -1) if context.where == "mT" else f.T for f in x.factors))


@rule("expand")
def expand(context: Context, shape: tuple[int, ...], x: Value, *_: Any) -> Value:
    """Repeats axes of size 1, which have no ids; new axes come in front."""
    extra = (1,) * (len(shape) - x.ndim)
    for factor in x.factors:
        context.write(factor, tuple(shape[len(extra) + a] for a in sorted(support(factor))))
    return Value(shape, tuple(f.reshape(extra + f.shape) for f in x.factors))


@rule("cat", "concat", "concatenate")
def cat(context: Context, shape: tuple[int, ...], tensors: Sequence[Value], axis: int = 0) -> Value:
    """Joins the ids along `axis`; the other axes are tied. An empty vector (a fresh cache) adds nothing."""
    units = context.units
    axis %= len(shape)
    tensors = [across(units, value, {axis}) for value in tensors if value.shape != (0,)]
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


@rule("stack")
def stack(context: Context, shape: tuple[int, ...], tensors: Sequence[Value], axis: int = 0) -> Value:
    """Joins tensors along a new axis; their axes are tied."""
    axis %= len(shape)
    single = _one(shape, axis)
    values = [Value(single, tuple(np.expand_dims(f, axis) for f in v.factors)) for v in tensors]
    return Value(shape, align(context.units, values, single, context.where).factors)


@rule("repeat", "tile")
def repeat(context: Context, shape: tuple[int, ...], x: Value, times: Sequence[int]) -> Value:
    """Copies along axes: all copies of a unit are that unit."""
    extra = (1,) * (len(shape) - x.ndim)
    times = (1,) * (len(shape) - len(times)) + tuple(times)
    factors = []
    for factor in x.factors:
        wide = factor.reshape(extra + factor.shape)
        factors.append(np.tile(wide, [n if a in support(wide) else 1 for a, n in enumerate(times)]))
    return Value(shape, tuple(factors))


@rule("repeat_interleave")
def repeat_interleave(context: Context, shape: tuple[int, ...], x: Value, times: int, axis: int) -> Value:
    """Copies each position, one copy beside the other."""
    axis %= x.ndim
    return Value(shape, tuple(np.repeat(f, times, axis) if axis in support(f) else f for f in x.factors))


@rule("pixel_shuffle")
def pixel_shuffle(context: Context, shape: tuple[int, ...], x: Value, factor: int) -> Value:
    """A channel is made of the ``factor ** 2`` consecutive ones that hold its pixels."""
    channel = x.ndim - 3
    ids = axis_ids(context.units, x, channel)
    kept = _off_pixels(context, without(x, {channel}), x.ndim)
    if ids is None:
        return Value(shape, kept)
    grid = ids.reshape(-1, factor**2)
    context.units.tie(grid[:, :1], grid)
    return Value(shape, (*kept, along(grid[:, 0], channel, x.ndim)) if shape[channel] > 1 else kept)


@rule("pixel_unshuffle")
def pixel_unshuffle(context: Context, shape: tuple[int, ...], x: Value, factor: int) -> Value:
    """A channel becomes ``factor ** 2`` consecutive ones."""
    kept = _off_pixels(context, x.factors, x.ndim)
    channel = x.ndim - 3
    return Value(shape, tuple(np.repeat(f, factor**2, channel) if channel in support(f) else f for f in kept))


def _off_pixels(context: Context, factors: tuple[Ids, ...], ndim: int) -> tuple[Ids, ...]:
    """The factors that do not touch the last two axes; freezes the others."""
    found = Value((0,) * ndim, factors)
    for factor in touching(found, {ndim - 2, ndim - 1}):
        context.units.freeze(factor, f"pixels that {context.where} moves")
    return without(found, {ndim - 2, ndim - 1})


@rule("channel_shuffle")
def channel_shuffle(context: Context, shape: tuple[int, ...], x: Value, groups: int) -> Value:
    """``(g, n)`` becomes ``(n, g)``: every group must lose the same positions."""
    ids = axis_ids(context.units, x, 1)
    if ids is None:
        return Value(shape, x.factors)
    grid = ids.reshape(groups, -1)
    context.units.tie(grid[:1], grid[1:])
    return Value(shape, (*without(x, {1}), along(grid.T.ravel(), 1, x.ndim)))


@rule("glu")
def glu(context: Context, shape: tuple[int, ...], x: Value, axis: int = -1) -> Value:
    """The first half times the sigmoid of the second."""
    halves = chunk(context, [shape, shape], x, 2, axis)
    return align(context.units, halves, shape, context.where)


@rule("chunk", "tensor_split")
def chunk(context: Context, shapes: list[tuple[int, ...]], x: Value, pieces: Any, axis: int = 0) -> list[Value]:
    """Pieces are cut at fractions of the axis, so all pieces must lose the same positions."""
    if not isinstance(pieces, int):  # tensor_split at given positions
        return split(context, shapes, x, pieces, axis)
    return _pieces(context, shapes, x, axis % x.ndim)


def _pieces(
    context: Context, shapes: list[tuple[int, ...]], x: Value, axis: int, *, listed: bool = False
) -> list[Value]:
    """Cuts `axis` into pieces, all of which must lose the same positions; of listed sizes, each its own."""
    x = across(context.units, x, {axis})
    ids = axis_ids(context.units, x, axis)
    sizes = [shape[axis] for shape in shapes]
    if ids is not None:
        if len(set(sizes)) == 1:
            grid = ids.reshape(len(sizes), -1)
            context.units.tie(grid[:1], grid)
        elif not listed:
            context.units.freeze(ids, f"cut into uneven pieces by {context.where}")
    return _cut(context, x, ids, axis, shapes)


@rule("split", "split_with_sizes", "unbind", "unsafe_split")
def split(context: Context, shapes: list[tuple[int, ...]], x: Value, sizes: Any = 0, axis: int = 0) -> Any:
    """Pieces of a constant size: the code must be told the new one."""
    if shapes and len(shapes[0]) < x.ndim:  # unbind(x, axis)
        axis = int(sizes) % x.ndim
        x = across(context.units, x, {axis})
        freeze_all(context, [Value(x.shape, tuple(touching(x, {axis})))], f"taken apart by {context.where}")
        rest = tuple(np.squeeze(f, axis) for f in without(x, {axis}))
        return [Value(shape, rest) for shape in shapes]
    axis %= x.ndim
    for factor in touching(x, {axis}):
        context.write(factor, tuple({shape[axis]: 0 for shape in shapes}))
    if context.where == "tensor_split":
        freeze_all(
            context, [Value(x.shape, tuple(touching(x, {axis})))], f"cut at constant positions by {context.where}"
        )
    return _pieces(context, shapes, x, axis, listed=isinstance(sizes, Sequence))


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
    """``x[:, start:end:step]`` with constants stays right only if nothing moves across its ends.

    A positive number counts from the front: what lies before it must stay. A negative one counts
    from the back: what lies after it must stay. An end at or past the last position is no number.
    """
    axis %= x.ndim
    size = x.shape[axis]
    span = slice(start, size if end is None else end, step)
    if context.where.endswith("narrow"):
        span = slice(start, (start or 0) + (end or 0))
    x = across(context.units, x, {axis})
    ids = axis_ids(context.units, x, axis)
    first, last, stride = span.indices(size)
    if ids is not None:
        held = np.full(size, stride != 1)
        for given, place in ((span.start, first), (span.stop, last)):
            if place not in (0, size):
                held[slice(place, None) if given < 0 else slice(place)] = True
        if held.any():
            context.units.freeze(ids[held], f"cut at constant positions by {context.where}")
    return _cut(context, x, None if ids is None else ids[span], axis, [shape])[0]


@rule("select")
def select(context: Context, shape: tuple[int, ...], x: Value, axis: int, index: int) -> Value:
    """One position of an axis; units on that axis must stay."""
    axis %= x.ndim
    x = across(context.units, x, {axis})
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


@rule("roll")
def roll(context: Context, shape: tuple[int, ...], x: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> Value:
    """Moves positions along the given axes, or (without any) along all; their units must stay."""
    return Value(shape, _in_place(context, x, axes or range(x.ndim)))


@rule("flip")
def flip(context: Context, shape: tuple[int, ...], x: Value, axes: Sequence[int]) -> Value:
    """Turns the given axes around; their units must stay."""
    return Value(shape, _in_place(context, x, axes))


def _in_place(context: Context, x: Value, axes: Sequence[int]) -> tuple[Ids, ...]:
    """The factors of `x`, frozen along `axes`."""
    moved = {a % x.ndim for a in axes}
    x = across(context.units, x, moved)
    for factor in touching(x, moved):
        context.units.freeze(factor, f"positions are moved by {context.where}")
    return x.factors


def _one(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _cut(context: Context, x: Value, ids: Ids | None, axis: int, shapes: list[tuple[int, ...]]) -> list[Value]:
    """The pieces along `axis`, one after the other, with their share of `ids`; one of size 1 has none."""
    rest = without(x, {axis})
    pieces, start = [], 0
    for shape in shapes:
        part = None if ids is None else ids[start : start + shape[axis]]
        start += shape[axis]
        own = (along(part, axis, len(shape)),) if part is not None and part.size > 1 else ()
        if part is not None and part.size == 1:
            context.units.freeze(part, f"cut out alone by {context.where}")
        pieces.append(Value(shape, (*rest, *own)))
    return pieces
