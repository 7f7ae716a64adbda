"""The depthwise form: a few small kernels for each input channel, then a 1 x 1 mixture."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from hap.implants.form import Factors, Form, Shapes, register
from hap.implants.geometry import Geometry
from hap.implants.moments import Moments
from hap.implants.regression import DECAY, RISE, cholesky, descended, solved
from hap.types import Layer

SWEEPS = 10  # of alternating least squares; at most
STEPS = 5  # of conjugate gradients for the kernels, in a sweep
RANKS = (1, 2, 3)  # kernels for each channel


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

    def shapes(self, layer: Layer, rows: int, columns: int, rank: int | None) -> Shapes:
        """The kernels and their mixture; a rank above the number of taps is that number."""
        channels = _copies(layer.kernel, rank) * columns
        return (channels, 1, *layer.kernel), (rows, channels, *(1 for _ in layer.kernel))

    def fit(self, moments: Moments, geometry: Geometry, rank: int | None) -> Factors:
        """Alternating least squares, from the best kernels of each channel alone; no sweep makes it worse."""
        taps = geometry.taps
        xx, xy = moments.xx[0], moments.xy[0]
        channels = len(xx) // taps
        blocks, targets = xx.reshape(channels, taps, channels, taps), xy.reshape(channels, taps, -1)
        free = moments.solution()[0].T.reshape(targets.shape)
        kernels = _unit(_alone(blocks, free, _copies(geometry.kernel, rank)))
        mixture, explained = _mixture(kernels, blocks, targets)
        for _ in range(SWEEPS):
            moved = _unit(_kernels(kernels, mixture, blocks, targets))
            found, energy = _mixture(moved, blocks, targets)
            gain = energy - explained
            if gain > 0:  # not so where rounding is all that is left
                kernels, mixture, explained = moved, found, energy
            if not gain > RISE * explained:
                break
        mixture = mixture.mT.flatten(1)  # all channels of one kernel, then of the next
        ones = [1] * len(geometry.kernel)
        return kernels.movedim(1, 0).reshape(-1, 1, *geometry.kernel), mixture.reshape(*mixture.shape, *ones)

    def build(self, factors: Factors, bias: torch.Tensor | None, geometry: Geometry, rank: int | None) -> nn.Module:
        """The two layers, after as many copies of the input as there are kernels; the second has the bias.

        A convolution that gives several channels for each group would need no copies, but has no fast kernel on a CPU;
        several depthwise ones cost a call each, and a call costs more than the arithmetic of small layers.
        """
        kernels, mixture = factors
        copies = _copies(geometry.kernel, rank)
        chain = geometry.grouped(len(kernels)).layer(kernels, None), geometry.after().layer(mixture, bias)
        return nn.Sequential(*([Repeat(copies)] if copies > 1 else []), *chain)

    def dense(self, factors: Factors, geometry: Geometry, rank: int | None) -> torch.Tensor:
        """The products, channel by channel, summed over the kernels."""
        kernels, mixture = factors
        copies = _copies(geometry.kernel, rank)
        kernels, mixture = kernels.reshape(copies, -1, geometry.taps), mixture.reshape(len(mixture), copies, -1)
        whole = torch.einsum("omc,mct->oct", mixture, kernels)
        return whole.reshape(*whole.shape[:2], *geometry.kernel)


class Repeat(nn.Module):
    """Copies of all channels, one after the other."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(N, channels, *spatial)`` to ``(N, copies * channels, *spatial)``, in the same memory format."""
        return torch.cat([x] * self.copies, dim=1)

    def extra_repr(self) -> str:
        """How many."""
        return f"copies={self.copies}"


def _copies(kernel: tuple[int, ...], rank: int | None) -> int:
    """Kernels for each channel."""
    assert rank is not None
    return min(rank, prod(kernel))


def _alone(blocks: torch.Tensor, free: torch.Tensor, rank: int) -> torch.Tensor:
    """For each channel the kernels that serve best, were it the only one: (channels, rank, taps).

    The leading directions of its least-squares filters `free`, ``(channels, taps, rows)``, weighted by its covariance.
    """
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (channels, taps, taps)
    values, vectors = torch.linalg.eigh(own)
    scale = values.clamp_min(max(1e-12 * float(values.amax()), 1e-200)).sqrt()[:, None]
    leading = torch.linalg.svd((vectors * scale).mT @ free).U[:, :, :rank]
    return ((vectors / scale) @ leading).mT


def _unit(kernels: torch.Tensor) -> torch.Tensor:
    """Of length 1, but for zeros."""
    return kernels / kernels.norm(dim=-1, keepdim=True).clamp_min(1e-200)


def _mixture(kernels: torch.Tensor, blocks: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best mixture of given kernels, (rows, channels, rank), and the energy that it explains."""
    channels, rank, _ = kernels.shape
    gram = torch.einsum("cmds,dns->cmdn", _read(kernels, blocks), kernels).reshape(channels * rank, -1)
    right = torch.einsum("cmt,cto->cmo", kernels, targets).flatten(0, 1)
    mixture = solved(gram, right, DECAY)
    return mixture.T.reshape(-1, channels, rank), float((mixture * right).sum())


def _read(kernels: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The moments of what each kernel gives with what every channel reads, (channels, rank, channels, taps)."""
    return (kernels @ blocks.flatten(2)).unflatten(2, blocks.shape[2:])


def _kernels(start: torch.Tensor, mixture: torch.Tensor, blocks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Better kernels for a given mixture, (channels, rank, taps), found channel by channel but for a few steps."""
    shape = start.shape
    weights = torch.tensordot(mixture, mixture, dims=([0], [0]))  # (channels, rank, channels, rank)
    between = weights.flatten(2)
    own = torch.einsum("cmcn,ctcs->cmtns", weights, blocks).reshape(len(blocks), shape[1] * shape[2], -1)
    factor = cholesky(own)

    def system(kernels: torch.Tensor) -> torch.Tensor:
        return between @ _read(kernels, blocks).permute(2, 0, 1, 3).flatten(1, 2)

    def conditioned(residual: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(residual.reshape(len(blocks), -1, 1), factor).reshape(shape)

    return descended(start, torch.einsum("ocm,cto->cmt", mixture, targets), system, conditioned, STEPS)
