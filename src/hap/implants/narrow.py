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
from typing import get_args

import torch
from torch import nn

from hap.batches import Batch
from hap.errors import HapError
from hap.implants.attended import Call, Part, Place, missing, watch
from hap.implants.heads import HEAD, VALUES, Heads
from hap.implants.values import Contexts, Values, fit_values, norms, roots


@dataclass(frozen=True, eq=False)
class Moments(Contexts):
    """Of queries and keys too, where linear layers give them.

    Attributes:
        query: ``E q q'``, (heads, width, width).
        key: the covariance of keys.
    """

    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True, eq=False)
class Narrow(Values):
    """What narrow heads keep.

    Attributes:
        query, key: a narrow head reads ``q' query`` and ``k' key``, each (heads, width, rank).
    """

    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True, eq=False)
class FittedHeads:
    """The narrow heads of one module.

    Attributes:
        narrow: what they keep of every head.
        parts: for each weight and bias of queries, keys and values that changes, and the chunk of it, which of these it
            holds.
    """

    narrow: Values
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
    """Which tokens of the keys any query may look at, ``(examples, tokens)``: padding is not seen. None for all."""
    mask = call.mask
    if mask is None or mask.ndim != 4:
        return None
    visible = mask if mask.dtype is torch.bool else mask > -1e4
    return visible.any(-2).any(1).expand(call.key.shape[0], call.key.shape[-2])


def looking(call: Call) -> torch.Tensor | None:
    """Which tokens of the queries count, as `seen`: all where they are of another input than the keys."""
    return seen(call) if call.own else None


def moments(
    model: nn.Module, sites: Mapping[str, Heads], batches: Iterable[Batch]
) -> tuple[dict[str, Contexts], dict[str, str]]:
    """The moments of each module's heads, by name; and the modules whose heads cannot become narrow, each with why.

    They are `Moments` where queries and keys can become narrow too.
    """
    sums: dict[str, dict[Part, Sums]] = {name: {} for name in sites}
    places: dict[str, Mapping[Part, Place]] = {}

    def add(name: str, call: Call) -> None:
        there, heads = looking(call), sites[name]
        context = tokens(call.context, there).unflatten(1, (heads.family.size, heads.group)).flatten(2)
        parts: dict[Part, torch.Tensor] = {"value": context}
        if _whole(heads, call.places) and call.key.shape[-2] > 1:  # a single key is all that a query can look at
            parts |= {"query": tokens(call.query, there), "key": tokens(call.key, seen(call))}
        for part, x in parts.items():
            sums[name].setdefault(part, Sums()).add(x)
        places[name] = call.places

    refused = watch(model, sites, batches, add)
    return {
        name: _moments(sums[name], places[name], heads) for name, heads in sites.items() if name not in refused
    }, refused


def _whole(heads: Heads, places: Mapping[Part, Place]) -> bool:
    """Whether queries and keys can become narrow."""
    return HEAD in heads.forms() and len(places) == len(get_args(Part))


def _moments(sums: Mapping[Part, Sums], places: Mapping[Part, Place], heads: Heads) -> Contexts:
    context, mean = sums["value"].moments()
    if heads.output.bias is None:
        mean = torch.zeros_like(mean)
    context = context - _outer(mean)
    if not _whole(heads, places):
        return Contexts(context, mean, places)
    (query, _), (key, key_mean) = sums["query"].moments(), sums["key"].moments()
    return Moments(context, mean, places, query, key - _outer(key_mean))


def _outer(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None] * x[:, None]


def fit(found: Moments, weight: torch.Tensor, rank: int) -> Narrow:
    """The best narrow heads of this rank, one for each head.

    Args:
        found: the moments.
        weight: how the output layer reads each head, (heads, outputs, width).
        rank: their width.
    """
    q, q_inverse = roots(found.query)
    k, k_inverse = roots(found.key)
    u, s, v = torch.linalg.svd(q @ k)
    root = s[:, None, :rank].sqrt()
    query, key = q_inverse @ u[:, :, :rank] * root, k_inverse @ v.mT[:, :, :rank] * root
    balance = (norms(key) / norms(query)).sqrt()  # as much of a score lies in queries as in keys
    values = fit_values(found, weight, rank, 1)
    return Narrow(values.value, values.output, values.shift, query * balance, key / balance)


def output_weight(model: nn.Module, heads: Heads) -> torch.Tensor:
    """How the output layer reads each head: (heads, outputs, group * width)."""
    member = heads.member(heads.output.weight)
    weight = model.get_parameter(member.parameter).detach().movedim(member.axis, -1)
    positions = torch.tensor(heads.chunks(member), device=weight.device)  # (group, heads, width)
    return weight[:, positions.transpose(0, 1).flatten(1)].movedim(1, 0)


def narrow_heads(
    model: nn.Module, sites: Mapping[str, tuple[Heads, str, int]], batches: Iterable[Batch]
) -> dict[str, FittedHeads]:
    """For each module, with its heads, a form and a rank, the narrow heads that are closest to them on the data.

    Raises:
        HapError: its heads cannot become narrow (says why).
    """
    found, refused = moments(model, {name: heads for name, (heads, *_) in sites.items()}, batches)
    for name, (heads, form, _) in sites.items():
        problem = refused.get(name) or against(found[name], heads, form)
        if problem is None:
            continue
        raise HapError(
            f"the heads of {name!r} cannot become narrow: {problem}",
            expected="queries, keys, values and output by linear layers around one scaled_dot_product_attention",
            remedy="let hap.implants.head_options say which heads can; attn_implementation='sdpa' in transformers",
        )
    return {name: _fitted(found[name], model, *site) for name, site in sites.items()}


def against(found: Contexts, heads: Heads, form: str) -> str | None:
    """Why a module's heads cannot have this form, though they attend as they should; None where they can."""
    if form not in heads.forms():
        return f"form {form!r} is not for its layers"
    if form == HEAD and not isinstance(found, Moments):
        return missing(found.places)
    if form == VALUES and (heads.values is None or found.places["value"] != (heads.values.weight, 0)):
        return "its values are not what the last of three linear layers gives"
    return None


def _fitted(found: Contexts, model: nn.Module, heads: Heads, form: str, rank: int) -> FittedHeads:
    weight = output_weight(model, heads)
    if form == HEAD:
        assert isinstance(found, Moments)
        return FittedHeads(fit(found, weight, rank), _parts(heads, found.places))
    values = fit_values(found, weight, rank, heads.group)
    return FittedHeads(values, _parts(heads, {"value": found.places["value"]}))


def _parts(heads: Heads, places: Mapping[Part, Place]) -> dict[Place, Part]:
    """What each chunk of the weights holds, and of their biases."""
    biases = {layer.weight: layer.bias for layer in heads.projections}
    found: dict[Place, Part] = {}
    for part, (weight, chunk) in places.items():
        for tensor in (weight, biases[weight]):
            if tensor is not None:
                found[tensor, chunk] = part
    return found
