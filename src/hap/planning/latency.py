"""How long models take, measured in turns so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hap.batches import device_of, evaluating
from hap.errors import HapError

WARMUP, LEAST = 3, 5  # untimed turns, and the fewest timed ones


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one forward pass over `runs` runs.

    Attributes:
        median: the median.
        low, high: the quartiles: half of the runs lie between them.
        ratio: median over the runs of this model's time / the first model's time in the same turn.
        runs: number of timed runs.
        least: the fastest: other work on the machine only ever adds to a time.
    """

    median: float
    low: float
    high: float
    ratio: float
    runs: int
    least: float


def measure_latency(
    models: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    runs: int = 50,
    seconds: float = 5.0,
) -> dict[str, Latency]:
    """Times each model's forward pass on the same inputs, the models taking turns.

    Args:
        models: name -> model, all on the device of `args`; in evaluation mode while timed.
        args, kwargs: the inputs.
        runs: timed turns at most, after some untimed ones to warm up.
        seconds: no new turn starts after so long, but at least 5 are timed.

    Returns:
        For each name its `Latency`.

    Raises:
        HapError: there is no model, or there are fewer than 2 runs.
    """
    if runs < 2 or not models:
        raise HapError(
            "there is too little to time",
            expected="at least one model and 2 runs",
            got=f"{len(models)} models, {runs} runs",
        )
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    for turn in range(-WARMUP, runs):
        if turn >= LEAST and time.perf_counter() > end:
            break
        for name, model in models.items():
            with evaluating(model), torch.inference_mode():
                elapsed = _time(model, args, kwargs or {})
            if turn >= 0:
                times[name].append(elapsed)
    first = next(iter(times.values()))
    return {name: _summary(found, first) for name, found in times.items()}


def _time(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    device = device_of(model)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    model(*args, **kwargs)
    wait()
    return 1000 * (time.perf_counter() - start)


def _summary(times: list[float], reference: list[float]) -> Latency:
    low, median, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(t / r for t, r in zip(times, reference, strict=True))
    return Latency(median, low, high, ratio, len(times), min(times))
