"""`apply`: the dense model and a plan -> the smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

import torch
from torch import nn

from hap.attention import OpenAttention, closed, fusing, nesting
from hap.batches import Batch, copied, device_of, settled_, take
from hap.errors import HapError, unknown
from hap.implants import (
    Fitted,
    FittedHeads,
    Implanted,
    Init,
    Target,
    build,
    dense_layer,
    form_of,
    from_weights,
    least_squares,
    narrow_heads,
)
from hap.planning import Plan
from hap.structure import mirrors
from hap.surgery.config import counts
from hap.surgery.heads import narrowed, packed_types
from hap.surgery.layout import Layout, layout
from hap.types import Progress, describe, silent


def apply(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch] | None = None,
    *,
    samples: int | None = 512,
    init: Init | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of the dense model with the plan carried out; the model itself is left as it is.

    Args:
        model: the dense model that the plan was made for.
        plan: from `hap.decide`.
        batches: data for the least-squares fit of the implants.
        samples: how many examples the fit reads at most.
        init: what implants start from: ``least-squares`` on the data (the default where there are any), ``weights``
            alone (centre taps, truncated SVD; the default where there are none; not for heads), or ``zeros``.
        progress: shows the fit.

    Returns:
        An ordinary, smaller module. Optimizers must be built after this.

    Raises:
        HapError: the model is not the one that the plan was made for (says what differs), or there is no data.
    """
    check(model, plan)
    small = copied(model)
    return apply_(small, plan, batches, samples=samples, init=init, progress=progress)


def apply_(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch] | None = None,
    *,
    samples: int | None = 512,
    init: Init | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """`apply` in place; on any error the model stays bit-identical. Returns the model."""
    check(model, plan)
    init = init or ("weights" if batches is None else "least-squares")
    if init not in get_args(Init):
        raise unknown("start of implants", init, get_args(Init))
    places = layout(plan)
    wanted = targets(plan, places)
    heads: dict[str, FittedHeads] = {}
    if init == "least-squares" and plan.implants:
        data = list(take(batches, samples, device_of(model)))
        fitted = least_squares(model, wanted, progress(data, "fitting implants", len(data))) if wanted else {}
        heads = _heads(model, plan, progress(data, "fitting narrow heads", len(data))) if plan.narrowed else {}
    else:
        _check_start(plan, init)
        fitted = {
            name: from_weights(dense_layer(model, name), target, zeros=init == "zeros")
            for name, target in wanted.items()
        }
    tensors = narrowed(model, plan, places, _tensors(model, places), heads)
    implants = {name: _implanted(model, plan, places, tensors, name, found) for name, found in fitted.items()}
    undo: list[Callable[[], None]] = []
    try:
        _commit(model, plan, places, tensors, implants, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    settled_(model)
    return model


def _heads(model: nn.Module, plan: Plan, batches: Iterable[Batch]) -> dict[str, FittedHeads]:
    """The fits of the heads that become narrow."""
    found = plan.narrowed.items()
    sites = {name: (heads, implant.form, implant.rank) for name, (heads, implant) in found if implant.rank}
    return narrow_heads(model, sites, batches)


def _check_start(plan: Plan, init: Init) -> None:
    if plan.narrowed and init == "weights":
        raise HapError(
            "narrow heads cannot be fitted without data",
            expected="batches, to see what queries, keys and values are",
            got="none",
            remedy="pass calibration batches, or init='zeros' where weights are loaded afterwards",
        )


def check(model: nn.Module, plan: Plan) -> None:
    """Raises a HapError that lists what differs if the model is not the one that was traced."""
    tensors, modules = describe(model)
    structure = plan.structure
    differences = []
    for kind, want, have in (("module", structure.modules, modules), ("tensor", structure.tensors, tensors)):
        for name in sorted({*want, *have}):
            old, new = want.get(name), have.get(name)
            if old != new:
                differences.append(f"{kind} {name!r}: traced {_show(old)}, now {_show(new)}")
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise HapError(
            "this is not the model that the plan was made for",
            expected=f"the dense model with fingerprint {structure.fingerprint[:12]}",
            got="; ".join(differences[:5]) + more,
            remedy="pass the dense model, or trace, measure and decide again",
        )


def _show(item: object) -> str:
    shape, dtype = getattr(item, "shape", None), getattr(item, "dtype", "")
    return f"{list(shape)} {dtype}" if shape is not None else "absent" if item is None else str(item)


def targets(plan: Plan, places: Layout) -> dict[str, Target]:
    """For each implanted layer, its implanted filters in their new order and the inputs that are left.

    Raises:
        HapError: a form is unknown, or not one for its layer.
    """
    found = {}
    for name, implant in plan.filters.items():
        layer, form = plan.structure.layer(name), form_of(implant.form)
        if not form.applies(layer) or form.ranked != (implant.rank is not None):
            raise HapError(
                f"{name!r} cannot have the plan's implant",
                expected="a form that applies to the layer, with a rank if it is one of those that have ranks",
                got=f"{form.name}, rank {implant.rank}, for a kernel of {layer.kernel} in {layer.groups} groups",
                remedy="let hap.decide make the plan, or choose another form",
            )
        shape = plan.structure.tensors[layer.weight].shape
        rows = set(implant.indices)
        found[name] = Target(
            [i for i in places.of(layer.weight, 0, shape[0]) if i in rows],
            list(places.of(layer.weight, 1, shape[1])),
            form,
            implant.rank,
        )
    return found


def _tensors(model: nn.Module, places: Layout) -> dict[str, torch.Tensor]:
    """The tensors that change, cut and reordered; memory format kept."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    new: dict[str, torch.Tensor] = {}
    for (name, axis), positions in places.kept.items():
        tensor = new.get(name, old[name].detach())
        new[name] = tensor.index_select(axis, torch.tensor(positions, device=tensor.device))
    for name, tensor in new.items():
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        if layout is not None and old[name].is_contiguous(memory_format=layout):
            new[name] = tensor.contiguous(memory_format=layout)
    return new


def _implanted(
    model: nn.Module, plan: Plan, places: Layout, tensors: dict[str, torch.Tensor], name: str, fitted: Fitted
) -> Implanted:
    layer = plan.structure.layer(name)
    rows = set(plan.implants[name].indices)
    flags = [i in rows for i in places.of(layer.weight, 0, layer.filters)]
    weight = tensors.get(layer.weight, model.get_parameter(layer.weight).detach())
    bias = None if layer.bias is None else tensors.get(layer.bias, model.get_parameter(layer.bias).detach())
    return build(dense_layer(model, name), weight, bias, flags, fitted)


def _commit(
    model: nn.Module,
    plan: Plan,
    places: Layout,
    tensors: dict[str, torch.Tensor],
    implants: dict[str, Implanted],
    undo: list[Callable[[], None]],
) -> None:
    """Puts everything in place, writing down how to take each step back."""
    current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        _set_data(current[name], tensor, undo)
    changed = {id(current[name]) for name in tensors}
    replaced = {model.get_submodule(name): new for name, new in implants.items()}
    attentions = {
        a for a in closed(model).values() if a.out_proj in replaced or any(id(p) in changed for p in a.parameters())
    }
    fused = fusing(model, replaced)
    _replace(model, {attention: OpenAttention(attention) for attention in attentions}, undo)
    for layer in fused:
        _set_attribute(layer, "activation_relu_or_gelu", 0, undo)
    for encoder in nesting(model) if attentions or fused else ():
        _set_attribute(encoder, "use_nested_tensor", False, undo)
    for module, kind in packed_types(model, plan):
        _set_attribute(module, "__class__", kind, undo)
    structure = plan.structure
    for config, attribute, value in counts(model, plan):
        _set_attribute(config, attribute, value, undo)
    for module, attribute, value in mirrors(model, places.kept, structure.tensors, structure.attributes):
        _set_attribute(module, attribute, value, undo)
    _replace(model, replaced, undo)


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module], undo: list[Callable[[], None]]) -> None:
    """Puts the new modules in the places of the old ones."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children leaves out second names
            if child is not None and child in new:
                _set_attribute(parent, key, new[child], undo)


def _set_data(tensor: torch.Tensor, data: torch.Tensor, undo: list[Callable[[], None]]) -> None:
    """Keeps the tensor object, and with it ties, hooks and requires_grad."""
    old, gradient = tensor.data, tensor.grad

    def restore() -> None:
        tensor.data, tensor.grad = old, gradient

    undo.append(restore)
    tensor.grad = None
    tensor.data = data


def _set_attribute(owner: object, name: str, value: object, undo: list[Callable[[], None]]) -> None:
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)
