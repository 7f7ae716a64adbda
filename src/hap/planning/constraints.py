"""How many units of each family may leave, and which layers are to be left as they are."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from hap.errors import HapError, unknown
from hap.types import Family, Kind, Structure

log = logging.getLogger(__name__)

Widths = Mapping[str, float]  # name pattern -> units (an int) or a fraction of them (a float)


@dataclass(frozen=True)
class Room:
    """How many units of a family leave: at least `least`, at most `most`."""

    least: int
    most: int


@dataclass(frozen=True)
class Constraints:
    """What a plan must respect.

    Attributes:
        rooms: by family name.
        protected: modules whose own units and filters stay as they are.
        round_to: kept units of a family are a multiple of this, or all of them.
    """

    rooms: Mapping[str, Room]
    protected: frozenset[str]
    round_to: int


def constraints(
    structure: Structure,
    *,
    floor: int = 1,
    minimum: Widths | None = None,
    maximum: Widths | None = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    inexact: bool = False,
    units: Iterable[str] | None = None,
    skipped: Collection[str] = (),
) -> Constraints:
    """Reads and checks the options of `hap.decide` that bound widths; the families in `skipped` stay as they are.

    Raises:
        HapError: a value is out of range, a pattern names nothing (says what is near), or a family's smallest
            width is above its largest.
    """
    for name, value in (("floor", floor), ("round_to", round_to)):
        if not isinstance(value, int) or value < 1:
            raise HapError(f"{name} is out of range", expected="an integer of at least 1", got=repr(value))
    units = None if units is None else tuple(units)
    protected = _protected(structure, protect) | _of_other_kinds(structure, units)
    low, high = _widths(structure, "minimum", minimum or {}), _widths(structure, "maximum", maximum or {})
    kinds, rooms, wider = units or get_args(Kind), {}, []
    for family in structure.families:
        stays = not (family.exact or inexact) or family.name in skipped or family.kind not in kinds
        if stays or _written_by(family) & protected:
            rooms[family.name] = Room(0, 0)
            if min([family.size, *high[family.name]]) < family.size:
                wider.append(family.name)
        else:
            rooms[family.name] = _room(
                family, max([floor, *low[family.name]]), min([family.size, *high[family.name]]), round_to
            )
    if wider:
        reasons = "protected, of another kind than units, not measured, or behind a normalisation"
        log.info(
            "families stay wider than maximum, as none of their units may leave (%s): %s", reasons, ", ".join(wider)
        )
    return Constraints(rooms, protected, round_to)


def counts(structure: Structure, widths: Widths | None, *, largest: bool) -> dict[str, int]:
    """What `minimum`, or (`largest`) `maximum`, says in units, by family name."""
    found = _widths(structure, "maximum" if largest else "minimum", widths or {})
    return {name: min(values) if largest else max(values) for name, values in found.items() if values}


def _room(family: Family, low: int, high: int, round_to: int) -> Room:
    """The widths between `low` and `high` that are multiples of `round_to`, or all units."""
    low = min(family.size, -(-low // round_to) * round_to)
    high = high if high == family.size else high // round_to * round_to
    if low > high:
        raise HapError(
            f"no width is left for family {family.name!r} of {family.size} units",
            expected="a smallest width (floor, minimum) not above the largest (maximum), as multiples of round_to",
            got=f"at least {low}, at most {high}",
            remedy="raise maximum, or lower minimum, floor or round_to",
        )
    return Room(family.size - high, family.size - low)


def _written_by(family: Family) -> set[str]:
    """The modules that compute, scale or shift the units."""
    return {m.parameter.rpartition(".")[0] for m in family.members if m.role != "consumer"}


def _protected(structure: Structure, patterns: Iterable[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        names = {name for name in structure.modules if name and inside(name, pattern)}
        if not names:
            raise unknown("module to protect", pattern, [name for name in structure.modules if name])
        found |= names
    return frozenset(found)


def _of_other_kinds(structure: Structure, units: Iterable[str] | None) -> frozenset[str]:
    """The layers that write no unit of the kinds `units`."""
    if units is None:
        return frozenset()
    wanted = tuple(units)
    for kind in wanted:
        if kind not in get_args(Kind):
            raise unknown("kind of unit", kind, get_args(Kind))
    written = {module for family in structure.families if family.kind in wanted for module in _written_by(family)}
    if not written:
        raise HapError(
            f"this model has no units of kind {' or '.join(map(repr, wanted))} that can be pruned",
            expected=f"one of: {', '.join(sorted({family.kind for family in structure.families})) or 'none at all'}",
            got=", ".join(wanted) or "no kind",
            remedy="see Structure.frozen for what cannot be pruned, and why",
        )
    return frozenset(layer.module for layer in structure.layers if layer.module not in written)


def inside(module: str, pattern: str) -> bool:
    """Whether the module, or one that holds it, has a name like the pattern."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _widths(structure: Structure, option: str, wanted: Widths) -> dict[str, list[int]]:
    """For each family the widths that the patterns give it."""
    found: dict[str, list[int]] = {family.name: [] for family in structure.families}
    for pattern, value in wanted.items():
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not count and not (isinstance(value, float) and 0 < value <= 1):
            raise HapError(
                f"{option} of {pattern!r} is out of range",
                expected="a number of units (an integer of at least 1) or a fraction of them (a float in (0, 1])",
                got=repr(value),
            )
        families = [f for f in structure.families if fnmatchcase(f.name, pattern)]
        if not families:
            raise unknown("family", pattern, found)
        for family in families:
            found[family.name].append(min(int(value) if count else _share(value, family.size, option), family.size))
    return found


def _share(value: float, size: int, option: str) -> int:
    """A fraction in whole units: no fewer than a minimum says, and no more than a maximum, but one."""
    slack = 1e-9 if option == "maximum" else -1e-9  # 0.3 * 10 is 3
    return max(1, (math.floor if option == "maximum" else math.ceil)(value * size + slack))
