"""What each form leaves undone, on a layer's real inputs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from hap.batches import Batch, device_of, take
from hap.implants.fit import flat
from hap.implants.form import FORMS, Form, form_of
from hap.implants.geometry import Dense, Geometry
from hap.implants.moments import Moments
from hap.implants.observe import MEMORY, Reading, dense_layer, observe
from hap.types import Layer, Progress, Structure, silent

log = logging.getLogger(__name__)

ROUNDING = 1e-12  # of a filter's energy: a variance below it is a constant output, and what rounding made of it

_TYPES = ("Conv1d", "Conv2d", "Conv3d", "Linear")


@dataclass(frozen=True, eq=False)
class Option:
    """One way to implant a layer's filters.

    Attributes:
        form: name of the form.
        rank: of forms that have one.
        undone: for each filter, the share of its output's variance that the least-squares fit misses, when all filters
            of the layer are replaced together; float64 ``(filters,)``, in [0, 1]. Of forms whose filters share
            something, fewer filters are served better in the sum.
    """

    form: str
    rank: int | None
    undone: torch.Tensor


def options(
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Batch],
    *,
    samples: int | None = 512,
    layers: Collection[str] | None = None,
    forms: Sequence[str] | None = None,
    memory: int = MEMORY,
    progress: Progress = silent,
) -> dict[str, tuple[Option, ...]]:
    """For each layer (by module name), the forms that apply and cost less, and what each leaves undone.

    Second moments of all layers are summed in one pass over the data where `memory` holds them; else the layers take
    turns, a pass each. A layer that does not fit alone is offered only what reads its centre taps. Layers that are not
    called as modules, but lend their weights, are left out (and are logged).

    Args:
        model: the dense model; left as it is.
        structure: its structure.
        batches: calibration data.
        samples: examples to read at most.
        layers: names of modules to look at; None for every convolution and linear layer.
        forms: names of the forms to look at; None for those that are worth a look.
        memory: bytes of moments held at a time.
        progress: shows the batches.

    Raises:
        HapError: an unknown form, no data, or activations that are not finite.
    """
    asked = None if forms is None else [form_of(name) for name in forms]
    choices, readings, held = {}, {}, _held(model, structure)
    for layer in structure.layers:
        columns = structure.tensors[layer.weight].shape[1]
        if (
            layer.positions
            and layer.weight not in held
            and _plain(structure, layer)
            and (layers is None or layer.module in layers)
        ):
            geometry = Geometry.of(dense_layer(model, layer.module))
            known = [form for form in FORMS.values() if form.offered(geometry)] if asked is None else asked
            found = list(_choices(layer, columns, [form for form in known if form.suits(geometry)], memory))
            if found:
                choices[layer.module] = found
                centre = all(form.centre for form, _ in found)
                readings[layer.module] = Reading(range(layer.filters), range(columns), centre)
    data = progress(take(batches, samples, device_of(model)), "fitting every form", None)
    fitted = {
        name: tuple(_fitted(dense_layer(model, name), readings[name], found, choices[name]))
        for name, found in observe(model, readings, data, memory=memory, uncalled="skip")
    }
    if left := [name for name in readings if name not in fitted]:
        log.info("no implants for %d layers that are never called as modules: %s", len(left), ", ".join(left))
    return fitted


def _held(model: nn.Module, structure: Structure) -> set[str]:
    """Weights that no implant can stand for: kernels that cannot shrink, and what has several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {name for found in names.values() if len(found) > 1 for name in found}
    return shared | {f.parameter for f in structure.frozen if f.axis >= 2}


def _plain(structure: Structure, layer: Layer) -> bool:
    return structure.modules.get(layer.module) in _TYPES


def _choices(layer: Layer, columns: int, forms: Sequence[Form], memory: int) -> Iterator[tuple[Form, int | None]]:
    """Forms and ranks that cost less than the layer, and whose moments fit in memory."""
    filters, taps = layer.filters, prod(layer.kernel)
    whole = Reading(range(filters), range(columns), centre=False)
    for form in forms:
        if form.applies(layer) and (form.centre or whole.bytes(taps) <= memory):
            for rank in form.ranks(layer, filters, columns):
                if form.weights(layer, filters, columns, rank) < filters * columns * taps:
                    yield form, rank


def _fitted(
    layer: Dense, reading: Reading, found: Moments, choices: Iterable[tuple[Form, int | None]]
) -> Iterator[Option]:
    """Fits each form to all filters, about the means: a bias, or the batch norm that follows, sees to those."""
    geometry, groups = Geometry.of(layer), len(found.x)
    about, weight = found.centred(), flat(layer.weight.detach().double(), geometry, groups, centre=reading.centre)
    seen = {reading.centre: (about, about.pulled(weight))}
    if not reading.centre:
        taps = slice(geometry.centre, None, geometry.taps)
        seen[True] = about.at(taps), about.at(taps).pulled(weight[:, :, taps])
    for form, rank in choices:
        moments, pulled = seen[form.centre]
        factors = form.fit(pulled, geometry, rank)
        missed = moments.error(flat(form.dense(factors, geometry, rank), geometry, groups, centre=form.centre))
        undone = torch.where(about.yy > ROUNDING * found.yy, missed / about.yy, 0.0).clamp(0, 1)
        yield Option(form.name, rank, undone.flatten())
