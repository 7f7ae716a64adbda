"""Python attributes that mirror the sizes of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hap.types import Attribute, TensorSpec

Kept = Mapping[tuple[str, int], Sequence[int]]  # for each tensor axis that changes, the positions that are left


def mirrors(
    model: nn.Module, kept: Kept, tensors: Mapping[str, TensorSpec], attributes: Iterable[Attribute]
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each module whose tensors have changed, with the name and the new value of an attribute that must follow.

    Args:
        model: after its tensors have changed.
        kept: what is left of them.
        tensors: the dense model's.
        attributes: those that no module type of ``torch.nn`` has by itself.
    """
    current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = {id(current[name]): name for name, _ in kept}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(id(tensor) in changed for tensor in own):
            for name, value in sizes(module, _filters(module, kept, changed)).items():
                yield module, name, value
    for found in attributes:
        left = kept.get((found.tensor, found.axis))
        if left is not None:
            module = model.get_submodule(found.module)
            yield module, found.name, getattr(module, found.name) * len(left) // tensors[found.tensor].shape[found.axis]


def _filters(module: nn.Module, kept: Kept, changed: Mapping[int, str]) -> Sequence[int]:
    """For a convolution, the dense positions of the filters that are left."""
    if not isinstance(module, _ConvNd):
        return ()
    every = range(module.out_channels)
    name = changed.get(id(module.weight))  # tied weights go by their first name
    return every if name is None else kept.get((name, 0), every)


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
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer, of shape (in, out)
        columns, rows = module.get_parameter("weight").shape
        return {"nx": columns, "nf": rows}
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
