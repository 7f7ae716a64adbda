"""First-order gate criteria: what the loss's gradient by each gate says alone.

They take any loss that is a mean over samples, and need labels and one backward pass over a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from hap.curvature.criterion import Problem, Scores, register
from hap.curvature.gatewise import GateCriterion, Pass
from hap.curvature.gram import Gram


@register
class GateTaylor(GateCriterion):
    """``|E_x dL/da_p|``: the size of the rise, to first order, of the mean loss when the gate closes.

    Molchanov et al. (ICLR 2017) on activations, the sum over positions included. The standard error is that of the
    signed mean.
    """

    name: ClassVar[str] = "gate-taylor"
    additive: ClassVar[bool] = False

    def values(self, one: Pass, gram: Gram | None) -> torch.Tensor:
        """See `GateCriterion.values`."""
        return one.loss_gradients()

    def result(self, mean: torch.Tensor) -> torch.Tensor:
        """See `GateCriterion.result`."""
        return mean.abs()


@register
class GateGradient(GateCriterion):
    """``E_x |dL(x)/da_p|``, the mean over samples (Michel, Levy and Neubig, NeurIPS 2019, equation 2, for heads)."""

    name: ClassVar[str] = "gate-gradient"

    def values(self, one: Pass, gram: Gram | None) -> torch.Tensor:
        """See `GateCriterion.values`."""
        return one.loss_gradients().abs()


@register
class HeadGradient(GateGradient):
    """`GateGradient` divided by its L2 norm over each family's units, and each layer's filters.

    Michel, Levy and Neubig (NeurIPS 2019, section 4.1), who rank the heads of all layers by it: their families are the
    heads of a layer. The standard error takes the norm as given.
    """

    name: ClassVar[str] = "head-gradient"
    additive: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scores:
        """See `GateCriterion.score`."""
        found = super().score(problem)
        units, filters = _norms(found.scores), _norms(found.filters)
        return replace(
            found,
            scores=_divided(found.scores, units),
            stderr=_divided(found.stderr, units),
            filters=_divided(found.filters, filters),
            filters_stderr=_divided(found.filters_stderr, filters),
        )


def _norms(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The norms; 1 for what is all zero."""
    return {name: float(value.norm()) or 1.0 for name, value in values.items()}


def _divided(values: Mapping[str, torch.Tensor], norms: Mapping[str, float]) -> dict[str, torch.Tensor]:
    return {name: value / norms[name] for name, value in values.items()}
