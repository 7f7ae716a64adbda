"""Which loss the caller's is: compared in numbers on the first batch, never guessed from its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hap import batches
from hap.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Objective
from hap.errors import HapError

KNOWN: dict[str, Likelihood] = {
    "cross-entropy": Categorical(),
    "cross-entropy of the last axis": Categorical(-1),
    "cross-entropy of the next token": Categorical(-1, shift=True),
    "binary cross-entropy": Bernoulli(),
    "mean squared error": Gaussian(),
}


@dataclass(frozen=True)
class AnyLoss(Objective):
    """The caller's loss, taken to be a mean over samples: each sample is one term."""

    loss: batches.Loss | None

    def counts(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.counts`."""
        return torch.ones(batches.size(batch))

    def total(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.total`."""
        return batches.checked(self.loss)(outputs, batch) * batches.size(batch)


def objective_of(loss: batches.Loss | None, outputs: Any, batch: batches.Batch) -> Objective:
    """The `Likelihood` whose mean on this batch is the loss; `AnyLoss` if there is none.

    ``loss=None`` where the model puts out no loss of its own is cross-entropy by definition: there may be no labels.

    Raises:
        HapError: the loss is not a finite scalar.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None and own is None:
        texts = isinstance(batch, Mapping) and "labels" not in batch and batches.logits(outputs).ndim == 3
        return Categorical(-1) if texts else Categorical()
    value = float(batches.checked(loss)(outputs, batch).detach())
    for likelihood in KNOWN.values():
        mean = mean_loss(likelihood, outputs, batch)  # not None: there are logits
        if mean is not None and math.isclose(value, mean, rel_tol=_tolerance(outputs), abs_tol=1e-6):
            return likelihood
    return AnyLoss(loss)


class Settled:
    """What the loss of a measurement is: its first batch says so, whoever computes that batch.

    Args:
        model: the model that is measured.
        loss: the caller's loss.
        criterion: the name of one that needs a `Likelihood`; empty where any loss will do.
    """

    def __init__(self, model: nn.Module, loss: batches.Loss | None, criterion: str = "") -> None:
        self.model, self.loss, self.criterion = model, loss, criterion
        self.objective: Objective | None = None

    def __call__(self, outputs: Any, batch: batches.Batch) -> Objective:
        """The objective, to be asked with outputs for a batch as it was given.

        Raises:
            HapError: the loss is not a finite scalar, or no likelihood where one is needed.
        """
        if self.objective is None:
            found = objective_of(self.loss, outputs, batch)
            self.objective = need_likelihood(self.criterion, found, outputs, batch) if self.criterion else found
        return self.objective

    def skipped(self, number: int, batch: batches.Batch, done: bool) -> None:
        """For `Walk.over`."""
        if self.objective is None:
            with torch.no_grad():
                self(batches.forward(self.model, batch), batch)

    def terms(self, outputs: Any, batch: batches.Batch) -> float:
        """Over how many terms the batch's loss is a mean."""
        return float(self(outputs, batch).counts(outputs, batch).sum())


def need_likelihood(name: str, objective: Objective, outputs: Any, batch: batches.Batch) -> Likelihood:
    """The objective itself, if it is a `Likelihood`.

    Raises:
        HapError: it is not; says what each likelihood's loss would have been.
    """
    if isinstance(objective, Likelihood):
        return objective
    value = float(objective.total(outputs, batch).detach()) / batches.size(batch)
    means = {known: mean_loss(likelihood, outputs, batch) for known, likelihood in KNOWN.items()}
    others = [f"{known} {mean:.6g}" for known, mean in means.items() if mean is not None]
    raise HapError(
        f"{name} needs cross-entropy, binary cross-entropy of logits or mean squared error, and this loss is another",
        expected="loss=None, or the mean of one of these over all samples and outputs",
        got=f"loss {value:.6g}; " + (", ".join(others) or "labels and outputs that fit none of them"),
        remedy="use gate-empirical, gate-gradient, gate-taylor, taylor or hessian-trace, which take any loss",
    )


def need_mean(whole: float, halves: tuple[float, float]) -> None:
    """Refuses a loss that adds up over samples, from its values on a batch and on the batch's two halves.

    Raises:
        HapError: the halves' losses add up to the whole's.
    """
    if whole and math.isclose(whole, sum(halves), rel_tol=1e-4):
        raise HapError(
            "the loss is a sum over the samples",
            expected="a mean, so that it does not grow with the batch",
            got=f"{whole:.6g} on a batch, {halves[0]:.6g} and {halves[1]:.6g} on its halves",
            remedy="divide it by the number of samples",
        )


def mean_loss(likelihood: Likelihood, outputs: Any, batch: batches.Batch) -> float | None:
    """The likelihood's mean loss on the true labels; None where it does not fit outputs and labels."""
    try:
        likelihood.check(outputs, batch)
        total = float(likelihood.total(outputs, batch).detach())
        return total / max(float(likelihood.counts(outputs, batch).sum()), 1.0)
    except HapError:
        return None


def _tolerance(outputs: Any) -> float:
    """Losses of half precision outputs may have been computed in half precision."""
    return max(1e-4, 2 * torch.finfo(batches.logits(outputs).dtype).eps)
