"""Batch-norm statistics of a model whose weights have changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap.batches import Batch, device_of, evaluating, forward, take
from hap.errors import HapError
from hap.training.meter import length
from hap.types import Progress, silent


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def recalibrate_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    samples: int | None = None,
    progress: Progress = silent,
) -> None:
    """Recomputes the running mean and variance of every batch norm on `batches`.

    They become the plain average, over the batches, of each batch's mean and unbiased variance (momentum None in
    `torch.nn.BatchNorm2d`), where only the batch norms are in training mode: dropout stays off. A batch norm that the
    forward pass never reaches keeps what it had. A model without batch norms is left alone, and no data is read.

    Args:
        model: the model; only its batch-norm statistics change, modes and momenta do not.
        batches: pairs or dicts; targets are not used.
        samples: how many examples to read; None means all.
        progress: shows how far it is.

    Raises:
        HapError: there is no data, the model cannot read it, or the statistics are not finite. They are then the old
            ones, as after any other exception.
    """
    norms = batch_norms(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    total = length(batches) if samples is None else None
    done = False
    with evaluating(model), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in progress(take(batches, samples, device_of(model)), "recalibrate", total):
                forward(model, batch)
            _check(norms)
            done = True
        finally:
            for norm, momentum, old in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not done or not norm.num_batches_tracked:
                    for buffer, value in zip(norm.buffers(recurse=False), old, strict=True):
                        buffer.copy_(value)


def _check(norms: list[_BatchNorm]) -> None:
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None and not torch.isfinite(statistic).all():
                raise HapError(
                    "batch-norm statistics are not finite",
                    expected="finite means and variances",
                    got="NaN or infinity",
                    remedy="check inputs and weights for NaN or overflow",
                )
