"""The criteria to compare with: first-order Taylor, magnitude, chance."""

from __future__ import annotations

from typing import ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.layout import Layout
from hap.curvature.reduce import Groups, groups_of


@register
class Taylor(Criterion):
    """``|sum_{w in p} g_w w_w|`` with g the gradient of the mean loss (Molchanov et al., ICLR 2017, on weights).

    The sums of g w over the calibration examples are added before the absolute value is taken. The standard
    error is that of the signed sum, from its spread over batches; NaN when there is only one batch.
    """

    name: ClassVar[str] = "taylor"

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure)
        counts, sums = [], []
        for batch in problem.batches(self.name):
            counts.append(batches.size(batch))
            sums.append(_gradient_times_weight(problem, groups, batch))
        share = torch.tensor(counts, dtype=torch.float64).unsqueeze(1) / sum(counts)
        rows = torch.stack(sums)
        mean = (share * rows).sum(0)
        unbiased = len(rows) / (len(rows) - 1) if len(rows) > 1 else torch.nan
        variance = (share * (rows - mean)).square().sum(0) * unbiased
        return groups.layout.scores(mean.abs(), variance.sqrt(), samples=sum(counts), draws=0)


def _gradient_times_weight(problem: Problem, groups: Groups, batch: batches.Batch) -> torch.Tensor:
    weights = groups.only_require_grad(problem.model)
    loss = batches.checked(problem.loss)(batches.forward(problem.model, batch), batch)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return groups.sums({name: g * groups.weights[name] for name, g in zip(weights, gradients, strict=True)})


@register
class Magnitude(Criterion):
    """The L2 norm of a unit's or filter's weights (Li et al., ICLR 2017, use L1). Reads no data."""

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure)
        norms = groups.sums({name: weight.square() for name, weight in groups.weights.items()}).sqrt()
        return groups.layout.scores(norms, torch.zeros_like(norms), samples=0, draws=0)


@register
class Random(Criterion):
    """Uniform in [0, 1) from the seed: the baseline that any criterion must beat. Reads no data."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        layout = Layout.of(problem.structure)
        values = torch.rand(layout.size, generator=problem.generator("random"), dtype=torch.float64)
        return layout.scores(values, torch.zeros_like(values), samples=0, draws=0)
