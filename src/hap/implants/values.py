"""Narrow values: fits them, in closed form, where queries and keys must stay as they are.

Rotary positions and norms of each head stand between the projections of queries and keys and the attention call, and
where a group of heads shares its keys these cannot be mixed with the queries of each. What a head adds to the output
is ``W_O z`` all the same, with z in the span of its values. Of rank r it is closest in the truncated singular value
decomposition of ``W_O C_z^(1/2)`` (Eckart and Young 1936, in the metric of the data).

A group shares its values: their basis is that of the group's weights one under the other in the metric of its mean
covariance, and the output weights of the group are then solved together, by regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hap.implants.attended import Part, Place

SMALLEST = 1e-12  # of the largest variance: directions with less are taken for never seen


@dataclass(frozen=True, eq=False)
class Contexts:
    """Moments of what the output layer reads of the heads of one module, over all tokens, float64.

    Attributes:
        context: ``E z z'``, the covariance where that layer has a bias; (heads, group * width, group * width).
        mean: ``E z`` where it has a bias, else zeros; (heads, group * width).
        places: where the weights of queries, keys and values are.
    """

    context: torch.Tensor
    mean: torch.Tensor
    places: Mapping[Part, Place]


@dataclass(frozen=True, eq=False)
class Values:
    """What values of one rank keep of every head of a module, float64.

    Attributes:
        value: a narrow head reads ``v' value``, (heads, width, rank).
        output: the weight by which the narrow context counts, (heads, outputs, group * rank).
        shift: what the bias of the output layer must add for each head, (heads, outputs).
    """

    value: torch.Tensor
    output: torch.Tensor
    shift: torch.Tensor


def fit_values(found: Contexts, weight: torch.Tensor, rank: int, group: int) -> Values:
    """The best values of this rank, and how the output layer reads them.

    Args:
        found: the moments.
        weight: how the output layer reads each head, (heads, outputs, group * width).
        rank: their width.
        group: heads that share one of values.
    """
    weight = weight.double()
    each = found.context.unflatten(-1, (group, -1)).unflatten(-3, (group, -1)).diagonal(dim1=1, dim2=3).mean(-1)
    z, z_inverse = roots(each)
    stacked = weight.unflatten(-1, (group, -1)).transpose(1, 2).flatten(1, 2)
    rows = stacked.shape[1]
    stacked = F.pad(stacked, (0, 0, 0, max(0, rank - rows)))  # a rank above the outputs has columns all the same
    u, s, v = torch.linalg.svd(stacked @ z, full_matrices=False)
    value, output = z_inverse @ v.mT[:, :, :rank], u[:, :rows, :rank] * s[:, None, :rank]
    length = norms(value)  # values stay as large as they are
    value, output = value / length, output * length
    kept = shared(value, group)
    if group > 1:
        second = kept.mT @ found.context @ kept
        output = weight @ found.context @ kept @ torch.linalg.pinv(second, rtol=SMALLEST, hermitian=True)
    missed = weight - output @ kept.mT
    return Values(value, output, (missed @ found.mean[:, :, None]).squeeze(-1))


def undone(found: Contexts, values: Values, weight: torch.Tensor, group: int) -> torch.Tensor:
    """The share of the energy of what each head adds to the output that narrow values miss; float64 (heads,)."""
    full = weight.double()
    missed = full - values.output @ shared(values.value, group).mT
    return share(energy(missed, found.context), energy(full, found.context))


def energy(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """``E |W z|^2`` of each head, with the second moments of z: (heads,)."""
    return ((weight @ moment) * weight).sum((-2, -1))


def share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What a part is of the whole, between 0 and 1; none of nothing."""
    return torch.where(whole > 0, part / whole, 0.0).clamp(0, 1)


def shared(value: torch.Tensor, group: int) -> torch.Tensor:
    """The columns of each head for all of its group: (heads, group * width, group * rank), zero between them."""
    if group == 1:
        return value
    eye = torch.eye(group, dtype=value.dtype, device=value.device)
    return torch.stack([torch.kron(eye, each) for each in value])


def norms(columns: torch.Tensor) -> torch.Tensor:
    """Their lengths, (heads, 1, columns); 1 for those that are zero."""
    length = columns.norm(dim=1, keepdim=True)
    return torch.where(length > 0, length, 1.0)


def roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of positive matrices, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    there = values > SMALLEST * values[:, -1:].clamp_min(1e-300)
    root = torch.where(there, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(there, 1 / root, 0.0)
    return (vectors * root[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
