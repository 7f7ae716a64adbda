"""The paper's criterion: the relative Hessian trace, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.draws import averaged, need_draws
from hap.curvature.objectives import Settled
from hap.curvature.reduce import Groups, groups_of
from hap.errors import HapError

Weights = Mapping[str, torch.Tensor]
Product = Callable[[Weights], dict[str, torch.Tensor]]


@register
class HessianTrace(Criterion):
    """``S_p = Trace(H_pp) / (2 |p|) * ||w_p||^2`` (Yu et al., HAP, WACV 2022, section 3).

    H is the Hessian of the mean loss over the calibration examples. Its trace is estimated for all p
    at once: ``E_v[v_p . (H v)_p]`` with v of independent random signs (Hutchinson 1990). For a unit, p is the
    union of its rows in all its producers; for an attention head, of its slices of W_Q, W_K, W_V and W_O.

    `draws` probes are made per batch. The gradient's graph is built once a batch and kept for them.
    """

    name: ClassVar[str] = "hessian-trace"
    default_draws: ClassVar[int] = 16
    additive: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    predicts_loss: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: fewer than two draws, or no weight to score.
        """
        need_draws(problem, self.name, least=2, default=self.default_draws)
        groups = groups_of(problem.model, problem.structure)
        settled = Settled(problem.model, problem.loss)

        def draws(batch: batches.Batch, number: int) -> tuple[torch.Tensor, float]:
            generators = [problem.generator("probe", number, draw) for draw in range(problem.draws)]
            with hessian(problem, groups, batch) as (multiply, outputs):
                terms = settled.terms(outputs, batch)
                probes = torch.stack([_probe(groups, multiply, generator) for generator in generators])
            return probes, terms

        found = averaged(problem, self.name, draws, skipped=settled.skipped)
        factor = relative(groups)
        return groups.layout.scores(
            factor * found.mean,
            factor * found.stderr,
            samples=found.samples,
            draws=problem.draws,
            terms=found.terms,
        )


def relative(groups: Groups) -> torch.Tensor:
    """``||w_p||^2 / (2 |p|)`` for every unit and filter: what makes a trace a sensitivity (HAP, section 3)."""
    squares = groups.sums({name: weight.square() for name, weight in groups.weights.items()})
    numbers = groups.sums({name: torch.ones_like(weight) for name, weight in groups.weights.items()})
    return squares / (2 * numbers.clamp(min=1))


@contextmanager
def hessian(problem: Problem, groups: Groups, batch: batches.Batch) -> Iterator[tuple[Product, Any]]:
    """Multiplies vectors by the Hessian of one batch's mean loss in the weights of `groups`, zero for other weights.

    The gradient's graph is built once and gone back through for each product (Pearlmutter 1994). That is cheaper than
    building it for each product, and than forward-over-reverse: see docs/criteria.md for what each costs.
    With it come the model's outputs.

    Raises:
        HapError: the loss does not depend on the weights.
    """
    weights = groups.only_require_grad(problem.model)
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = batches.forward(problem.model, batch)
        loss = batches.checked(problem.loss)(outputs, batch)
        if not loss.requires_grad:
            raise HapError(
                "the loss does not depend on the weights",
                expected="a loss that is differentiable in the model's weights",
                remedy="look for torch.no_grad or .detach() in the model and the loss",
            )
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        yield partial(_hessian_vector_product, gradients, weights), outputs


def _probe(groups: Groups, multiply: Product, generator: torch.Generator) -> torch.Tensor:
    """``v * Hv`` summed over every unit and filter, for one vector of signs."""
    signs = random_signs(groups.weights, generator)
    products = multiply(signs)
    return groups.sums({name: signs[name] * products[name] for name in signs})


def _hessian_vector_product(
    gradients: tuple[torch.Tensor | None, ...], weights: Weights, vector: Weights
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


def random_signs(like: Weights, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Independent random signs, one for each element of the tensors.

    Drawn on the CPU as bytes and unpacked on the tensors' device: 8 signs for each number drawn and byte sent.
    """
    total = sum(tensor.numel() for tensor in like.values())
    packed = torch.randint(256, (-(-total // 8),), generator=generator, dtype=torch.uint8)
    device = next(iter(like.values())).device
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (packed.to(device).unsqueeze(1) >> shifts & 1).flatten()[:total]
    parts = bits.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape).to(tensor.device, tensor.dtype) * 2 - 1
        for part, (name, tensor) in zip(parts, like.items(), strict=True)
    }
