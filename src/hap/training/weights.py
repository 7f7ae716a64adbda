"""Copies and averages of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hap.training.recalibrate import batch_norms
from hap.training.sharded import local


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Snapshot:
    """A copy of everything that training changes in a model: trainable parameters and buffers.

    Attributes:
        copies: by name; of a model that is cut into shards, this process's parts.
    """

    def __init__(self, model: nn.Module, copies: dict[str, torch.Tensor] | None = None) -> None:
        self._model = model
        self.copies = {name: tensor.clone() for name, tensor in changing(model).items()} if copies is None else copies

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copy back, in place."""
        for name, tensor in changing(self._model).items():
            copy = self.copies.get(name)
            # A buffer that is new or has another shape is a cache that the forward pass has grown, and no state.
            if copy is not None and copy.shape == tensor.shape:
                tensor.copy_(copy)


def changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name and with the model's memory: trainable parameters and buffers."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: local(tensor.detach()) for name, tensor in (*parameters.items(), *model.named_buffers())}


class Average:
    """The exponential moving average of a model's weights, starting from those it has now.

    ``average <- decay * average + (1 - decay) * weights`` at each `update`, over the trainable parameters and the
    batch norms' running statistics, which would not fit averaged weights otherwise. Other buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        statistics = [t for norm in batch_norms(model) for t in (norm.running_mean, norm.running_var) if t is not None]
        self._live = [local(tensor.detach()) for tensor in (*trainable(model), *statistics)]
        self.average = [tensor.clone() for tensor in self._live]
        self._step = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Moves the average towards the model's weights."""
        self._step(self.average, self._live, None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights, and its own back afterwards."""
        own = [tensor.clone() for tensor in self._live]
        _write(self._live, self.average)
        try:
            yield
        finally:
            _write(self._live, own)


def _write(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
