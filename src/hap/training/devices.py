"""Where training runs: in this process alone, or in several at once through Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from hap.batches import Batch, device_of, forward
from hap.errors import HapError
from hap.training.meter import Meter, length
from hap.training.precision import HALF, Precision, half_forward
from hap.training.sharded import shards, write_whole_

UNFINISHED = "Expected to have finished reduction"  # how DistributedDataParallel begins to say so


class Share:
    """The batches of one of several processes, for one pass: every `world`-th.

    All shares are of equal length: the pass's first batches fill up its last round, as Accelerate does. Data with a
    method ``shard(rank, world)`` hand out a share themselves, and prepare no other process's batches.

    Attributes:
        filled: whether the batch that was just given out only fills up.

    Raises:
        HapError: somebody else shares them out already.
    """

    def __init__(self, batches: Iterable[Batch], rank: int, world: int) -> None:
        self.filled = False
        self._batches = batches
        self._rank, self._world = rank, world
        sampler, prepared = getattr(batches, "sampler", None), hasattr(batches, "base_dataloader")
        if world > 1 and (prepared or isinstance(sampler, DistributedSampler)):
            raise HapError(
                "the data are shared out among the processes already",
                expected="the same batches in every process, of which each takes its share",
                got="a loader that accelerator.prepare made" if prepared else "a DistributedSampler",
                remedy="give the DataLoader as it was before",
            )

    def __iter__(self) -> Iterator[Batch]:
        if self._world == 1:
            yield from self._batches
            return
        shard, count = getattr(self._batches, "shard", None), length(self._batches)
        if shard is not None and count is not None:
            for turn, batch in enumerate(shard(self._rank, self._world)):
                self.filled = turn * self._world + self._rank >= count
                yield batch
            return
        stream = iter(self._batches)
        first: list[Batch] = []
        while group := list(islice(stream, self._world)):
            first = first or group
            self.filled = self._rank >= len(group)
            yield (group + first * self._world)[self._rank]


class Alone:
    """This process alone."""

    rank = 0
    world = 1

    def __init__(self, precision: Precision = "no") -> None:
        self.precision: Precision = precision
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def device(self, model: nn.Module) -> torch.device:
        """Where a model is trained."""
        return device_of(model)

    def check(self) -> None:
        """Refuses what training cannot do here."""

    def place(self, model: nn.Module) -> nn.Module:
        """The model that is trained: the caller's own, unless it is to be cut into shards."""
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(device_of(model).type)
        return model

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What the loop calls and steps in place of the two."""
        return model, optimizer

    def restore(self, placed: nn.Module, model: nn.Module) -> None:
        """Takes back what `place` and `prepare` did, the device aside; the caller's model gets the weights."""

    def share(self, batches: Iterable[Batch]) -> Share:
        """The batches that this process reads."""
        return Share(batches, self.rank, self.world)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs, in the precision asked for."""
        return half_forward(model, batch, self.precision)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of the loss, scaled where the precision needs it."""
        self.scaler.scale(loss).backward()

    def unsynced(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Gradients stay this process's own meanwhile."""
        return contextlib.nullcontext()

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None) -> None:
        """Cuts the whole gradient to a norm, and steps."""
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each value over all processes."""
        return values

    def gather(self, item: Any) -> list[Any]:
        """Every process's object, in the order of ranks."""
        return [item]

    def align(self, model: nn.Module) -> None:
        """Gives all processes the same buffers: batch norms have seen different batches."""

    def agree(self, choice: bool) -> bool:
        """The first process's choice, so that no two go different ways by a rounding error."""
        return choice

    def mean(self, meter: Meter) -> tuple[float, int]:
        """The mean loss over the examples of all processes, and their number."""
        total, samples = self.sums([meter.total(), meter.samples])
        return total / samples, int(samples)


class Accelerated(Alone):
    """The processes of an `accelerate.Accelerator`, each with its own share of every epoch."""

    def __init__(self, accelerator: Any, precision: Precision = "no") -> None:
        own = accelerator.mixed_precision
        if own != "no" and precision not in ("no", own):
            raise HapError("the accelerator has another precision", expected=f"precision={own!r}", got=repr(precision))
        super().__init__(own if own in HALF else precision)
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self._inside = own != "no"  # the prepared model's forward, and the prepared optimizer, see to it

    def device(self, model: nn.Module) -> torch.device:
        """The accelerator's, which moves the model there."""
        if not self.accelerator.device_placement:
            return device_of(model)
        return torch.empty(0, device=self.accelerator.device).device  # "cuda" gets its number

    def check(self) -> None:
        """Refuses an accelerator that divides losses for an accumulation of its own."""
        steps = self.accelerator.gradient_accumulation_steps
        if steps != 1:
            raise HapError(
                "the accelerator accumulates gradients by itself",
                expected="gradient_accumulation_steps=1",
                got=str(steps),
                remedy=f"accumulate={steps} (on the command line --accumulate {steps}) in its place",
            )

    def place(self, model: nn.Module) -> nn.Module:
        """A copy where it is cut into shards (FSDP2): the caller's model stays whole."""
        placed = shards(self.accelerator, model)
        if self._inside:
            self.scaler = self.accelerator.scaler or self.scaler
        elif self.precision == "fp16" and placed is not model:
            raise HapError(
                "the gradients of shards are scaled by the accelerator alone",
                expected="Accelerator(mixed_precision='fp16'), or bf16",
                got="precision='fp16'",
            )
        elif self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.accelerator.device.type)
        return placed

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """In `DistributedDataParallel`, or cut into shards, where there are several; under autocast where asked."""
        self._before = [list(held) for held in self._held()]
        return self.accelerator.prepare(model, optimizer)

    def _held(self) -> tuple[list[Any], ...]:
        """What the accelerator has prepared; it keeps all of it, for its `save_state`."""
        return self.accelerator._models, self.accelerator._optimizers

    def restore(self, placed: nn.Module, model: nn.Module) -> None:
        """Takes the autocast off the model's forward; gathers the weights of all shards; lets go of the optimizer."""
        for held, before in zip(self._held(), self._before, strict=True):
            held[:] = before
        if placed is model:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        else:
            write_whole_(placed, model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        try:
            return forward(model, batch) if self._inside else super().forward(model, batch)
        except HapError as error:
            if UNFINISHED not in error.what:
                raise
            raise HapError(
                "parameters had no part in the loss, and the processes wait for their gradients",
                expected="a loss that depends on every trainable parameter",
                got=str(error.__cause__).partition(". ")[0],
                remedy="requires_grad_(False) on what is not used, or Accelerator(kwargs_handlers="
                "[DistributedDataParallelKwargs(find_unused_parameters=True)])",
            ) from error

    def backward(self, loss: torch.Tensor) -> None:
        """The mean over processes."""
        self.accelerator.backward(loss if self._inside else self.scaler.scale(loss))

    def unsynced(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """No all-reduce at the end of a backward pass."""
        return self.accelerator.no_sync(model)

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None) -> None:
        """Of the mean gradient."""
        if clip is not None:
            if not self._inside:
                self.scaler.unscale_(optimizer)
            self.accelerator.clip_grad_norm_(parameters, clip)
        if self._inside:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def sums(self, values: list[float]) -> list[float]:
        """In float64, where the device has it."""
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=wide, device=device), "sum").tolist()

    def gather(self, item: Any) -> list[Any]:
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, item)
        return found

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


def devices_of(accelerator: Any, precision: Precision = "no") -> Alone:
    """This process alone, or those of an accelerator."""
    return Alone(precision) if accelerator is None else Accelerated(accelerator, precision)
