"""Gate curvature: how much the loss rises when a unit's gate closes, to second order.

For a loss that is a negative log-likelihood the generalized Gauss-Newton matrix of the gates a is their Fisher
information:

    F_pq = E_x E_{y ~ p(y|x)} [ d log p(y|x) / d a_p  d log p(y|x) / d a_q ]
         = E_x sum_c p(c|x) d log p(c|x) / d a_p  d log p(c|x) / d a_q      (cross-entropy)

The score is ``F_pp / 2``, the rise of the mean loss (in nats, for cross-entropy) when a_p goes from 1 to 0 (optimal
brain damage, LeCun 1990, with this curvature). The network's own outputs are the labels: none are needed.

With ``first_order=True`` the score is the whole Taylor sum ``F_pp / 2 - g_p``, with g the gates' gradient of the mean
loss on the true labels. It may be negative, and needs labels and a backward pass more. On examples that the model was
not trained on it ranks single removals better; on training examples, and where many units leave together, often worse.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from hap.curvature.criterion import register
from hap.curvature.gatewise import GateCriterion, Pass
from hap.curvature.gram import Gram
from hap.curvature.likelihoods import Likelihood


class _GateCurvature(GateCriterion):
    """F as a sum of squares: criteria differ in the rows r, ``F_pq = sum r_p r_q``, that they take."""

    has_gram: ClassVar[bool] = True
    predicts_loss: ClassVar[bool] = True

    def __init__(self, *, first_order: bool = False) -> None:
        self.first_order = first_order

    @property
    def label(self) -> str:
        """The name; says so when the first order is in it."""
        return f"{self.name} + first order" if self.first_order else self.name

    def values(self, one: Pass, gram: Gram | None) -> torch.Tensor:
        """See `GateCriterion.values`."""
        half = torch.zeros(())
        for row in self.rows(one):
            half = half + row.square() / 2
            if gram is not None:
                gram.add(row[:, : gram.size])
        return half - one.loss_gradients() if self.first_order else half

    @abstractmethod
    def rows(self, one: Pass) -> Iterator[torch.Tensor]:
        """Gate gradients whose squares add up to F_pp for each sample: (samples, gates) each."""


@register
class GateFisher(_GateCurvature):
    """F with labels sampled from the network's own outputs: one backward pass per draw over a batch.

    Outputs may have positions, whose loss is averaged. The draws of one sample are averaged; the standard error is
    from the spread over samples, so it covers both the sampling of labels and that of the data. A sample's labels
    do not depend on how the data is cut into batches.

    >>> GateFisher(first_order=True).label
    'gate-fisher + first order'
    """

    name: ClassVar[str] = "gate-fisher"
    default_draws: ClassVar[int] = 1
    any_loss: ClassVar[bool] = False

    def rows(self, one: Pass) -> Iterator[torch.Tensor]:
        """See `_GateCurvature.rows`."""
        assert isinstance(one.objective, Likelihood)
        count = len(one.generators)
        for draw, generator in enumerate(one.generators):
            total = one.objective.sampled(one.outputs, one.batch, generator)
            yield one.gates.gradients(total, keep=self.first_order or draw + 1 < count) / count**0.5


@register
class GateGGN(_GateCurvature):
    """F exactly, by one backward pass per output over a batch. Outputs (N, classes) or (N, outputs) only.

    The standard error is from the spread over samples.
    """

    name: ClassVar[str] = "gate-ggn"
    any_loss: ClassVar[bool] = False

    def rows(self, one: Pass) -> Iterator[torch.Tensor]:
        """See `_GateCurvature.rows`."""
        assert isinstance(one.objective, Likelihood)
        directions = one.objective.exact(one.outputs, one.batch)
        for i, (total, weights) in enumerate(directions):
            gradients = one.gates.gradients(total, keep=self.first_order or i + 1 < len(directions))
            yield gradients * weights.sqrt().unsqueeze(1)


@register
class GateEmpirical(_GateCurvature):
    """The empirical Fisher: true labels in place of the network's own; any loss; one backward pass over a batch.

    Not an estimate of the Hessian where the network is wrong about its labels (Kunstner, Balles and Hennig, NeurIPS
    2019). A loss that is no likelihood is taken to be a mean over samples. The standard error is from the spread over
    samples.
    """

    name: ClassVar[str] = "gate-empirical"

    def __init__(self) -> None:
        super().__init__()

    def rows(self, one: Pass) -> Iterator[torch.Tensor]:
        """See `_GateCurvature.rows`."""
        yield one.loss_gradients()
