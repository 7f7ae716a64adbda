"""The criteria to compare with that need no more than the gradient of the loss, or chance."""

from __future__ import annotations

from typing import ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.layout import Layout
from hap.curvature.reduce import Groups, groups_of
from hap.curvature.sums import Rows


@register
class Taylor(Criterion):
    """``|sum_{w in p} g_w w_w|`` with g the gradient of the mean loss (Molchanov et al., ICLR 2017, on weights).

    The sums of g w over the calibration examples are added before the absolute value is taken. The standard
    error is that of the signed sum, from its spread over batches; NaN when there is only one batch.
    """

    name: ClassVar[str] = "taylor"
    resumable: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure)
        counts, sums = _gradients_times_weights(problem, groups, self.name)
        mean, stderr = _mean_of_batches(sums, counts)
        return groups.layout.scores(mean.abs(), stderr, samples=int(counts.sum()), draws=0)


@register
class EmpiricalFisher(Criterion):
    """``1/2 sum_b n_b / N * n_b (g_b . w_p)^2``, with g_b the gradient of the mean loss of batch b, of n_b examples.

    With one example in each batch it is ``1/2 w_p' F_pp w_p`` with F = E[g g'], the empirical Fisher: labels are the
    data's, not the model's. In larger batches the g of examples add up before they are squared; where the mean
    gradient is 0, at a minimum, n_b (g_b . w_p)^2 has the same expectation still. Elsewhere it grows with n_b: compare
    scores of equal batch sizes only. (The square of Molchanov et al., CVPR 2019, equation 8, over a filter's weights.)
    The standard error is from the spread over batches; NaN when there is only one.
    """

    name: ClassVar[str] = "empirical-fisher"
    resumable: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups = groups_of(problem.model, problem.structure)
        counts, sums = _gradients_times_weights(problem, groups, self.name)
        mean, stderr = _mean_of_batches(counts * sums.square() / 2, counts)
        return groups.layout.scores(mean, stderr, samples=int(counts.sum()), draws=0)


def _gradients_times_weights(problem: Problem, groups: Groups, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches' sizes, (batches, 1), and ``g_b . w_p`` for every unit and filter, (batches, units and filters)."""
    rows = Rows()
    for number, batch in problem.share(name, rows):
        rows.add(number, batches.size(batch), _gradient_times_weight(problem, groups, batch))
    return rows.sorted()


def _mean_of_batches(rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of batches' rows, weighted with their sizes, and its standard error from their spread."""
    share = counts / counts.sum()
    mean = (share * rows).sum(0)
    unbiased = len(rows) / (len(rows) - 1) if len(rows) > 1 else torch.nan
    return mean, ((share * (rows - mean)).square().sum(0) * unbiased).sqrt()


def _gradient_times_weight(problem: Problem, groups: Groups, batch: batches.Batch) -> torch.Tensor:
    weights = groups.only_require_grad(problem.model)
    loss = batches.checked(problem.loss)(batches.forward(problem.model, batch), batch)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return groups.sums({name: g * groups.weights[name] for name, g in zip(weights, gradients, strict=True)})


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
