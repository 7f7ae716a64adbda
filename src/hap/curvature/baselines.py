"""The criteria to compare with that need no more than the gradient of the loss, or chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.layout import Layout
from hap.curvature.moments import Moments
from hap.curvature.objectives import Settled
from hap.curvature.reduce import Groups, groups_of
from hap.curvature.sums import Sums


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
        groups, moments, samples = _of_batches(problem, self.name, lambda product, terms: product)
        return groups.layout.scores(moments.mean.abs(), moments.stderr(), samples=samples, draws=0)


@register
class EmpiricalFisher(Criterion):
    """``1/2 sum_b n_b / N * n_b (g_b . w_p)^2``, with g_b the gradient of the mean loss of batch b, of n_b examples.

    (Of texts whose tokens are classified, n_b counts tokens.) With one example in each batch it is
    ``1/2 w_p' F_pp w_p`` with F = E[g g'], the empirical Fisher: labels are the data's, not the model's. In larger
    batches the g of examples add up before they are squared; where the mean gradient is 0, at a minimum,
    n_b (g_b . w_p)^2 has the same expectation still. Elsewhere it grows with n_b: compare scores of equal batch sizes
    only. (The square of Molchanov et al., CVPR 2019, equation 8, over a filter's weights.) The standard error is from
    the spread over batches; NaN when there is only one.
    """

    name: ClassVar[str] = "empirical-fisher"
    resumable: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scores:
        """See the class."""
        groups, moments, samples = _of_batches(problem, self.name, lambda product, terms: terms * product.square() / 2)
        return groups.layout.scores(moments.mean, moments.stderr(), samples=samples, draws=0)


def _of_batches(
    problem: Problem, name: str, value: Callable[[torch.Tensor, float], torch.Tensor]
) -> tuple[Groups, Moments, int]:
    """Means over the batches of what `value` makes of ``g_b . w_p`` and the batch's number of terms, its weight.

    Also the number of examples.
    """
    groups = groups_of(problem.model, problem.structure)
    settled, moments, seen = Settled(problem.model, problem.loss), Moments(), Sums()
    for _, batch in problem.share(name, moments, seen, skipped=settled.skipped):
        weights = groups.only_require_grad(problem.model)
        outputs = batches.forward(problem.model, batch)
        loss = batches.checked(problem.loss)(outputs, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        products = {name: g * groups.weights[name] for name, g in zip(weights, gradients, strict=True)}
        terms = settled.terms(outputs, batch)
        moments.add(terms * value(groups.sums(products), terms)[None], torch.tensor([terms]))
        seen.add(samples=batches.size(batch))
    return groups, moments, int(seen["samples"])


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
