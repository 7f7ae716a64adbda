"""Operators that act on each element by itself, and normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hap.structure.rules.registry import Context, rule
from hap.structure.value import Value, across, align, along, axis_ids, touching


@rule(
    "relu6", "hardswish", "silu", "selu", "celu", "rrelu", "leaky_relu", "mish", "softplus", "expand_as", "where",
)  # fmt: skip
def elementwise(context: Context, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Value:
    """Also the rule of every operator that PyTorch itself tags as pointwise.

    ``f(0)`` need not be 0: gates stand where units are read, after this operator.
    """
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    return align(context.units, values, shape, context.where)


@rule(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout2d",
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as", "float", "half",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
)  # fmt: skip
def as_first(context: Context, shape: tuple[int, ...], x: Value, *_: Any, **__: Any) -> Value:
    """The shape of the first argument; the others say at most what dtype to take."""
    return Value(shape, x.factors)


@rule("new_zeros", "new_ones", "new_full", "zeros", "ones", "full")
def constant(context: Context, shape: tuple[int, ...], *_: Any, **__: Any) -> Value:
    """The same number everywhere: as long as the code makes it, if the code can be told."""
    axes = [(a, context.units.fresh(n)) for a, n in enumerate(shape) if n > 1]
    for _axis, ids in axes:
        context.write(ids, (ids.size,))
    return Value(shape, tuple(along(ids, a, len(shape)) for a, ids in axes))


@rule("new_empty", "new_tensor")
def fixed(context: Context, shape: tuple[int, ...], *_: Any, **__: Any) -> Value:
    """A shape written as numbers; the first argument gives the dtype alone."""
    return Value(shape)


@rule("prelu")
def prelu(context: Context, shape: tuple[int, ...], x: Value, slope: Value) -> Value:
    """One slope for all channels, or one for each."""
    if slope.shape[0] > 1:
        context.units.tie(axis_ids(context.units, x, 1), axis_ids(context.units, slope, 0))
    return Value(shape, x.factors)


@rule("batch_norm", "instance_norm")
def per_channel_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    variance: Value | None,
    of_input: bool = False,
    *_: Any,
) -> Value:
    """Each channel is normalised by itself; statistics of the input mix what else is in it."""
    if context.where == "instance_norm":
        for factor in touching(x, set(range(2, x.ndim))):
            context.units.freeze(factor, "positions that instance_norm mixes")
    elif of_input:  # also how some code standardises weights: input channels are mixed
        for factor in touching(x, {0, *range(2, x.ndim)}):
            context.units.blur(factor)
    channel = axis_ids(context.units, x, 1)
    for tensor in (weight, bias, mean, variance):
        if tensor is not None:
            context.units.tie(channel, axis_ids(context.units, tensor, 0))
    return Value(shape, x.factors)


@rule("_weight_norm")
def weight_norm(context: Context, shape: tuple[int, ...], direction: Value, length: Value, axis: int = 0) -> Value:
    """``w = length * direction / |direction|``, the norm taken over all axes but one: it mixes the units on those."""
    for factor in touching(direction, set(range(len(shape))) - {axis}):
        context.units.blur(factor)
    return align(context.units, [direction, length], shape, context.where)


@rule("layer_norm")
def layer_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    normalized: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    """Units inside a normalised axis are mixed: removing one differs from closing its gate.

    Without a weight nothing tells surgery which module has the size written down.
    """
    mixed = set(range(len(shape) - len(normalized), len(shape)))
    x = across(context.units, x, mixed)
    result = align(context.units, [v for v in (x, weight, bias) if v is not None], shape, context.where)
    for factor in touching(x, mixed):
        context.units.blur(factor)
        if weight is None:
            context.units.freeze(factor, f"{context.where} without a weight has their number written down")
    return result


@rule("rms_norm")
def rms_norm(
    context: Context, shape: tuple[int, ...], x: Value, normalized: Sequence[int], weight: Value | None = None, *_: Any
) -> Value:
    """As `layer_norm`, without a bias: what follows the weight is a number."""
    return layer_norm(context, shape, x, normalized, weight)


@rule("group_norm")
def group_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    """Each group must keep the same number of channels, and mixes them."""
    channel = axis_ids(context.units, x, 1)
    for tensor in (weight, bias):
        if tensor is not None:
            context.units.tie(channel, axis_ids(context.units, tensor, 0))
    if channel is not None:
        grid = channel.reshape(groups, -1)
        context.units.tie(grid[:1], grid[1:])
    for factor in x.factors:
        context.units.blur(factor)
    return Value(shape, x.factors)
