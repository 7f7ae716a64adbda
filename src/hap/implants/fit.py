"""Fits pointwise filters to the filters that they replace, by least squares on the layer's real inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.batches import Batch, evaluating, forward
from hap.errors import HapError
from hap.implants.pointwise import centre, shifted, shifts

RIDGE = 1e-6  # of the mean input energy: decides for the centre taps where inputs are dead or doubled


@dataclass(frozen=True)
class Target:
    """What to fit in one convolution.

    Attributes:
        rows: the filters to replace; whole groups in a grouped convolution.
        columns: the input channels within a group that the implant may read.
    """

    rows: Sequence[int]
    columns: Sequence[int]


@dataclass(frozen=True)
class Fitted:
    """Pointwise weights of shape ``(rows, columns, 1, ...)`` and biases ``(rows,)``, if there are any."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def centre_taps(conv: _ConvNd, target: Target) -> Fitted:
    """The centre tap of each dense filter: the choice when there is no data."""
    rows = torch.tensor(target.rows, device=conv.weight.device)
    columns = torch.tensor(target.columns, device=conv.weight.device)
    weight = conv.weight.detach().index_select(0, rows).index_select(1, columns)
    for axis, kernel in enumerate(conv.kernel_size):
        weight = weight.narrow(axis + 2, centre(kernel), 1)
    return Fitted(weight.clone(), None if conv.bias is None else conv.bias.detach()[rows].clone())


def least_squares(model: nn.Module, targets: Mapping[str, Target], batches: Iterator[Batch]) -> dict[str, Fitted]:
    """For each convolution (by module name), the pointwise filters closest to its dense ones.

    Minimises ``E |y - W u - b|^2`` over the calibration data, where y is the dense filters' response
    and u the input at the centre tap. One forward pass a batch; per layer only two moment matrices
    are kept. Without a bias in the dense layer there is none in the implant. A weak pull towards the
    centre taps settles what the data leave open; the result is never worse on them than the centre taps.

    Raises:
        HapError: a convolution's inputs or outputs are not finite.
    """
    moments = {name: _Moments(name, model.get_submodule(name), target) for name, target in targets.items()}
    with evaluating(model), _watching(model, moments), torch.no_grad():
        for batch in batches:
            forward(model, batch)
    return {name: found.solve() for name, found in moments.items()}


class _Moments:
    """Sums of ``u u'`` and ``u y'`` for one convolution, per group, in float64."""

    def __init__(self, name: str, conv: nn.Module, target: Target) -> None:
        assert isinstance(conv, _ConvNd)
        self.name = name
        self.conv = conv
        self.target = target
        device = conv.weight.device
        per_group = conv.out_channels // conv.groups
        self.rows = torch.tensor(target.rows, device=device)
        self.groups = torch.tensor(list(dict.fromkeys(r // per_group for r in target.rows)), device=device)
        self.columns = torch.tensor(target.columns, device=device)
        width = len(target.columns) + (conv.bias is not None)
        self.uu = torch.zeros(len(self.groups), width, width, dtype=torch.float64, device=device)
        self.uy = torch.zeros(
            len(self.groups), width, len(target.rows) // len(self.groups), dtype=torch.float64, device=device
        )

    def __call__(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], y: torch.Tensor
    ) -> None:
        conv, x = self.conv, args[0] if args else kwargs["input"]
        x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))  # sums overflow a half
        x = shifted(x, shifts(conv), conv.padding_mode)
        steps = [slice(None, None, s) for s in conv.stride]
        x = x[(slice(None), slice(None), *steps)]
        n, groups = x.shape[0], len(self.groups)
        u = x.reshape(n, conv.groups, -1, *x.shape[2:])[:, self.groups][:, :, self.columns]
        u = u.movedim(0, 2).reshape(groups, len(self.columns), -1)
        if conv.bias is not None:
            u = torch.cat([u, u.new_ones(groups, 1, u.shape[2])], dim=1)
        y = y[:, self.rows].reshape(n, groups, -1, *y.shape[2:]).movedim(0, 2)
        y = y.reshape(groups, self.uy.shape[2], -1)
        self.uu += (u @ u.mT).double()
        self.uy += (u @ y.mT).double()

    def solve(self) -> Fitted:
        if not (self.uu.isfinite().all() and self.uy.isfinite().all()):
            raise HapError(
                f"{self.name} cannot be fitted: its inputs or outputs are not finite",
                expected="finite activations on the calibration data",
                remedy="check inputs and weights for NaN or overflow",
            )
        width, bias = self.uu.shape[-1], self.conv.bias is not None
        energy = self.uu.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
        ridge = RIDGE * energy * torch.eye(width, dtype=torch.float64, device=self.uu.device)
        solution = torch.linalg.solve(self.uu + ridge, self.uy + ridge @ self._start())  # (groups, width, rows)
        solution = solution.mT.reshape(-1, width).to(self.conv.weight.dtype)
        columns = len(self.target.columns)
        weight = solution[:, :columns].reshape(-1, columns, *[1] * len(self.conv.kernel_size))
        return Fitted(weight.contiguous(), solution[:, columns].clone() if bias else None)

    def _start(self) -> torch.Tensor:
        """The centre taps and biases, shaped as the solution."""
        taps = centre_taps(self.conv, self.target)
        start = taps.weight.flatten(1)
        if taps.bias is not None:
            start = torch.cat([start, taps.bias[:, None]], dim=1)
        return start.double().reshape(len(self.groups), -1, start.shape[1]).mT


@contextmanager
def _watching(model: nn.Module, moments: Mapping[str, _Moments]) -> Iterator[None]:
    handles = [
        model.get_submodule(name).register_forward_hook(found, with_kwargs=True) for name, found in moments.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
