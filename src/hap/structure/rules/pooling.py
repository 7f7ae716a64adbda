"""Pooling, resampling and reductions: some axes are summarised, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hap.structure.rules.registry import Context, rule
from hap.structure.value import Value, touching, without


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool2d_with_indices", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
def pool(context: Context, shape: Any, x: Value, *_: Any, **__: Any) -> Any:
    """Acts on the axes whose operator name counts them (the last one, two or three)."""
    name = context.where
    spatial = set(range(x.ndim - (1 if "1d" in name else 3 if "3d" in name else 2), x.ndim))
    for factor in touching(x, spatial):
        context.units.freeze(factor, f"positions that {name} summarises")
    shapes = shape if isinstance(shape, list) else [shape]
    values = [Value(s, without(x, spatial)) for s in shapes]
    return values if isinstance(shape, list) else values[0]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "logsumexp", "linalg_vector_norm", "norm")
def reduce(
    context: Context, shape: tuple[int, ...], x: Value, axes: int | Sequence[int] | None = None, *rest: Any, **_: Any
) -> Value:
    """A reduction over an axis of units changes when they leave."""
    if context.where in ("linalg_vector_norm", "norm"):
        axes, rest = (rest[0] if rest else None), rest[1:]
    listed = range(x.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = {a % x.ndim for a in listed}
    for factor in touching(x, gone):
        context.units.freeze(factor, f"{context.where} runs over them")
    kept = without(x, gone)
    if len(shape) == x.ndim:
        return Value(shape, kept)
    return Value(shape, tuple(np.squeeze(f, tuple(gone)) for f in kept))
