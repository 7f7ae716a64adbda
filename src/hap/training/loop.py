"""The training loop: one pass over the data, one step of the optimizer for each batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hap.batches import Batch, Loss, device_of, forward, size, take
from hap.errors import HapError
from hap.training.devices import Alone
from hap.training.meter import Meter, length
from hap.training.weights import Average, trainable
from hap.types import Progress

Optimizer = Literal["sgd", "adamw"]

FUSED = ("cpu", "cuda")  # where one kernel does the whole step: on a CPU a fifth of the time of one for each tensor
LEARNING_RATES: dict[Optimizer, float] = {"sgd": 0.02, "adamw": 5e-4}  # SGD's is the paper's


def make_optimizer(
    name: Optimizer, model: nn.Module, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD, or AdamW with `momentum` as its first beta; only parameters with two axes or more decay."""
    parameters = trainable(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)


def rounds(batches: Iterable[Batch], devices: Alone) -> int | None:
    """The number of steps in an epoch, in each of which every process takes a batch; None if it is not known."""
    count = length(batches)
    return None if count is None else -(-count // devices.world)


@dataclass(frozen=True)
class Loop:
    """What every epoch of a run uses.

    The scheduler moves after each batch, or where `batches` have no length after each epoch.
    """

    model: nn.Module
    batches: Iterable[Batch]
    loss: Loss
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    average: Average | None
    clip: float | None
    devices: Alone
    progress: Progress

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def run(self, epoch: str) -> Meter:
        """Trains for one epoch; returns this process's losses.

        Raises:
            HapError: there is no data, the model cannot read it, or a loss is no finite scalar with a gradient.
        """
        steps = rounds(self.batches, self.devices)
        meter = Meter(f"{epoch} with lr={self.lr:g}")
        parameters = trainable(self.model)
        self.model.train()
        share = take(self.devices.share(self.batches), None, device_of(self.model))
        for batch in self.progress(share, epoch, steps):
            value = self.loss(forward(self.model, batch), batch)
            meter.add(value, size(batch))
            self._step(value, parameters)
            if steps is not None:
                self.scheduler.step()
        if steps is None:
            self.scheduler.step()
        return meter

    def _step(self, value: torch.Tensor, parameters: list[nn.Parameter]) -> None:
        if not value.requires_grad:
            raise HapError(
                "the loss does not depend on the model's trainable parameters",
                expected="a loss with a gradient",
                got="a tensor without requires_grad",
                remedy="do not detach outputs in the loss, and do not fine-tune under torch.no_grad()",
            )
        self.optimizer.zero_grad()
        self.devices.backward(value)
        if self.clip is not None:
            self.devices.clip(parameters, self.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
