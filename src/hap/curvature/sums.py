"""What a loop over batches adds up, in a form that can be saved, and merged with that of other batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

State = Mapping[str, torch.Tensor]


class Part(Protocol):
    """Something that grows with every batch, and that can be taken apart into tensors and put together again.

    A cleared part that merges one state is, to the bit, what gave that state. An empty part has an empty state.
    """

    def state(self) -> State:
        """Tensors that say all; they may be the part's own."""

    def clear(self) -> None:
        """Forget everything; leaves the tensors that `state` gave as they are."""

    def merge(self, state: State) -> None:
        """Add what another part has seen. Tensors are on the CPU, and become the part's own."""


class Sums:
    """Named sums of float64 tensors, on the CPU.

    >>> sums = Sums()
    >>> sums.add(total=torch.tensor([1.0, 2.0]))
    >>> sums.add(total=torch.tensor([1.0, 0.0]))
    >>> sums["total"].tolist()
    [2.0, 2.0]
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """A sum; 0 before anything was added."""
        return self._sums.get(name, torch.zeros((), dtype=torch.float64))

    def add(self, **values: torch.Tensor | float) -> None:
        """Add to each of the sums named."""
        for name, value in values.items():
            self._sums[name] = self[name] + torch.as_tensor(value).cpu().double()

    def state(self) -> State:
        """See `Part.state`."""
        return self._sums

    def clear(self) -> None:
        """See `Part.clear`."""
        self._sums = {}

    def merge(self, state: State) -> None:
        """See `Part.merge`."""
        self.add(**state)
