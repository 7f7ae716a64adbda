"""Running mean and variance over samples."""

from __future__ import annotations

import torch


class Moments:
    """Mean and standard error of the mean of rows that come in batches; never holds more than one batch.

    Chan, Golub and LeVeque (1979): batches are merged by their means and centred sums of squares, which does not
    cancel as a difference of raw sums would. In float64, on the rows' device (on the CPU where it has no float64).

    >>> m = Moments()
    >>> m.add(torch.tensor([[1.0], [2.0]]))
    >>> m.add(torch.tensor([[6.0]]))
    >>> m.mean.item(), round(m.stderr().item(), 4)
    (3.0, 1.5275)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, rows: torch.Tensor) -> None:
        """Merge rows of shape (samples, quantities)."""
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if not self.count:
            self.count, self.mean, self._squares = len(rows), mean, squares
            return
        total = self.count + len(rows)
        shift = mean - self.mean
        self._squares = self._squares + squares + shift.square() * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    def stderr(self) -> torch.Tensor:
        """Standard error of the mean; NaN (0 / 0) for a single row."""
        return (self._squares / (self.count - 1) / self.count).sqrt()
