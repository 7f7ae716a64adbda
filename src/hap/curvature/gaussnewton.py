"""The generalized Gauss-Newton matrix of the weights: its traces and its quadratic forms, one backward pass a draw.

For a loss that is a negative log-likelihood (cross-entropy, for one) it is the Fisher information (Martens, JMLR 2020,
section 9.2), ``G = 1/N sum_n J_n' H_n J_n`` with J_n the Jacobian of the outputs by the weights and H_n the loss's
Hessian by the outputs, ``diag p_n - p_n p_n'`` for cross-entropy. With ``H_n = R_n R_n'`` and z_n of independent random
signs, the gradient ``g = sum_n J_n' R_n z_n / sqrt(N)`` has mean 0 and covariance G:

    E[||g_p||^2] = Trace(G_pp)        E[(g_p . w_p)^2] = w_p' G_pp w_p

for every p at once. Against Hutchinson's estimator, which puts random signs on the weights: no second derivative, no
noise from other weights, and all groups, overlapping ones too, from the same draw. Labels sampled from the network's
outputs would do for z as well, but not show how much a rare one matters until it is drawn. G needs no labels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.draws import averaged, need_draws
from hap.curvature.hutchinson import Weights, relative
from hap.curvature.likelihoods import Likelihood
from hap.curvature.objectives import Settled
from hap.curvature.quadratic import Along, label_of, role_of
from hap.curvature.reduce import Groups, groups_of
from hap.errors import HapError
from hap.types import Role


class _GaussNewton(Criterion):
    """What the two criteria share: they differ in what they make of a gradient whose covariance is G."""

    default_draws: ClassVar[int] = 16
    additive: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    predicts_loss: ClassVar[bool] = True

    @property
    def role(self) -> Role:
        """The role of the members whose weights make up a unit."""
        return "producer"

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: fewer than two draws, or the loss is none of the likelihoods' (see `hap.curvature.objectives`).
        """
        need_draws(problem, self.name, least=2, default=self.default_draws)
        groups = groups_of(problem.model, problem.structure, roles=(self.role,))
        settled = Settled(problem.model, problem.loss, self.name)

        def draws(batch: batches.Batch, number: int) -> tuple[torch.Tensor, float]:
            weights = groups.only_require_grad(problem.model)
            outputs = batches.forward(problem.model, batch)
            likelihood = settled(outputs, batch)
            assert isinstance(likelihood, Likelihood)
            terms = settled.terms(outputs, batch)
            estimates = []
            for draw in range(problem.draws):
                total = likelihood.signed(outputs, batch, problem.generator("probe", number, draw))
                estimates.append(self.estimate(groups, _gradient(total / max(terms, 1) ** 0.5, weights)))
            return torch.stack(estimates), terms

        found = averaged(problem, self.label, draws, skipped=settled.skipped)
        factor = self.factor(groups)
        return groups.layout.scores(
            factor * found.mean,
            factor * found.stderr,
            samples=found.samples,
            draws=problem.draws,
            terms=found.terms,
        )

    @abstractmethod
    def estimate(self, groups: Groups, gradient: Weights) -> torch.Tensor:
        """From a gradient with covariance G, an estimate for every unit and filter, flat."""

    @abstractmethod
    def factor(self, groups: Groups) -> torch.Tensor:
        """What the mean of the estimates is multiplied by."""


@register
class GGNTrace(_GaussNewton):
    """``S_p = Trace(G_pp) / (2 |p|) * ||w_p||^2``: HAP's formula (Yu et al., WACV 2022) with G in place of the Hessian.

    Never negative. One backward pass for each of the `draws` a batch makes, where `hessian-trace` needs a product with
    the Hessian.
    """

    name: ClassVar[str] = "ggn-trace"

    def estimate(self, groups: Groups, gradient: Weights) -> torch.Tensor:
        """``||g_p||^2``."""
        return groups.sums({name: g.square() for name, g in gradient.items()})

    def factor(self, groups: Groups) -> torch.Tensor:
        """``||w_p||^2 / (2 |p|)``."""
        return relative(groups)


@register
@dataclass(frozen=True, kw_only=True)
class GGNQuadratic(_GaussNewton):
    """``1/2 w_p' G_pp w_p``: the second-order rise of the loss when the weights w_p go to 0, with G for the Hessian.

    Along the consumers' weights this is what `gate-ggn` computes exactly: a gate scales those weights.

    Attributes:
        along: a unit's weights: ``producers``, the rows that compute it, or ``consumers``, the slices that read it.
            Filters always go along their own row.
    """

    name: ClassVar[str] = "ggn-quadratic"
    along: Along = "producers"

    @property
    def role(self) -> Role:
        """See the class."""
        return role_of(self.along)

    @property
    def label(self) -> str:
        """The name; says so when it goes along the consumers."""
        return label_of(self.name, self.along)

    def estimate(self, groups: Groups, gradient: Weights) -> torch.Tensor:
        """``(g_p . w_p)^2``."""
        return groups.sums({name: g * groups.weights[name] for name, g in gradient.items()}).square()

    def factor(self, groups: Groups) -> torch.Tensor:
        """One half."""
        return torch.full((groups.layout.size,), 0.5, dtype=torch.float64)


def _gradient(total: torch.Tensor, weights: Weights) -> Weights:
    if not total.requires_grad:
        raise HapError(
            "the outputs do not depend on the weights",
            expected="a model that is differentiable in its weights",
            remedy="look for torch.no_grad or .detach() in the model",
        )
    names, leaves = zip(*weights.items(), strict=True)
    gradients = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))
