"""Gates: the derivative of a scalar by a factor 1 on each unit and each filter, for every sample.

A unit's gate multiplies what its consumers read, a filter's gate what its layer puts out. With
a_p = 1 the gates need not be built: the derivative of a sum over samples is, for each sample,

    d / d a_p = sum over positions of x_p * (d / d x_p)

which hooks gather while one ordinary backward pass runs. Evaluation mode keeps samples independent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap import batches
from hap.curvature.layout import Layout
from hap.errors import HapError
from hap.types import Layer, Structure


@dataclass(eq=False)
class _Tap:
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


class Gates:
    """The gates of a model, while `gated` has them in place.

    Attributes:
        layout: order of the gates.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model = model
        self.layout = Layout.of(structure)
        self.inputs = _input_taps(model, structure, self.layout)
        self.outputs = _output_taps(model, self.layout)
        self._samples = 0
        self._rows = torch.empty(0)
        self._leaves: list[torch.Tensor] = []
        self._held: list[tuple[_Tap, torch.Tensor, int]] = []

    def forward(self, batch: batches.Batch) -> Any:
        """The model's outputs, with a graph that `gradients` can go back through.

        Raises:
            HapError: a consumer's module is not called, or reads something without a batch axis.
        """
        self._samples = batches.size(batch)
        self._leaves, self._held = [], []
        outputs = batches.forward(self.model, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, batch))
        overwritten = [tap for tap, values, version in self._held if values._version != version]
        self._held = []
        if overwritten:  # by an in-place operation: known for good after the first batch
            for tap in overwritten:
                tap.copied = True
            return self.forward(batch)
        # A layer without positions is called in training mode only: here nothing is read through it.
        uncalled = [tap for tap in self.inputs if not tap.called and tap.layer.positions]
        if uncalled:
            raise _not_followed(
                [(name, tap.layer.module) for tap in uncalled for name in tap.families],
                "the model's forward never calls as a module",
                "consumers that are called, not used as functions of their weights",
            )
        return outputs

    def gradients(self, total: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """The derivative of `total`, a sum over samples, by each sample's gates: (samples, gates).

        Args:
            total: a scalar computed from the outputs of `forward`.
            keep: keep the graph for another call.
        """
        if not total.requires_grad:
            raise HapError(
                "the outputs do not depend on any unit or filter",
                expected="a model that is differentiable from its layers to its outputs",
                remedy="look for torch.no_grad or .detach() in the model",
            )
        wide = torch.promote_types(total.dtype, torch.float32)
        device = batches.device_of(self.model)
        self._rows = torch.zeros(self._samples, self.layout.size, dtype=wide, device=device)
        torch.autograd.grad(total, self._leaves, retain_graph=keep, allow_unused=True)
        return self._rows

    def seen(self) -> set[str]:
        """The layers whose output has been seen: a functional call, or an output without batch axis, cannot be."""
        return {tap.layer.module for tap in self.outputs if tap.called and not tap.blind}

    def watch(self, tap: _Tap, values: torch.Tensor) -> torch.Tensor:
        """A stand-in for `values` whose gradient counts for the gates of `tap`."""
        tap.called = True
        held = values.detach().clone() if tap.copied else values.detach()
        self._held.append((tap, held, held._version))
        if not values.requires_grad:  # nothing before it has gates: the graph starts here
            leaf = values.detach().requires_grad_()
            self._leaves.append(leaf)
            alias = leaf.clone()  # a leaf, or a view of one, must not be overwritten in place
        elif tap.copied:
            alias = values.clone()
        else:
            alias = values.view_as(values) if tap.families else values
        alias.register_hook(partial(self._add, tap, held))
        return alias

    def _add(self, tap: _Tap, values: torch.Tensor, gradient: torch.Tensor) -> None:
        products = tap.products(values, gradient).to(self._rows)
        self._rows.index_add_(1, tap.gates, products[:, tap.channels])

    def enter(self, tap: _Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward-pre hook of a consumer."""
        name = "" if args else next(iter(kwargs))
        values = args[0] if args else kwargs[name]
        if not self._has_batch_axis(tap, values):
            got = f"shape {tuple(values.shape)} for a batch of {self._samples}"
            pairs = [(name, tap.layer.module) for name in tap.families]
            raise _not_followed(pairs, "has an input without a batch axis", "one row for each sample", got)
        alias = self.watch(tap, values)
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, name: alias})

    def leave(self, tap: _Tap, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of a layer."""
        if self._has_batch_axis(tap, output):
            return self.watch(tap, output)
        tap.blind = True
        return output

    def _has_batch_axis(self, tap: _Tap, values: torch.Tensor) -> bool:
        return values.ndim >= max(2, len(tap.layer.kernel) + 2) and values.shape[0] == self._samples


@contextlib.contextmanager
def gated(model: nn.Module, structure: Structure) -> Iterator[Gates]:
    """Puts the gates of `structure` into the model, and takes them out.

    No parameter requires gradients meanwhile (the caller restores that): only activations' are computed.

    Raises:
        HapError: a family's consumer is not the weight of a convolution or linear module.
    """
    gates = Gates(model, structure)
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    try:
        model.requires_grad_(False)
        for tap in gates.inputs:
            hook = partial(gates.enter, tap)
            handles.append(modules[tap.layer.module].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in gates.outputs:
            handles.append(modules[tap.layer.module].register_forward_hook(partial(gates.leave, tap)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _input_taps(model: nn.Module, structure: Structure, layout: Layout) -> list[_Tap]:
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
        raise _not_followed(lost, problem, "consumers that are the input axis of such a module's weight")
    device = batches.device_of(model)
    return [
        _Tap(layer, tuple(names), torch.tensor(channels, device=device), torch.tensor(gates, device=device))
        for layer, names, channels, gates in reads.values()
    ]


def _output_taps(model: nn.Module, layout: Layout) -> list[_Tap]:
    """One tap for each layer that is a module; what a functional call puts out cannot be seen."""
    device = batches.device_of(model)
    return [
        _Tap(layer, (), torch.arange(layer.filters, device=device), offset + torch.arange(layer.filters, device=device))
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


def _not_followed(pairs: list[tuple[str, str]], problem: str, expected: str, got: str = "") -> HapError:
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
