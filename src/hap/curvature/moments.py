"""Running mean over samples, and its standard error."""

from __future__ import annotations

import torch


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on their own device where it has that type, else on the CPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class Moments:
    """Mean and standard error of the mean of rows that come in batches; never holds more than one batch.

    Each row may be the sum of several terms (the tokens of a text): the mean is then over all terms, ``sum q / sum w``
    with w the rows' numbers of terms, and the standard error is that of a ratio of sums over independent samples
    (Cochran 1977, section 2.11): ``sum (q - mean w)^2 N / (N - 1) / (sum w)^2``.

    Chan, Golub and LeVeque (1979): batches are merged by their means and centred sums of squares, which does not
    cancel as a difference of raw sums would. In float64, on the rows' device (on the CPU where it has no float64).

    Attributes:
        count: number of rows.
        terms: number of terms.
        mean: sum of the rows over `terms`.

    >>> m = Moments()
    >>> m.add(torch.tensor([[1.0], [2.0]]))
    >>> m.add(torch.tensor([[6.0]]))
    >>> m.mean.item(), round(m.stderr().item(), 4)
    (3.0, 1.5275)
    >>> m.add(torch.tensor([[7.0]]), torch.tensor([5.0]))
    >>> m.mean.item()
    2.0
    """

    def __init__(self) -> None:
        self.count = 0
        self.terms = 0.0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())  # sum of e^2, e w and w^2, with e = q - mean w
        self._cross = torch.zeros(())
        self._weights = torch.zeros(())

    def add(self, rows: torch.Tensor, terms: torch.Tensor | None = None) -> None:
        """Merge rows of shape (samples, quantities), with their numbers of terms (samples,); None: one each."""
        rows = in_float64(rows)
        weights = (rows.new_ones(len(rows)) if terms is None else terms.to(rows)).unsqueeze(1)
        total = float(weights.sum())
        mean = rows.sum(0) / max(total, 1.0)
        merged = self.mean + (mean - self.mean) * (total / max(self.terms + total, 1.0))
        step = self.mean - merged
        rest = rows - merged * weights
        # Centred on the merged mean, what is there already changes by what its own mean moved.
        self._squares = self._squares + 2 * step * self._cross + step.square() * self._weights + rest.square().sum(0)
        self._cross = self._cross + step * self._weights + (rest * weights).sum(0)
        self._weights = self._weights + weights.square().sum()
        self.mean = merged
        self.count += len(rows)
        self.terms += total

    def stderr(self) -> torch.Tensor:
        """Standard error of the mean; NaN for a single row."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self._squares * (self.count / (self.count - 1))).sqrt() / self.terms
