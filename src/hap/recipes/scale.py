"""Scaling a recipe down, so that it runs in minutes."""

from __future__ import annotations

from typing import Any

from hap.curvature import CRITERIA
from hap.errors import HapError
from hap.pipeline.stages import CAP
from hap.recipes.recipe import Recipe


def scaled(recipe: Recipe, limit: int) -> dict[str, Any]:
    """What changes, by dotted key: no count is above `limit`, and every training is one epoch.

    The counts are the examples of each split and of a batch, the calibration examples and the draws, which are not
    above the criterion's default either: each costs a pass over every batch. Where texts and
    images are large is left alone: models, sizes of inputs, the budget.

    Raises:
        HapError: `limit` is below 1.
    """
    if limit < 1:
        raise HapError("limit is out of range", expected="a whole number, 1 or more", got=repr(limit))

    def most(count: int | None) -> int:
        return limit if count is None else min(count, limit)

    samples = recipe.measure.samples

    found: dict[str, Any] = {
        "data.limit": most(recipe.data.limit),
        "data.batch_size": most(recipe.data.batch_size),
        "finetune.epochs": min(1, recipe.finetune.epochs),
    }
    if samples is not None:  # else no more are measured on than there are
        found["measure.samples"] = min(CAP, limit) if isinstance(samples, str) else most(samples)
    if recipe.measure.draws is not None:
        usual = CRITERIA[recipe.measure.criterion].default_draws
        found["measure.draws"] = min(most(recipe.measure.draws), usual)
    if recipe.dense.train is not None:
        found["dense.train.epochs"] = min(1, recipe.dense.train.epochs)
    if recipe.dense.batch_size is not None:
        found["dense.batch_size"] = most(recipe.dense.batch_size)
    return found
