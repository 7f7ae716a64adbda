"""Pruning in rounds: measure, prune a little, fine-tune, and again on what is left."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from hap.errors import HapError
from hap.pipeline.stages import Result
from hap.planning import Plan, compose
from hap.planning.constraints import counts
from hap.types import Budget, Structure

T = TypeVar("T")


def schedule(budget: Budget, rounds: int) -> list[Budget]:
    """The budget of each round, as fractions of the dense model: each keeps the same share of the one before.

    >>> [b.params for b in schedule(Budget(params=0.25), 2)]
    [0.5, 0.25]
    """
    if rounds < 1:
        raise HapError("iterations is out of range", expected="an integer of at least 1", got=repr(rounds))
    return [Budget(**{k: v ** (n / rounds) for k, v in budget.limits.items()}) for n in range(1, rounds + 1)]


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
        verification; and what `train_` returned, round by round.
    """
    results: list[Result] = []
    notes: list[T] = []
    for number, part in enumerate(schedule(budget, rounds), start=1):
        more: dict[str, Any] = {} if number == rounds else {"implant_ratio": 0.0}
        if results:
            more |= {"of": results[0].plan.dense, **_widths(results[0].structure, results[-1].plan, settings)}
        before = results[-1].model if results else model
        results.append(cut(before, part, **more))
        notes.append(train_(results[-1].model, before, results[-1]))
    first, last = results[0], results[-1]
    plan = functools.reduce(compose, [result.plan for result in results])
    plan = dataclasses.replace(plan, budget=budget, options={**plan.options, "iterations": rounds})
    return dataclasses.replace(first, model=last.model, plan=plan, verification=last.verification), tuple(notes)


def _widths(structure: Structure, last: Plan, settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The smallest and largest widths in units of the dense model; a family of one unit is none any more."""
    left = {name for name, decision in last.decisions.items() if len(decision.keep) > 1}
    bounds = (("minimum", False), ("maximum", True))
    found = {option: counts(structure, settings.get(option), largest=largest) for option, largest in bounds}
    return {option: {name: n for name, n in widths.items() if name in left} for option, widths in found.items()}
