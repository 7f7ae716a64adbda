"""Cutting batches so that what a backward pass needs fits into the memory that the caller allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils import _pytree as pytree

from hap import batches
from hap.errors import HapError

Cost = Callable[[batches.Batch], int]


class Pieces:
    """Cuts batches into pieces of at most `max_memory` bytes, by what one sample costs.

    One sample's cost is found once for each shape of sample.

    Args:
        cost: the bytes that a batch needs, taken to be proportional to its size.
        max_memory: None leaves batches whole.

    >>> pieces = Pieces(lambda batch: 10 * len(batch[0]), max_memory=25)
    >>> [len(x) for x, _ in pieces.of((torch.zeros(5, 2), None))]
    [2, 2, 1]
    """

    def __init__(self, cost: Cost, *, max_memory: int | None) -> None:
        self.cost = cost
        self.max_memory = max_memory
        self._found: dict[tuple[torch.Size, ...], int] = {}

    def of(self, batch: batches.Batch) -> Iterator[batches.Batch]:
        """The batch itself if it fits, else its pieces in order.

        Raises:
            HapError: one sample does not fit.
        """
        total = batches.size(batch)
        most = total if self.max_memory is None else self._most(batch, self.max_memory)
        if most >= total:
            yield batch
        else:
            yield from (batches.cut(batch, start, start + most) for start in range(0, total, most))

    def _most(self, batch: batches.Batch, max_memory: int) -> int:
        sample = batches.cut(batch, 0, 1)
        key = shapes(sample)
        if key not in self._found:
            self._found[key] = max(self.cost(sample), 1)
        if self._found[key] > max_memory:
            raise HapError(
                "one sample does not fit into max_memory",
                expected=f"max_memory >= {self._found[key]}: the bytes of one sample's activations",
                got=str(max_memory),
                remedy="allow more, or leave max_memory out to run batches whole",
            )
        return max_memory // self._found[key]


def shapes(sample: batches.Batch) -> tuple[torch.Size, ...]:
    """The shapes of all tensors."""
    return tuple(leaf.shape for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor))
