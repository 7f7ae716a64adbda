"""Gate curvature: how much the loss rises when a unit's gate closes, to second order.

For cross-entropy the generalized Gauss-Newton matrix of the gates a is their Fisher information:

    F_pp = E_x E_{y ~ p(y|x)} [ (d log p(y|x) / d a_p)^2 ]
         = E_x sum_c p(c|x) (d log p(c|x) / d a_p)^2

The score is ``F_pp / 2``, the rise in nats of the mean cross-entropy when a_p goes from 1 to 0 (optimal brain
damage, LeCun 1990, with this curvature). The network's own outputs are the labels: none are needed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.gates import Gates, gated
from hap.curvature.moments import Moments
from hap.errors import HapError


class _GateCurvature(Criterion):
    """What the two criteria share: they differ in how one batch's curvature is computed."""

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Layers whose output the gates cannot see (used as functions, not modules) have no filter scores.

        Raises:
            HapError: the loss is not cross-entropy, or a family's consumers cannot be gated.
        """
        moments = Moments()
        curvature = self.curvature(problem)
        with gated(problem.model, problem.structure) as gates:
            for batch in problem.batches(self.name):
                outputs = gates.forward(batch)
                if not moments.count:
                    _need_cross_entropy(problem.loss, outputs, batch, self.name)
                moments.add(curvature(gates, _log_probabilities(outputs, batch)) / 2)
            seen = gates.seen()
        draws = problem.draws
        scores = gates.layout.scores(moments.mean, moments.stderr(), samples=moments.count, draws=draws)
        filters, stderr = ({k: v for k, v in d.items() if k in seen} for d in (scores.filters, scores.filters_stderr))
        return Scores(moments.count, draws, scores.scores, scores.stderr, filters, stderr)

    @abstractmethod
    def curvature(self, problem: Problem) -> Callable[[Gates, torch.Tensor], torch.Tensor]:
        """A function from the gates and a batch's log-probabilities to F_pp: (samples, gates)."""


@register
class GateFisher(_GateCurvature):
    """F_pp with labels sampled from the network's own outputs: one backward pass per draw over a batch.

    Outputs (N, classes), or (N, classes, ...) with positions, whose cross-entropy is averaged. The draws of one
    sample are averaged; the standard error is from the spread over samples, so it covers both the sampling
    of labels and that of the data. A sample's labels do not depend on how the data is cut into batches.
    """

    name: ClassVar[str] = "gate-fisher"
    default_draws: ClassVar[int] = 1

    def curvature(self, problem: Problem) -> Callable[[Gates, torch.Tensor], torch.Tensor]:
        """See `_GateCurvature.curvature`."""
        return partial(_sampled, [problem.generator("labels", draw) for draw in range(problem.draws)])


@register
class GateGGN(_GateCurvature):
    """F_pp exactly, by one backward pass per class over a batch. Outputs (N, classes) only.

    The standard error is from the spread over samples.
    """

    name: ClassVar[str] = "gate-ggn"

    def curvature(self, problem: Problem) -> Callable[[Gates, torch.Tensor], torch.Tensor]:
        """See `_GateCurvature.curvature`."""
        return _exact


def _sampled(generators: list[torch.Generator], gates: Gates, log_p: torch.Tensor) -> torch.Tensor:
    positions = log_p[0, 0].numel()
    total = torch.zeros((), device=log_p.device)
    for draw, generator in enumerate(generators):
        labels = _sample(log_p.detach(), generator).unsqueeze(1)
        log_likelihood = log_p.gather(1, labels).sum()
        total = total + gates.gradients(log_likelihood, keep=draw + 1 < len(generators)).square()
    # Labels are independent between positions, so the sum's Fisher is the sum; the loss is the mean.
    return total / (len(generators) * positions)


def _exact(gates: Gates, log_p: torch.Tensor) -> torch.Tensor:
    if log_p.ndim != 2:
        raise HapError(
            "gate-ggn needs one set of class scores for each sample",
            expected="logits (N, classes)",
            got=f"logits {tuple(log_p.shape)}",
            remedy="use gate-fisher, which allows positions",
        )
    classes = log_p.shape[1]
    total = torch.zeros((), device=log_p.device)
    for c in range(classes):
        squares = gates.gradients(log_p[:, c].sum(), keep=c + 1 < classes).square()
        total = total + log_p[:, c].detach().exp().unsqueeze(1) * squares
    return total


def _sample(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels (N, ...) from log-probabilities (N, classes, ...), by inverting the distribution function.

    On the CPU in float64, so that the same seed means the same labels on every device.
    """
    cumulative = log_p.to("cpu").double().exp().cumsum(1)
    uniform = torch.rand(cumulative[:, :1].shape, generator=generator, dtype=torch.float64)
    labels = (cumulative <= uniform * cumulative[:, -1:]).sum(1)
    return labels.to(log_p.device)


def _log_probabilities(outputs: Any, batch: batches.Batch) -> torch.Tensor:
    logits = batches.logits(outputs)
    if logits.ndim < 2 or logits.shape[0] != batches.size(batch):
        raise HapError(
            "the logits do not fit the batch",
            expected=f"logits (N, classes) or (N, classes, ...) with N = {batches.size(batch)}",
            got=f"logits {tuple(logits.shape)}",
            remedy="use taylor, hessian-trace or magnitude, which need no logits",
        )
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    batches.checked(lambda *_: log_p.detach().amax(1).sum())(outputs, batch)  # a class's -inf alone is a masked class
    return log_p


def _need_cross_entropy(loss: batches.Loss | None, outputs: Any, batch: batches.Batch, name: str) -> None:
    """Raises a HapError unless the loss is the mean cross-entropy of the logits, on this batch."""
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None and own is None:
        return  # cross-entropy by definition; there may be no labels
    value = float(batches.checked(loss)(outputs, batch).detach())
    try:
        expected = float(batches.default_loss(batches.logits(outputs), batch).detach())
    except HapError as error:
        raise _not_cross_entropy(name, value, error.what) from error
    if not math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-6):
        raise _not_cross_entropy(name, value, f"cross-entropy {expected:.6g}")


def _not_cross_entropy(name: str, value: float, other: str) -> HapError:
    return HapError(
        f"{name} needs cross-entropy, and this loss is another",
        expected="loss=None, or the mean cross-entropy of the logits",
        got=f"loss {value:.6g}; {other}",
        remedy="use taylor or hessian-trace, which take any loss, or magnitude",
    )
