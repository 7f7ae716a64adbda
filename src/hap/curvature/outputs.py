"""Reading a model's outputs and a batch's labels, with an error that says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from hap import batches
from hap.errors import HapError


def scores_of(outputs: Any, batch: batches.Batch, *, least: int = 1) -> torch.Tensor:
    """The outputs in single precision or better, (N, ...)."""
    scores = batches.logits(outputs)
    if scores.ndim < least or scores.shape[0] != batches.size(batch):
        raise HapError(
            "the logits do not fit the batch",
            expected=f"logits (N, classes) or (N, classes, ...) with N = {batches.size(batch)}",
            got=f"logits {tuple(scores.shape)}",
            remedy="use taylor, hessian-trace or magnitude, which need no logits",
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def finite_scores(outputs: Any, batch: batches.Batch) -> torch.Tensor:
    """As `scores_of`; raises a HapError if one is not finite."""
    scores = scores_of(outputs, batch)
    need_finite(scores.detach())
    return scores


def need_finite(values: torch.Tensor) -> None:
    """Raises a HapError if a value is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise HapError(
            "the model's outputs are not finite",
            expected="finite numbers",
            got="NaN or infinity",
            remedy="check inputs and weights for NaN or overflow",
        )


def entry(batch: batches.Batch, key: Literal["labels", "attention_mask"]) -> torch.Tensor | None:
    """The tensor under a key of a batch; a pair holds labels only."""
    entries = batch if isinstance(batch, Mapping) else {"labels": batch[1]}
    found = entries.get(key)
    return found if isinstance(found, torch.Tensor) else None


def labels_like(scores: torch.Tensor, batch: batches.Batch, loss: str) -> torch.Tensor:
    """The labels in the outputs' shape; (N, 1) and (N,) are the same."""
    labels = entry(batch, "labels")
    if labels is None or _squeezed(labels) != _squeezed(scores):
        raise unfit(loss, "labels in the shape of the outputs", scores, batch)
    return labels.reshape(scores.shape).to(scores)


def _squeezed(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[:-1]) if tensor.ndim == 2 and tensor.shape[1] == 1 else tuple(tensor.shape)


def unfit(loss: str, expected: str, scores: torch.Tensor, batch: batches.Batch) -> HapError:
    """The error for labels that a loss cannot read."""
    labels = entry(batch, "labels")
    return HapError(
        f"{loss} does not fit this model and these labels",
        expected=expected,
        got=f"outputs {tuple(scores.shape)}, "
        + ("no labels" if labels is None else f"labels {tuple(labels.shape)} {labels.dtype}"),
        remedy="pass batches with labels, or your own loss(outputs, batch); gate-fisher alone needs no labels",
    )
