"""Processor time of models that take turns: what others do on the machine does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

WARMUP, LEAST, MOST = 3, 7, 200  # untimed turns, and the bounds on timed ones


def ratios(models: Mapping[str, nn.Module], x: torch.Tensor, *, seconds: float) -> dict[str, float]:
    """For each model its processor time / the first one's in the same turn, the median over turns.

    On one thread this is the time that the model takes on a machine of its own.
    """
    assert torch.get_num_threads() == 1, "processor time is the time taken on one thread only"
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        for turn in range(-WARMUP, MOST):
            if turn >= LEAST and time.perf_counter() > end:
                break
            for name, model in models.items():
                start = time.process_time()
                model(x)
                if turn >= 0:
                    times[name].append(time.process_time() - start)
    first = next(iter(times.values()))
    return {name: statistics.median(a / b for a, b in zip(found, first, strict=True)) for name, found in times.items()}
