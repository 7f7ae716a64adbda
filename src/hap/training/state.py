"""Everything that a run must have back to go on to the same bits, as tensors by name and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hap.batches import device_of
from hap.training.history import History
from hap.training.loop import Loop
from hap.training.meter import Meter
from hap.training.randomness import Randomness
from hap.training.sharded import like, local
from hap.training.weights import Snapshot, changing

Tensors = dict[str, torch.Tensor]


@dataclass
class Progressed:
    """How far a run is.

    Attributes:
        history: of the epochs that are complete.
        began: the random states when the running epoch began.
        meter: the running epoch's losses.
        steps: of the optimizer, in all.
        batches: that this process has taken of the running epoch.
        lr: of its first step.
        seconds: spent on it.
        first: the `digest` of its first batch, once that has been read, if states are saved.
    """

    history: History
    began: Randomness
    meter: Meter
    steps: int = 0
    batches: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    first: str = ""


def packed(at: Progressed, model: nn.Module, loop: Loop, kept: Snapshot) -> tuple[Tensors, dict[str, Any]]:
    """The state of a run between two steps, with the present random states."""
    losses, sizes = at.meter.state()
    now = Randomness.now(model, loop.batches)
    average = loop.average.average if loop.average is not None else []
    tensors = {
        **_under("model", changing(model)),
        **_under("kept", kept.copies),
        **_under("average", dict(enumerate(average))),
        **_under("optimizer", _optimizer(loop.optimizer)),
        **_under("began", dict(enumerate(at.began.states))),
        **_under("now", dict(enumerate(now.states))),
        "losses": losses,
    }
    about = {
        "history": at.history.to_dict(),
        "data": at.began.data,
        "sizes": sizes,
        "scheduler": loop.scheduler.state_dict(),
        "scaler": loop.devices.scaler.state_dict(),
        **{name: getattr(at, name) for name in _PLAIN},
    }
    return tensors, about


_PLAIN = ("steps", "batches", "lr", "seconds", "first")


def unpack_(tensors: Tensors, about: Mapping[str, Any], model: nn.Module, loop: Loop) -> tuple[Progressed, Randomness]:
    """Sets model, average, optimizer and scheduler to a saved state; returns how far it is, and its random states."""
    for name, tensor in changing(model).items():
        saved = tensors.get(f"model.{name}")
        if saved is not None and saved.shape == tensor.shape:  # else a cache that the forward pass has grown
            tensor.copy_(saved)
    for number, tensor in enumerate(loop.average.average if loop.average is not None else ()):
        tensor.copy_(tensors[f"average.{number}"])
    loop.scheduler.load_state_dict(dict(about["scheduler"]))
    _load_optimizer_(loop.optimizer, _of("optimizer", tensors), loop.scheduler.get_last_lr())
    loop.devices.scaler.load_state_dict(about["scaler"])
    meter = Meter("")
    meter.restore(tensors["losses"].to(device_of(model)), about["sizes"])
    began = Randomness(_states("began", tensors), about["data"])
    plain = {name: about[name] for name in _PLAIN}
    at = Progressed(History.from_dict(about["history"]), began, meter, **plain)
    return at, Randomness(_states("now", tensors))


def unpacked_best(tensors: Tensors, model: nn.Module) -> Snapshot:
    """The best weights of a saved state."""
    live = changing(model)
    return Snapshot(model, {name: t.to(live[name].device) for name, t in _of("kept", tensors).items() if name in live})


def _under(prefix: str, tensors: Mapping[Any, torch.Tensor]) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _of(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _states(prefix: str, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    found = _of(prefix, tensors)
    return tuple(found[str(number)] for number in range(len(found)))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Its moments, by the number of the parameter and their name."""
    return {
        f"{number}.{name}": local(value)
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _load_optimizer_(optimizer: torch.optim.Optimizer, tensors: Tensors, lrs: list[Any]) -> None:
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        # Moments lie in memory as their parameter does: the fused kernels read them side by side.
        alike = value.shape == local(parameter).shape
        state.setdefault(int(number), {})[name] = like(value, parameter.detach()) if alike and value.ndim else value
    groups = [{**group, "lr": lr} for group, lr in zip(optimizer.state_dict()["param_groups"], lrs, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
