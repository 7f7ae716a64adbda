"""What can be chosen: units that may leave, and filters that may be implanted though their channel stays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hap.errors import HapError
from hap.implants import Heads, Option, heads_of
from hap.planning.constraints import Constraints
from hap.types import Family, Layer, Sensitivity, Structure

_IMPLANTABLE = ("Conv1d", "Conv2d", "Conv3d")

_Row = tuple[float, int, int, int]  # score, family, unit, layer


@dataclass(frozen=True)
class Candidates:
    """All candidates in one list, least sensitive first.

    Attributes:
        score: ascending, shape (n,).
        family: index into `families` of the unit, or -1 for a filter; shape (n,).
        unit: the unit's index in its family, or the first filter of a block; shape (n,).
        layer: index into `layers` of a filter, or -1 for a unit; shape (n,).
        families, layers: what the indices refer to.
        forced: for each family, a mask over the units that leave in any case.
        implants: for each family and unit, the filters that an implant would replace, by layer index.
        heads: for each family of heads that may become narrow, where they are, and the form.
    """

    score: np.ndarray
    family: np.ndarray
    unit: np.ndarray
    layer: np.ndarray
    families: tuple[Family, ...]
    layers: tuple[Layer, ...]
    forced: dict[str, np.ndarray]
    implants: dict[int, dict[int, tuple[tuple[int, ...], ...]]]
    heads: dict[int, tuple[Heads, str]]

    def __len__(self) -> int:
        return len(self.score)


def implantable(structure: Structure) -> tuple[Layer, ...]:
    """The layers whose filters can be replaced by pointwise ones: convolutions larger than 1.

    Where kernels cannot shrink (the caller ignores the layer, another one shares its weight, a
    subclass computes something else), the structure holds the kernel's axes frozen.
    """
    return tuple(
        layer
        for layer in structure.layers
        if math.prod(layer.kernel) > 1
        and structure.modules.get(layer.module) in _IMPLANTABLE
        and replaceable(structure, layer)
    )


def replaceable(structure: Structure, layer: Layer) -> bool:
    """Whether any of a layer's filters may be implanted, whatever the form."""
    held = any(f.parameter == layer.weight and f.axis >= 2 for f in structure.frozen)
    return bool(layer.positions and layer.module) and not held and _whole_groups(structure, layer)


def _whole_groups(structure: Structure, layer: Layer) -> bool:
    """Whether filters can be implanted group by group: with few wide groups, no part of one can."""
    return layer.groups == 1 or layer.groups > min(block(layer), structure.tensors[layer.weight].shape[1])


def block(layer: Layer) -> int:
    """How many consecutive filters are implanted together: those of one convolution group."""
    return layer.filters // layer.groups if layer.groups > 1 else 1


def candidates(
    structure: Structure,
    sensitivity: Sensitivity,
    bounds: Constraints,
    *,
    with_implants: bool,
    options: Mapping[str, Sequence[Option]] | None = None,
) -> Candidates:
    """Builds the list: every unit that may leave, and every filter that others' channels hold in place.

    The most sensitive units of each family, which its smallest width holds, are no candidates, nor are the least
    sensitive ones, for which its largest width has no place. Heads may become narrow where the `options` say so.

    Raises:
        HapError: the sensitivity is not one of this structure, or holds values that are not finite.
    """
    families = tuple(f for f in structure.families if bounds.rooms[f.name].most)
    layers = implantable(structure) if with_implants else ()
    layers = tuple(layer for layer in layers if layer.module not in bounds.protected)
    rows: list[_Row] = []
    forced = {}
    for i, family in enumerate(families):
        score, room = checked(sensitivity, sensitivity.scores, family.name, family.size), bounds.rooms[family.name]
        order = np.argsort(score, kind="stable")
        forced[family.name] = np.isin(np.arange(family.size), order[: room.least])
        rows += [(float(score[unit]), i, unit, -1) for unit in order[room.least : room.most].tolist()]
    rows += _filters(families, layers, sensitivity)
    rows.sort(key=lambda row: row[0])  # stable: ties stay in the order of the forward pass
    table = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 3)
    scores = np.array([row[0] for row in rows], dtype=np.float64)
    return Candidates(
        scores,
        table[:, 0],
        table[:, 1],
        table[:, 2],
        families,
        layers,
        forced,
        _implants(families, layers),
        _narrowable(structure, bounds, families, options or {}) if with_implants else {},
    )


def _narrowable(
    structure: Structure, bounds: Constraints, families: tuple[Family, ...], options: Mapping[str, Sequence[Option]]
) -> dict[int, tuple[Heads, str]]:
    """The families whose heads may become narrow; not those that keep a multiple of units."""
    offered = {
        heads.family.name: (heads, option.form)
        for name, heads in heads_of(structure).items()
        for option in reversed(options.get(name, ()))
        if bounds.round_to == 1 and option.form in heads.forms()
    }
    return {i: offered[family.name] for i, family in enumerate(families) if family.name in offered}


def _filters(families: tuple[Family, ...], layers: tuple[Layer, ...], sensitivity: Sensitivity) -> Iterator[_Row]:
    for k, layer in enumerate(layers):
        if layer.module not in sensitivity.filters:
            continue
        score = checked(sensitivity, sensitivity.filters, layer.module, layer.filters)
        replaceable, step = _replaceable(families, layer), block(layer)
        for first in range(0, layer.filters, step):
            if first not in replaceable:
                yield float(score[first : first + step].sum()), -1, first, k


def checked(sensitivity: Sensitivity, values: Mapping[str, torch.Tensor], name: str, size: int) -> np.ndarray:
    """The values called `name`, as float64.

    Raises:
        HapError: they are missing, of another shape, or not finite.
    """
    value = values.get(name)
    if value is None or tuple(value.shape) != (size,):
        raise HapError(
            f"the sensitivity does not fit the structure at {name!r}",
            expected=f"scores of shape ({size},)",
            got="none" if value is None else f"shape {tuple(value.shape)}",
            remedy="measure again with this structure",
        )
    score = value.detach().double().cpu().numpy()
    bad = int((~np.isfinite(score)).sum())
    if bad:
        raise HapError(
            f"{sensitivity.criterion} gave scores that are not finite at {name!r}",
            expected="finite numbers",
            got=f"{bad} of {size} are NaN or infinite",
            remedy="check the calibration data and the model's weights",
        )
    return score


def _producers(family: Family, layer: Layer) -> list[tuple[tuple[int, ...], ...]]:
    return [m.indices for m in family.members if (m.parameter, m.axis) == (layer.weight, layer.output_axis)]


def _replaceable(families: tuple[Family, ...], layer: Layer) -> set[int]:
    """Filters whose unit has no other producer: to implant one is a choice of its unit."""
    found: set[int] = set()
    for family in families:
        if len(family.roles("producer")) == 1:
            for indices in _producers(family, layer):
                found.update(i for unit in indices for i in unit)
    return found


def _implants(
    families: tuple[Family, ...], layers: tuple[Layer, ...]
) -> dict[int, dict[int, tuple[tuple[int, ...], ...]]]:
    return {
        i: {k: indices for k, layer in enumerate(layers) for indices in _producers(family, layer)}
        for i, family in enumerate(families)
    }
