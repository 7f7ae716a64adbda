"""Where gates stand: on what each consumer reads, and on what each layer puts out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hap import batches
from hap.curvature.layout import Layout
from hap.errors import HapError
from hap.types import Layer, Structure


@dataclass(eq=False)
class Tap:
    """Gates on one module's input or output.

    Attributes:
        layer: the layer on whose input or output the gates are.
        families: the families read here; empty for the filter gates on an output.
        channels, gates: channel ``channels[i]`` is multiplied by gate ``gates[i]`` of the flat layout.
        channel_axis: 1 for convolutions, -1 for linear layers.
        copied: keep a copy of the values, because the model overwrites them in place.
        called: the module has been called.
        blind: a call could not be followed, so the sum would lack a part.
    """

    layer: Layer
    families: tuple[str, ...]
    channels: torch.Tensor
    gates: torch.Tensor
    copied: bool = False
    called: bool = False
    blind: bool = False

    @property
    def channel_axis(self) -> int:
        return 1 if self.layer.kernel else -1

    def products(self, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``x * dx`` summed over everything but samples and channels: (samples, channels)."""
        wide = torch.promote_types(values.dtype, torch.float32)
        products = values.to(wide) * gradient
        channel_axis = self.channel_axis % products.ndim
        rest = [axis for axis in range(1, products.ndim) if axis != channel_axis]
        return products.sum(rest) if rest else products


def input_taps(model: nn.Module, structure: Structure, layout: Layout) -> list[Tap]:
    """One tap for each module that reads a family, with the gates of all the families it reads."""
    readers: dict[str, list[Layer]] = {}
    for layer in structure.layers:
        if _owns_weight(model, layer):
            readers.setdefault(layer.weight, []).append(layer)
    reads: dict[str, tuple[Layer, list[str], list[int], list[int]]] = {}
    lost: list[tuple[str, str]] = []
    for family, offset in layout.unit_offsets():
        for member in family.roles("consumer"):
            layers = readers.get(member.parameter, [])
            if not layers or member.axis != 1 - layers[0].output_axis:
                lost.append((family.name, f"{member.parameter} (axis {member.axis})"))
                continue
            for layer in layers:
                _, names, channels, gates = reads.setdefault(layer.module, (layer, [], [], []))
                names.append(family.name)
                for unit, positions in enumerate(member.indices):
                    read = _channels(layer, structure, positions)
                    channels.extend(read)
                    gates.extend([offset + unit] * len(read))
    if lost:
        problem = "is not the input of a convolution or linear module"
        raise not_followed(lost, problem, "consumers that are the input axis of such a module's weight")
    device = batches.device_of(model)
    return [
        Tap(layer, tuple(names), torch.tensor(channels, device=device), torch.tensor(gates, device=device))
        for layer, names, channels, gates in reads.values()
    ]


def output_taps(model: nn.Module, layout: Layout) -> list[Tap]:
    """One tap for each layer that is a module; what a functional call puts out cannot be seen."""
    device = batches.device_of(model)
    return [
        Tap(layer, (), torch.arange(layer.filters, device=device), offset + torch.arange(layer.filters, device=device))
        for layer, offset in layout.filter_offsets()
        if _owns_weight(model, layer)
    ]


def _channels(layer: Layer, structure: Structure, positions: tuple[int, ...]) -> list[int]:
    """Input channels that a weight's input axis positions read: in a grouped convolution, one in each group."""
    if layer.groups == 1 or layer.transposed:
        return list(positions)
    width = structure.tensors[layer.weight].shape[1]
    return [group * width + position for group in range(layer.groups) for position in positions]


def _owns_weight(model: nn.Module, layer: Layer) -> bool:
    """Whether the layer is a module that computes with ``self.weight``, and not a part of a larger one."""
    module = model.get_submodule(layer.module)
    weight = getattr(module, "weight", None)
    return weight is model.get_parameter(layer.weight) and next(module.children(), None) is None


def not_followed(pairs: list[tuple[str, str]], problem: str, expected: str, got: str = "") -> HapError:
    """The error for (family, consumer) pairs; names all the families, so that one more run is enough."""
    family, consumer = pairs[0]
    names = list(dict.fromkeys(name for name, _ in pairs))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return HapError(
        f"gates cannot follow family {family!r}{more}: it is read by {consumer!r}, which {problem}",
        expected=expected,
        got=got,
        remedy=f"leave it out: hap.trace(..., ignore={names}); or use taylor, hessian-trace or magnitude",
    )
