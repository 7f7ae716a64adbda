"""What training minimises: the loss, with softened labels or a teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hap.batches import IGNORED_LABEL, Batch, Loss, default_loss, device_of, evaluating, logits, targets
from hap.errors import HapError
from hap.training.checks import check_numbers
from hap.training.precision import Precision, half_forward


@dataclass(frozen=True, eq=False)
class Distillation:
    """Learning from another model's outputs (Hinton et al. 2015, arXiv 1503.02531).

    The loss is ``(1 - weight) * loss + weight * temperature^2 * KL(teacher || student)``, both distributions softened
    by the temperature; its square keeps the two gradients in proportion (section 2 there).

    Attributes:
        teacher: the dense model, say, on the same device; read in evaluation mode, and left as it is.
        weight: the teacher's share, in [0, 1].
        temperature: that logits are divided by, above 0.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_numbers(distill=self.weight, temperature=self.temperature)


@dataclass(frozen=True)
class Objective:
    """The training loss of a batch, from the student's outputs.

    Attributes:
        loss: the caller's; None for cross-entropy, or the model's own.
        smoothing: of the labels: the share of a label's weight that is spread over all classes (Szegedy et al. 2016).
        distill: the teacher.
        precision: of the teacher's forward pass.
    """

    loss: Loss | None
    smoothing: float = 0.0
    distill: Distillation | None = None
    precision: Precision = "no"

    def __post_init__(self) -> None:
        if self.smoothing and self.loss is not None:
            raise HapError(
                "label_smoothing has no meaning for a loss of your own",
                expected="label_smoothing=0, or loss=None",
                got=f"label_smoothing={self.smoothing}",
                remedy="smooth the labels in your loss",
            )

    def check(self, model: nn.Module, device: torch.device) -> None:
        """Refuses a teacher that is the student, or not on the device that the student is trained on."""
        if self.distill is None:
            return
        teacher = self.distill.teacher
        if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
            raise HapError(
                "the teacher has weights that are trained",
                expected="a model of its own",
                got="parameters that both models have",
                remedy="copy.deepcopy the model before training",
            )
        if device_of(teacher) != device:
            raise HapError(
                "the teacher is on another device",
                expected=str(device),
                got=str(device_of(teacher)),
                remedy=f"teacher.to({str(device)!r})",
            )

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        value = self._hard(outputs, batch)
        if self.distill is None:
            return value
        teacher, weight = self.distill.teacher, self.distill.weight
        with evaluating(teacher), torch.no_grad():
            taught = logits(half_forward(teacher, batch, self.precision))
        following = "CausalLM" in type(outputs).__name__  # transformers' name for outputs that are of the next token
        soft = divergence(logits(outputs), taught, _labels(batch), self.distill.temperature, shift=following)
        return (1 - weight) * value + weight * self.distill.temperature**2 * soft

    def _hard(self, outputs: Any, batch: Batch) -> torch.Tensor:
        if not self.smoothing:
            return (self.loss or default_loss)(outputs, batch)
        scores, labels = logits(outputs), targets(batch)
        if scores.ndim < 2 or labels.dtype != torch.int64 or labels.shape != scores.shape[:1] + scores.shape[2:]:
            raise HapError(
                "label_smoothing needs a classifier",
                expected="logits (N, classes, ...) and int64 labels (N, ...)",
                got=f"logits {tuple(scores.shape)}, labels {tuple(labels.shape)} {labels.dtype}",
                remedy="leave label_smoothing out",
            )
        return F.cross_entropy(scores, labels, label_smoothing=self.smoothing)


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: float,
    *,
    shift: bool = False,
) -> torch.Tensor:
    """The mean over predictions of KL(teacher || student), of logits divided by the temperature.

    Classes are on the last axis where each label stands for a vector there (language models), else on axis 1.
    Predictions whose label is ignored (-100) do not count. With `shift` the label of a position is the next one's, as
    in causal language models; the last position predicts nothing.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> float(divergence(logits, logits, torch.tensor([1]), 2.0))
    0.0
    """
    if student.shape != teacher.shape or student.ndim < 2:
        raise HapError(
            "teacher and student predict different things",
            expected=f"logits of shape {tuple(student.shape)}",
            got=f"{tuple(teacher.shape)} from the teacher",
            remedy="a teacher has the classes of its student",
        )
    last = labels is not None and student.ndim > 2 and labels.shape == student.shape[:-1]
    axis = student.ndim - 1 if last else 1
    ours, theirs = (F.log_softmax(scores.to(student.dtype) / temperature, axis) for scores in (student, teacher))
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)
    if labels is None or labels.shape != each.shape:
        return each.mean()
    if shift:
        each, labels = each[:, :-1], labels[:, 1:]
    counted = labels != IGNORED_LABEL
    return (each * counted).sum() / counted.sum().clamp(min=1)


def _labels(batch: Batch) -> torch.Tensor | None:
    try:
        labels = targets(batch)
    except HapError:
        return None
    return labels if isinstance(labels, torch.Tensor) else None
