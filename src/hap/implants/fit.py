"""Fits implants to the filters that they replace: on the layer's real inputs, or by the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import nn

from hap.batches import Batch
from hap.implants.form import Factors, Form
from hap.implants.geometry import Dense, Geometry
from hap.implants.moments import RIDGE, Moments
from hap.implants.observe import Reading, dense_layer, observe
from hap.types import Layer

Init = Literal["least-squares", "weights", "zeros"]


@dataclass(frozen=True)
class Target:
    """What to fit in one layer.

    Attributes:
        rows: the filters to replace; whole groups in a grouped convolution.
        columns: the inputs within a group that the implant may read.
        form, rank: the implant's.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    form: Form
    rank: int | None = None


@dataclass(frozen=True)
class Fitted:
    """The factors of an implant, in the layer's dtype, and its biases, if the layer has any."""

    target: Target
    factors: Factors
    bias: torch.Tensor | None


def from_weights(layer: Dense, target: Target, *, zeros: bool = False) -> Fitted:
    """The fit of the weights alone, as if the inputs were white noise: centre taps, or a truncated SVD.

    Args:
        layer: the dense layer.
        target: what to fit.
        zeros: fit nothing, but put zeros into the last factor, as the code of the paper does; the others are random,
            the same at every call, so that training can begin.
    """
    if zeros:
        bias = None if layer.bias is None else layer.bias.detach()[list(target.rows)]
        return _fitted(layer, target, _silent(layer, target), bias)
    weight, bias = _rows(layer, target)
    factors = target.form.fit(Moments.white(weight), Geometry.of(layer), target.rank)
    return _fitted(layer, target, factors, bias)


def _silent(layer: Dense, target: Target) -> Factors:
    """Factors of the right shapes that together give zeros, without a fit: weights may be loaded into them next."""
    geometry = Geometry.of(layer)
    record = Layer("", "weight", None, len(layer.weight), 0, geometry.kernel, geometry.groups, False, positions=1)
    shapes = target.form.shapes(record, len(target.rows), len(target.columns), target.rank)
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5 for shape in shapes[:-1]]
    return tuple(factor.to(layer.weight.device) for factor in (*first, torch.zeros(shapes[-1])))


def least_squares(model: nn.Module, targets: Mapping[str, Target], batches: Iterable[Batch]) -> dict[str, Fitted]:
    """For each layer (by module name), the implant closest to its dense filters.

    Minimises ``E |y - W x - b|^2`` over the calibration data among the W that the form can be, where y is what the
    dense filters give and x what they read. Without a bias in the dense layer there is none in the implant. A weak
    pull towards the dense weights settles what the data leave open.

    Raises:
        HapError: a layer's inputs or outputs are not finite.
    """
    readings = {name: Reading(target.rows, target.columns, target.form.centre) for name, target in targets.items()}
    return {
        name: _solve(dense_layer(model, name), targets[name], found)
        for name, found in observe(model, readings, batches)
    }


def solve(
    form: Form,
    rank: int | None,
    geometry: Geometry,
    found: Moments,
    weight: torch.Tensor,
    *,
    biased: bool,
    ridge: float = RIDGE,
) -> tuple[Factors, torch.Tensor | None]:
    """Factors and biases (None if not `biased`) of least squares, pulled towards filters ``(G, rows, inputs)``."""
    about = found.centred() if biased else found
    factors = form.fit(about.pulled(weight, ridge), geometry, rank)
    if not biased:
        return factors, None
    return factors, found.bias(flat(form.dense(factors, geometry, rank), geometry, len(found.x), centre=form.centre))


def _solve(layer: Dense, target: Target, found: Moments) -> Fitted:
    """The fit for the moments of one dense layer."""
    weight, bias = _rows(layer, target)
    factors, bias = solve(target.form, target.rank, Geometry.of(layer), found, weight, biased=bias is not None)
    return _fitted(layer, target, factors, bias)


def flat(weight: torch.Tensor, geometry: Geometry, groups: int, *, centre: bool) -> torch.Tensor:
    """Filters ``(rows, columns, *kernel)`` as they multiply the moments' inputs: (groups, rows, inputs)."""
    weight = weight.reshape(*weight.shape[:2], geometry.taps)
    weight = weight[:, :, [geometry.centre]] if centre else weight
    return weight.reshape(groups, -1, weight.shape[1] * weight.shape[2])


def _rows(layer: Dense, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dense weights and biases of a target, float64."""
    weight, bias = layer.weight, layer.bias
    rows = torch.tensor(target.rows, device=weight.device)
    geometry = Geometry.of(layer)
    groups = len(target.rows) // (len(weight) // geometry.groups) if geometry.groups > 1 else 1
    kept = weight.detach()[rows][:, torch.tensor(target.columns, device=weight.device)].double()
    return (
        flat(kept, geometry, groups, centre=target.form.centre),
        bias.detach()[rows].double() if bias is not None else None,
    )


def _fitted(layer: Dense, target: Target, factors: Factors, bias: torch.Tensor | None) -> Fitted:
    dtype = layer.weight.dtype
    return Fitted(target, tuple(f.to(dtype).contiguous() for f in factors), bias if bias is None else bias.to(dtype))
