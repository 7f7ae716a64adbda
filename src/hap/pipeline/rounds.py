"""Pruning in rounds: measure, prune a little, fine-tune, and again on what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from hap.errors import HapError
from hap.pipeline.stages import Result
from hap.planning import Plan, compose
from hap.planning.constraints import counts
from hap.types import Budget

T = TypeVar("T")


def schedule(budget: Budget, rounds: int) -> list[Budget]:
    """The budget of each round, as fractions of the dense model: each keeps the same share of the one before.

    >>> [b.params for b in schedule(Budget(params=0.25), 2)]
    [0.5, 0.25]
    """
    if rounds < 1:
        raise HapError("iterations is out of range", expected="an integer of at least 1", got=repr(rounds))
    return [Budget(**{k: v ** (n / rounds) for k, v in budget.limits.items()}) for n in range(1, rounds + 1)]


def repeatable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `hap.pipeline.prune`, with names that could be read only once read out: each round reads them."""
    names = {k: tuple(settings[k]) for k in ("protect", "units", "ignore") if settings.get(k) is not None}
    return {**settings, **names}


def in_rounds(
    model: nn.Module,
    budget: Budget,
    rounds: int,
    cut: Callable[..., Result],
    train_: Callable[[nn.Module, nn.Module, Result], T],
    **settings: Any,
) -> tuple[Result, tuple[T, ...]]:
    """Prunes round by round; implants come in the last one, since what has been implanted is not traced again.

    Args:
        model: the dense model; left as it is.
        budget: what may remain of it at the end.
        rounds: how many.
        cut: `hap.pipeline.prune` on a model and a budget; options that it is given win over its own.
        train_: trains what was cut, given it, the model that it was cut from, and the result.
        settings: of `cut`; widths that are fractions become those of the dense model.

    Returns:
        One result for the dense model: its structure, its sensitivity and one plan, with the last round's
        verification, which is exact if every round's is; and what `train_` returned, round by round.
    """
    first: Result | None = None
    notes: list[T] = []
    whole: Plan | None = None
    exact = True
    for number, part in enumerate(schedule(budget, rounds), start=1):
        result = cut(model, part, **round_settings(whole, settings, last=number == rounds))
        whole = joined(whole, result.plan, part, rounds, settings)
        notes.append(train_(result.model, model, result))
        first, model, exact = first or result, result.model, exact and result.verification.exact
    assert first is not None and whole is not None  # there is a round
    proof = dataclasses.replace(result.verification, exact=exact)
    return dataclasses.replace(first, model=model, plan=whole, verification=proof), tuple(notes)


def round_settings(whole: Plan | None, settings: Mapping[str, Any], *, last: bool) -> dict[str, Any]:
    """What a round adds to the settings of `hap.pipeline.prune`.

    Args:
        whole: the plan for the dense model that the rounds before make together; None in the first.
        settings: as they were given, for the dense model.
        last: whether implants may come.
    """
    more: dict[str, Any] = {} if last else {"implant_ratio": 0.0}
    if whole is None:
        return more
    return {**more, "after": whole, **_widths(whole, settings), **_units(whole, settings.get("units"))}


def joined(whole: Plan | None, plan: Plan, budget: Budget, rounds: int, settings: Mapping[str, Any]) -> Plan:
    """One plan for the dense model: the rounds before, and the plan of this one, which met `budget`.

    Each round measured its time against the model that it was given: together they took the product. On record are
    the widths and the kinds of units that were asked for, not what this round made of them.
    """
    asked: dict[str, Any] = {name: dict(settings.get(name) or {}) for name in ("minimum", "maximum")}
    if settings.get("units") is not None:
        asked["units"] = list(settings["units"])
    options = {**plan.options, "iterations": rounds, **asked}
    if whole is not None and "latency_measured" in options:
        options["latency_measured"] = round(whole.options["latency_measured"] * options["latency_measured"], 3)
    plan = plan if whole is None else compose(whole, plan)
    return dataclasses.replace(plan, budget=budget, options=options)


def _units(whole: Plan, units: Iterable[str] | None) -> dict[str, Any]:
    """The kinds of units that may leave still; where there is none any more, nothing may."""
    if units is None:
        return {}
    left = {f.kind for f in whole.structure.families if len(whole.decisions[f.name].keep) > 1}
    found = [kind for kind in units if kind in left]
    return {"units": found} if found else {"units": None, "protect": ("*",)}


def _widths(whole: Plan, settings: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The smallest and largest widths in units of the dense model; a family of one unit is none any more."""
    left = {name for name, decision in whole.decisions.items() if len(decision.keep) > 1}
    bounds = (("minimum", False), ("maximum", True))
    found = {option: counts(whole.structure, settings.get(option), largest=largest) for option, largest in bounds}
    return {option: {name: n for name, n in widths.items() if name in left} for option, widths in found.items()}
