"""The order in which convolution weights lie in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from hap.errors import HapError

ChannelsLast = Literal["auto"] | bool
CHOICES = ("auto", "True", "False")  # as text


def wants_channels_last(model: nn.Module, choice: ChannelsLast, device: torch.device, *, sharded: bool = False) -> bool:
    """The choice; ``auto`` is for models with 2-D convolutions on a GPU, where the fast kernels read that order.

    Raises:
        HapError: it is asked of a model that is cut into shards, which FSDP2 keeps contiguous.
    """
    if sharded and choice is True:
        raise HapError(
            "shards of weights are contiguous",
            expected="channels_last=False or 'auto' with FSDP",
            got="channels_last=True",
            remedy="leave channels_last out, or train with DDP",
        )
    if sharded:
        return False
    if choice == "auto":
        return device.type == "cuda" and any(isinstance(module, nn.Conv2d) for module in model.modules())
    return choice


@contextlib.contextmanager
def channels_last_(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Keeps four-axis weights in ``torch.channels_last`` meanwhile, in place. Images follow at the first convolution.

    Whatever was contiguous is contiguous again afterwards, as files need it.
    """
    weights = [p for p in model.parameters() if on and p.ndim == 4 and p.is_contiguous()]
    _reorder(weights, torch.channels_last)
    try:
        yield
    finally:
        _reorder(weights, torch.contiguous_format)


def _reorder(weights: list[nn.Parameter], order: torch.memory_format) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=order)
