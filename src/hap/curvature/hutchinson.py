"""The paper's criterion: the relative Hessian trace, by Hutchinson's estimator."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.reduce import Groups, groups_of
from hap.errors import HapError


@register
class HessianTrace(Criterion):
    """``S_p = Trace(H_pp) / (2 |p|) * ||w_p||^2`` (Yu et al., HAP, WACV 2022, section 3).

    H is the Hessian of the mean loss over the calibration examples. Its trace is estimated for all p
    at once: ``E_v[v_p . (H v)_p]`` with v of independent random signs (Hutchinson 1990). For a unit, p is the
    union of its rows in all its producers.

    `draws` probes are made *per batch*, independent between batches: for the same cost this says more than the
    same probes for every batch, because their errors average out over batches. The standard error is that of
    the estimate given the data, ``sqrt(sum_b (n_b / N)^2 var_b / draws)`` times ``||w_p||^2 / (2 |p|)``.
    The gradient's graph is built once a batch and kept for its probes.
    """

    name: ClassVar[str] = "hessian-trace"
    default_draws: ClassVar[int] = 16

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: fewer than two draws, or no weight to score.
        """
        if problem.draws < 2:
            raise HapError(
                "hessian-trace needs at least two draws",
                expected="draws >= 2: the standard error comes from the spread between them",
                got=str(problem.draws),
                remedy=f"leave draws out for the default of {self.default_draws}",
            )
        groups = groups_of(problem.model, problem.structure)
        trace = torch.zeros(groups.layout.size, dtype=torch.float64)
        variance = torch.zeros_like(trace)
        examples = 0
        for number, batch in enumerate(problem.batches(self.name)):
            probes = _probes(problem, groups, batch, number)
            count = batches.size(batch)
            trace += count * probes.mean(0)
            variance += count**2 * probes.var(0) / problem.draws
            examples += count
        squares = groups.sums({name: weight.square() for name, weight in groups.weights.items()})
        numbers = groups.sums({name: torch.ones_like(weight) for name, weight in groups.weights.items()})
        factor = squares / (2 * numbers.clamp(min=1) * examples)
        return groups.layout.scores(factor * trace, factor * variance.sqrt(), samples=examples, draws=problem.draws)


def _probes(problem: Problem, groups: Groups, batch: batches.Batch, number: int) -> torch.Tensor:
    """``v * Hv`` summed over every unit and filter, for each probe on one batch: (draws, units and filters)."""
    weights = groups.only_require_grad(problem.model)
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = batches.checked(problem.loss)(batches.forward(problem.model, batch), batch)
        if not loss.requires_grad:
            raise HapError(
                "the loss does not depend on the weights",
                expected="a loss that is differentiable in the model's weights",
                remedy="look for torch.no_grad or .detach() in the model and the loss",
            )
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        sums = []
        for draw in range(problem.draws):
            signs = _signs(weights, problem.generator("probe", number, draw))
            products = _hessian_vector_product(gradients, weights, signs)
            sums.append(groups.sums({name: signs[name] * products[name] for name in weights}))
    return torch.stack(sums)


def _hessian_vector_product(
    gradients: tuple[torch.Tensor | None, ...], weights: dict[str, torch.Tensor], vector: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``H v``; zero where the gradient does not depend on a weight."""
    pairs = [(g, vector[n]) for n, g in zip(weights, gradients, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    outputs, grad_outputs = zip(*pairs, strict=True)
    products = torch.autograd.grad(
        outputs, list(weights.values()), grad_outputs, retain_graph=True, materialize_grads=True
    )
    return dict(zip(weights, products, strict=True))


def _signs(weights: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Independent random signs, one for each weight.

    Drawn on the CPU as bytes and unpacked on the weights' device: 8 signs for each number drawn and byte sent.
    """
    total = sum(weight.numel() for weight in weights.values())
    packed = torch.randint(256, (-(-total // 8),), generator=generator, dtype=torch.uint8)
    device = next(iter(weights.values())).device
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (packed.to(device).unsqueeze(1) >> shifts & 1).flatten()[:total]
    parts = bits.split([weight.numel() for weight in weights.values()])
    return {
        name: part.view(weight.shape).to(weight.device, weight.dtype) * 2 - 1
        for part, (name, weight) in zip(parts, weights.items(), strict=True)
    }
