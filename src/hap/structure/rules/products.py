"""Products of two activations: attention, matmul, einsum."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from hap.structure.rules.layers import consume, record
from hap.structure.rules.registry import Context, rule
from hap.structure.units import Ids
from hap.structure.value import Value, across, align, axis_ids, support, touching, without


@rule("matmul", "bmm")
def matmul(context: Context, shape: tuple[int, ...], first: Value, second: Value, *_: Any) -> Value:
    """``(*batch, n, k) @ (*batch, k, m)``: units lie side by side on batch axes (heads); those summed over stay.

    Where one of the two is a parameter it is a weight, and reads what is summed over.
    """
    return _matmul(context, shape, (first, second), (0, 1))


@rule("baddbmm")
def baddbmm(context: Context, shape: tuple[int, ...], bias: Value, first: Value, second: Value, **_: Any) -> Value:
    """``bias + first @ second``."""
    return align(context.units, [bias, _matmul(context, shape, (first, second), (1, 2))], shape, context.where)


def _matmul(context: Context, shape: tuple[int, ...], pair: tuple[Value, Value], positions: tuple[int, int]) -> Value:
    """The product of two tensors that are the operator's arguments at these positions."""
    batch = len(shape) - 2
    if min(value.ndim for value in pair) < 2:
        raise TypeError("a vector")
    labels = ["".join(chr(97 + batch - v.ndim + 2 + i) for i in range(v.ndim - 2)) for v in pair]
    output = max(*labels, key=len) + "NM"
    terms = [(pair[0], labels[0] + "NK"), (pair[1], labels[1] + "KM")]
    return _weighted(context, shape, terms, output, positions)


@rule("einsum")
def einsum(context: Context, shape: tuple[int, ...], equation: str, tensors: Sequence[Value], **_: Any) -> Value:
    """Labels in the output and in every operand are batch axes; labels that are summed over stay.

    Of two operands one may be a weight, of any number of axes (heads, width, features): it reads what is summed over.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in (*terms, output)):
        raise TypeError("an ellipsis, a diagonal or no output")
    pairs = list(zip(tensors, terms, strict=True))
    if len(pairs) != 2:
        return _product(context, shape, pairs, output)
    return _weighted(context, shape, pairs, output, (1, 2))


@rule("scaled_dot_product_attention")
def attention(
    context: Context,
    shape: tuple[int, ...],
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    *_: Any,
    **options: Any,
) -> Value:
    """Heads lie side by side on the axis before the positions; a key head serves one query head or a group of them."""
    heads = query.shape[-3] if query.ndim > 2 else 1
    key, value = _repeated(key, heads), _repeated(value, heads)
    batch = "".join(chr(97 + i) for i in range(len(shape) - 2))
    positions = (*shape[:-1], key.shape[-2])
    scores = _product(context, positions, [(query, batch + "LK"), (key, batch + "SK")], batch + "LS")
    if mask is not None or isinstance(mask := options.get("attn_mask"), Value):
        scores = align(context.units, [scores, mask], positions, context.where)
    for factor in touching(scores, {len(shape) - 1}):
        context.units.freeze(factor, f"positions that {context.where} weighs")
    return _product(context, shape, [(scores, batch + "LS"), (value, batch + "SD")], batch + "LD")


def _repeated(value: Value, heads: int) -> Value:
    """Grouped-query attention: every key head stands for as many query heads, one beside the other."""
    axis = value.ndim - 3
    if axis < 0 or value.shape[axis] == heads:
        return value
    times = heads // value.shape[axis]
    factors = tuple(np.repeat(f, times, axis) if axis in support(f) else f for f in value.factors)
    return Value((*value.shape[:axis], heads, *value.shape[axis + 1 :]), factors)


def _weighted(
    context: Context,
    shape: tuple[int, ...],
    terms: Sequence[tuple[Value, str]],
    output: str,
    positions: tuple[int, int],
) -> Value:
    """The product of two tensors that are the operator's arguments at these positions; one may be a weight."""
    weights = [i for i in (0, 1) if context.tensor(positions[i]) is not None]
    if len(weights) != 1:
        return _product(context, shape, terms, output)
    (place,) = weights
    weight, labels = terms[place]
    read = _weight(context, terms[place], terms[1 - place], output)
    written = [axis for axis, label in enumerate(labels) if label not in terms[1 - place][1]]
    if len(labels) == 2 and len(read) == len(written) == 1:  # a layer has one input and one output axis
        uses = math.prod(shape) // weight.shape[written[0]]
        record(context, weight, written[0], (), 1, False, uses, at=positions[place], bias=None)
    return _product(context, shape, terms, output, read)


def _weight(context: Context, weight: tuple[Value, str], other: tuple[Value, str], output: str) -> set[str]:
    """Says which axes of a weight read and which produce; returns the labels of those that read."""
    read = set()
    for axis, label in enumerate(weight[1]):
        ids = axis_ids(context.units, weight[0], axis)
        if label not in output:
            consume(context, axis_ids(context.units, other[0], other[1].index(label)), ids)
            read.add(label)
        elif label not in other[1]:
            context.units.play(ids, "producer")
    return read


def _product(
    context: Context,
    shape: tuple[int, ...],
    terms: Sequence[tuple[Value, str]],
    output: str,
    read: Collection[str] = (),
) -> Value:
    """The product of labelled tensors, summed over the labels that `output` has not.

    Nothing but a weight (labels `read`) reads a unit that is summed over, so that no gate can close it: it stays.
    """
    aligned = []
    for value, labels in terms:
        if len(labels) != value.ndim:
            raise TypeError(f"{value.ndim} axes for {labels}")
        gone = {a for a, label in enumerate(labels) if label not in output}
        value = across(context.units, value, gone)
        for factor in touching(value, {a for a in gone if labels[a] not in read}):
            context.units.freeze(factor, f"summed over by {context.where}")
        factors = tuple(_moved(f, labels, output) for f in without(value, gone))
        sizes = dict(zip(labels, value.shape, strict=True))
        aligned.append(Value(tuple(sizes.get(label, 1) for label in output), factors))
    result = align(context.units, aligned, shape, context.where)
    shared = {a for a, label in enumerate(output) if all(label in labels for _, labels in terms)}
    result = across(context.units, result, set(range(len(output))) - shared)
    for factor in touching(result, shared) if not read else ():
        context.units.head(factor)
    return result


def _moved(factor: Ids, labels: str, output: str) -> Ids:
    """A factor's axes in the order of the output's labels."""
    kept = [a for a, label in enumerate(labels) if label in output]
    order = sorted(kept, key=lambda a: output.index(labels[a]))
    rest = [a for a in range(len(labels)) if a not in kept]  # of size 1: the factor does not touch them
    compact = factor.transpose([*order, *rest]).reshape([factor.shape[a] for a in order])
    sizes = iter(compact.shape)
    return compact.reshape([next(sizes) if label in labels else 1 for label in output])
