"""Watches layers while a model reads data, and sums the moments of what they read and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hap.attention import opened
from hap.batches import Batch, evaluating, forward, real_tokens
from hap.implants.geometry import Dense, Geometry
from hap.implants.moments import Moments
from hap.implants.sums import Sums

MEMORY = 1 << 30  # bytes of moments held at a time


@dataclass(frozen=True)
class Reading:
    """What to watch of one layer.

    Attributes:
        rows: filters; whole groups in a grouped convolution.
        columns: inputs within a group.
        centre: whether only the centre taps are of interest.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    centre: bool

    def bytes(self, taps: int) -> int:
        """Memory of the moments, for a kernel of so many taps (of one group)."""
        width = len(self.columns) * (1 if self.centre else taps)
        return 8 * width * (width + len(self.rows))


def dense_layer(model: nn.Module, name: str) -> Dense:
    """The convolution or linear layer called `name`."""
    module = model.get_submodule(name)
    assert isinstance(module, Dense)
    return module


def observe(
    model: nn.Module,
    readings: Mapping[str, Reading],
    batches: Iterable[Batch],
    *,
    memory: int = MEMORY,
    uncalled: Literal["raise", "skip"] = "raise",
) -> Iterator[tuple[str, Moments]]:
    """The moments of each layer (by module name), in one pass over the data if `memory` bytes hold all sums.

    If not, the layers take turns: each turn is a pass. All calls of a layer count. No activation is kept,
    and padding of texts does not count.

    Args:
        model: is run in evaluation mode.
        readings: what to watch, by layer.
        batches: the data.
        memory: bytes of moments held at a time.
        uncalled: what becomes of a layer that the model never calls: an error, or nothing.

    Raises:
        HapError: a layer's inputs or outputs are not finite, or it is never called.
    """
    turns = _turns(model, readings, memory)
    batches = batches if len(turns) == 1 else list(batches)
    for names in turns:
        sums = {name: _sums(name, dense_layer(model, name), readings[name]) for name in names}
        with evaluating(model), opened(model), torch.no_grad():
            for batch in batches:
                with _watching(model, sums, real_tokens(batch)):
                    forward(model, batch)
        for name in names:
            found = sums.pop(name)
            if found.count or uncalled == "raise":
                yield name, found.moments()


def _turns(model: nn.Module, readings: Mapping[str, Reading], memory: int) -> list[list[str]]:
    """The layers, in turns whose sums fit in memory together (or are one layer's)."""
    turns: list[list[str]] = []
    left = 0
    for name, reading in readings.items():
        need = reading.bytes(Geometry.of(dense_layer(model, name)).taps)
        if not turns or need > left:
            turns.append([])
            left = memory
        turns[-1].append(name)
        left -= need
    return turns


def _sums(name: str, layer: Dense, reading: Reading) -> Sums:
    geometry, filters, device = Geometry.of(layer), len(layer.weight), layer.weight.device
    return Sums(name, geometry, filters, reading.rows, reading.columns, centre=reading.centre, device=device)


@contextmanager
def _watching(model: nn.Module, sums: Mapping[str, Sums], real: torch.Tensor | None) -> Iterator[None]:
    def watch(found: Sums) -> Callable[..., None]:
        return lambda _, args, kwargs, y: found.add(args[0] if args else kwargs["input"], y, real)

    handles = [
        dense_layer(model, name).register_forward_hook(watch(found), with_kwargs=True) for name, found in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
