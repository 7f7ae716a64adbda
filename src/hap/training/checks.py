"""What `finetune` refuses before it changes anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from hap.errors import HapError, unknown
from hap.training.weights import trainable

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("a whole number, 0 or more", lambda v: isinstance(v, int) and v >= 0),
    "lr": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "momentum": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "weight_decay": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
    "warmup": ("a fraction of the run in [0, 1)", lambda v: 0 <= v < 1),
    "ema": ("None, or a decay in (0, 1), for example 0.999", lambda v: v is None or 0 < v < 1),
    "accumulate": ("a whole number, 1 or more", lambda v: isinstance(v, int) and v >= 1),
    "label_smoothing": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "distill": ("a weight in [0, 1]", lambda v: 0 <= v <= 1),
    "temperature": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "clip": ("None, or a norm above 0", lambda v: v is None or v > 0),
}


def check_numbers(**values: float | None) -> None:
    """Refuses options out of range, by the name that they have in `finetune`."""
    for name, value in values.items():
        expected, holds = _RANGES[name]
        if not holds(value):
            raise HapError(f"{name} is out of range", expected=expected, got=repr(value))


def check_names(*choices: tuple[str, str, tuple[str, ...]]) -> None:
    """Refuses names that are not known; each choice is what it is, the name, and the known names."""
    for kind, name, known in choices:
        if name not in known:
            raise unknown(kind, name, known)


def check_reads(name: str, batches: Iterable[Any] | None, reads: int) -> None:
    """Refuses an iterator, which can be read once, where more is needed."""
    if reads > 1 and isinstance(batches, Iterator):
        raise HapError(
            f"{name} can be read only once, and {reads} times are needed",
            expected="a list or a DataLoader, which start anew each time",
            got=type(batches).__name__,
            remedy=f"{name}=list({name}), if it fits into memory",
        )


def check_trainable(model: nn.Module) -> None:
    """Refuses a model in which nothing can be trained."""
    if not trainable(model):
        raise HapError(
            "the model has nothing to train",
            expected="at least one parameter with requires_grad",
            got=f"{sum(1 for _ in model.parameters())} parameters, none trainable",
            remedy="model.requires_grad_(True)",
        )
