"""How long models take, measured in turns so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hap.batches import device_of, evaluating


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one forward pass over `runs` runs.

    Attributes:
        median: the median.
        low, high: the quartiles: half of the runs lie between them.
        ratio: median over the runs of this model's time / the first model's time in the same turn.
        runs: number of timed runs.
    """

    median: float
    low: float
    high: float
    ratio: float
    runs: int


def measure_latency(
    models: Mapping[str, nn.Module], args: tuple[Any, ...], *, runs: int = 30, warmup: int = 5
) -> dict[str, Latency]:
    """Times each model's forward pass on the same inputs, the models taking turns.

    Args:
        models: name -> model, all on the device of `args`; in evaluation mode while timed.
        args: positional inputs.
        runs: timed turns, at least 2.
        warmup: turns before the first timed one.

    Returns:
        For each name its `Latency`.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + runs):
        for name, model in models.items():
            with evaluating(model), torch.inference_mode():
                elapsed = _time(model, args)
            if turn >= warmup:
                times[name].append(elapsed)
    first = next(iter(times.values()))
    return {name: _summary(found, first) for name, found in times.items()}


def _time(model: nn.Module, args: tuple[Any, ...]) -> float:
    cuda = device_of(model).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(*args)
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _summary(times: list[float], reference: list[float]) -> Latency:
    low, median, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(t / r for t, r in zip(times, reference, strict=True))
    return Latency(median, low, high, ratio, len(times))
