"""Mixed precision: which numbers the forward pass computes with. The weights stay as they are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap.batches import Batch, device_of, forward

Precision = Literal["no", "bf16", "fp16"]

HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_forward(model: nn.Module, batch: Batch, precision: Precision) -> Any:
    """The model's outputs under `torch.autocast`, in float32, since losses need its range.

    >>> half_forward(nn.Linear(2, 1), (torch.ones(1, 2), None), "bf16").dtype
    torch.float32
    """
    if precision == "no":
        return forward(model, batch)
    with torch.autocast(device_of(model).type, HALF[precision]):
        outputs = forward(model, batch)
    return pytree.tree_map_only(torch.Tensor, _widened, outputs)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALF.values() else tensor
