"""The modules that a latency table times: layers of other widths, implants, and what joins the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hap.implants import Dense, Geometry, Implanted, form_of
from hap.planning.latency_table import Way
from hap.types import Layer

VALUE = 0.01  # of all weights and inputs: times do not depend on values, but subnormal ones are slow


@dataclass(frozen=True)
class Widths:
    """Filters, what each of them reads, and groups of a narrower layer."""

    rows: int
    columns: int
    groups: int


@dataclass(frozen=True, eq=False)
class Call:
    """What a layer reads and gives in one call: tensors on the meta device."""

    x: torch.Tensor
    y: torch.Tensor


class Timed(nn.Module):
    """A module with its inputs."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, dict(kwargs or {})
        here = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), None)
        self.register_buffer("here", torch.empty(0, device=here), persistent=False)  # says where it runs

    def forward(self) -> Any:
        """Calls it."""
        return self.module(*self.args, **self.kwargs)


class _Give(nn.Module):
    """Stands for a part of an implanted layer: gives the same at once."""

    def __init__(self, y: torch.Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.y


def key(module: Dense, what: tuple[Any, ...], call: Call) -> str:
    """Everything that the time of a part depends on, in words."""
    settings: list[Any] = [type(module).__name__, *what, module.bias is not None]
    if isinstance(module, _ConvNd):
        settings += [module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode]
        settings += [list(call.x.shape[:1]), list(call.x.shape[2:]), list(call.y.shape[2:]), channels_last(call.x)]
    else:
        settings += [list(call.x.shape[:-1])]
    return json.dumps([*settings, str(module.weight.dtype)])


def narrow(module: Dense, widths: Widths, call: Call) -> nn.Module:
    """A layer of these widths, of PyTorch's own kind: what else a subclass does counts as lying between the layers."""
    weight = module.weight
    options: dict[str, Any] = {"bias": module.bias is not None, "device": "meta", "dtype": weight.dtype}
    if isinstance(module, nn.Linear):
        return _timed(nn.Linear(widths.columns, widths.rows, **options), widths.columns, module, call)
    for name in ("stride", "padding", "dilation", "padding_mode"):
        options[name] = getattr(module, name)
    # a transposed weight holds all inputs, and of the outputs those of a group; the others the other way round
    transposed = isinstance(module, _ConvTransposeNd)
    per_input, per_output = (1, widths.groups) if transposed else (widths.groups, 1)
    inputs, outputs = widths.columns * per_input, widths.rows * per_output
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{len(module.kernel_size)}d")
    new = kind(inputs, outputs, module.kernel_size, groups=widths.groups, **options)
    return _timed(new, inputs, module, call if transposed else _padded(Geometry.of(module), call))


def _padded(geometry: Geometry, call: Call) -> Call:
    """The call with an input from which the layer's settings give as much: a subclass may pad more than they say."""
    settings = zip(geometry.kernel, geometry.stride, geometry.dilation, geometry.pads(), strict=True)
    needed = [
        (count - 1) * stride + dilation * (kernel - 1) + 1 - before - after
        for count, (kernel, stride, dilation, (before, after)) in zip(call.y.shape[2:], settings, strict=True)
    ]
    shape = (*call.x.shape[:2], *map(max, call.x.shape[2:], needed))
    memory = torch.channels_last if channels_last(call.x) else torch.contiguous_format
    return Call(torch.empty(shape, device="meta", memory_format=memory), call.y)


def implant(module: Dense, layer: Layer, way: Way, widths: Widths, call: Call) -> nn.Module:
    """The chain that implants of these widths are."""
    form, geometry, weight = form_of(way[0]), Geometry.of(module).grouped(widths.groups), module.weight
    shapes = form.shapes(layer, widths.rows, widths.columns, way[1])
    factors = tuple(torch.empty(shape, dtype=weight.dtype, device="meta") for shape in shapes)
    bias = None if module.bias is None else torch.empty(widths.rows, dtype=weight.dtype, device="meta")
    return _timed(form.build(factors, bias, geometry, way[1]), widths.columns * widths.groups, module, call)


def join(module: Dense, rows: int, call: Call) -> nn.Module:
    """An implanted layer of `rows` filters whose two parts take no time."""
    axis = Geometry.of(module).channel_axis
    one, other = (_Give(_tensor(call.y, axis, n, module.weight)) for n in (rows - rows // 2, rows // 2))
    made = Implanted(one, other, form="", rank=None, geometry=Geometry.of(module))  # type: ignore[arg-type]
    return Timed(made, (_tensor(call.x, axis, 1, module.weight),))


def after(module: Dense, share: float, call: Call) -> nn.Module:
    """An element-wise operation on a share of what the layer gives: as normalisations and activations are."""
    axis = Geometry.of(module).channel_axis
    channels = max(1, round(share * call.y.shape[axis]))
    return Timed(nn.ReLU(), (_tensor(call.y, axis, channels, module.weight),))


def _timed(new: nn.Module, inputs: int, module: Dense, call: Call) -> Timed:
    """A part made on the meta device, brought to where the layer is, with its inputs."""
    new = new.to_empty(device=module.weight.device)
    for parameter in new.parameters():
        nn.init.constant_(parameter, VALUE)
    if channels_last(call.x):
        new = new.to(memory_format=torch.channels_last)
    return Timed(new, (_tensor(call.x, Geometry.of(module).channel_axis, inputs, module.weight),))


def _tensor(like: torch.Tensor, axis: int, channels: int, weight: torch.Tensor) -> torch.Tensor:
    """A tensor with so many channels in the same memory format."""
    shape = list(like.shape)
    shape[axis] = channels
    memory = torch.channels_last if channels_last(like) else torch.contiguous_format
    return torch.full(shape, VALUE, dtype=weight.dtype, device=weight.device).contiguous(memory_format=memory)


def channels_last(x: torch.Tensor) -> bool:
    """Whether the channels come last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
