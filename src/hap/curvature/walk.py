"""The one loop over batches: each process walks its share of them, and may be stopped on the way and go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from hap import batches
from hap.curvature.processes import Processes
from hap.curvature.saved import Saved, digest
from hap.curvature.sums import Part

Skipped = Callable[[int, batches.Batch, bool], None]


class Walk:
    """How a measurement goes through its batches.

    Args:
        processes: those that share the work.
        saved: where to keep what has been added up so far; None to keep nothing.
    """

    def __init__(self, processes: Processes | None = None, saved: Saved | None = None) -> None:
        self.processes = processes or Processes()
        self.saved = saved
        self._under_way = self._in_chunks = False

    def over(
        self,
        taken: Iterable[batches.Batch],
        parts: Sequence[Part],
        generators: Sequence[torch.Generator] = (),
        skipped: Skipped | None = None,
    ) -> Iterator[tuple[int, batches.Batch]]:
        """The batches that are this process's to compute, with their numbers among all batches.

        Rank r of W computes batches r, r + W, ... . When the loop ends, the parts hold the sums over all batches, the
        same bits on every process. A part may change only between one batch and the next.

        Args:
            parts: what the loop adds up; empty at the start.
            generators: those whose state runs on from batch to batch.
            skipped: called with (number, batch, done) in place of each batch that is not given out: done, if the state
                that was saved has it already; else it is another process's, and `generators` have to be moved on.

        Raises:
            HapError: what is saved is of another run; another process failed or has read other data.
        """
        self._under_way = True
        start, begun_with = self.saved.restore(parts, generators) if self.saved else (0, "")
        count, first = 0, ""
        for number, batch in enumerate(taken):
            if not number and (self.saved or self.processes.size > 1):
                first = digest(batch)
            if not number and self.saved:
                self.saved.need_first(first, begun_with)
            done = number < start
            if self.processes.mine(number) and not done:
                yield number, batch
            elif skipped is not None:
                skipped(number, batch, done)
            count = number + 1
            if self.saved and not done:
                self.saved.save(count, first, parts, generators)
        if self.saved:
            self.saved.need_count(count, start)
        self._under_way = False
        self.processes.add_up(parts, (count, first))
        self._under_way = self._in_chunks

    def resume(self, before: Part, first: Callable[[], batches.Batch]) -> int:
        """Before data is read in chunks, each by `over`: fills an empty part with what those came to that are done.

        Every process gets what the one that came furthest had saved.

        Args:
            first: gives the first batch of all.

        Returns:
            How many chunks that were.

        Raises:
            HapError: as `over` does.
        """
        self._under_way = True
        if self.saved:
            self.saved.restore_before(before, digest(first()))
        self._under_way = False
        done = self.processes.furthest(before, self.saved.chunk if self.saved else 0)
        self._under_way = self._in_chunks = True
        self.next(done)
        return done

    def next(self, chunk: int) -> None:
        """The chunk of this number comes now."""
        if self.saved:
            self.saved.next(chunk)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error in the midst of the walk is told to the other processes, which would wait for ever."""
        try:
            yield
        except Exception:
            if self._under_way:
                self._under_way = False
                self.processes.fail()
            raise
