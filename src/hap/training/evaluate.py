"""Loss and accuracy over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hap.batches import Batch, Loss, default_loss, device_of, evaluating, forward, logits, size, take, targets
from hap.errors import HapError
from hap.training.meter import Meter, length
from hap.types import Evaluation, Progress, silent

IGNORED = -100  # the label that torch's cross-entropy leaves out


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    samples: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """The model's mean loss over all examples, and its accuracy.

    Runs in evaluation mode without gradients, and leaves each module in the mode it was in. The mean weights each
    batch's loss by its size, so that a short last batch counts for what it holds.

    Args:
        model: the model; it is not changed.
        batches: pairs ``(inputs, targets)``, or dicts with ``labels``.
        loss: ``loss(outputs, batch)``, the mean over a batch; None means cross-entropy, or the model's own loss.
        samples: how many examples to read; None means all.
        progress: shows how far it is.

    Returns:
        The loss; the share of labels that are the arg max of the logits, in [0, 1], or None where targets are not
        int64 class labels, one for each score vector; and the number of examples.

    Raises:
        HapError: there is no data, the model cannot read it, or a loss is not a finite scalar.

    >>> batch = (torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1, 1, 1]))
    >>> evaluate(nn.Identity(), [batch]).accuracy
    0.75
    """
    function = loss or default_loss
    meter = Meter("the evaluation")
    hits: list[torch.Tensor | None] = []
    total = length(batches) if samples is None else None
    # Not inference_mode: what a model caches there (rotary tables) could not be trained through afterwards.
    with evaluating(model), torch.no_grad():
        for batch in progress(take(batches, samples, device_of(model)), "evaluate", total):
            outputs = forward(model, batch)
            meter.add(function(outputs, batch), size(batch))
            hits.append(_hits(outputs, batch))
    return Evaluation(loss=meter.mean(), accuracy=_accuracy(hits), samples=meter.samples)


def _hits(outputs: Any, batch: Batch) -> torch.Tensor | None:
    """The numbers of right and of all labels; None if this is not a classification."""
    try:
        scores, labels = logits(outputs), targets(batch)
    except HapError:
        return None
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or scores.ndim < 2 or scores.shape[1] < 2:
        return None
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        return None
    return torch.stack([(scores.argmax(1) == labels).sum(), (labels != IGNORED).sum()])


def _accuracy(hits: list[torch.Tensor | None]) -> float | None:
    known = [pair for pair in hits if pair is not None]
    if len(known) < len(hits):
        return None
    right, counted = torch.stack(known).sum(0).tolist()
    return right / counted if counted else None
