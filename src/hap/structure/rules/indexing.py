"""Operators that pick positions by an index."""

from __future__ import annotations

from collections.abc import Sequence

from hap.structure.rules.registry import Context, freeze_all, rule
from hap.structure.value import Value, across, touching, without


@rule("index")
def index(context: Context, shape: tuple[int, ...], x: Value, indices: Sequence[Value | None]) -> Value:
    """``x[:, i, j]``: the axes that index tensors stand for become those of the index; the others pass."""
    freeze_all(context, [i for i in indices if i is not None], "used as an index")
    given = [a for a, i in enumerate(indices) if i is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise TypeError("index tensors that do not stand side by side")
    x = _held(context, x, set(given))
    new = len(shape) - (x.ndim - len(given))
    first, last = given[0], given[-1] + 1
    factors = tuple(f.reshape(f.shape[:first] + (1,) * new + f.shape[last:]) for f in x.factors)
    return Value(shape, factors)


@rule("index_select")
def index_select(context: Context, shape: tuple[int, ...], x: Value, axis: int, chosen: Value) -> Value:
    """Positions of one axis; the others pass."""
    freeze_all(context, [chosen], "used as an index")
    return Value(shape, _held(context, x, {axis % x.ndim}).factors)


@rule("gather")
def gather(context: Context, shape: tuple[int, ...], x: Value, axis: int, *_: Value) -> Value:
    """Positions of one axis, chosen for each place along the others, along which the index is as long as `x`."""
    axis %= x.ndim
    if len(shape) != x.ndim or any(shape[a] != x.shape[a] for a in range(x.ndim) if a != axis):
        raise TypeError("an index of another shape")
    x = _held(context, x, {axis})
    for factor in x.factors:
        context.write(factor, ())
    return Value(shape, x.factors)


@rule("tril", "triu")
def triangle(context: Context, shape: tuple[int, ...], x: Value, *_: int) -> Value:
    """Positions of the last two axes are told apart by their place."""
    return Value(shape, _held(context, x, {x.ndim - 2, x.ndim - 1}).factors)


def _held(context: Context, x: Value, axes: set[int]) -> Value:
    """`x` with nothing free to leave along `axes`."""
    x = across(context.units, x, axes)
    for factor in touching(x, axes):
        context.units.freeze(factor, f"positions picked by {context.where}")
    return Value(x.shape, without(x, axes))
