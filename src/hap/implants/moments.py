"""Second moments of what filters read and give: all that a least-squares fit needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from hap.implants.regression import ROUNDING, definite

RIDGE = 1e-6  # of the mean input energy: decides for the dense weights where inputs are dead or doubled


@dataclass(frozen=True)
class Moments:
    """Means over all samples and positions, for each of G convolution groups; float64.

    The unfolded input x has ``inputs = channels * taps`` entries, the taps running fastest.

    Attributes:
        xx: ``E x x'``, (G, inputs, inputs).
        xy: ``E x y'``, (G, inputs, rows).
        yy: ``E y^2``, (G, rows).
        x: ``E x``, (G, inputs).
        y: ``E y``, (G, rows).
        factor: the Cholesky factor of xx, where it is known.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    factor: torch.Tensor | None = None

    @staticmethod
    def white(weight: torch.Tensor) -> Moments:
        """Those of filters ``(G, rows, inputs)`` without bias that read white noise: the fit is one of the weights."""
        weight = weight.double()
        groups, rows, inputs = weight.shape
        eye = torch.eye(inputs, dtype=weight.dtype, device=weight.device).expand(groups, -1, -1)
        zeros = weight.new_zeros
        return Moments(eye, weight.mT, weight.square().sum(-1), zeros(groups, inputs), zeros(groups, rows))

    def centred(self) -> Moments:
        """About the means: what is left for the weights when a bias takes the rest."""
        return Moments(
            self.xx - self.x[:, :, None] * self.x[:, None],
            self.xy - self.x[:, :, None] * self.y[:, None],
            self.yy - self.y.square(),
            torch.zeros_like(self.x),
            torch.zeros_like(self.y),
        )

    def pulled(self, weight: torch.Tensor, ridge: float = RIDGE) -> Moments:
        """As if filters `weight` read a little white noise besides, `ridge` of the mean input energy.

        The least squares of these moments have the term ``ridge |W - weight|^2``. Where the moments are indefinite,
        by rounding, the noise is as large as makes them definite: what is lost in rounding, the data leave open.
        """
        factor, energy = definite(self.xx, ridge)
        noise = Moments.white(weight)
        return Moments(
            self.xx + energy[:, None, None] * noise.xx,
            self.xy + energy[:, None, None] * noise.xy,
            self.yy + energy[:, None] * noise.yy,
            self.x,
            self.y,
            factor,
        )

    def at(self, inputs: slice) -> Moments:
        """Of these inputs only."""
        return Moments(self.xx[:, inputs, inputs], self.xy[:, inputs], self.yy, self.x[:, inputs], self.y)

    def of(self, rows: slice) -> Moments:
        """Of these rows only."""
        return Moments(self.xx, self.xy[:, :, rows], self.yy[:, rows], self.x, self.y[:, rows])

    def solution(self) -> torch.Tensor:
        """The filters of ordinary least squares: (G, rows, inputs). Where xx is not definite, it is made so."""
        return self._solution

    @cached_property
    def _solution(self) -> torch.Tensor:
        factor = definite(self.xx, ROUNDING)[0] if self.factor is None else self.factor
        return torch.cholesky_solve(self.xy, factor).mT

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """The best biases of filters ``(G, rows, inputs)``, one group's after the other."""
        return (self.y - (weight.double() @ self.x[:, :, None]).squeeze(-1)).flatten()

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """``E |y - W x|^2`` of filters ``(G, rows, inputs)``, for each row: (G, rows)."""
        weight = weight.double()
        return self.yy - 2 * (weight * self.xy.mT).sum(-1) + (weight @ self.xx * weight).sum(-1)
