"""Progress in plain lines, for logs and pipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Loop:
    what: str
    total: int | None
    done: int = 0

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.what}: {self.done}" if self.done else self.what
        return f"{self.what}: {self.done} of {self.total}" if self.total > 1 else self.what


class Lines:
    """A `hap.types.Progress` that writes a line when a loop begins, and every now and then while none does.

    Args:
        write: takes a line.
        every: seconds after which a line comes whatever happens.
        apart: seconds between two lines at least; up to `every` in a long run.
        clock: tells the seconds since some moment.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        every: float = 30.0,
        apart: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._apart = write, every, apart
        self._loops: tuple[_Loop, ...] = ()
        self._shown: _Loop | None = None
        self._clock, self._start = clock, clock()
        self._last = -every
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Lines:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        loop = _Loop(description, total)
        self._loops += (loop,)
        self._tell()
        try:
            for item in items:
                yield item
                loop.done += 1
        finally:
            self._loops = tuple(other for other in self._loops if other is not loop)

    def _watch(self) -> None:
        """In a thread of its own, since one step of a loop may take minutes."""
        while not self._ended.wait(min(1.0, self._apart)):
            self._tell()

    def _tell(self) -> None:
        """Writes how far the loops are, if it is time."""
        with self._lock:
            loops, spent = self._loops, self._clock() - self._start
            if not loops:
                return
            news = loops[-1] is not self._shown
            apart = min(self._every, max(self._apart, spent / 20)) if news else self._every
            if spent - self._last >= apart:
                self._last, self._shown = spent, loops[-1]
                self._write(f"[{int(spent) // 60:3d}:{int(spent) % 60:02d}] {', '.join(map(str, loops))}")
