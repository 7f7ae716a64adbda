"""Several processes that run the pipeline together: what only one of them may decide or do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")


def several() -> bool:
    """Whether `torch.distributed` is set up, for more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not several() or dist.get_rank() == 0


def by_the_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; the others wait, and do not work.

    An error is the first process's alone: whoever started the processes ends the others with it.
    """
    if not several():
        return work()
    held = [work() if is_first() else None]
    dist.broadcast_object_list(held, 0)
    found: T = held[0]  # type: ignore[assignment]  # the first has put it there
    return found
