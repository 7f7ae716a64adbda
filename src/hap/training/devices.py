"""Where training runs: in this process alone, or in several at once through Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from hap.batches import Batch
from hap.training.meter import Meter


class Alone:
    """This process alone."""

    world = 1

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What the loop calls and steps in place of the two."""
        return model, optimizer

    def restore(self, model: nn.Module) -> None:
        """Takes back what `prepare` did to the model, its device aside."""

    def share(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches that this process trains on."""
        return batches

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of the loss."""
        loss.backward()

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Cuts the whole gradient to a norm."""
        nn.utils.clip_grad_norm_(parameters, norm)

    def mean(self, meter: Meter) -> tuple[float, int]:
        """The mean loss over the examples of all processes, and their number."""
        return meter.mean(), meter.samples

    def align(self, model: nn.Module) -> None:
        """Gives all processes the same buffers: batch norms have seen different batches."""

    def agree(self, choice: bool) -> bool:
        """The first process's choice, so that no two go different ways by a rounding error."""
        return choice


class Accelerated(Alone):
    """The processes of an `accelerate.Accelerator`, each with its own share of every epoch."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.world = accelerator.num_processes

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrapped in `DistributedDataParallel` where there are several processes, under autocast where it is asked."""
        return self.accelerator.prepare(model, optimizer)

    def restore(self, model: nn.Module) -> None:
        """Takes the autocast off the model's forward."""
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def share(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Every `world`-th batch; the epoch's first batches fill up its last round, as Accelerate does."""
        rank = self.accelerator.process_index
        stream = iter(batches)
        first: list[Batch] = []
        while group := list(islice(stream, self.world)):
            first = first or group
            yield (group + first * self.world)[rank]

    def backward(self, loss: torch.Tensor) -> None:
        """The mean over processes; scaled where the precision needs it."""
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], norm: float) -> None:
        """Of the mean gradient."""
        self.accelerator.clip_grad_norm_(parameters, norm)

    def mean(self, meter: Meter) -> tuple[float, int]:
        """Summed in float64 on the CPU's or the device's own process group."""
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.tensor([meter.mean() * meter.samples, meter.samples], dtype=wide, device=device)
        total, samples = self.accelerator.reduce(sums, "sum").tolist()
        return total / samples, int(samples)

    def align(self, model: nn.Module) -> None:
        """From the first process."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, choice: bool) -> bool:
        """Broadcast from the first process."""
        if self.world == 1:
            return choice
        flag = torch.tensor([int(choice)], device=self.accelerator.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())
