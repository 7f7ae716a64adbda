"""Where each sample's part lies in what a module reads or puts out."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The axis along which the samples lie, each with the same number of rows.

    Attributes:
        axis: of the tensor, as it is.
        inner: each sample's rows are apart, those of different samples side by side.
    """

    axis: int = 0
    inner: bool = False

    def fit(self, values: torch.Tensor, samples: int) -> bool:
        """Whether the axis can hold so many samples."""
        return self.axis < values.ndim and values.shape[self.axis] % samples == 0

    def first(self, values: torch.Tensor, samples: int) -> torch.Tensor:
        """The samples on an axis of their own, before all others: one axis more than `values`."""
        count = values.shape[self.axis] // samples
        sizes = (count, samples) if self.inner else (samples, count)
        return values.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)
