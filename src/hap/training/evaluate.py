"""Loss, accuracy and other metrics over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hap.batches import IGNORED_LABEL, Batch, Loss, default_loss, device_of, evaluating, logits, size, take, targets
from hap.errors import HapError
from hap.training.devices import Alone, devices_of
from hap.training.meter import Meter, length
from hap.types import Evaluation, Metric, Progress, silent


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    samples: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    accelerator: Any = None,
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
        metrics: by name, functions of all labels and predictions (arg max of the logits); ignored labels are left out.
        accelerator: an `accelerate.Accelerator` whose processes share the work: all call this with the same arguments,
            and all return the same.
        progress: shows how far it is.

    Returns:
        The loss; the share of labels that are predicted, in [0, 1], or None where targets are not int64 class labels,
        one for each score vector; the number of examples; and the metrics.

    Raises:
        HapError: there is no data, the model cannot read it, a loss is not a finite scalar, or metrics are asked for
            where targets are not class labels.

    >>> batch = (torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1, 1, 1]))
    >>> evaluate(nn.Identity(), [batch]).accuracy
    0.75
    """
    return evaluated(
        model, batches, loss, devices_of(accelerator), samples=samples, metrics=metrics or {}, progress=progress
    )


def evaluated(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None,
    devices: Alone,
    *,
    samples: int | None = None,
    metrics: Mapping[str, Metric],
    progress: Progress,
) -> Evaluation:
    """`evaluate`, by the processes that train, in their precision."""
    function = loss or default_loss
    device = device_of(model)
    meter = Meter("the evaluation")
    hits: list[torch.Tensor | None] = []
    classes: list[_Classes | None] = []
    share = devices.share(batches if samples is None else take(batches, samples, device))
    count = length(batches) if samples is None else None
    total = None if count is None else -(-count // devices.world)
    # Not inference_mode: what a model caches there (rotary tables) could not be trained through afterwards.
    with evaluating(model), torch.no_grad():
        for batch in progress(take(share, None, device), "evaluate", total):
            outputs = devices.forward(model, batch)
            if share.filled:  # another process counts it
                continue
            meter.add(function(outputs, batch), size(batch))
            found = _classes(outputs, batch)
            hits.append(None if found is None else _hits(*found))
            if metrics:  # else nothing is kept, however many pixels have a label each
                classes.append(found)
    loss_of_all, examples = devices.mean(meter)
    return Evaluation(loss_of_all, _accuracy(hits, devices), examples, _metrics(metrics, classes, devices))


_Classes = tuple[torch.Tensor, torch.Tensor]


def _classes(outputs: Any, batch: Batch) -> _Classes | None:
    """Labels, and the classes that were predicted; None if this is not a classification."""
    try:
        scores, labels = logits(outputs), targets(batch)
    except HapError:
        return None
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or scores.ndim < 2 or scores.shape[1] < 2:
        return None
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        return None
    return labels, scores.argmax(1)


def _hits(labels: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """The numbers of right and of all labels."""
    return torch.stack([(predictions == labels).sum(), (labels != IGNORED_LABEL).sum()])


def _accuracy(hits: list[torch.Tensor | None], devices: Alone) -> float | None:
    known = [pair for pair in hits if pair is not None]
    right, counted = torch.stack(known).sum(0).tolist() if known else (0, 0)
    right, counted, unknown = devices.sums([right, counted, len(hits) - len(known)])
    return None if unknown or not counted else right / counted


def _metrics(metrics: Mapping[str, Metric], found: list[_Classes | None], devices: Alone) -> dict[str, float]:
    if not metrics:
        return {}
    known = [tuple(part.flatten().cpu() for part in pair) for pair in found if pair is not None]
    every = devices.gather((known, len(known) < len(found)))
    if any(unknown for _, unknown in every):
        raise HapError(
            f"there is no {next(iter(metrics))} where targets are not classes",
            expected="logits (N, classes, ...) and int64 labels (N, ...)",
            got="outputs or targets of another kind",
            remedy="leave metrics out",
        )
    pairs = [pair for theirs, _ in every for pair in theirs]
    labels, predictions = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    counted = labels != IGNORED_LABEL
    return {name: float(metric(labels[counted], predictions[counted])) for name, metric in metrics.items()}
