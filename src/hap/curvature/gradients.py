"""First-order gate criteria: what the loss's gradient by each gate says alone.

They take any loss that is a mean over samples, and need labels and one backward pass over a batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from hap.curvature.criterion import register
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
