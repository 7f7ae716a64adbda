"""`trace`: from a model and example inputs to its structure."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap.attention import opened
from hap.batches import evaluating
from hap.errors import HapError, unknown
from hap.structure.export import export
from hap.structure.families import families
from hap.structure.propagate import propagate
from hap.structure.rules.registry import Multiplication
from hap.structure.trial import Trial
from hap.structure.units import Units
from hap.types import IGNORED, Family, Frozen, Layer, Structure, TensorSpec, describe

log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ignore: Iterable[str] = (),
) -> Structure:
    """Finds what can leave a model: the families of units, from its exported graph.

    The graph is taken in evaluation mode. Where parameters are read in training mode only
    (auxiliary classifiers), a second graph ties their units too, so that the smaller model trains.

    Args:
        model: any module that `torch.export` captures; left as it is.
        args: example positional inputs; their first axis is the batch.
        kwargs: example keyword inputs.
        ignore: names of modules to leave alone, with all inside them; ``*`` and ``?`` are wildcards.

    Returns:
        The structure. Its costs are for one sample of this input size.

    Raises:
        HapError: the model cannot be exported, or a name to ignore matches no module.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> [(f.name, f.kind, f.size) for f in trace(net, (torch.zeros(1, 4),)).families]
    [('0', 'neuron', 6)]
    """
    kwargs = kwargs or {}
    units = Units()
    tensors, modules = describe(model)
    with evaluating(model), opened(model):
        context = propagate(export(model, args, kwargs), units, model)
        calls = context.layers
        unread = [name for name, p in model.named_parameters() if not units.knows(name)]
        if unread:
            calls += _training_calls(model, args, kwargs, units, {call.weight for call in calls})
        units.settle_grids()
        _freeze_special(model, units)
        _ignore(model, units, ignore)
        convolutions = {call.weight for call in calls if call.kernel}
        found, frozen = families(units, convolutions)
        attributes, refused = Trial(model, args, kwargs, found, context.written, units).settle()
    for family in found:
        if family.name in refused:
            _freeze(units, family, refused[family.name])
    if refused:
        found, frozen = families(units, convolutions)
    layers = _layers(calls, _samples(args, kwargs))
    return Structure(found, (*frozen, *_unread(tensors, units)), layers, tensors, modules, attributes)


def _freeze(units: Units, family: Family, reason: str) -> None:
    for member in family.members:
        ids = units.owners[member.parameter, member.axis]
        units.freeze(ids[[i for unit in member.indices for i in unit]], reason)


def _training_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], units: Units, known: set[str]
) -> list[Multiplication]:
    """States the relations of the training graph; returns the layers that are not `known` yet.

    These cost nothing when the model is used, and nothing then tells how much their units matter:
    they stay.
    """
    for module in model.modules():
        module.training = True
    try:
        calls = propagate(export(model, args, kwargs), units, model).layers
    except HapError as error:
        log.warning(
            "parameters that only training mode reads stay as they are, and what they read may leave, so that the "
            "small model may only serve for inference: the graph of training mode cannot be had: %s",
            error.what,
        )
        return []
    finally:
        for module in model.modules():
            module.training = False
    new = [dataclasses.replace(call, multiplications=0) for call in calls if call.weight not in known]
    for call in new:
        units.freeze(units.own(call.weight, call.output_axis, call.filters), "used in training mode only")
    return new


def _ignore(model: nn.Module, units: Units, patterns: Iterable[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    hits: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(modules, pattern)
        if not found:
            raise unknown("module to ignore", pattern, [name for name in modules if name])
        hits.update(found)
    _freeze_inside(model, units, [modules[hit] for hit in hits], IGNORED)


def _freeze_special(model: nn.Module, units: Units) -> None:
    """Freezes what the graph shows as prunable and something outside of it forbids."""
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    _freeze_inside(
        model, units, attentions, "nn.MultiheadAttention with a bias of keys, zero attention or in a subclass"
    )
    fixed = dict(model.named_buffers())
    for key, role in units.roles.items():
        if key[0] in fixed and role != "follower":
            units.freeze(units.owners[key], "a weight that is a buffer")


def _freeze_inside(model: nn.Module, units: Units, modules: Iterable[nn.Module], reason: str) -> None:
    """Freezes every tensor of these modules, under whatever name it is known."""
    inside = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    names = {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) in inside}
    for (tensor, _), ids in units.owners.items():
        if tensor in names:
            units.freeze(ids, reason)


def _unread(tensors: Mapping[str, TensorSpec], units: Units) -> list[Frozen]:
    return [
        Frozen(name, axis, tuple(range(size)), "not used in the forward pass")
        for name, spec in tensors.items()
        if spec.is_parameter and not units.knows(name)
        for axis, size in enumerate(spec.shape)
    ]


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return leaf.shape[0]
    return 1


def _layers(calls: list[Multiplication], samples: int) -> tuple[Layer, ...]:
    """One record a weight; a layer that is called several times costs the sum."""
    uses: dict[str, int] = {}
    first: dict[str, Multiplication] = {}
    for call in calls:
        uses[call.weight] = uses.get(call.weight, 0) + call.multiplications
        first.setdefault(call.weight, call)
    return tuple(
        Layer(
            module=call.weight.rpartition(".")[0],
            weight=call.weight,
            bias=call.bias,
            filters=call.filters,
            output_axis=call.output_axis,
            kernel=call.kernel,
            groups=call.groups,
            transposed=call.transposed,
            positions=uses[call.weight] // samples,
        )
        for call in first.values()
    )
