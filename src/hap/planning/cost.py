"""What a model costs after units have left and filters have been implanted: exactly, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hap.implants import NARROW, Heads, form_of, heads_of, packs
from hap.planning.latency_table import LatencyTable
from hap.planning.plan import Implant
from hap.types import Cost, Layer, Structure


@dataclass(frozen=True)
class Share:
    """How many of a layer's kept filters, or of a module's kept heads, are implanted, and how."""

    rows: int
    form: str
    rank: int | None = None


NONE = Share(0, "")


@dataclass(frozen=True)
class _Weight:
    """Where a layer's weight lies among tensors and axes.

    Attributes:
        layer: the layer.
        tensor: index of its weight.
        rows, columns: indices of the axes that hold its filters and what each of them reads.
    """

    layer: Layer
    tensor: int
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class _Site:
    """Heads of one module that may become narrow.

    Attributes:
        family: index of their family.
        size: how many they are.
        width: of one.
        taken: for each form, the positions along every axis that a head takes where narrow ones can share its place.
    """

    family: int
    size: int
    width: int
    taken: Mapping[str, np.ndarray]

    def saved(self, count: np.ndarray, share: Share) -> np.ndarray:
        """How many places `count` narrow heads save: several lie in one."""
        return count - packs(count, self.width // (share.rank or self.width))


class CostModel:
    """Parameters, MACs and (with a table) latency as a function of the choices made.

    Each tensor has as many elements as the product of its axes' kept positions, so that coupled
    layers are priced together: what a channel saves depends on its neighbours' widths. The units of a
    family are alike: the cost depends on how many of them leave.

    Args:
        structure: from `hap.trace`.
        latency: the layers' times on the user's device; without it costs have no latency.
    """

    def __init__(self, structure: Structure, latency: LatencyTable | None = None) -> None:
        shapes = {name: spec.shape for name, spec in structure.tensors.items() if spec.is_parameter}
        keys = [(name, axis) for name, shape in shapes.items() for axis in range(max(1, len(shape)))]
        place = {key: i for i, key in enumerate(keys)}
        self._full = np.array([(shapes[name] or (1,))[axis] for name, axis in keys], dtype=np.int64)
        self._starts = np.array([i for i, (_, axis) in enumerate(keys) if axis == 0], dtype=np.int64)
        self._taken = np.zeros((len(structure.families), len(keys)), dtype=np.int64)  # positions of one unit
        for i, family in enumerate(structure.families):
            for member in family.members:
                if (member.parameter, member.axis) in place:
                    self._taken[i, place[member.parameter, member.axis]] += len(member.indices[0])
        self._families = [family.name for family in structure.families]
        self._sites = {name: self._site(heads, place) for name, heads in heads_of(structure).items()}
        tensor = {name: i for i, name in enumerate(shapes)}
        self._weights = {
            module: _Weight(
                layer,
                tensor[layer.weight],
                place[layer.weight, layer.output_axis],
                place[layer.weight, 1 - layer.output_axis],
            )
            for module, layer in structure.by_module.items()
        }
        self._positions = np.zeros(len(shapes), dtype=np.int64)
        for layer in structure.layers:
            self._positions[tensor[layer.weight]] = layer.positions
        heads = {m.parameter for family in structure.families if family.kind == "head" for m in family.members}
        self._heads = np.array([name in heads and len(shape) > 1 for name, shape in shapes.items()], dtype=bool)
        self._latency = latency
        self._known: dict[tuple[str, Share, int, int], tuple[int, float]] = {}  # what `_takes` said
        self.dense = self({}, {})

    def __call__(self, pruned: Mapping[str, np.ndarray], implants: Mapping[str, Implant]) -> Cost:
        """The cost when `pruned` (for each family, a mask over its units) units are gone.

        Args:
            pruned: boolean masks of shape ``(size,)``; families that are left out lose nothing.
            implants: by module; only filters, and heads, that are kept.
        """
        gone = np.array([int(pruned[name].sum()) if name in pruned else 0 for name in self._families], dtype=np.int64)
        return self.at(gone, {name: Share(len(i.indices), i.form, i.rank) for name, i in implants.items() if i.indices})

    def at(self, gone: np.ndarray, shares: Mapping[str, Share]) -> Cost:
        """The cost when of each family `gone` units have left, shape ``(families,)``."""
        params, macs, heads, *latency = self.costs(gone[None], shares)[:, 0].tolist()
        return Cost(round(params), round(macs), latency[0] if latency else None, round(heads))

    def costs(self, gone: np.ndarray, shares: Mapping[str, Share]) -> np.ndarray:
        """The costs at several places at once.

        Args:
            gone: units that have left, shape ``(places, families)``.
            shares: the implants, the same at all places (but never more than there are filters).

        Returns:
            float64 of shape ``(quantities, places)``: parameters, MACs, parameters of heads and, with a table,
            milliseconds.
        """
        axes = self._full - gone @ self._taken
        narrow = {module: share for module, share in shares.items() if share.form in NARROW}
        if narrow:
            axes = axes - self._packed(gone, narrow)
            shares = {module: share for module, share in shares.items() if module not in narrow}
        counts = np.multiply.reduceat(axes, self._starts, axis=1)
        # with a table, the time of every layer is asked for; else what is implanted takes fewer weights
        milliseconds = self._layers(axes, counts, shares, self._weights if self._latency is not None else shares)
        heads = counts[:, self._heads].sum(1, dtype=np.float64)
        found = [counts.sum(1, dtype=np.float64), counts @ self._positions.astype(np.float64), heads]
        if self._latency is not None:
            found.append(milliseconds)
        return np.stack(found)

    def _packed(self, gone: np.ndarray, shares: Mapping[str, Share]) -> np.ndarray:
        """The positions that narrow heads save along every axis, shape ``(places, axes)``."""
        saved = np.zeros((len(gone), len(self._full)), dtype=np.int64)
        for module, share in shares.items():
            site = self._sites[module]
            count = np.minimum(share.rows, site.size - gone[:, site.family])
            saved += site.saved(count, share)[:, None] * site.taken[share.form]
        return saved

    def _site(self, heads: Heads, place: Mapping[tuple[str, int], int]) -> _Site:
        family = self._families.index(heads.family.name)
        taken = {form: np.zeros_like(self._full) for form in heads.forms()}
        for form, axes in taken.items():
            for member in heads.carrying(form):
                axes[place[member.parameter, member.axis]] += len(member.indices[0])
        return _Site(family, heads.family.size, heads.width, taken)

    def place(self, gone: np.ndarray) -> Place:
        """Where of each family `gone` units have left, shape ``(families,)``."""
        return Place(self, (self._full - gone @ self._taken).tolist())

    def layer(self, module: str, axes: Sequence[int], share: Share | None) -> np.ndarray:
        """See `Place.layer`."""
        if module in self._sites:
            return self._narrow(module, axes, share)
        weight = self._weights[module]
        rows, columns = axes[weight.rows], axes[weight.columns]
        share = share or NONE
        count, milliseconds = self._takes(module, share, rows, columns)
        found = [count, count * weight.layer.positions, count * self._heads[weight.tensor]]
        if self._latency is not None:
            found.append(milliseconds)
        return np.array(found, dtype=np.float64)

    def _narrow(self, module: str, axes: Sequence[int], share: Share | None) -> np.ndarray:
        """The whole model's costs with some heads of one module narrow, and without other implants."""
        site, left = self._sites[module], np.array(axes, dtype=np.int64)
        if share is not None and share.rows:
            taken = site.taken[share.form]
            there = (left[taken > 0] // taken[taken > 0]).min()  # the heads that are left
            left = left - site.saved(np.minimum(share.rows, there), share) * taken
        counts = np.multiply.reduceat(left, self._starts)
        found = [float(counts.sum()), float(counts @ self._positions), float(counts[self._heads].sum())]
        if self._latency is not None:
            found.append(float(self._layers(left[None], counts[None], {}, self._weights)[0]))
        return np.array(found)

    def widths(self, module: str, axes: Sequence[int]) -> tuple[int, int]:
        """See `Place.widths`."""
        weight = self._weights[module]
        return axes[weight.rows], axes[weight.columns]

    def key(self, module: str, axes: Sequence[int]) -> tuple[int, ...]:
        """See `Place.key`."""
        return tuple(axes) if module in self._sites else self.widths(module, axes)

    def _layers(
        self, axes: np.ndarray, counts: np.ndarray, shares: Mapping[str, Share], modules: Iterable[str]
    ) -> np.ndarray:
        """The time of these layers at each place; writes the weights of the implanted ones into `counts`.

        Most layers are as wide at one place as at another, so that each width is priced once.
        """
        names, total = list(modules), np.zeros(len(axes))
        if not names:
            return total
        weights = [self._weights[name] for name in names]
        rows, columns = axes[:, [w.rows for w in weights]], axes[:, [w.columns for w in weights]]
        for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
            share = shares.get(name, NONE)
            count, milliseconds = self._takes(name, share, int(rows[-1, i]), int(columns[-1, i]))
            total += milliseconds
            if share.rows:
                counts[:, weight.tensor] = count
        others = np.argwhere((rows != rows[-1]) | (columns != columns[-1]))
        for at, i in others.tolist():
            share = shares.get(names[i], NONE)
            count, milliseconds = self._takes(names[i], share, int(rows[at, i]), int(columns[at, i]))
            total[at] += milliseconds - self._takes(names[i], share, int(rows[-1, i]), int(columns[-1, i]))[1]
            if share.rows:
                counts[at, weights[i].tensor] = count
        return total

    def _takes(self, module: str, share: Share, rows: int, columns: int) -> tuple[int, float]:
        """Elements of a layer's weights, and its time (0 without a table)."""
        key = (module, share, rows, columns)
        if key not in self._known:
            layer, implanted = self._weights[module].layer, min(share.rows, rows)
            count = (rows - implanted) * columns * math.prod(layer.kernel)
            if implanted:
                count += form_of(share.form).weights(layer, implanted, columns, share.rank)
            time = 0.0
            if self._latency is not None:
                time = self._latency.milliseconds(module, rows, columns, implanted, (share.form, share.rank))
            self._known[key] = count, time
        return self._known[key]


@dataclass(frozen=True, eq=False)
class Place:
    """A point in the search: how wide every layer is.

    Attributes:
        model: the cost model.
        axes: the kept positions of all axes of all tensors.
    """

    model: CostModel
    axes: Sequence[int]

    def widths(self, module: str) -> tuple[int, int]:
        """A layer's filters, and the inputs that each of them reads."""
        return self.model.widths(module, self.axes)

    def key(self, module: str) -> tuple[int, ...]:
        """What `layer` depends on, besides the share."""
        return self.model.key(module, self.axes)

    def layer(self, module: str, share: Share | None = None) -> np.ndarray:
        """What a layer takes, implanted or not: the quantities of `CostModel.costs`, shape ``(quantities,)``.

        Of an attention module, what the whole model takes with these heads narrow: only differences mean something.
        """
        return self.model.layer(module, self.axes, share)
