"""Measures a `LatencyTable`: every layer alone, on inputs of its real size, at a grid of widths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hap.batches import device_of, evaluating
from hap.errors import HapError
from hap.planning.latency import measure_latency
from hap.planning.latency_cache import LatencyCache
from hap.planning.latency_table import Grid, LatencyTable
from hap.types import Layer, Progress, Structure, silent

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of a layer's width, at which it is timed
RUNS = 9
SECONDS = 1.0  # for all widths of a layer, beyond the least number of runs


def time_layers(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cache: str | Path | None = None,
    progress: Progress = silent,
) -> LatencyTable:
    """Times the layers of a model on its own device, in its own dtype and memory format.

    Args:
        model: the dense model; left as it is.
        structure: from `hap.trace`.
        args, kwargs: inputs, of the size that counts in deployment.
        cache: a JSON file that keeps times by device, number of threads, version of PyTorch and the layer's geometry;
            what it holds is not measured again.
        progress: shows the layers.

    Raises:
        HapError: the model cannot read the inputs, or the cache is not one.
    """
    device = device_of(model)
    kept = LatencyCache(cache, device)
    inputs = _inputs(model, structure, args, dict(kwargs or {}))
    grids: dict[str, Grid] = {}
    whole = 0.0
    for layer in progress(structure.layers, "timing layers", len(structure.layers)):
        calls = inputs.get(layer.module, [])
        module = model.get_submodule(layer.module)
        found = [_grid(module, layer, structure, x, kept) for x in calls]
        if found:
            times = np.sum([grid.milliseconds for grid in found], axis=0)
            grids[layer.module] = Grid(found[0].rows, found[0].columns, times)
            whole += float(times[-1, -1])
    key = json.dumps(["model", structure.fingerprint, *(list(t.shape) for t in _tensors((args, kwargs)))])
    dense = kept.get(key)
    if dense is None:
        dense = measure_latency({"dense": _Call(model, args, dict(kwargs or {}))}, (), runs=30)["dense"].median
        kept.put(key, dense)
    if not whole:
        raise HapError(
            "no layer of this model could be timed",
            expected="convolutions or linear layers that run on the inputs",
            got=f"{len(structure.layers)} layers, none of which is called as a module",
            remedy="give a budget of params or macs",
        )
    kept.write()
    return LatencyTable(kept.device, dense / whole, grids)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Call(nn.Module):
    """A module with its inputs."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, dict(kwargs or {})

    def forward(self) -> Any:
        return self.module(*self.args, **self.kwargs)


def _inputs(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """What each layer reads in one pass, call by call: tensors of the same shapes, not the values."""
    found: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = _tensors((given, named))
            found.setdefault(name, []).append(torch.empty_like(tensors[0], device="meta"))

        return hook

    handles = [
        model.get_submodule(layer.module).register_forward_pre_hook(note(layer.module), with_kwargs=True)
        for layer in structure.layers
        if isinstance(model.get_submodule(layer.module), (_ConvNd, nn.Linear))
    ]
    try:
        with evaluating(model), torch.inference_mode():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class _Widths:
    """Filters, what each of them reads, and groups of a narrower layer."""

    rows: int
    columns: int
    groups: int


def _grid(module: nn.Module, layer: Layer, structure: Structure, x: torch.Tensor, cache: LatencyCache) -> Grid:
    """The times of one call of a layer."""
    assert isinstance(module, (_ConvNd, nn.Linear))
    narrows = {(m.parameter, m.axis) for family in structure.families for m in family.members}
    shape = structure.tensors[layer.weight].shape
    full = shape[1 - layer.output_axis]
    narrow, narrower = ((layer.weight, axis) in narrows for axis in (layer.output_axis, 1 - layer.output_axis))
    # groups leave as a whole where what a filter reads is fixed; else all groups shrink alike
    leaving = not narrower and not layer.transposed
    group = shape[layer.output_axis] // layer.groups if leaving else layer.groups
    rows = _knots(shape[layer.output_axis], narrow, 1 if layer.transposed else group)
    columns = _knots(full, narrower, layer.groups if layer.transposed else 1)
    widths = [_Widths(r, c, r // group if leaving else layer.groups) for r in rows.tolist() for c in columns.tolist()]
    keys = {w: _key(module, w, x) for w in widths}
    missing = {k: _narrow(module, w, x) for w, k in keys.items() if cache.get(k) is None}
    if missing:
        for key, latency in measure_latency(missing, (), runs=RUNS, seconds=SECONDS).items():
            cache.put(key, latency.median)
    times = np.array([cache.get(keys[w]) for w in widths]).reshape(len(rows), len(columns))
    return Grid(rows, columns, _falling(times))


def _knots(size: int, narrows: bool, multiple: int) -> np.ndarray:
    """The widths to time: whole groups where those leave, else as many for each group."""
    if not narrows:
        return np.array([size])
    return np.unique([min(size, max(multiple, round(share * size) // multiple * multiple)) for share in SHARES])


def _falling(times: np.ndarray) -> np.ndarray:
    """A narrower layer is not slower: what says so is noise, or an odd width that `round_to` avoids."""
    for axis in (0, 1):
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
    return times


def _key(module: _ConvNd | nn.Linear, widths: _Widths, x: torch.Tensor) -> str:
    """Everything that the time depends on, in words."""
    settings: list[Any] = [type(module).__name__, widths.rows, widths.columns, widths.groups, module.bias is not None]
    if isinstance(module, _ConvNd):
        settings += [module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode]
        settings += [list(x.shape[:1]), list(x.shape[2:]), x.stride(1) == 1]
    else:
        settings += [list(x.shape[:-1])]
    return json.dumps([*settings, str(module.weight.dtype)])


def _narrow(module: _ConvNd | nn.Linear, widths: _Widths, x: torch.Tensor) -> nn.Module:
    """A layer of these widths, with inputs."""
    weight, shape = module.weight, list(x.shape)
    options: dict[str, Any] = {"bias": module.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(module, nn.Linear):
        return _Call(
            nn.Linear(widths.columns, widths.rows, **options), (torch.rand(*shape[:-1], widths.columns).to(weight),)
        )
    for name in ("stride", "padding", "dilation", "padding_mode"):
        options[name] = getattr(module, name)
    # a transposed weight holds all inputs, and of the outputs those of a group; the others the other way round
    per_input, per_output = (1, widths.groups) if isinstance(module, _ConvTransposeNd) else (widths.groups, 1)
    inputs, outputs = widths.columns * per_input, widths.rows * per_output
    new = type(module)(inputs, outputs, module.kernel_size, groups=widths.groups, **options)
    values = torch.rand(shape[0], inputs, *shape[2:]).to(weight)
    if x.stride(1) == 1 and x.ndim == 4:
        return _Call(new.to(memory_format=torch.channels_last), (values.contiguous(memory_format=torch.channels_last),))
    return _Call(new, (values,))
