"""Where gates stand: on what each consumer reads, and on what each layer puts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hap import batches
from hap.curvature.layout import Layout
from hap.curvature.rows import Rows
from hap.errors import HapError
from hap.types import Layer, Structure


@dataclass(eq=False)
class Tap:
    """Gates on one module's input or output.

    Attributes:
        layer: the layer on whose input or output the gates are.
        module: name of the module that computes it.
        families: the families read here; empty for the filter gates on an output.
        channels, gates: channel ``channels[i]`` is multiplied by gate ``gates[i]`` of the flat layout.
        channel_axis: 1 for convolutions, -1 for linear layers.
        copied: keep a copy of the values, because the model overwrites them in place.
        called: the module has been called.
        blind: a call could not be followed, so the sum would lack a part.
    """

    layer: Layer
    module: str
    families: tuple[str, ...]
    channels: torch.Tensor
    gates: torch.Tensor
    copied: bool = False
    called: bool = False
    blind: bool = False

    @property
    def channel_axis(self) -> int:
        return 1 if self.layer.kernel else -1

    def products(self, values: torch.Tensor, gradient: torch.Tensor, samples: int, rows: Rows) -> torch.Tensor:
        """``x * dx`` summed over everything but samples and channels: (samples, channels)."""
        wide = torch.promote_types(values.dtype, torch.float32)
        products = values.to(wide) * gradient
        channels = self.channel_axis if self.channel_axis < 0 else self.channel_axis - products.ndim
        products = rows.first(products, samples)
        rest = [axis for axis in range(1, products.ndim) if axis != products.ndim + channels]
        return products.sum(rest)


@dataclass(frozen=True)
class Lost:
    """A family that no gate can follow: who reads it, and what about that is the problem."""

    family: str
    reader: str
    problem: str
    expected: str
    got: str = ""


def input_taps(model: nn.Module, structure: Structure, layout: Layout) -> tuple[list[Tap], list[Lost]]:
    """One tap for each module that reads a family, with the gates of all the families it reads; and what is lost."""
    readers: dict[str, list[tuple[Layer, str]]] = {}
    for layer in structure.layers:
        for module in _modules(model, structure, layer):
            readers.setdefault(layer.weight, []).append((layer, module))
    reads: dict[str, tuple[Layer, list[str], list[int], list[int]]] = {}
    lost: list[Lost] = []
    for family, offset in layout.unit_offsets():
        for member in family.roles("consumer"):
            found = readers.get(member.parameter, [])
            if not found or member.axis != 1 - found[0][0].output_axis:
                problem = "is not the input of a convolution or linear module"
                expected = "consumers that are the input axis of such a module's weight"
                lost.append(Lost(family.name, f"{member.parameter} (axis {member.axis})", problem, expected))
                continue
            for layer, module in found:
                _, names, channels, gates = reads.setdefault(module, (layer, [], [], []))
                names.append(family.name)
                for unit, positions in enumerate(member.indices):
                    read = _channels(layer, structure, positions)
                    channels.extend(read)
                    gates.extend([offset + unit] * len(read))
    device = batches.device_of(model)
    taps = [
        Tap(layer, module, tuple(names), torch.tensor(channels, device=device), torch.tensor(gates, device=device))
        for module, (layer, names, channels, gates) in reads.items()
    ]
    return taps, lost


def output_taps(model: nn.Module, structure: Structure, layout: Layout) -> list[Tap]:
    """One tap for each layer that is a module; what a functional call puts out cannot be seen."""
    device = batches.device_of(model)
    return [
        Tap(layer, module, (), each, offset + each)
        for layer, offset in layout.filter_offsets()
        for each in [torch.arange(layer.filters, device=device)]
        for module in _modules(model, structure, layer)
    ]


def _channels(layer: Layer, structure: Structure, positions: tuple[int, ...]) -> list[int]:
    """Input channels that a weight's input axis positions read: in a grouped convolution, one in each group."""
    if layer.groups == 1 or layer.transposed:
        return list(positions)
    width = structure.tensors[layer.weight].shape[1]
    return [group * width + position for group in range(layer.groups) for position in positions]


def _modules(model: nn.Module, structure: Structure, layer: Layer) -> list[str]:
    """The modules that compute the layer with ``self.weight`` (several where tied) and are no part of a larger one."""
    weight = model.get_parameter(layer.weight)
    others = {other.module for other in structure.layers} - {layer.module}
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is weight
        and name not in others
        and not isinstance(module, nn.Embedding)
        and next(module.children(), None) is None
    ]


def not_followed(lost: Sequence[Lost]) -> HapError:
    """The error for lost families; names all of them, so that one more run is enough."""
    first = lost[0]
    names = list(dict.fromkeys(one.family for one in lost))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return HapError(
        f"gates cannot follow family {first.family!r}{more}: it is read by {first.reader!r}, which {first.problem}",
        expected=first.expected,
        got=first.got,
        remedy=f"leave it out: hap.trace(..., ignore={names}); or use taylor, hessian-trace or magnitude",
    )
