"""Python attributes that mirror the sizes of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def sizes(module: nn.Module, filters: Sequence[int]) -> dict[str, Any]:
    """The attributes that a module must have to agree with its tensors.

    Args:
        module: after its tensors have changed.
        filters: for a convolution, the dense positions of the filters that are left.
    """
    if isinstance(module, _ConvTransposeNd):
        return {"in_channels": module.weight.shape[0], "out_channels": module.weight.shape[1] * module.groups}
    if isinstance(module, _ConvNd):
        per_group = module.out_channels // module.groups
        groups = len({i // per_group for i in filters})
        return {
            "groups": groups,
            "in_channels": module.weight.shape[1] * groups,
            "out_channels": module.weight.shape[0],
        }
    if isinstance(module, nn.Linear):
        return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        return {"normalized_shape": tuple(module.weight.shape)}
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        return {"num_channels": module.weight.shape[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    if isinstance(module, _NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        return {"num_features": tensor.shape[0]} if tensor is not None else {}
    return {}
