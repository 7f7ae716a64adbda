"""Averages over random draws, made for each batch on its own, and their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hap import batches
from hap.curvature.criterion import Problem
from hap.curvature.sums import Sums
from hap.curvature.walk import Skipped
from hap.errors import HapError

Draws = Callable[[batches.Batch, int], tuple[torch.Tensor, float]]


@dataclass(frozen=True, eq=False)
class Averaged:
    """Mean over the data of what the draws estimate, flat, and its standard error given the data.

    Attributes:
        samples: the number of examples.
        terms: the number of terms of the loss.
    """

    mean: torch.Tensor
    stderr: torch.Tensor
    samples: int
    terms: float


def averaged(
    problem: Problem,
    criterion: str,
    draws: Draws,
    *,
    says: torch.Tensor | None = None,
    skipped: Skipped | None = None,
) -> Averaged:
    """Averages estimates of a mean over the terms of a loss (its examples, or the tokens of texts).

    Draws are independent between batches: for the same cost this says more than the same draws for every batch,
    because their errors average out over batches. The standard error is that of the estimate given the data,
    ``sqrt(sum_b (n_b / N)^2 var_b / draws)`` with n_b of the N terms in batch b; what other data would say is not in
    it.

    Args:
        draws: from a batch and its number to estimates (draws, quantities), independent and unbiased for this batch's
            mean, and the number of terms.
        says: (draws, quantities) of bool: which draw says something about which quantity; None: each about all.
            At least two say something about each.
        skipped: see `Walk.over`.

    Raises:
        HapError: there is no data, or none of it counts.
    """
    sums = Sums()
    for number, batch in problem.share(criterion, sums, skipped=skipped):
        values, count = draws(batch, number)
        weights = (torch.ones_like(values) if says is None else says).double()
        drawn = weights.sum(0)
        centre = torch.where(weights > 0, values, 0).sum(0) / drawn
        spread = torch.where(weights > 0, values - centre, 0).square().sum(0) / (drawn - 1)
        variance = count**2 * spread / drawn
        sums.add(mean=count * centre, variance=variance, samples=batches.size(batch), terms=count)
    samples, terms = int(sums["samples"]), float(sums["terms"])
    if not terms:
        raise HapError(
            "nothing in the data counts",
            expected="at least one position whose label is not -100 and whose attention mask is not 0",
            got=f"none in {samples} examples",
            remedy="check the labels",
        )
    return Averaged(sums["mean"] / terms, sums["variance"].sqrt() / terms, samples, terms)


def need_draws(problem: Problem, criterion: str, *, least: int, default: int) -> None:
    """Raises a HapError if there are too few draws for a standard error."""
    if problem.draws < least:
        numeral = {2: "two", 4: "four"}[least]
        raise HapError(
            f"{criterion} needs at least {numeral} draws",
            expected=f"draws >= {least}: the standard error comes from the spread between them",
            got=str(problem.draws),
            remedy=f"leave draws out for the default of {default}",
        )
