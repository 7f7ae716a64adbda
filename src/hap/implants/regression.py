"""Least squares from second moments: free, of reduced rank, and of filters that share projections of their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hap.errors import HapError

SWEEPS = 3  # of alternating least squares, at most; from a good start, more gain less than a hundredth
STEPS = 3  # of conjugate gradients, in a sweep
RISE = 1e-3  # of the energy explained: a sweep that gains less is the last
DECAY = 1e-10  # of a system's mean diagonal: factors have a common scale that nothing fixes
ROUNDING = 1e-14  # of it: what sums in float64 lose

Linear = Callable[[torch.Tensor], torch.Tensor]


def descended(
    start: torch.Tensor, right: torch.Tensor, system: Linear, conditioned: Linear, steps: int
) -> torch.Tensor:
    """A few steps of conjugate gradients towards the solution of ``system(x) = right``: none takes it farther away.

    Args:
        start: where to start.
        right: the right side, of any shape.
        system: a positive semidefinite linear map.
        conditioned: an approximate inverse of it, positive definite.
        steps: how many, at most.
    """
    x = start
    residual = right - system(x)
    direction = step = conditioned(residual)
    size = (residual * step).sum()
    for _ in range(steps):
        image = system(direction)
        length = (direction * image).sum()
        if size <= 0 or length <= 0:
            break  # solved
        x = x + size / length * direction
        residual = residual - size / length * image
        step = conditioned(residual)
        size, before = (residual * step).sum(), size
        direction = step + size / before * direction
    return x


def reduced(free: torch.Tensor, xy: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduced-rank regression (Izenman 1975): the best ``V U`` of this rank.

    The least-squares filters, projected on the leading eigenvectors of the covariance of their outputs.

    Args:
        free: the least-squares filters, ``(rows, inputs)``.
        xy: ``E x y'``, ``(inputs, rows)``.
        rank: at most the number of rows.

    Returns:
        U ``(rank, inputs)`` and V ``(rows, rank)``, the columns of V orthonormal.
    """
    outputs = free @ xy
    basis = torch.linalg.eigh((outputs + outputs.T) / 2).eigenvectors.flip(-1)[:, :rank]
    return basis.T @ free, basis


def projected(
    xx: torch.Tensor, xy: torch.Tensor, free: torch.Tensor, projections: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filters ``W[o, g, t] = sum_q V[o, q] U[q, p, t] A[p, g]``: at every t they read the same projections A.

    Alternating least squares. U and V for given A are a reduced-rank regression; A for given U and V takes a few steps
    of conjugate gradients, preconditioned as if no t were correlated with another. No sweep makes the error larger.
    It starts from the best A for that case: the truncated SVD of `free`, weighted by the covariance of what A reads.

    Args:
        xx: ``E x x'``, ``(g, t, g, t)``.
        xy: ``E x y'``, ``(g, t, rows)``.
        free: the least-squares filters, ``(rows, g, t)``.
        projections: the number of rows of A; at most g.
        rank: of ``V U``, at most the number of rows; with as many, ``V U`` is any matrix.

    Returns:
        A ``(projections, g)``, U ``(rank, projections, t)`` and V ``(rows, rank)``.
    """
    one = cholesky(xx.diagonal(dim1=1, dim2=3).mean(-1))
    seen = one.T @ free.movedim(0, -1).flatten(1)
    leading = torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(-1)[:, :projections]
    shared = torch.linalg.solve_triangular(one.T, leading, upper=True).T
    first, last, explained = _regressed(shared, xx, xy, rank)
    for _ in range(SWEEPS):
        whole = torch.tensordot(last, first, dims=1)
        moved = torch.linalg.qr(_projections(shared, whole, xx, xy, one).T).Q.T  # the span is what counts
        *found, energy = _regressed(moved, xx, xy, rank)
        gain = energy - explained
        if gain > 0:  # not so where rounding is all that is left
            shared, (first, last), explained = moved, found, energy
        if not gain > RISE * explained:
            break
    return shared, first, last


def _regressed(
    shared: torch.Tensor, xx: torch.Tensor, xy: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """U and V for given projections, and the energy that they explain."""
    (count, _), taps = shared.shape, xx.shape[1]
    half = torch.tensordot(shared, xx, dims=1)  # (p, t, g, t)
    gram = torch.tensordot(half, shared, dims=([2], [1])).movedim(-1, 2).reshape(count * taps, -1)
    right = torch.tensordot(shared, xy, dims=1).flatten(0, 1)
    first, last = reduced(solved(gram, right).T, right, rank)
    return first.reshape(-1, count, taps), last, float(((last @ first) * right.T).sum())


def _projections(
    start: torch.Tensor, whole: torch.Tensor, xx: torch.Tensor, xy: torch.Tensor, one: torch.Tensor
) -> torch.Tensor:
    """Better projections A for a given ``V U``, `whole`: ``(rows, p, t)``.

    Args:
        start: A to start from.
        whole: the rest of the filters.
        xx, xy: see `projected`.
        one: the Cholesky factor of what A reads at one t, the mean over all t.
    """
    weights = torch.tensordot(whole, whole, dims=([0], [0]))  # (p, t, p, t)
    inner = cholesky(weights.diagonal(dim1=1, dim2=3).sum(-1))
    flat = weights.permute(0, 2, 1, 3).flatten(1)

    def system(a: torch.Tensor) -> torch.Tensor:
        read = torch.tensordot(a, xx, dims=1)  # (p, t, g, t); xx is symmetric
        return flat @ read.permute(0, 3, 1, 2).flatten(0, 2)

    def conditioned(residual: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, inner).T, one).T

    right = torch.tensordot(whole, xy, dims=([0, 2], [2, 1]))
    return descended(start, right, system, conditioned, STEPS)


def solved(system: torch.Tensor, right: torch.Tensor, decay: float = ROUNDING) -> torch.Tensor:
    """The solution x of a positive semidefinite system, made definite where it is not; see `definite`.

    Even if it is indefinite, ``2 x'right - x'system x`` is at least 0: zeros explain no more.
    """
    return torch.cholesky_solve(right, definite(system, decay)[0])


def cholesky(system: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of positive semidefinite matrices, (..., n, n), singular ones too; see `definite`."""
    return definite(system, DECAY)[0]


def definite(system: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to the diagonal of symmetric matrices what makes them positive definite.

    Moments of few or very unlike inputs are indefinite by rounding: where `decay` is not enough, ten times as much is
    tried, until it is; twice that is added, so that nothing is left next to singular.

    Args:
        system: the matrices, ``(..., n, n)``.
        decay: the least to add, relative to the mean diagonal; to 1 where all is zero.

    Returns:
        The Cholesky factors of the sums, and what was added to each diagonal, ``(...)``.

    Raises:
        HapError: the matrices are not finite.
    """
    largest = torch.linalg.vector_norm(system, torch.inf, dim=(-2, -1))
    unit = system.diagonal(dim1=-2, dim2=-1).mean(-1).maximum(1e-16 * largest)
    unit = torch.where(unit > 1e-200, unit, 1.0)
    least = enough = decay * unit
    for power in range(40):  # diagonally dominant long before
        factor, failed = _factored(system, enough)
        if not failed.any():
            break
        enough = torch.where(failed > 0, 10.0 ** (power + 1) * max(decay, ROUNDING) * unit, enough)
    else:
        raise HapError(
            "an implant cannot be fitted: second moments are not finite",
            expected="finite weights and activations",
            remedy="check inputs and weights for NaN or overflow",
        )
    if power == 0:
        return factor, least
    added = torch.where(enough > least, 2 * enough, least)
    return _factored(system, added)[0], added


def _factored(system: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Cholesky factors with this added to each diagonal, and of which matrices there is none (not 0)."""
    whole = system.clone()
    whole.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    factor, failed = torch.linalg.cholesky_ex(whole)
    return factor, failed
