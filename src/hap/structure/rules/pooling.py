"""Pooling, resampling, reductions and sorting: some axes are summarised or mixed, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hap.structure.rules.registry import Context, rule
from hap.structure.value import Value, across, touching, without

_MOMENTS = {"mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"}


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
)  # fmt: skip
def pool(context: Context, shape: Any, x: Value, *_: Any, **__: Any) -> Any:
    """Acts on the axes whose operator name counts them (the last one, two or three)."""
    name = context.where
    spatial = set(range(x.ndim - (1 if "1d" in name else 3 if "3d" in name else 2), x.ndim))
    for factor in touching(x, spatial):
        context.units.freeze(factor, f"positions that {name} summarises")
    return _each(shape, without(x, spatial))


@rule("grid_sampler")
def grid_sample(context: Context, shape: tuple[int, ...], x: Value, grid: Value, *_: Any) -> Value:
    """Reads each channel at the same places."""
    for factor in (*touching(x, set(range(2, x.ndim))), *grid.factors):
        context.units.freeze(factor, f"positions of {context.where}")
    return Value(shape, without(x, set(range(2, x.ndim))))


@rule(
    "mean", "sum", "prod", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "median", "any", "all",
    "logsumexp", "linalg_vector_norm", "norm", "argmax", "argmin",
)  # fmt: skip
def reduce(
    context: Context, shape: Any, x: Value, axes: int | Sequence[int] | None = None, *rest: Any, **_: Any
) -> Any:
    """A reduction over units changes when they leave; moments along an axis (a norm written by hand) may."""
    if context.where in ("linalg_vector_norm", "norm"):
        axes = rest[0] if rest else None
    if isinstance(axes, Value):
        raise TypeError("two tensors")
    listed = [axes] if isinstance(axes, int) else axes or range(x.ndim)  # no axes means all
    gone = {a % x.ndim for a in listed}
    x = across(context.units, x, gone)
    for factor in touching(x, gone):
        if context.where in _MOMENTS and axes is not None:
            context.units.blur(factor)
        else:
            context.units.freeze(factor, f"{context.where} runs over them")
    kept = without(x, gone)
    first = shape[0] if isinstance(shape, list) else shape
    if len(first) != x.ndim:
        kept = tuple(np.squeeze(f, tuple(gone)) for f in kept)
    return _each(shape, kept)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "argsort", "sort", "topk")
def over_axis(context: Context, shape: Any, x: Value, *options: Any, **named: Any) -> Any:
    """Mixes the positions along one axis, which must not change; the others pass."""
    if context.where == "topk":
        options = options[1:]  # how many comes first
    if context.where in ("sort", "argsort", "topk") and not options:
        options = (named.get("dim", -1),)  # of the stable variants it is given by name
    axis = options[0]
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError("the axis is not the first option")
    x = across(context.units, x, {axis % x.ndim})
    for factor in touching(x, {axis % x.ndim}):
        context.units.freeze(factor, f"{context.where} runs over them")
    return _each(shape, x.factors if context.where != "topk" else without(x, {axis % x.ndim}))


def _each(shape: Any, factors: tuple[Any, ...]) -> Any:
    """A value with these factors, or a list of them where the operator gives out several tensors."""
    return [Value(s, factors) for s in shape] if isinstance(shape, list) else Value(shape, factors)
