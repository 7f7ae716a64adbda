"""What one line of the support matrix is: a model with inputs, made on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Example:
    """A model with random weights, and inputs for it; the first axis of each is a batch of two."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One line of the matrix.

    Attributes:
        group: the table that it stands in.
        name: unique in its group.
        needs: the package that must be installed.
        make: builds it, small where the architecture allows that; downloads nothing.
    """

    group: str
    name: str
    needs: str
    make: Callable[[], Example]

    @property
    def key(self) -> str:
        """Its name in the raw results: ``group/name``."""
        return f"{self.group}/{self.name}"
