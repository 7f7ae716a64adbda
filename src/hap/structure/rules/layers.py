"""Convolutions, linear layers and embeddings: where units are produced and consumed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.structure.rules.registry import Context, Multiplication, freeze_all, rule
from hap.structure.units import Ids
from hap.structure.value import Value, along, axis_ids, touching, without

Sizes = int | Sequence[int]

# Only these can be replaced by an implant: what a subclass does besides is not known.
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@rule("linear")
def linear(context: Context, shape: tuple[int, ...], x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``y[..., o] = sum_i w[o, i] x[..., i] + b[o]``."""
    units = context.units
    consume(context, axis_ids(units, x, -1), axis_ids(units, weight, 1))
    out = _produce(context, weight, 0, bias)
    record(context, weight, 0, (), 1, False, math.prod(shape[:-1]))
    return _with(shape, without(x, {x.ndim - 1}), out, len(shape) - 1)


@rule("addmm")
def addmm(context: Context, shape: tuple[int, ...], bias: Value, x: Value, weight: Value) -> Value:
    """``y = x W + b`` with W of shape (in, out): a linear layer by another layout (GPT-2's Conv1D)."""
    if context.tensor(2) is None or bias.ndim != 1:
        raise TypeError("not a weight and a bias")
    consume(context, axis_ids(context.units, x, 1), axis_ids(context.units, weight, 0))
    out = _produce(context, weight, 1, bias)
    record(context, weight, 1, (), 1, False, shape[0], at=2, bias=0)
    return _with(shape, without(x, {1}), out, 1)


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Value:
    """Weight ``(out, in / groups, *kernel)``."""
    units = context.units
    channel = len(shape) - (weight.ndim - 2) - 1
    read = axis_ids(units, x, channel)
    inner = axis_ids(units, weight, 1)
    out = _produce(context, weight, 0, bias)
    if groups == 1:
        consume(context, read, inner)
    else:
        _group(context, read, inner, out, groups, weight.shape[0] // groups, weight.shape[1])
    record(context, weight, 0, weight.shape[2:], groups, False, math.prod(shape) // weight.shape[0])
    if not _implantable(context) or len(shape) != weight.ndim:
        for factor in touching(weight, set(range(2, weight.ndim))):
            units.freeze(factor, "called otherwise than by a plain convolution of its own, on a batch")
    return _convolved(context, shape, x, channel, out)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Value:
    """Weight ``(in, out / groups, *kernel)``."""
    units = context.units
    channel = len(shape) - (weight.ndim - 2) - 1
    read = axis_ids(units, x, channel)
    out = _produce(context, weight, 1, bias if groups == 1 else None)
    consume(context, read, axis_ids(units, weight, 0))
    record(context, weight, 1, weight.shape[2:], groups, True, math.prod(x.shape) // weight.shape[0])
    if groups > 1:
        for value in (x, weight, *([bias] if bias else [])):
            for factor in touching(value, set(range(value.ndim))):
                units.freeze(factor, "a transposed convolution with groups")
        return Value(shape)
    return _convolved(context, shape, x, channel, out)


@rule("embedding")
def embedding(context: Context, shape: tuple[int, ...], weight: Value, index: Value, *_: object) -> Value:
    """Rows are looked up, so the rows stay; the columns are produced."""
    freeze_all(context, [index], "used as an index")
    rows = axis_ids(context.units, weight, 0)
    if rows is not None:
        context.units.freeze(rows, "rows of a look-up table")
    out = _produce(context, weight, 1, None)
    return _with(shape, (), out, len(shape) - 1)


def consume(context: Context, read: Ids | None, inner: Ids | None) -> None:
    """Says that the weight's axis `inner` reads the units `read`."""
    context.units.play(inner, "consumer")
    if read is None and inner is not None:
        context.units.freeze(inner, "reads an input of fixed size")
    else:
        context.units.tie(read, inner)


def _produce(context: Context, weight: Value, axis: int, bias: Value | None) -> Ids | None:
    out = axis_ids(context.units, weight, axis)
    context.units.play(out, "producer")
    if bias is not None and out is not None:
        context.units.tie(out, axis_ids(context.units, bias, 0))
    return out


def _group(
    context: Context, read: Ids | None, inner: Ids | None, out: Ids | None, groups: int, rows: int, columns: int
) -> None:
    """Ties units so that the convolution stays a grouped one.

    With many small groups (depthwise, ResNeXt) a unit is a whole group, in and out: the number of
    groups shrinks, which surgery can tell a convolution module, but no other caller. With few wide
    ones a unit is a position inside the group, the same in every group.
    """
    units = context.units
    if out is None or read is None:
        for ids in (read, out):
            if ids is not None:
                units.freeze(ids, "a grouped convolution meets an axis of fixed size")
        return
    ins, outs = read.reshape(groups, columns), out.reshape(groups, rows)
    if groups > min(rows, columns):
        if context.tensor(1) is None or not isinstance(context.caller, _ConvNd):
            for ids in (read, out):
                units.freeze(ids, "the number of groups is written outside a convolution module")
        units.tie(ins[:, :1], ins[:, 1:])
        units.tie(ins[:, :1], outs)
        if inner is not None:
            units.freeze(inner, "width of a convolution group")
        if columns == 1:
            units.play(out, "follower")
    else:
        units.tie(ins[:1], ins[1:])
        units.tie(outs[:1], outs[1:])
        units.play(inner, "consumer")
        units.tie(ins[0], inner)


def _convolved(context: Context, shape: tuple[int, ...], x: Value, channel: int, out: Ids | None) -> Value:
    spatial = set(range(channel + 1, len(shape)))
    for factor in touching(x, spatial):
        context.units.freeze(factor, f"positions that {context.where} slides over")
    return _with(shape, without(x, spatial | {channel}), out, channel)


def _with(shape: tuple[int, ...], factors: tuple[Ids, ...], out: Ids | None, axis: int) -> Value:
    """A value with the ids of a layer's output, if it has any, along `axis`."""
    return Value(shape, factors if out is None else (*factors, along(out, axis, len(shape))))


def _implantable(context: Context) -> bool:
    """Whether a plain convolution module is calling its own weight."""
    name = context.tensor(1)
    owner = context.modules.get(name.rpartition(".")[0]) if name else None
    return type(owner) in _PLAIN and owner is context.caller


def record(
    context: Context,
    weight: Value,
    axis: int,
    kernel: tuple[int, ...],
    groups: int,
    is_transposed: bool,
    uses: int,
    *,
    at: int = 1,
    bias: int | None = 2,
) -> None:
    """Notes a layer whose weight and bias are the arguments at these positions."""
    name = context.tensor(at)
    if name is not None:
        filters, added = weight.shape[axis], None if bias is None else context.tensor(bias)
        context.layers.append(Multiplication(name, added, filters, axis, tuple(kernel), groups, is_transposed, uses))
