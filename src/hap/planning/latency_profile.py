"""Measures a `LatencyTable`: every layer and implant alone, on inputs of its real size, at a grid of widths."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hap.batches import device_of, evaluating
from hap.errors import HapError
from hap.implants import Dense, Option
from hap.planning.candidates import block, implantable
from hap.planning.latency import measure_latency
from hap.planning.latency_cache import LatencyCache
from hap.planning.latency_parts import Call, Timed, Widths, after, channels_last, implant, join, key, narrow
from hap.planning.latency_table import Grid, LatencyTable, Way
from hap.planning.rule import POINTWISE
from hap.types import Layer, Progress, Structure, silent

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of a layer's width, at which it is timed
COARSE = (1 / 8, 1 / 2, 1.0)  # the same for implants
RUNS = 9
SECONDS = 1.0  # for all widths of a layer, beyond the least number of runs

_Part = tuple[str, Callable[[Call], nn.Module]]  # its name in the cache, and how it is made


def time_layers(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    implants: Mapping[str, Iterable[Way]] | None = None,
    cache: str | Path | None = None,
    progress: Progress = silent,
) -> LatencyTable:
    """Times the layers of a model on its own device, in its own dtype and memory format.

    Args:
        model: the dense model; left as it is.
        structure: from `hap.trace`.
        args, kwargs: inputs, of the size that counts in deployment.
        implants: for each layer (by module) the forms and ranks that its filters may be given (see `ways`); they
            are timed too.
        cache: a JSON file that keeps times by device, number of threads, version of PyTorch and the layer's geometry;
            what it holds is not measured again, so that the next table is the same. It is written after each layer.
        progress: shows the layers.

    Raises:
        HapError: the model cannot read the inputs, the cache is not one, or most multiplications are of layers that
            cannot be timed alone: they are no convolutions or linear layers of PyTorch, or not called as modules.
    """
    device = device_of(model)
    kept = LatencyCache(cache, device)
    calls = _calls(model, structure, args, dict(kwargs or {}))
    _check(structure, calls)
    layers: dict[str, Grid] = {}
    forms: dict[str, dict[Way, Grid]] = {}
    joins: dict[str, Grid] = {}
    afters: dict[str, Grid] = {}
    for layer in progress(structure.by_module.values(), "timing layers", len(structure.by_module)):
        ways = tuple((implants or {}).get(layer.module, ()))
        timed = [
            _Timing(model.get_submodule(layer.module), layer, structure, call, kept)  # type: ignore[arg-type]
            for call in calls.get(layer.module, [])
        ]
        if timed:
            layers[layer.module] = _sum([t.dense(bool(ways)) for t in timed])
            afters[layer.module] = _sum([t.after() for t in timed])
        if timed and ways:
            forms[layer.module] = {way: _sum([t.implant(way) for t in timed]) for way in ways}
            joins[layer.module] = _sum([t.join() for t in timed])
        kept.write()
    whole = sum(grid.milliseconds[-1][-1] for grid in layers.values())
    name = _name(model, structure, calls, _tensors((args, kwargs)))
    dense = kept.get(name)
    if dense is None:
        dense = measure_latency({"dense": Timed(model, args, dict(kwargs or {}))}, (), runs=30)["dense"].least
        kept.put(name, dense)
        kept.write()
    return LatencyTable(
        kept.device, min(dense / whole, 1.0), layers, forms, joins, _spread(max(dense - whole, 0.0), afters)
    )


def _name(
    model: nn.Module, structure: Structure, calls: Mapping[str, Sequence[Call]], inputs: Sequence[torch.Tensor]
) -> str:
    """What the whole model is called in the cache: its tensors and modules, its inputs, and how each layer is called.

    The tensors do not tell strides, dilations and paddings; nor do they tell the sizes of what flows between.
    """
    layers = [key(model.get_submodule(name), (), call) for name in sorted(calls) for call in calls[name]]  # type: ignore[arg-type]
    read = [(list(t.shape), str(t.dtype), channels_last(t)) for t in inputs]
    parts = json.dumps([structure.fingerprint, any(map(channels_last, model.parameters())), read, layers])
    return json.dumps(["model", hashlib.sha256(parts.encode()).hexdigest()])


def ways(
    structure: Structure, options: Mapping[str, Sequence[Option]], *, mode: Literal["paper", "optimal"]
) -> dict[str, tuple[Way, ...]]:
    """For each layer the implants that a plan may choose: in mode ``paper`` pointwise ones, else the options."""
    if mode == "paper":
        return {layer.module: ((POINTWISE, None),) for layer in implantable(structure)}
    return {name: tuple((option.form, option.rank) for option in found) for name, found in options.items()}


def _check(structure: Structure, calls: Mapping[str, Sequence[Call]]) -> None:
    """Raises a HapError if what can be timed is not most of the model."""
    macs: dict[str, int] = {}
    for x in structure.layers:
        macs[x.module] = macs.get(x.module, 0) + x.positions * prod(structure.tensors[x.weight].shape)
    untimed = [name for name in macs if macs[name] and name not in calls]
    share = sum(macs[name] for name in untimed) / max(1, sum(macs.values()))
    if not calls or share > 1 / 2:
        more = f" and {len(untimed) - 5} more" if len(untimed) > 5 else ""
        raise HapError(
            "too little of this model can be timed layer by layer",
            expected="convolutions or linear layers of torch.nn that run as modules, with most of the multiplications",
            got=f"{share:.0%} of them in other layers: {', '.join(untimed[:5])}{more}" if untimed else "no such layer",
            remedy="leave latency out of the budget (for the command line: --any-latency)",
        )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _calls(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[Call]]:
    """What each layer reads and gives in one pass, call by call."""
    found: dict[str, list[Call]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: torch.Tensor) -> None:
            x = _tensors((given, named))[0]
            found.setdefault(name, []).append(Call(*(torch.empty_like(t, device="meta") for t in (x, y))))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in structure.by_module
        if isinstance(model.get_submodule(name), (_ConvNd, nn.Linear))
    ]
    try:
        with evaluating(model), torch.inference_mode():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Timing:
    """Times one call of a layer: at several widths the layer itself, its implants, and what joins both."""

    def __init__(self, module: Dense, layer: Layer, structure: Structure, call: Call, cache: LatencyCache) -> None:
        self.module, self.layer, self.call, self.cache = module, layer, call, cache
        narrows = {(m.parameter, m.axis) for family in structure.families for m in family.members}
        shape = structure.tensors[layer.weight].shape
        self.rows, self.columns = shape[layer.output_axis], shape[1 - layer.output_axis]
        self.fewer_rows, self.fewer_columns = (
            (layer.weight, axis) in narrows for axis in (layer.output_axis, 1 - layer.output_axis)
        )

    def dense(self, implanted: bool) -> Grid:
        """The layer itself; with fewer filters too where some may be `implanted`."""
        layer = self.layer
        # groups leave as a whole where what a filter reads is fixed; else all groups shrink alike
        leaving = not self.fewer_columns and not layer.transposed
        group = self.rows // layer.groups if leaving else layer.groups
        rows = _knots(self.rows, self.fewer_rows or implanted, 1 if layer.transposed else group, SHARES)
        columns = _knots(self.columns, self.fewer_columns, layer.groups if layer.transposed else 1, SHARES)
        parts = {}
        for r, c in itertools.product(rows, columns):
            widths = Widths(r, c, r // group if leaving else layer.groups)
            parts[r, c] = key(self.module, (r, c, widths.groups), self.call), partial(narrow, self.module, widths)
        return self._grid(rows, columns, parts)

    def implant(self, way: Way) -> Grid:
        """The implant alone."""
        size = block(self.layer)
        rows = _knots(self.rows, True, size, COARSE)
        columns = _knots(self.columns, self.fewer_columns, 1, COARSE)
        parts = {}
        for r, c in itertools.product(rows, columns):
            widths = Widths(r, c, r // size if self.layer.groups > 1 else 1)
            name = key(self.module, ("implant", *way, r, c, widths.groups), self.call)
            parts[r, c] = name, partial(implant, self.module, self.layer, way, widths)
        return self._grid(rows, columns, parts)

    def join(self) -> Grid:
        """What puts both together."""
        rows = _knots(self.rows, True, 1, COARSE)
        parts = {(r, 1): (key(self.module, ("join", r), self.call), partial(join, self.module, r)) for r in rows}
        return self._grid(rows, [1], parts)

    def after(self) -> Grid:
        """What an element-wise operation takes on what the layer gives."""
        rows = _knots(self.rows, self.fewer_rows, 1, COARSE)
        parts = {
            (r, 1): (key(self.module, ("after", r), self.call), partial(after, self.module, r / self.rows))
            for r in rows
        }
        return self._grid(rows, [1], parts)

    def _grid(self, rows: Sequence[int], columns: Sequence[int], parts: Mapping[tuple[int, int], _Part]) -> Grid:
        """The times of parts by their widths; what the cache does not hold is measured, all in turns."""
        missing = {name: make(self.call) for name, make in parts.values() if self.cache.get(name) is None}
        if missing:
            for name, latency in measure_latency(missing, (), runs=RUNS, seconds=SECONDS).items():
                self.cache.put(name, latency.least)
        return Grid(rows, columns, _falling([[self.cache.get(parts[r, c][0]) for c in columns] for r in rows]))


def _spread(rest: float, afters: Mapping[str, Grid]) -> dict[str, Grid]:
    """What lies between the layers: it shrinks with them as element-wise operations do, for small inputs hardly."""
    whole = sum(grid.milliseconds[-1][-1] for grid in afters.values())
    factor = rest / whole if whole else 0.0
    return {
        name: Grid(grid.rows, grid.columns, [[factor * ms for ms in line] for line in grid.milliseconds])
        for name, grid in afters.items()
    }


def _sum(grids: Sequence[Grid]) -> Grid:
    """The times of all calls of a layer."""
    times = np.sum([grid.milliseconds for grid in grids], axis=0)
    return Grid(grids[0].rows, grids[0].columns, times.tolist())


def _knots(size: int, narrows: bool, multiple: int, shares: Sequence[float]) -> list[int]:
    """The widths to time: whole groups where those leave, else as many for each group."""
    if not narrows:
        return [size]
    return sorted({min(size, max(multiple, round(share * size) // multiple * multiple)) for share in shares})


def _falling(times: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """A narrower layer is not slower: what says so is noise, or an odd width that `round_to` avoids."""
    found = np.array(times, dtype=np.float64)
    for axis in (0, 1):
        found = np.flip(np.minimum.accumulate(np.flip(found, axis), axis), axis)
    fallen: list[list[float]] = found.tolist()
    return fallen
