"""What narrow heads leave undone of full ones, measured by running them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from hap.batches import Batch, device_of, take
from hap.implants.attended import Call, watch
from hap.implants.heads import HEAD, VALUES, Heads, heads_of
from hap.implants.narrow import Moments, Narrow, Sums, against, fit, looking, moments, output_weight, tokens
from hap.implants.options import Option
from hap.implants.tried import bears
from hap.implants.values import Contexts, energy, fit_values, share, undone
from hap.types import Progress, Structure, silent

log = logging.getLogger(__name__)


def head_options(
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Batch],
    *,
    samples: int | None = 512,
    layers: Collection[str] | None = None,
    progress: Progress = silent,
) -> dict[str, tuple[Option, ...]]:
    """For each attention module whose heads can become narrow, the ranks that they can have.

    What a rank leaves undone of a head is the share of the energy of what it adds to the output, about its mean where
    the output layer has a bias, that the fitted narrow head misses on the data: errors of scores and of values
    together. Two passes over the data are made. Where queries and keys must stay (rotary positions, a norm of each
    head, grouped queries), values and output alone become narrow, form ``value-head``. Modules whose attention cannot
    be told to have narrow heads are left out: eager attention, a positional bias of each head; and where values must be
    narrow alone, values that one layer writes with queries, or whose heads the model's own code counts. The log
    says why.

    Args:
        model: the dense model; left as it is.
        structure: its structure.
        batches: calibration data.
        samples: examples to read at most.
        layers: names of modules that may change; None for all.
        progress: shows the batches.

    Raises:
        HapError: there is no data.
    """
    sites = {
        name: heads
        for name, heads in heads_of(structure).items()
        if heads.ranks() and (layers is None or heads.modules <= set(layers))
    }
    if not sites:
        return {}
    data = list(take(batches, samples, device_of(model)))
    found, refused = moments(model, sites, progress(data, "fitting narrow heads", len(data)))
    weights = {name: output_weight(model, sites[name]) for name in found}
    whole = {name: each for name, each in found.items() if isinstance(each, Moments)}
    alone = {name: sites[name] for name in found if name not in whole and sites[name].family.size > 1}
    refused |= {name: why for name, heads in alone.items() if (why := against(found[name], heads, VALUES)) is not None}
    for name, why in refused.items():
        log.info("the heads of %r cannot become narrow: %s", name, why)
    alone = {name: heads for name, heads in alone.items() if name not in refused}
    values = {
        name: _of_values(found[name], weights[name], heads)
        for name, heads in (bears(model, alone, data[0]) if alone else {}).items()
    }
    if not whole:
        return values
    fitted = {
        name: {rank: fit(each, weights[name], rank) for rank in sites[name].ranks()} for name, each in whole.items()
    }
    sums = {name: {rank: Sums() for rank in each} for name, each in fitted.items()}

    def add(name: str, call: Call) -> None:
        there = looking(call)
        for rank, narrow in fitted[name].items():
            sums[name][rank].add(tokens(torch.cat([call.context, _context(call, narrow)], -1), there))

    watch(model, {name: sites[name] for name in whole}, progress(data, "trying narrow heads", len(data)), add)
    return values | {
        name: tuple(
            Option(HEAD, rank, _undone(each, fitted[name][rank], weights[name], sites[name]))
            for rank, each in by_rank.items()
        )
        for name, by_rank in sums.items()
    }


def _of_values(found: Contexts, weight: torch.Tensor, heads: Heads) -> tuple[Option, ...]:
    """The ranks of narrow values. Scores are exact, so that what is missed follows from the moments."""
    fitted = {rank: fit_values(found, weight, rank, heads.group) for rank in heads.ranks()}
    return tuple(Option(VALUES, rank, undone(found, each, weight, heads.group)) for rank, each in fitted.items())


def _context(call: Call, narrow: Narrow) -> torch.Tensor:
    """What narrow heads give, (..., heads, tokens, rank)."""
    full, kept = (call.query, call.key, call.value), (narrow.query, narrow.key, narrow.value)
    q, k, v = (x @ a.to(x.dtype) for x, a in zip(full, kept, strict=True))
    return F.scaled_dot_product_attention(q, k, v, call.mask, 0.0, call.causal, scale=call.scale)


def _undone(sums: Sums, narrow: Narrow, weight: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The share of ``E |W z|^2`` that ``E |W z - W' z'|^2`` is, for each head; float64 (heads,)."""
    second, mean = sums.moments()
    if heads.output.bias is not None:
        second = second - mean[:, :, None] * mean[:, None]
    full = weight.double()
    both = torch.cat([full, -narrow.output], -1)
    return share(energy(both, second), energy(full, second[:, : heads.width, : heads.width]))
