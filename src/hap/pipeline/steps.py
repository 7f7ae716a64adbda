"""One count of steps over all stages of a run, for trackers."""

from __future__ import annotations

from collections.abc import Mapping

from hap.types import Log


class Steps:
    """Numbers of stages that each count their steps from 0, told to one `log` with steps that never go back.

    Trackers need that: Weights & Biases drops what comes with a smaller step than before.

    >>> steps = Steps(lambda values, step: print(step, values))
    >>> steps.stage("dense/")({"loss": 2.0}, 10)
    10 {'dense/loss': 2.0}
    >>> steps.stage()({"loss": 1.0}, 5)
    15 {'loss': 1.0}
    >>> steps.stage()({}, 100)  # a stage that was over before a kill tells how far it had come, and no more
    >>> steps.stage()({"loss": 0.5}, 1)
    116 {'loss': 0.5}
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._last = 0

    def stage(self, prefix: str = "") -> Log:
        """Takes the numbers of a stage that begins now; `prefix` is put before their names."""
        start = self._last

        def tell(values: Mapping[str, float], step: int) -> None:
            self._last = max(self._last, start + step)
            if values:
                self._log({f"{prefix}{name}": value for name, value in values.items()}, start + step)

        return tell
