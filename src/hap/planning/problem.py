"""The choices of mode ``optimal`` as arrays: units that may leave, filters and heads that may be implanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hap.errors import HapError, unknown
from hap.implants import NARROW, Heads, Option, form_of, heads_of
from hap.planning.candidates import block, checked, replaceable
from hap.planning.constraints import Constraints
from hap.types import Family, Layer, Sensitivity, Structure


@dataclass(frozen=True, eq=False)
class Implantable:
    """A layer whose filters may be implanted, block by block, all in one form; or a module whose heads may be.

    Attributes:
        module: the name of the layer, or of the attention module.
        block: filters in a block: one, or those of a convolution group. One head.
        owner: for each block, the unit that it computes, -1 where none may leave.
        options: the forms to choose from.
        rise: the predicted rise of the loss by each option and block, shape ``(options, blocks)``.
        parts: for each option, how many blocks take the place of a full one: heads save nothing one by one.
    """

    module: str
    block: int
    owner: np.ndarray
    options: tuple[Option, ...]
    rise: np.ndarray
    parts: tuple[int, ...]

    def step(self, option: int, implanted: int, *, smaller: bool) -> int:
        """How many blocks to implant, or (not `smaller`) to make full again, at once."""
        parts = self.parts[option]
        begun = implanted % parts
        return parts - begun if smaller else begun or parts


@dataclass(frozen=True, eq=False)
class Problem:
    """All choices, and what each is predicted to cost in loss.

    Attributes:
        families: all of the structure's, in its order; units are counted through, one family after the other.
        start: the first unit of each family, and the number of units.
        score: the predicted rise of the loss when one unit leaves alone, never below zero.
        gram: see `Sensitivity`; None to take units as independent.
        least, most: how many units of each family leave.
        round_to: kept units are a multiple of this, or all.
        layers: what may be implanted.
    """

    families: tuple[Family, ...]
    start: np.ndarray
    score: np.ndarray
    gram: np.ndarray | None
    least: np.ndarray
    most: np.ndarray
    round_to: int
    layers: tuple[Implantable, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Units of each family."""
        return np.diff(self.start)

    @cached_property
    def writers(self) -> tuple[tuple[int, ...], ...]:
        """For each family, the layers (by number) with blocks that compute units of it."""
        families = [np.searchsorted(self.start, owner, side="right") - 1 for owner in (x.owner for x in self.layers)]
        return tuple(tuple(k for k, found in enumerate(families) if f in found) for f in range(len(self.families)))

    def spans(self) -> Iterator[slice]:
        """The units of each family."""
        return (slice(a, b) for a, b in zip(self.start[:-1].tolist(), self.start[1:].tolist(), strict=True))

    def lowest(self, counts: np.ndarray) -> np.ndarray:
        """So many units of each family, the least sensitive ones."""
        orders = (span.start + np.argsort(self.score[span], kind="stable") for span in self.spans())
        found = [order[:count] for order, count in zip(orders, counts.tolist(), strict=True)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def fewer(self, family: int, gone: int) -> int:
        """How many units leave of a family that is one step narrower, `gone` if it is as narrow as can be."""
        size = int(self.start[family + 1] - self.start[family])
        narrower = size - (size - gone - 1) // self.round_to * self.round_to
        return narrower if narrower <= self.most[family] else gone

    def more(self, family: int, gone: int) -> int:
        """How many units leave of a family that is one step wider, `gone` if it is as wide as can be."""
        wider = max(0, gone - self.round_to)
        return wider if wider >= self.least[family] else gone

    def allowed(self, family: int) -> np.ndarray:
        """All numbers of units that may leave, ascending."""
        size = int(self.start[family + 1] - self.start[family])
        gone = np.arange(self.least[family], self.most[family] + 1)
        found: np.ndarray = gone[((size - gone) % self.round_to == 0) | (gone == 0)]
        return found


def problem(
    structure: Structure,
    sensitivity: Sensitivity,
    bounds: Constraints,
    options: Mapping[str, Sequence[Option]],
    *,
    pairs: float,
) -> Problem:
    """Builds the arrays.

    An estimate below zero counts as zero: that a removal should help is within the error of a measurement. Of the
    second derivatives between different units the share `pairs` counts; 0 takes units as independent.

    Raises:
        HapError: the sensitivity or the options are not those of this structure.
    """
    families = structure.families
    scores = [
        np.zeros(f.size) if f.name in sensitivity.skipped else checked(sensitivity, sensitivity.scores, f.name, f.size)
        for f in families
    ]
    start = np.cumsum([0, *(f.size for f in families)])
    score, gram = np.concatenate([np.zeros(0), *scores]), None
    if pairs:
        gram = _gram(sensitivity, len(score), pairs)
        score = gram.diagonal() / 2
    rooms = [bounds.rooms[f.name] for f in families]
    return Problem(
        families,
        start,
        np.maximum(score, 0.0),
        gram,
        np.array([room.least for room in rooms], dtype=np.int64),
        np.array([room.most for room in rooms], dtype=np.int64),
        bounds.round_to,
        (
            *_implantables(structure, sensitivity, bounds, options, start),
            *_narrowable(structure, sensitivity, bounds, options, np.maximum(score, 0.0), start),
        ),
    )


def _gram(sensitivity: Sensitivity, units: int, pairs: float) -> np.ndarray:
    if sensitivity.gram is None or tuple(sensitivity.gram.shape) != (units, units):
        shape = None if sensitivity.gram is None else tuple(sensitivity.gram.shape)
        raise HapError(
            "a joint choice needs the second derivatives between all units",
            expected=f"a sensitivity with a gram of shape ({units}, {units})",
            got="none" if shape is None else f"shape {shape}",
            remedy="hap.measure(..., gram=True) with gate-fisher or gate-ggn, or joint=False",
        )
    gram: np.ndarray = sensitivity.gram.detach().double().cpu().numpy()
    if not np.isfinite(gram).all():
        raise HapError(
            f"{sensitivity.criterion} gave second derivatives that are not finite",
            expected="finite numbers",
            remedy="check the calibration data and the model's weights",
        )
    weighted = pairs * gram
    np.fill_diagonal(weighted, gram.diagonal())
    return weighted


def _implantables(
    structure: Structure,
    sensitivity: Sensitivity,
    bounds: Constraints,
    options: Mapping[str, Sequence[Option]],
    start: np.ndarray,
) -> Iterator[Implantable]:
    layers, sites = structure.by_module, heads_of(structure)
    in_heads = {module for name in options if name in sites for module in sites[name].modules}
    for module, found in options.items():
        if module in sites or module in in_heads:  # heads become narrow as a whole, or not at all
            continue
        if module not in layers:
            raise unknown("layer with implant options", module, layers)
        layer = layers[module]
        usable = tuple(option for option in found if form_of(option.form).applies(layer))
        if (
            not usable
            or module not in sensitivity.filters
            or module in bounds.protected
            or not replaceable(structure, layer)
        ):
            continue
        size = block(layer)
        filters = np.maximum(checked(sensitivity, sensitivity.filters, module, layer.filters), 0.0)
        rise = np.stack([filters * _undone(option, module, layer.filters) for option in usable])
        owner = _owners(structure, bounds, layer, start)[::size]
        ones = (1,) * len(usable)
        yield Implantable(module, size, owner, usable, rise.reshape(len(usable), -1, size).sum(2), ones)


def _narrowable(
    structure: Structure,
    sensitivity: Sensitivity,
    bounds: Constraints,
    options: Mapping[str, Sequence[Option]],
    score: np.ndarray,
    start: np.ndarray,
) -> Iterator[Implantable]:
    """The heads that may become narrow. To leave a share of a head undone costs that share of its own sensitivity.

    What narrow heads miss is taken to lie across what other heads give, so that pairs do not count.
    """
    first = {family.name: int(i) for family, i in zip(structure.families, start, strict=False)}
    for module, heads in heads_of(structure).items():
        usable = tuple(option for option in options.get(module, ()) if option.form in NARROW)
        if not usable or {layer.module for layer in heads.projections} & bounds.protected or bounds.round_to > 1:
            continue
        if heads.family.name in sensitivity.skipped:  # not measured: their score of zero says nothing
            continue
        owner = first[heads.family.name] + np.arange(heads.family.size)
        rise = np.stack([score[owner] * _undone(option, module, heads.family.size) for option in usable])
        owner = owner if bounds.rooms[heads.family.name].most else np.full_like(owner, -1)
        yield Implantable(module, 1, owner, usable, rise, tuple(_parts(heads, option) for option in usable))


def _parts(heads: Heads, option: Option) -> int:
    if option.rank not in heads.ranks() or option.form not in heads.forms():
        raise HapError(
            f"the heads of {heads.module!r} cannot become narrow in this way",
            expected=f"a rank of {', '.join(map(str, heads.ranks()))}, and form {' or '.join(heads.forms())}",
            got=f"{option.form} of rank {option.rank!r}",
            remedy="measure the options again for this model, with hap.implants.head_options",
        )
    return heads.width // option.rank


def _undone(option: Option, module: str, size: int) -> np.ndarray:
    undone: np.ndarray = option.undone.detach().double().cpu().numpy()
    if undone.shape != (size,) or not np.isfinite(undone).all():
        raise HapError(
            f"the implant options do not fit the structure at {module!r}",
            expected=f"finite shares of shape ({size},)",
            got=f"shape {undone.shape} for {option.form}",
            remedy="measure them again for this model",
        )
    return undone


def _owners(structure: Structure, bounds: Constraints, layer: Layer, start: np.ndarray) -> np.ndarray:
    """For each filter, the unit whose leaving takes it along; -1 for a filter that always stays."""
    owner = np.full(layer.filters, -1, dtype=np.int64)
    for family, first in zip(structure.families, start.tolist(), strict=False):
        if not bounds.rooms[family.name].most:
            continue
        for member in family.members:
            if (member.parameter, member.axis) == (layer.weight, layer.output_axis):
                for unit, rows in enumerate(member.indices):
                    owner[list(rows)] = first + unit
    return owner
