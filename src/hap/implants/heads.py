"""Attention heads that can have narrow ones in their place: which tensors hold them, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix  # of lists too
from typing import TypeVar

import numpy as np

from hap.types import Family, Layer, Member, Structure

HEAD = "head"  # the form of an implant of heads
T = TypeVar("T", int, np.ndarray)

PARTS = (2, 4, 8)  # narrow heads that take the place of one


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        module: the innermost module that holds its projections to queries, keys and values.
        family: its heads, as units.
        width: of one head.
        projections: the layers that write queries, keys and values: one, or up to three.
        output: the layer that reads the heads.
    """

    module: str
    family: Family
    width: int
    projections: tuple[Layer, ...]
    output: Layer

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

    def ranks(self) -> tuple[int, ...]:
        """The widths that narrow heads can have, largest first."""
        return tuple(self.width // parts for parts in PARTS if self.width % parts == 0)

    def chunks(self, member: Member) -> list[tuple[tuple[int, ...], ...]]:
        """For each of queries, keys and values that the tensor holds, the positions of every head."""
        width = self.width
        starts = range(0, len(member.indices[0]), width)
        return [tuple(tuple(sorted(unit)[start : start + width]) for unit in member.indices) for start in starts]


def packs(count: T, parts: int) -> T:
    """How many full heads take as much room as `count` narrow ones."""
    return -(-count // parts)


def heads_of(structure: Structure) -> dict[str, Heads]:
    """The attention modules whose heads may become narrow, by name.

    Each of their units is one head of queries, of keys and of values; nothing else depends on them, such as
    positional biases, and normalisations, of each head.
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
    written, read = [layers[m.parameter] for m in producers], layers[consumers[0].parameter]
    width = len(consumers[0].indices[0])
    sizes = [len(unit) for m in producers for unit in m.indices]
    biases = {layer.bias for layer in written if layer.bias is not None}
    plain = all(m.axis == layers[m.parameter].output_axis for m in producers) and consumers[0].axis != read.output_axis
    if (
        sum(sizes) == 3 * width * family.size
        and all(size % width == 0 for size in sizes)
        and all(len(unit) == width for unit in consumers[0].indices)
        and {m.parameter for m in family.roles("follower")} == biases
        and plain
        and all(layer.groups == 1 and not layer.kernel and layer.positions for layer in (*written, read))
    ):
        yield Heads(_around(structure, written), family, width, tuple(written), read)


def _around(structure: Structure, layers: Sequence[Layer]) -> str:
    """The innermost module that holds these layers, and calls them rather than being one."""
    own = {layer.module for layer in layers}
    if len(own) == 1 and structure.modules[layers[0].module] == "MultiheadAttention":
        return layers[0].module
    paths = [layer.module.split(".")[:-1] for layer in layers]
    return ".".join(commonprefix(paths))
