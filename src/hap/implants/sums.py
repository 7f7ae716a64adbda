"""Sums second moments over batches, a piece at a time, so that no more than the sums stay in memory.

The sums are about the means of the first piece: about zero, inputs that hardly vary would be lost in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hap.errors import HapError
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments

CHUNK = 1 << 24  # elements of unfolded input held at a time
FEW, SHARE = 64, 4  # of one example at most max(FEW, inputs / SHARE) positions: they are much alike


class Sums:
    """The moments of some filters of one layer.

    Args:
        name: the layer's, for error messages.
        geometry: how it reads.
        filters: how many it has.
        rows: the filters of interest; whole groups of a grouped convolution.
        columns: the inputs of interest within a group; of the x that `add` is given.
        centre: whether only the centre taps are of interest.
        device: where the sums are kept.
    """

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        filters: int,
        rows: Sequence[int],
        columns: Sequence[int],
        *,
        centre: bool,
        device: torch.device,
    ) -> None:
        self.name, self.geometry, self.centre = name, geometry, centre
        self.rows = torch.tensor(rows, device=device)
        self.columns = torch.tensor(columns, device=device)
        block = filters // geometry.groups
        found = dict.fromkeys(r // block for r in rows) if geometry.groups > 1 else [0]
        self.groups = torch.tensor(list(found), device=device)
        self.count = 0
        width = len(columns) * (1 if centre else geometry.taps) + 1
        zeros = torch.zeros(len(found), width, width, dtype=torch.float64, device=device)
        self.xx, self.xy = zeros, zeros.new_zeros(len(found), width, len(rows) // len(found))
        self.yy = zeros.new_zeros(self.xy[:, 0].shape)
        self.about: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Adds inputs ``(N, inputs, *spatial)`` and outputs ``(N, filters, *positions)`` (linear: features last).

        Args:
            x, y: what the layer read and gave.
            real: of texts, which tokens are no padding, ``(N, tokens)``: of what a linear layer reads for each token
                these alone count. None: all do.
        """
        x, y = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))  # a half would overflow
        if not self.geometry.kernel:
            x, y = _tokens(x, real), _tokens(y, real)
            if not len(x):
                return  # all of it was padding
        at = self._some(y.shape[2:])
        outputs = y[0, 0].numel() if at is None else len(at[-1])
        step = max(1, CHUNK // max(1, outputs * self.xx.shape[0] * self.xx.shape[1]))
        for first in range(0, len(x), step):
            self._add(x[first : first + step], y[first : first + step], at)

    def _some(self, shape: torch.Size) -> tuple[Any, ...] | None:
        """An index of positions at random, others at each call; None for all, where there are few."""
        most = max(FEW, (self.xx.shape[1] - 1) // SHARE)
        if shape.numel() <= most:
            return None
        order = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(self.count))
        return (..., *torch.unravel_index(order[:most].sort().values.to(self.xx.device), shape))

    def _add(self, x: torch.Tensor, y: torch.Tensor, at: tuple[Any, ...] | None) -> None:
        views = self.geometry.views(x, centre=self.centre, at=at)  # (N, inputs, taps, *positions)
        y = y if at is None else y[at]
        n, groups, taps = len(views), len(self.groups), views.shape[2]
        u = views.reshape(n, self.geometry.groups, -1, taps, views[0, 0, 0].numel())
        u = u[:, self.groups][:, :, self.columns].permute(1, 2, 3, 0, 4).flatten(1, 2).flatten(2)
        v = y[:, self.rows].reshape(n, groups, self.xy.shape[2], -1).permute(1, 2, 0, 3).flatten(2)
        if self.about is None:
            self.about = u.mean(-1), v.mean(-1)
        u, v = (t - mean[..., None] for t, mean in zip((u, v), self.about, strict=True))
        u = torch.cat([u, u.new_ones(groups, 1, u.shape[2])], dim=1)
        self.xx += (u @ u.mT).double()
        self.xy += (u @ v.mT).double()
        self.yy += v.double().square().sum(-1)
        self.count += u.shape[2]

    def moments(self) -> Moments:
        """The means of what was added.

        Raises:
            HapError: nothing was added, or what was is not finite.
        """
        if self.about is None:
            raise HapError(f"{self.name} is not called", expected="a layer that every forward pass calls")
        if not all(t.isfinite().all() for t in (self.xx, self.xy, self.yy)):
            raise HapError(
                f"{self.name} cannot be fitted: its inputs or outputs are not finite",
                expected="finite activations on the calibration data",
                remedy="check inputs and weights for NaN or overflow",
            )
        xx, xy, yy = (total / self.count for total in (self.xx, self.xy, self.yy))
        dx, dy = xx[:, -1, :-1], xy[:, -1]
        x, y = (mean.double() + more for mean, more in zip(self.about, (dx, dy), strict=True))

        def moved(found: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:  # to those about 0
            return torch.baddbmm(found, torch.stack([x, -dx], dim=-1), torch.stack([after, before], dim=-2))

        xx, xy = moved(xx[:, :-1, :-1], dx, x), moved(xy[:, :-1], dy, y)
        return Moments(xx, xy, yy - dy.square() + y.square(), x, y)


def _tokens(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(..., features) as (tokens, features), the real ones alone where x has a row for each token of the text."""
    flat = x.flatten(0, -2)
    if real is None or x.shape[:-1] not in (real.shape, (real.numel(),)):
        return flat
    return flat[real.flatten()]
