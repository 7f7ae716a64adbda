"""Torch's random states, and those of the training data: taken, and set again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hap.errors import HapError


def gpus_of(model: nn.Module) -> list[int]:
    """The indices of the GPUs that a model is on."""
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seeds torch's generators for the CPU and the model's GPUs, and gives them back their own states afterwards."""
    devices = gpus_of(model)
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@dataclass(frozen=True)
class Randomness:
    """The states of torch's generators and of the data's own, where they have one.

    Attributes:
        states: of the CPU, of each of the model's GPUs, and last of the data's generators.
        data: what the data's ``state_dict()`` says: how many epochs they have given out, say.
    """

    states: tuple[torch.Tensor, ...]
    data: Any = None

    @staticmethod
    def now(model: nn.Module, batches: Any) -> Randomness:
        """The present state. `batches` may have generators, as a `DataLoader` has, and a ``state_dict()``."""
        gpus = [torch.cuda.get_rng_state(index) for index in gpus_of(model)]
        own = [generator.get_state() for generator in _generators(batches)]
        return Randomness((torch.get_rng_state(), *gpus, *own), _data_state(batches))

    def set(self, model: nn.Module, batches: Any) -> None:
        """Makes it the present state again.

        Raises:
            HapError: the data has another number of generators.
        """
        cpu, *rest = self.states
        gpus = gpus_of(model)
        torch.set_rng_state(cpu)
        for index, state in zip(gpus, rest, strict=False):
            torch.cuda.set_rng_state(state, index)
        generators, states = _generators(batches), rest[len(gpus) :]
        if len(generators) != len(states):
            raise HapError(
                "the data, or the device, does not fit what is resumed",
                expected=f"{len(self.states)} random generators of CPU, GPUs and data, as there were when it was saved",
                got=f"{1 + len(gpus) + len(generators)}",
                remedy="give the data as it was, on the same kind of device, or begin anew",
            )
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if self.data is not None:
            getattr(batches, "base_dataloader", batches).load_state_dict(self.data)


def _generators(batches: Any) -> list[torch.Generator]:
    """A loader's own, and those of what draws its examples; each once."""
    sampler, groups = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    holders = (batches, sampler, groups, getattr(groups, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _data_state(batches: Any) -> Any:
    batches = getattr(batches, "base_dataloader", batches)  # Accelerate's have these methods, but not for every loader
    take, give = (getattr(batches, name, None) for name in ("state_dict", "load_state_dict"))
    return take() if take is not None and give is not None else None
