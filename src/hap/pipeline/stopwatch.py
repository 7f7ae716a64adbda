"""The seconds of each stage, also of a run that was killed and goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from hap.files import write_json
from hap.pipeline.together import is_first

logger = logging.getLogger(__name__)
FILE = "seconds.json"

Timed = Callable[[str], AbstractContextManager[None]]  # what a stage runs in, by its name


def untimed(stage: str) -> AbstractContextManager[None]:
    """The default `Timed`: times nothing."""
    return nullcontext()


class Stopwatch:
    """Times the stages of all rounds, and keeps the times in each round's folder.

    A stage that is taken from the state of a run before is over at once: then the longer time counts, which it took.
    Of a stage that a kill cut off, what had been done is not counted.

    Args:
        folder: of a round, by its number; None keeps nothing.
    """

    def __init__(self, folder: Callable[[int], Path] | None) -> None:
        self._folder = folder
        self._now: dict[int, dict[str, float]] = {}
        self._before: dict[int, dict[str, float]] = {}

    @contextmanager
    def __call__(self, stage: str, number: int = 0) -> Iterator[None]:
        """Times a part of a stage in round `number`, counted from 1; 0 is after all rounds."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        logger.info("%s took %.1f s", stage, spent)
        self.at_least(stage, number, self._now.get(number, {}).get(stage, 0.0) + spent)

    def at_least(self, stage: str, number: int, spent: float) -> None:
        """So many seconds, at least, were spent on a stage."""
        path = self._folder(number) / FILE if self._folder is not None and number else None
        if number not in self._before:
            there = path is not None and path.exists()
            self._before[number] = json.loads(path.read_text(encoding="utf-8")) if path is not None and there else {}
        mine = self._now.setdefault(number, {})
        mine[stage] = max(spent, mine.get(stage, 0.0))
        if path is not None and is_first():
            write_json(path, self._longest(number))

    def seconds(self, others: Mapping[str, float]) -> dict[str, float]:
        """By stage, all rounds together; after the seconds of other stages."""
        found = dict(others)
        for number in self._now:
            for stage, spent in self._longest(number).items():
                found[stage] = found.get(stage, 0.0) + spent
        return found

    def _longest(self, number: int) -> dict[str, float]:
        now, before = self._now[number], self._before[number]
        return {stage: max(now.get(stage, 0.0), before.get(stage, 0.0)) for stage in {**before, **now}}
