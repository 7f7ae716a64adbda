"""The Gram matrix of rows that come in batches: F = S'S, for all units at once."""

from __future__ import annotations

import torch

from hap.curvature.moments import in_float64
from hap.curvature.sums import State

_WIDTH = 2048  # columns of a block where memory is not limited


class Gram:
    """Adds up ``S'S`` in float64, block by block, for rows S of shape (samples, columns).

    Besides the result it needs two blocks of S in float64 and one block of the product at a time. The matrix is
    symmetric: only the blocks on and above the diagonal are computed.

    Args:
        size: number of columns.
        max_memory: bytes that may be used besides the rows and the result; None for blocks of a fixed width.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0]]))
    >>> gram.add(torch.tensor([[0.0, 1.0]]))
    >>> gram.total().tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, size: int, *, max_memory: int | None = None) -> None:
        self.size = size
        self.max_memory = max_memory
        self.clear()

    def clear(self) -> None:
        """See `Part.clear`."""
        self._sum = torch.zeros(0)

    def state(self) -> State:
        """See `Part.state`."""
        return {"sum": self._sum} if self._sum.numel() else {}

    def merge(self, state: State) -> None:
        """See `Part.merge`."""
        if state:
            self._sum = self._sum.cpu().add_(state["sum"]) if self._sum.numel() else state["sum"]

    def add(self, rows: torch.Tensor) -> None:
        """Add the rows' products."""
        device = torch.device("cpu") if rows.device.type == "mps" else rows.device
        if not self._sum.numel():
            self._sum = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        self._sum = self._sum.to(device)  # what was merged is on the CPU
        width = self._width(len(rows))
        starts = range(0, self.size, width)
        for i in starts:
            left = in_float64(rows[:, i : i + width])
            for j in starts[i // width :]:
                right = left if i == j else in_float64(rows[:, j : j + width])
                self._sum[i : i + width, j : j + width].addmm_(left.T, right)

    def total(self) -> torch.Tensor:
        """The sum so far: (size, size), float64 on the CPU."""
        for i in range(1, self.size):
            self._sum[i, :i] = self._sum[:i, i]
        return self._sum.cpu()

    def _width(self, samples: int) -> int:
        """The widest block w whose two blocks of rows and one of products, ``8 (2 samples w + w^2)`` bytes, fit."""
        if self.max_memory is None:
            return _WIDTH
        return max(1, int((samples**2 + self.max_memory / 8) ** 0.5 - samples))
