"""Attention heads that can have narrow ones in their place: which tensors hold them, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix  # of lists too
from typing import TypeVar

import numpy as np

from hap.types import Family, Layer, Member, Structure

HEAD, VALUES = "head", "value-head"  # forms of implants of heads: all of it narrow, or values and output alone
NARROW = (HEAD, VALUES)
T = TypeVar("T", int, np.ndarray)

PARTS = (2, 4, 8)  # narrow heads that take the place of one


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        module: the innermost module that holds its projections to queries, keys and values.
        family: its heads, as units: a head of keys and values, with the heads of queries that share it.
        width: of one head.
        group: heads of queries in a unit.
        projections: the layers that write queries, keys and values, in the order of the forward pass: one, or up to
            three.
        output: the layer that reads the heads.
    """

    module: str
    family: Family
    width: int
    group: int
    projections: tuple[Layer, ...]
    output: Layer

    @property
    def values(self) -> Layer | None:
        """The layer that values would come from, were they to become narrow alone: the last of three, by custom.

        Whether they do is looked up on the data, see `hap.implants.attended`.
        """
        return self.projections[-1] if len(self.projections) == 3 else None

    @property
    def members(self) -> tuple[Member, ...]:
        """The tensors that shrink with the heads; of weights and biases alike."""
        return self.family.members

    @property
    def modules(self) -> set[str]:
        """The modules of all its layers."""
        return {layer.module for layer in (*self.projections, self.output)}

    def member(self, tensor: str) -> Member:
        """The axis of a tensor that carries the heads."""
        return next(member for member in self.members if member.parameter == tensor)

    def carrying(self, form: str) -> tuple[Member, ...]:
        """The tensors that hold narrow heads of this form."""
        if form == HEAD or self.values is None:
            return self.members
        own = (self.values.weight, self.values.bias, self.output.weight)
        return tuple(member for member in self.members if member.parameter in own)

    def forms(self) -> tuple[str, ...]:
        """The forms that its layers allow: what is shared by a group cannot be mixed with the queries of each."""
        whole = (HEAD,) if self.group == 1 else ()
        return (*whole, VALUES) if self.values is not None else whole

    def ranks(self) -> tuple[int, ...]:
        """The widths that narrow heads can have, largest first."""
        return tuple(self.width // parts for parts in PARTS if self.width % parts == 0)

    def chunks(self, member: Member) -> list[tuple[tuple[int, ...], ...]]:
        """For each of queries, keys and values that the tensor holds, the positions of every head.

        Where heads of queries share one of keys: for each of the group.
        """
        width = self.width
        starts = range(0, len(member.indices[0]), width)
        return [tuple(tuple(sorted(unit)[start : start + width]) for unit in member.indices) for start in starts]


def packs(count: T, parts: int) -> T:
    """How many full heads take as much room as `count` narrow ones."""
    return -(-count // parts)


def heads_of(structure: Structure) -> dict[str, Heads]:
    """The attention modules whose heads may become narrow, by name.

    Each of their units is one head of keys and of values, with one head of queries or a group of them; nothing else
    depends on them, such as positional biases, and normalisations, of each head, or a mean over all of them.
    """
    layers = {layer.weight: layer for layer in structure.layers}
    families = [family for family in structure.families if family.kind == "head"]
    found = [heads for family in families for heads in _heads(structure, family, layers)]
    names = [heads.module for heads in found]
    return {heads.module: heads for heads in found if names.count(heads.module) == 1}


def _heads(structure: Structure, family: Family, layers: dict[str, Layer]) -> Iterator[Heads]:
    producers, consumers = family.roles("producer"), family.roles("consumer")
    if len(consumers) != 1 or not {m.parameter for m in (*producers, *consumers)} <= set(layers):
        return
    own = {m.parameter: len(m.indices[0]) for m in producers}
    written, read = [layer for name, layer in layers.items() if name in own], layers[consumers[0].parameter]
    wide = len(consumers[0].indices[0])
    sizes = [len(unit) for m in producers for unit in m.indices]
    width = own[written[-1].weight] if len(written) == 3 else wide  # queries of a group share keys and values
    biases = {layer.bias for layer in written if layer.bias is not None}
    plain = all(m.axis == layers[m.parameter].output_axis for m in producers) and consumers[0].axis != read.output_axis
    if (
        family.exact
        and sum(sizes) == (wide + 2 * width) * family.size
        and all(size % width == 0 for size in (wide, *sizes))
        and all(len(unit) == wide for unit in consumers[0].indices)
        and {m.parameter for m in family.roles("follower")} == biases
        and plain
        and all(layer.groups == 1 and not layer.kernel and layer.positions for layer in (*written, read))
    ):
        yield Heads(_around(structure, written), family, width, wide // width, tuple(written), read)


def _around(structure: Structure, layers: Sequence[Layer]) -> str:
    """The innermost module that holds these layers, and calls them rather than being one."""
    own = {layer.module for layer in layers}
    if len(own) == 1 and structure.modules[layers[0].module] in ("MultiheadAttention", "OpenAttention"):
        return layers[0].module
    paths = [layer.module.split(".")[:-1] for layer in layers]
    return ".".join(commonprefix(paths))
