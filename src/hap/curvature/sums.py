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


class Rows:
    """One row for each batch, with its number of examples, in the batches' order whoever computed them.

    >>> rows = Rows()
    >>> rows.add(1, 4, torch.tensor([7.0]))
    >>> rows.add(0, 5, torch.tensor([6.0]))
    >>> [column.tolist() for column in rows.sorted()]
    [[[5.0], [4.0]], [[6.0], [7.0]]]
    """

    def __init__(self) -> None:
        self.clear()

    def add(self, number: int, count: int, row: torch.Tensor) -> None:
        """The row (quantities,) of batch `number`, which has `count` examples."""
        self._rows[number] = (float(count), row.cpu().double())

    def sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batches' numbers of examples, (batches, 1), and their rows, (batches, quantities)."""
        counts, rows = zip(*(self._rows[number] for number in sorted(self._rows)), strict=True)
        return torch.tensor(counts, dtype=torch.float64).unsqueeze(1), torch.stack(rows)

    def state(self) -> State:
        """See `Part.state`."""
        if not self._rows:
            return {}
        counts, rows = self.sorted()
        return {"numbers": torch.tensor(sorted(self._rows)), "counts": counts.squeeze(1), "rows": rows}

    def clear(self) -> None:
        """See `Part.clear`."""
        self._rows: dict[int, tuple[float, torch.Tensor]] = {}

    def merge(self, state: State) -> None:
        """See `Part.merge`."""
        if state:
            for number, count, row in zip(state["numbers"], state["counts"], state["rows"], strict=True):
                self.add(int(number), int(count), row)
