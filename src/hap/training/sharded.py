"""Models whose weights are cut into shards, one for each process (FSDP2).

Every parameter is then a `DTensor`; all that is done element by element (averages, copies, files) is done to the
part that this process holds.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from hap.errors import HapError

# Whoever cuts a model has imported these; the library does not, since they take half a second.
TENSORS, MODULES = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether it is a `DTensor`."""
    known = sys.modules.get(TENSORS)
    return known is not None and isinstance(tensor, known.DTensor)


def local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor, with the same memory; a tensor that is not cut is its own part."""
    return tensor.to_local() if is_cut(tensor) else tensor


def like(part: torch.Tensor, whole: Any) -> torch.Tensor:
    """This process's part as a tensor of `whole`'s kind, device and order in memory."""
    own = torch.empty_like(local(whole), dtype=part.dtype).copy_(part)
    if not is_cut(whole):
        return own
    size = {"shape": whole.shape, "stride": whole.stride()}  # parts may differ in length
    return sys.modules[TENSORS].DTensor.from_local(own, whole.device_mesh, whole.placements, **size)


def shards(accelerator: Any, model: nn.Module) -> nn.Module:
    """What the accelerator may cut: a copy of the model under FSDP2, else the model itself.

    Raises:
        HapError: the accelerator is set up for another way of cutting models.
    """
    kind = str(getattr(accelerator, "distributed_type", "NO")).rpartition(".")[2]
    if kind in ("NO", "MULTI_CPU") or kind.startswith("MULTI_"):
        return model
    if kind == "FSDP" and accelerator.is_fsdp2:
        return copy.deepcopy(model)
    raise HapError(
        "this way of cutting a model is not supported",
        expected="several processes (DDP), or FSDP with version 2",
        got=kind if kind != "FSDP" else "FSDP with version 1",
        remedy="accelerate launch --use_fsdp --fsdp_version 2",
    )


def reshard_(placed: nn.Module) -> None:
    """Lets go of the weights that a forward pass without a backward pass has gathered: the next must gather anew."""
    known = sys.modules.get(MODULES)
    for module in placed.modules():
        if known is not None and isinstance(module, known.FSDPModule):
            module.reshard()


@torch.no_grad()
def write_whole_(placed: nn.Module, model: nn.Module) -> None:
    """Gathers the shards into the caller's model; every process must call it."""
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    held: Any
    for name, held in (*placed.named_parameters(), *placed.named_buffers()):
        whole = held.full_tensor() if is_cut(held) else held
        target = targets.get(name)
        if target is not None and target.shape == whole.shape:  # else a cache that the forward pass has grown
            target.copy_(whole)
