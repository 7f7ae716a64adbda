"""The learning rate over a training run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "step", "constant"]

MILESTONES = (0.5, 0.75)  # fractions of the run, as in HAP's fine-tuning
DECAY = 0.1


def factor(tick: int, total: int, schedule: Schedule = "cosine", warmup: float = 0.0) -> float:
    """What the base learning rate is multiplied by at `tick`, counted from 0, of `total`.

    First a straight line up over the fraction `warmup` of all ticks, never from 0; then, by `schedule`: half a
    cosine wave from 1 towards 0 over what is left (Loshchilov and Hutter 2017, without restarts), a tenth from
    each of the `MILESTONES` on, or 1.

    >>> [round(factor(tick, 4), 3) for tick in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    >>> [round(factor(tick, 4, "step"), 3) for tick in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    rising = round(warmup * total)
    if tick < rising:
        return (tick + 1) / (rising + 1)
    if schedule == "cosine":
        # The last call of a run asks for tick == total, and a loader's len() may be too small.
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (tick - rising) / max(1, total - rising))))
    if schedule == "step":
        return DECAY ** sum(tick >= milestone * total for milestone in MILESTONES)
    return 1.0
