"""The training loop: one pass over the data, one step of the optimizer for each batch or group of batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from hap.batches import Batch, Loss, device_of, size, take
from hap.errors import HapError
from hap.training.devices import Alone
from hap.training.meter import Meter, length
from hap.training.weights import Average, trainable
from hap.types import Progress

Optimizer = Literal["sgd", "adamw"]

FUSED = ("cpu", "cuda")  # where one kernel does the whole step: on a CPU a fifth of the time of one for each tensor
LEARNING_RATES: dict[Optimizer, float] = {"sgd": 0.02, "adamw": 5e-4}  # SGD's is the paper's


def make_optimizer(
    name: Optimizer, model: nn.Module, *, lr: float, momentum: float, weight_decay: float, sharded: bool = False
) -> torch.optim.Optimizer:
    """SGD, or AdamW with `momentum` as its first beta; only parameters with two axes or more decay."""
    parameters = trainable(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # The fused kernels know nothing of shards.
    fused = not sharded and all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)


def rounds(batches: Iterable[Batch], devices: Alone) -> int | None:
    """The batches that each process takes in an epoch; None if it is not known."""
    count = length(batches)
    return None if count is None else -(-count // devices.world)


@dataclass(frozen=True)
class Loop:
    """What every epoch of a run uses.

    The scheduler moves after each step, or where `batches` have no length after each epoch.
    """

    model: nn.Module
    batches: Iterable[Batch]
    loss: Loss
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    average: Average | None
    clip: float | None
    accumulate: int
    devices: Alone
    progress: Progress

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def stream(self, epoch: str) -> Iterator[Batch]:
        """This process's batches of the next epoch, on the model's device."""
        share = take(self.devices.share(self.batches), None, device_of(self.model))
        return iter(self.progress(share, epoch, rounds(self.batches, self.devices)))

    def run(self, stream: Iterator[Batch], meter: Meter) -> Iterator[int]:
        """Trains on a stream of batches; yields after each step the number of batches that it took.

        Raises:
            HapError: there is no data, the model cannot read it, or a loss is no finite scalar with a gradient.
        """
        known = length(self.batches) is not None
        parameters = trainable(self.model)
        self.model.train()
        while group := list(islice(stream, self.accumulate)):
            self._step(group, meter, parameters)
            if known:
                self.scheduler.step()
            yield len(group)
        if not known:
            self.scheduler.step()

    def _step(self, group: list[Batch], meter: Meter, parameters: list[nn.Parameter]) -> None:
        self.optimizer.zero_grad()
        for left, batch in zip(reversed(range(len(group))), group, strict=True):
            # Gradients go to the other processes with the last batch.
            with self.devices.unsynced(self.model) if left else contextlib.nullcontext():
                value = self.loss(self.devices.forward(self.model, batch), batch)
                meter.add(value, size(batch))
                _check_gradient(value)
                self.devices.backward(value / len(group))
        self.devices.step(self.optimizer, parameters, self.clip)
        if self.average is not None:
            self.average.update()


def _check_gradient(value: torch.Tensor) -> None:
    if not value.requires_grad:
        raise HapError(
            "the loss does not depend on the model's trainable parameters",
            expected="a loss with a gradient",
            got="a tensor without requires_grad",
            remedy="do not detach outputs in the loss, and do not fine-tune under torch.no_grad()",
        )
