"""Several processes that measure together: whose batch it is, and how their sums become one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from hap import batches
from hap.curvature.sums import Part
from hap.errors import HapError


@dataclass(frozen=True)
class Processes:
    """The processes of a group, seen from one of them; one process alone by default.

    Attributes:
        rank: this process's place in the group.
        size: the number of processes.
        group: of `torch.distributed`; None for the default group.
        device: where tensors must be to be sent.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = torch.device("cpu")

    @staticmethod
    def of(group: Any, model: nn.Module) -> Processes:
        """The processes of a group (None: the default one), or this one alone if `torch.distributed` is not set up.

        Raises:
            HapError: this process is not in the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        rank = dist.get_rank(group)
        if rank < 0:
            raise HapError(
                "this process is not in the group",
                expected="measure called by the processes of the group, all of them, and by no other",
                got=f"rank {dist.get_rank()} of the default group",
                remedy="call it where dist.get_rank(group) >= 0",
            )
        on_model = dist.get_backend(group) == "nccl"
        device = batches.device_of(model) if on_model else torch.device("cpu")
        return Processes(rank, dist.get_world_size(group), group, device)

    def mine(self, number: int) -> bool:
        """Whether a batch is this process's to compute."""
        return number % self.size == self.rank

    def file(self, path: Path) -> Path:
        """This process's own file: the one named, where there is but one process.

        >>> Processes(1, 4).file(Path("run.state")).name
        'run.state.1-of-4'
        """
        return path if self.size == 1 else path.with_name(f"{path.name}.{self.rank}-of-{self.size}")

    def add_up(self, parts: Sequence[Part], read: tuple[object, ...]) -> None:
        """Give every part, on every process, the sum over all processes, added in the order of ranks.

        All processes add the same numbers in the same order on the CPU, and so hold the same bits. One process's sums
        are sent at a time: none holds more than two sums of a kind.

        Args:
            read: what this process has read; must be the same for all.

        Raises:
            HapError: another process failed, or has read other data.
        """
        if self.size == 1:
            return
        states = [part.state() for part in parts]
        shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} for state in states]
        found = self._given((read, shapes))
        if any(item[0] != read for item in found):
            raise HapError(
                "the processes have read different data",
                expected="the same batches in the same order on every rank, of which each computes its share",
                got="other batches on " + ", ".join(f"rank {r}" for r, x in enumerate(found) if x[0] != found[0][0]),
                remedy="leave out DistributedSampler, and shuffle with the same seed on every rank or not at all",
            )
        for part in parts:
            part.clear()
        for rank, (_, theirs) in enumerate(found):
            for part, state, kinds in zip(parts, states, theirs, strict=True):
                sent = {
                    name: self._sent(rank, state[name] if rank == self.rank else torch.empty(shape, dtype=dtype))
                    for name, (shape, dtype) in kinds.items()
                }
                part.merge(sent)

    def furthest(self, part: Part, count: int) -> int:
        """Give every process the part of the one that has come furthest, by its count, and that count.

        Raises:
            HapError: another process failed.
        """
        if self.size == 1:
            return count
        counts = self._given(count)
        if self.rank != counts.index(max(counts)):
            part.clear()
        self.add_up([part], ())
        return int(max(counts))

    def fail(self) -> None:
        """Tell the others, which wait for this process or will, that this process has nothing to give."""
        if self.size > 1:
            self._exchange(None)

    def _given(self, item: object) -> list[Any]:
        """What each process gives; raises a HapError if one has failed."""
        found = self._exchange(item)
        failed = [rank for rank, item in enumerate(found) if item is None]
        if failed:
            raise HapError(
                f"measuring failed on rank {failed[0]} of {self.size}",
                expected="all processes to finish their share of the batches",
                got=f"an error on {len(failed)} of them",
                remedy="see the error that rank raised",
            )
        return found

    def _exchange(self, item: object) -> list[Any]:
        found: list[Any] = [None] * self.size
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with current:  # objects are sent from the current device
            dist.all_gather_object(found, item, group=self.group)
        return found

    def _sent(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device).contiguous()
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        dist.broadcast(tensor, src=source, group=self.group)
        return tensor.cpu()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`, whose names are those of the structure; any other as it is."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
