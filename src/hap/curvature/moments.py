"""Running mean over samples, and its standard error."""

from __future__ import annotations

import torch

from hap.curvature.sums import State


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
        self.clear()

    def clear(self) -> None:
        """See `Part.clear`."""
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
        self._move(rows)
        mean = rows.sum(0) / max(total, 1.0)
        merged = self.mean + (mean - self.mean) * (total / max(self.terms + total, 1.0))
        step = self.mean - merged
        rest = rows - merged * weights
        squares, cross = _centred(self._squares, self._cross, self._weights, step)
        self._squares = squares + rest.square().sum(0)
        self._cross = cross + (rest * weights).sum(0)
        self._weights = self._weights + weights.square().sum()
        self.mean = merged
        self.count += len(rows)
        self.terms += total

    def state(self) -> State:
        """See `Part.state`."""
        if not self.count:
            return {}
        numbers = torch.tensor([self.count, self.terms], dtype=torch.float64)
        sums = {"squares": self._squares, "cross": self._cross, "weights": self._weights}
        return {"numbers": numbers, "mean": self.mean, **sums}

    def merge(self, state: State) -> None:
        """See `Part.merge`. As `add`, from what another has kept of its rows in place of the rows."""
        if not state:
            return
        count, terms = state["numbers"].tolist()
        self._move(state["mean"])
        merged = self.mean + (state["mean"] - self.mean) * (terms / max(self.terms + terms, 1.0))
        own = _centred(self._squares, self._cross, self._weights, self.mean - merged)
        theirs = _centred(state["squares"], state["cross"], state["weights"], state["mean"] - merged)
        self._squares, self._cross = own[0] + theirs[0], own[1] + theirs[1]
        self._weights = self._weights + state["weights"]
        self.mean = merged
        self.count += int(count)
        self.terms += terms

    def _move(self, like: torch.Tensor) -> None:
        """What was merged from elsewhere may be on another device than the rows."""
        self.mean, self._squares = self.mean.to(like), self._squares.to(like)
        self._cross, self._weights = self._cross.to(like), self._weights.to(like)

    def stderr(self) -> torch.Tensor:
        """Standard error of the mean; NaN for a single row."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self._squares * (self.count / (self.count - 1))).sqrt() / self.terms


def _centred(
    squares: torch.Tensor, cross: torch.Tensor, weights: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of e^2 and e w, when the mean that they are centred on moves down by `step`."""
    return squares + 2 * step * cross + step.square() * weights, cross + step * weights
