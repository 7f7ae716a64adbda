"""The depthwise form: a few small kernels for each input channel, then a 1 x 1 mixture."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from hap.implants.form import Factors, Form, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.types import Layer

SWEEPS = 10  # of alternating least squares; at most
RISE = 1e-3  # of the energy explained: a sweep that gains less is the last
RANKS = (1, 2, 3)  # kernels for each channel
DECAY = 1e-10  # of a system's mean diagonal: kernels and mixture have a common scale that nothing fixes


@register
class Depthwise(Form):
    """``W[o, c, t] = sum_m B[o, c, m] D[c, m, t]``: a depthwise convolution of `rank` kernels a channel, then 1 x 1.

    With as many kernels as taps it could be any convolution.
    """

    name = "depthwise"
    ranked = True

    def applies(self, layer: Layer) -> bool:
        """Convolutions larger than 1, of one group."""
        return prod(layer.kernel) > 1 and layer.groups == 1 and not layer.transposed

    def ranks(self, layer: Layer, rows: int, columns: int) -> tuple[int | None, ...]:
        """Fewer kernels than taps."""
        return tuple(rank for rank in RANKS if rank < prod(layer.kernel))

    def weights(self, layer: Layer, rows: int, columns: int, rank: int | None) -> int:
        """The kernels, and their mixture; a rank above the number of taps is that number."""
        assert rank is not None
        return min(rank, prod(layer.kernel)) * columns * (prod(layer.kernel) + rows)

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """Alternating least squares, from the best kernels of each channel alone; no sweep makes it worse."""
        assert rank is not None
        taps = geometry.taps
        rank = min(rank, taps)
        xx, xy = moments.xx[0], moments.xy[0]
        channels = len(xx) // taps
        blocks, targets = xx.reshape(channels, taps, channels, taps), xy.reshape(channels, taps, -1)
        kernels = _alone(blocks, moments.solution()[0].T.reshape(targets.shape), rank)
        mixture, explained = _mixture(kernels, blocks, targets)
        for _ in range(SWEEPS):
            kernels = _kernels(mixture, blocks, targets)
            kernels = kernels / kernels.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            before = explained
            mixture, explained = _mixture(kernels, blocks, targets)
            if explained < (1 + RISE) * before:
                break
        mixture = mixture.mT.flatten(1)  # all channels of one kernel, then of the next
        ones = [1] * len(geometry.kernel)
        each = kernels.movedim(1, 0).reshape(rank, channels, 1, *geometry.kernel)
        return *each, mixture.reshape(*mixture.shape, *ones)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry) -> nn.Module:
        """The layers; the last has the bias."""
        *kernels, mixture = factors
        each = [geometry.grouped(len(kernel)).layer(kernel, None) for kernel in kernels]
        return nn.Sequential(each[0] if len(each) == 1 else Side(each), geometry.after().layer(mixture, bias))

    def dense(self, factors: Factors, geometry: Geometry) -> torch.Tensor:
        """The products, channel by channel, summed over the kernels."""
        *kernels, mixture = factors
        parts = mixture.flatten(1).split(len(kernels[0]), dim=1)
        ones = [1] * len(geometry.kernel)
        products = [
            part.reshape(*part.shape, *ones) * kernel.squeeze(1) for part, kernel in zip(parts, kernels, strict=True)
        ]
        return torch.stack(products).sum(0)


class Side(nn.ModuleList):
    """Layers side by side: their outputs, one after the other along the channels.

    On CPU, several depthwise convolutions are faster than one that gives several channels for each.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(N, channels, *spatial)`` to ``(N, layers * channels, *spatial')``."""
        return torch.cat([layer(x) for layer in self], dim=1)


def _alone(blocks: torch.Tensor, free: torch.Tensor, rank: int) -> torch.Tensor:
    """For each channel the kernels that serve best, were it the only one: (channels, rank, taps).

    The leading directions of its least-squares filters `free`, ``(channels, taps, rows)``, weighted by its covariance.
    """
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (channels, taps, taps)
    values, vectors = torch.linalg.eigh(own)
    scale = values.clamp_min(1e-12 * values.amax()).sqrt()[:, None]
    leading = torch.linalg.svd((vectors * scale).mT @ free).U[:, :, :rank]
    return ((vectors / scale) @ leading).mT


def _mixture(kernels: torch.Tensor, blocks: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best mixture of given kernels, (rows, channels, rank), and the energy that it explains."""
    channels, rank, _ = kernels.shape
    half = torch.einsum("cmt,ctds->cmds", kernels, blocks)
    gram = torch.einsum("cmds,dns->cmdn", half, kernels).reshape(channels * rank, -1)
    right = torch.einsum("cmt,cto->cmo", kernels, targets).flatten(0, 1)
    mixture = _solved(gram, right)
    return mixture.T.reshape(-1, channels, rank), float((mixture * right).sum())


def _kernels(mixture: torch.Tensor, blocks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The best kernels for a given mixture: (channels, rank, taps)."""
    (_, channels, rank), taps = mixture.shape, blocks.shape[1]
    weights = torch.tensordot(mixture, mixture, dims=([0], [0]))  # (channels, rank, channels, rank)
    system = torch.einsum("cmdn,ctds->cmtdns", weights, blocks).reshape(channels * rank * taps, -1)
    right = torch.einsum("ocm,cto->cmt", mixture, targets)
    return _solved(system, right.reshape(-1, 1)).reshape(channels, rank, taps)


def _solved(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution of a positive semidefinite system."""
    decay = DECAY * system.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(system + decay * torch.eye(len(system)).to(system))
    return torch.cholesky_solve(right, factor)
