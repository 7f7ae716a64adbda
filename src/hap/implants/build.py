"""Makes an `Implanted` out of a layer that has lost its pruned channels already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hap.implants.fit import Fitted
from hap.implants.geometry import Dense, Geometry
from hap.implants.implanted import Implanted

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def build(
    layer: Dense, weight: torch.Tensor, bias: torch.Tensor | None, implanted: Sequence[bool], fitted: Fitted
) -> Implanted:
    """The implanted layer that gives the channels of `weight` in their order.

    Args:
        layer: the dense layer; gives the settings, requires_grad and mode.
        weight: what is left of its weight, ``(out, in / groups, *kernel)``; rows of implanted filters
            are there but not used.
        bias: what is left of its bias.
        implanted: for each row of `weight`, whether it is replaced.
        fitted: the implant, its rows in the order of these.
    """
    geometry, form = Geometry.of(layer), fitted.target.form
    block = len(layer.weight) // geometry.groups if geometry.groups > 1 else 0
    large = [i for i, flag in enumerate(implanted) if not flag]
    small = [i for i, flag in enumerate(implanted) if flag]
    first = bool(large) and [*small, *large] == sorted(range(len(implanted)))
    sequence = [*small, *large] if first else [*large, *small]

    def grouped(rows: Sequence[int]) -> Geometry:
        return geometry.grouped(len(rows) // block if block else 1)

    dense = None
    if large:
        # indexing keeps the memory format, which index_select does not
        dense = grouped(large).layer(weight[large], None if bias is None else bias[large])
    implant = form.build(fitted.factors, fitted.bias, grouped(small), fitted.target.rank)
    width = len(small if first else large) // block * weight.shape[1] if block and large else None
    made = Implanted(
        dense,
        implant,
        form=form.name,
        rank=fitted.target.rank,
        geometry=grouped(sequence),
        implant_first=first,
        split=width,
        order=_inverse(sequence, weight.device),
        input_order=_input_order(sequence, block, weight.shape[1], weight.device),
    )
    inherit_(made, layer, layer)
    return made


def inherit_(made: nn.Module, layer: nn.Module, like: Dense) -> None:
    """Gives `made`, which replaces `layer`, its mode and hooks, and requires_grad and memory format of `like`.

    The hooks are shared, not copied: their handles still remove them.
    """
    for name in _HOOKS:
        setattr(made, name, getattr(layer, name))
    for name, parameter in made.named_parameters():
        old = like.bias if name.endswith("bias") and like.bias is not None else like.weight
        parameter.requires_grad_(old.requires_grad)
        memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
        if memory is not None and not like.weight.is_contiguous() and like.weight.is_contiguous(memory_format=memory):
            parameter.data = parameter.data.contiguous(memory_format=memory)
    made.train(layer.training)


def _inverse(sequence: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Where each channel stands in `sequence`; None if it is sorted."""
    if list(sequence) == sorted(sequence):
        return None
    return torch.tensor(sequence, device=device).argsort()


def _input_order(sequence: Sequence[int], block: int, columns: int, device: torch.device) -> torch.Tensor | None:
    """The input channels that the two parts of a grouped convolution read, one part after the other."""
    if not block or list(sequence) == sorted(sequence):
        return None
    groups = list(dict.fromkeys(i // block for i in sequence))
    return torch.tensor([g * columns + c for g in groups for c in range(columns)], device=device)
