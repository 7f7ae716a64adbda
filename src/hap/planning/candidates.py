"""What can be chosen: units that may leave, and filters that may be implanted though their channel stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hap.errors import HapError
from hap.types import IGNORED, Family, Layer, Sensitivity, Structure

_IMPLANTABLE = ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class Candidates:
    """All candidates in one list, least sensitive first.

    Attributes:
        score: ascending, shape (n,).
        family: index into `families` of the unit, or -1 for a filter; shape (n,).
        unit: the unit's index in its family, or the first filter of a block; shape (n,).
        layer: index into `layers` of a filter, or -1 for a unit; shape (n,).
        families, layers: what the indices refer to.
        implants: for each family and unit, the filters that an implant would replace, by layer index.
    """

    score: np.ndarray
    family: np.ndarray
    unit: np.ndarray
    layer: np.ndarray
    families: tuple[Family, ...]
    layers: tuple[Layer, ...]
    implants: dict[int, dict[int, tuple[tuple[int, ...], ...]]]

    def __len__(self) -> int:
        return len(self.score)


def implantable(structure: Structure) -> tuple[Layer, ...]:
    """The layers whose filters can be replaced by pointwise ones: convolutions larger than 1."""
    ignored = {f.parameter for f in structure.frozen if f.reason == IGNORED}
    return tuple(
        layer
        for layer in structure.layers
        if math.prod(layer.kernel) > 1
        and structure.modules.get(layer.module) in _IMPLANTABLE
        and layer.module
        and layer.weight not in ignored
        and _whole_groups(structure, layer)
    )


def _whole_groups(structure: Structure, layer: Layer) -> bool:
    """Whether filters can be implanted group by group: with few wide groups, no part of one can."""
    return layer.groups == 1 or layer.groups > min(block(layer), structure.tensors[layer.weight].shape[1])


def block(layer: Layer) -> int:
    """How many consecutive filters are implanted together: those of one convolution group."""
    return layer.filters // layer.groups if layer.groups > 1 else 1


def candidates(
    structure: Structure, sensitivity: Sensitivity, *, with_implants: bool, floor: int, inexact: bool
) -> Candidates:
    """Builds the list: every unit that may leave, and every filter that others' channels hold in place.

    The `floor` most sensitive units of each family are no candidates.

    Raises:
        HapError: the sensitivity is not one of this structure, or holds values that are not finite.
    """
    families = tuple(f for f in structure.families if f.exact or inexact)
    layers = implantable(structure) if with_implants else ()
    scores, rows = [], []
    for i, family in enumerate(families):
        score = _checked(sensitivity, family.name, family.size)
        order = np.argsort(score, kind="stable")
        for unit in order[: max(0, family.size - floor)]:
            scores.append(score[unit])
            rows.append((i, int(unit), -1))
    alone = {layer.weight: _replaceable(families, layer) for layer in layers}
    for k, layer in enumerate(layers):
        filters = sensitivity.filters.get(layer.module)
        if filters is None:
            continue
        step = block(layer)
        for first in range(0, layer.filters, step):
            if first not in alone[layer.weight]:
                scores.append(float(filters[first : first + step].sum()))
                rows.append((-1, first, k))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    score = np.array(scores, dtype=np.float64)
    if not np.isfinite(score).all():
        raise HapError(
            f"{sensitivity.criterion} gave scores that are not finite",
            expected="finite numbers",
            got=f"{int((~np.isfinite(score)).sum())} of {len(score)} are NaN or infinite",
            remedy="check the calibration data and the model's weights",
        )
    order = np.argsort(score, kind="stable")
    table = table[order]
    return Candidates(
        score[order], table[:, 0], table[:, 1], table[:, 2], families, layers, _implants(families, layers)
    )


def _checked(sensitivity: Sensitivity, name: str, size: int) -> np.ndarray:
    score = sensitivity.scores.get(name)
    if score is None or tuple(score.shape) != (size,):
        raise HapError(
            f"the sensitivity does not fit the structure at family {name!r}",
            expected=f"scores of shape ({size},)",
            got="none" if score is None else f"shape {tuple(score.shape)}",
            remedy="measure again with this structure",
        )
    return score.double().cpu().numpy()


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
