"""Operators that act on each element by itself, and normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hap.structure.rules.registry import Context, rule
from hap.structure.value import Value, align, along, axis_ids, support, touching


@rule(
    "dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias", "to", "_to_copy",
    "relu6", "hardswish", "silu", "selu", "celu", "rrelu", "leaky_relu", "mish", "softplus",
    "dropout2d", "lift_fresh_copy", "type_as", "float", "half",
)  # fmt: skip
def elementwise(context: Context, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Value:
    """Also the rule of every operator that PyTorch itself tags as pointwise.

    ``f(0)`` need not be 0: gates stand where units are read, after this operator.
    """
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    return align(context.units, values, shape, context.where)


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
    *_: Any,
) -> Value:
    """Each channel is normalised by itself."""
    channel = axis_ids(context.units, x, 1)
    for tensor in (weight, bias, mean, variance):
        if tensor is not None:
            context.units.tie(channel, axis_ids(context.units, tensor, 0))
    if channel is None and weight is not None:
        ids = axis_ids(context.units, weight, 0)
        return Value(shape, (along(ids, 1, len(shape)),)) if ids is not None else Value(shape)
    return Value(shape, x.factors)


@rule("layer_norm", "rms_norm")
def layer_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    normalized: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    """Units inside a normalised axis are mixed: removing one differs from closing its gate."""
    result = align(context.units, [v for v in (x, weight, bias) if v is not None], shape, context.where)
    for factor in touching(x, set(range(len(shape) - len(normalized), len(shape)))):
        context.units.blur(factor)
    return result


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
        context.units.blur(channel)
        grid = channel.reshape(groups, -1)
        context.units.tie(grid[:1], grid[1:])
    return Value(shape, x.factors)


@rule("softmax", "log_softmax", "_softmax", "cumsum", "argmax", "argsort", "sort", "topk")
def over_axis(context: Context, shape: tuple[int, ...], x: Value, axis: int, *_: Any) -> Value:
    """Mixes the positions along one axis, which must not change; the others pass."""
    for factor in touching(x, {axis % x.ndim}):
        context.units.freeze(factor, f"{context.where} runs over them")
    return Value(shape, tuple(f for f in x.factors if support(f) and len(shape) == x.ndim))
