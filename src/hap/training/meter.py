"""The mean loss of a pass over the data, without waiting for the device at every batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hap.errors import HapError


def length(batches: Iterable[Any] | None) -> int | None:
    """``len(batches)``, or None where it has none (generators, loaders of iterable data sets)."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


class Meter:
    """Collects one loss a batch; the mean is weighted by batch size.

    To read a value, the host must wait for the device, so losses are looked at only every `interval`
    batches, and by `mean`. A loss that is not finite is thus found late on a GPU, but always found.

    >>> meter = Meter("evaluation")
    >>> meter.add(torch.tensor(1.0), 3)
    >>> meter.add(torch.tensor(5.0), 1)
    >>> meter.mean(), meter.samples
    (2.0, 4)
    """

    interval = 50

    def __init__(self, where: str) -> None:
        self.where = where
        self._values: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._checked = 0

    @property
    def samples(self) -> int:
        """The number of examples so far."""
        return sum(self._sizes)

    def add(self, value: torch.Tensor, size: int) -> None:
        """Takes the mean loss of one batch of `size` examples.

        Raises:
            HapError: the loss is not a scalar tensor, or a value so far was not finite.
        """
        if not isinstance(value, torch.Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise HapError("the loss is not a scalar", expected="a tensor of shape ()", got=got)
        self._values.append(value.detach())
        self._sizes.append(size)
        free = value.device.type == "cpu"
        if free or len(self._values) - self._checked >= self.interval:
            self._check()

    def mean(self) -> float:
        """The mean over all examples so far, at least one, summed in float64.

        Raises:
            HapError: a value is not finite.
        """
        return self.total() / self.samples

    def total(self) -> float:
        """The sum over all examples so far, of the mean loss of each one's batch; 0 without examples.

        Raises:
            HapError: a value is not finite.
        """
        self._check()
        if not self._values:
            return 0.0
        values = torch.stack(self._values).cpu().double()
        return float(values @ torch.tensor(self._sizes, dtype=torch.float64))

    def recent(self) -> float:
        """The plain mean of the last `interval` batches' losses, at least one."""
        return float(torch.stack(self._values[-self.interval :]).double().mean())

    def state(self) -> tuple[torch.Tensor, list[int]]:
        """Losses and sizes of all batches so far."""
        return torch.stack(self._values) if self._values else torch.empty(0), list(self._sizes)

    def restore(self, values: torch.Tensor, sizes: list[int]) -> None:
        """Goes on from what `state` gave."""
        self._values, self._sizes, self._checked = list(values), list(sizes), len(sizes)

    def _check(self) -> None:
        if self._checked == len(self._values):
            return
        fresh = torch.stack(self._values[self._checked :]).tolist()
        for index, value in enumerate(fresh, start=self._checked + 1):
            if not abs(value) < float("inf"):
                raise HapError(
                    f"the loss is not finite at batch {index} of {self.where}",
                    expected="a finite number",
                    got=str(value),
                    remedy="check inputs and weights for NaN or overflow; in training, lower lr or clip the gradient",
                )
        self._checked = len(self._values)
