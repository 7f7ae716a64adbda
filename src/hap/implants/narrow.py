"""Fits narrow heads to full ones, in closed form, from what attention calls are given and give.

A score is ``q . k``; of it, what does not depend on the key does not matter to the softmax. Over independent queries
and keys, ``E (q' k - q' A A' k)^2`` is least, among the A that keep r numbers of each, where ``A A'`` is the truncated
singular value decomposition of ``M_q^(1/2) C_k^(1/2)``, with M the second moment and C the covariance. What a head adds
to the output is ``W_O z``; of rank r it is closest in the truncated decomposition of ``W_O C_z^(1/2)``. Both are those
of Eckart and Young (1936) in the metric of the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hap.batches import Batch
from hap.errors import HapError
from hap.implants.attended import Call, Part, Place, watch
from hap.implants.heads import Heads

SMALLEST = 1e-12  # of the largest variance: directions with less are taken for never seen


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the heads of one module over all tokens, float64.

    Attributes:
        query: ``E q q'``, (heads, width, width).
        key: the covariance of keys.
        context: ``E z z'``, of what the output layer reads; the covariance where that layer has a bias.
        mean: ``E z`` where it has a bias, else zeros; (heads, width).
        places: where the weights of queries, keys and values are.
    """

    query: torch.Tensor
    key: torch.Tensor
    context: torch.Tensor
    mean: torch.Tensor
    places: Mapping[Part, Place]


@dataclass(frozen=True, eq=False)
class Narrow:
    """What narrow heads of one rank keep of every head of a module, float64.

    Attributes:
        query, key, value: a narrow head reads ``q' query`` and so on, each (heads, width, rank).
        output: the weight by which the narrow context counts, (heads, outputs, rank).
        shift: what the bias of the output layer must add for each head, (heads, outputs).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class FittedHeads:
    """The narrow heads of one module.

    Attributes:
        narrow: what they keep of every head.
        parts: for each weight and bias of queries, keys and values, and the chunk of it, which of these it holds.
    """

    narrow: Narrow
    parts: Mapping[Place, Part]

    def basis(self, tensor: str, chunk: int) -> torch.Tensor:
        """The columns by which what this chunk of a tensor gives is multiplied, (heads, width, rank)."""
        found: torch.Tensor = getattr(self.narrow, self.parts[tensor, chunk])
        return found


class Sums:
    """Second moments with a one appended, (heads, width + 1, width + 1)."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds (tokens, heads, width)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(0, 1)
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1)
        found = (x.mT @ x).double()
        self.total = found if self.total is None else self.total + found
        self.count += x.shape[1]

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``E x x'`` and ``E x``.

        Raises:
            HapError: they are not finite.
        """
        assert self.total is not None
        if not self.total.isfinite().all():
            raise HapError(
                "heads cannot become narrow: queries, keys or values are not finite",
                expected="finite activations on the calibration data",
                remedy="check inputs and weights for NaN or overflow",
            )
        mean = self.total / self.count
        return mean[:, :-1, :-1], mean[:, -1, :-1]


def tokens(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """(..., heads, tokens, width) as (tokens, heads, width), those that were `seen` alone."""
    x = x.movedim(-3, -2)
    return x.flatten(0, -3) if seen is None or seen.shape != x.shape[:-2] else x[seen]


def seen(call: Call) -> torch.Tensor | None:
    """Which tokens any query may look at, ``(examples, tokens)``: padding is not seen. None for all."""
    mask = call.mask
    if mask is None or mask.ndim != 4:
        return None
    visible = mask if mask.dtype is torch.bool else mask > -1e4
    return visible.any(-2).any(1).expand(call.key.shape[0], call.key.shape[-2])


def moments(
    model: nn.Module, sites: Mapping[str, Heads], batches: Iterable[Batch]
) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments of each module's heads, by name; and the modules whose heads cannot become narrow, each with why."""
    sums: dict[str, dict[Part, Sums]] = {name: {} for name in sites}
    places: dict[str, Mapping[Part, Place]] = {}

    def add(name: str, call: Call) -> None:
        there = seen(call)
        parts: dict[Part, torch.Tensor] = {"query": call.query, "key": call.key, "value": call.context}
        for part, x in parts.items():
            sums[name].setdefault(part, Sums()).add(tokens(x, there))
        places[name] = call.places

    refused = watch(model, sites, batches, add)
    return {
        name: _moments(sums[name], places[name], biased=heads.output.bias is not None)
        for name, heads in sites.items()
        if name not in refused
    }, refused


def _moments(sums: Mapping[Part, Sums], places: Mapping[Part, Place], *, biased: bool) -> Moments:
    (query, _), (key, key_mean), (context, mean) = (sums[part].moments() for part in ("query", "key", "value"))
    if not biased:
        mean = torch.zeros_like(mean)
    return Moments(query, key - _outer(key_mean), context - _outer(mean), mean, places)


def _outer(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None] * x[:, None]


def fit(found: Moments, weight: torch.Tensor, rank: int) -> Narrow:
    """The best narrow heads of this rank, one for each head.

    Args:
        found: the moments.
        weight: how the output layer reads each head, (heads, outputs, width).
        rank: their width.
    """
    q, q_inverse = _roots(found.query)
    k, k_inverse = _roots(found.key)
    u, s, v = torch.linalg.svd(q @ k)
    root = s[:, None, :rank].sqrt()
    query, key = q_inverse @ u[:, :, :rank] * root, k_inverse @ v.mT[:, :, :rank] * root
    balance = (_norms(key) / _norms(query)).sqrt()  # as much of a score lies in queries as in keys
    z, z_inverse = _roots(found.context)
    u, s, v = torch.linalg.svd(weight.double() @ z, full_matrices=False)
    value, output = z_inverse @ v.mT[:, :, :rank], u[:, :, :rank] * s[:, None, :rank]
    length = _norms(value)  # values stay as large as they are
    value, output = value / length, output * length
    missed = weight.double() - output @ value.mT
    return Narrow(query * balance, key / balance, value, output, (missed @ found.mean[:, :, None]).squeeze(-1))


def _norms(columns: torch.Tensor) -> torch.Tensor:
    """Their lengths, (heads, 1, columns); 1 for those that are zero."""
    length = columns.norm(dim=1, keepdim=True)
    return torch.where(length > 0, length, 1.0)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of positive matrices, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    there = values > SMALLEST * values[:, -1:].clamp_min(1e-300)
    root = torch.where(there, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(there, 1 / root, 0.0)
    return (vectors * root[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT


def output_weight(model: nn.Module, heads: Heads) -> torch.Tensor:
    """How the output layer reads each head: (heads, outputs, width)."""
    member = heads.member(heads.output.weight)
    weight = model.get_parameter(member.parameter).detach().movedim(member.axis, -1)
    (positions,) = heads.chunks(member)
    return weight[:, torch.tensor(positions, device=weight.device)].movedim(1, 0)


def narrow_heads(
    model: nn.Module, sites: Mapping[str, tuple[Heads, int]], batches: Iterable[Batch]
) -> dict[str, FittedHeads]:
    """For each module, with its heads and a rank, the narrow heads that are closest to them on the data.

    Raises:
        HapError: its heads cannot become narrow (says why).
    """
    found, refused = moments(model, {name: heads for name, (heads, _) in sites.items()}, batches)
    for name, problem in refused.items():
        raise HapError(
            f"the heads of {name!r} cannot become narrow: {problem}",
            expected="queries, keys, values and output by linear layers around one scaled_dot_product_attention",
            remedy="let hap.implants.head_options say which heads can; attn_implementation='sdpa' in transformers",
        )
    return {
        name: FittedHeads(fit(found[name], output_weight(model, heads), rank), _parts(heads, found[name].places))
        for name, (heads, rank) in sites.items()
    }


def _parts(heads: Heads, places: Mapping[Part, Place]) -> dict[Place, Part]:
    """What each chunk of the weights holds, and of their biases."""
    biases = {layer.weight: layer.bias for layer in heads.projections}
    found: dict[Place, Part] = {}
    for part, (weight, chunk) in places.items():
        for tensor in (weight, biases[weight]):
            if tensor is not None:
                found[tensor, chunk] = part
    return found
