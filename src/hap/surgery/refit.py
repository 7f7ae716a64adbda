"""`refit_`: closed-form correction of what is left, so that it makes up for what has gone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from hap.attention import opened
from hap.batches import Batch, device_of, evaluating, forward, real_tokens, take
from hap.errors import HapError
from hap.implants import Dense, Geometry, Implanted, Moments, Reading, Sums, flat, form_of, solve
from hap.implants.observe import MEMORY
from hap.planning import Plan
from hap.surgery.apply import check
from hap.surgery.layout import layout
from hap.surgery.lockstep import in_lockstep, thread_state
from hap.types import Progress, silent

log = logging.getLogger(__name__)


def refit_(
    small: nn.Module,
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    samples: int | None = 512,
    ridge: float = 1e-3,
    memory: int = MEMORY,
    progress: Progress = silent,
) -> None:
    """Solves each layer's weights anew so that it puts out what the dense layer puts out.

    Layer by layer, from the input on: ``min_W E |Y - W X|^2 + ridge |X|^2 |W - W_0|^2``, where X is what
    the small model's layer reads (the earlier layers refitted already), Y what the dense layer puts
    out, and W_0 the weights as cut. Implants are fitted anew, in their form. Exact ridge
    regression over streamed moments, no gradients. Padding of texts (by the batch's ``attention_mask``) does not count.

    Both models run over the data once: all batches stop at each layer, in threads of their own, and go on with its new
    weights. So the activations of all calibration examples at one place in each model are in memory together.

    Layers stay as they are (and are logged, as a warning if these are all) that are grouped or transposed
    convolutions, no modules of their own, projections to heads some of which became narrow, called never or more than
    once in a forward pass, share their weight with another module, or read so many inputs that their moments do not
    fit in `memory`.

    Args:
        small: what `hap.apply` made; changed in place. Where this raises, it is as it was.
        model: the dense model; left as it is.
        plan: the plan in between.
        batches: calibration data; one pass is read and kept in memory.
        samples: examples to use at most.
        ridge: pull towards the weights as cut, relative to the mean energy of the layer's inputs.
        memory: bytes of the moments of one layer at most.
        progress: shows the layers.

    Raises:
        HapError: `model` is not the plan's dense model, `small` is not what the plan made, there is no data, or
            activations are not finite.
    """
    check(model, plan)
    data = list(take(batches, samples, device_of(model)))
    jobs = _jobs(small, model, plan, memory)
    before = [(p, p.detach().clone()) for job in jobs.values() for p in job.entry.parameters()]
    device = device_of(model)
    state = thread_state(device, passes=2 * len(data))
    try:
        with evaluating(small), evaluating(model), opened(small), opened(model), torch.no_grad():
            with state():
                jobs = _called_once(small, jobs, data[0])
            inputs = {name: job.entry for name, job in jobs.items()}
            outputs = {name: job.dense for name, job in jobs.items()}
            stops = in_lockstep(small, model, inputs, outputs, data, state)
            with closing(stops), torch.autocast(device.type, enabled=False):
                solved = {
                    name for name, found in progress(stops, "refitting", len(jobs)) if jobs[name].solve(found, ridge)
                }
    except BaseException:
        with torch.no_grad():
            for parameter, old in before:
                parameter.copy_(old)
        raise
    if left := [layer.module for layer in plan.structure.layers if layer.module not in solved]:
        level = logging.INFO if solved else logging.WARNING
        log.log(level, "refit: %d layers stay as they are: %s", len(left), ", ".join(left))


@dataclass(frozen=True)
class _Job:
    """One layer to refit.

    Attributes:
        name: the module's name.
        geometry: how it reads.
        output_axis: the axis of its weight that carries the filters: 1 for GPT-2's linear layers.
        dense: the dense model's module.
        entry: the small model's module.
        rows: the dense filters that it still has: the unchanged ones, then those with implants.
        implanted: how many of them have implants.
    """

    name: str
    geometry: Geometry
    output_axis: int
    dense: nn.Module
    entry: nn.Module
    rows: tuple[int, ...]
    implanted: int

    def solve(self, found: Iterable[tuple[torch.Tensor, torch.Tensor, Batch]], ridge: float) -> bool:
        """Solves for the layer's weights, from its inputs and the dense layer's outputs; False if there are none."""
        sums: Sums | None = None
        for x, y, batch in found:
            if sums is None:
                axis = self.geometry.channel_axis
                every, filters = range(x.shape[axis]), y.shape[axis]
                sums = Sums(self.name, self.geometry, filters, self.rows, every, centre=False, device=x.device)
            sums.add(x, y, real_tokens(batch))
        if sums is None or not sums.count:
            return False
        moments, kept = sums.moments(), len(self.rows) - self.implanted
        whole = self.entry.dense if isinstance(self.entry, Implanted) else self.entry
        if whole is not None:
            _solve_dense(whole, self.output_axis, moments.of(slice(kept)), ridge)
        if isinstance(self.entry, Implanted):
            _solve_implant(self.entry, moments.of(slice(kept, None)), ridge)
        return True


def _solve_dense(layer: Any, output_axis: int, found: Moments, ridge: float) -> None:
    weight = layer.weight.detach().movedim(output_axis, 0)
    about = found if layer.bias is None else found.centred()
    solution = about.pulled(weight.flatten(1)[None], ridge).solution()
    weight.copy_(solution.reshape(weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(found.bias(solution))


def _solve_implant(layer: Implanted, found: Moments, ridge: float) -> None:
    form, geometry = form_of(layer.form), layer.geometry
    if form.centre:
        found = found.at(slice(geometry.centre, None, geometry.taps))
    weight = flat(layer.equivalent()[0], geometry, 1, centre=form.centre)
    old = layer.layers()[-1].bias
    factors, bias = solve(form, layer.rank, geometry, found, weight, biased=old is not None, ridge=ridge)
    for parameter, factor in zip(layer.factors(), factors, strict=True):
        parameter.copy_(factor)
    if old is not None and bias is not None:
        old.copy_(bias)


def _jobs(small: nn.Module, model: nn.Module, plan: Plan, memory: int) -> dict[str, _Job]:
    """The layers that can be refitted, by name."""
    places = layout(plan)
    modules = dict(small.named_modules())
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    narrow = set[str]()  # they have no dense twin
    for heads, found in plan.narrowed.values():
        held = {member.parameter for member in heads.carrying(found.form)}
        narrow |= {layer.module for layer in heads.projections if layer.weight in held}
    jobs = {}
    for layer in plan.structure.layers:
        entry, dense = modules.get(layer.module), model.get_submodule(layer.module)
        geometry = _geometry(dense)
        if not layer.positions or layer.groups > 1 or layer.transposed or layer.module in narrow:
            continue
        implant = plan.filters.get(layer.module)
        if implant is not None and not isinstance(entry, Implanted):
            raise HapError(
                f"{layer.module!r} has no implant",
                expected="the model that hap.apply made of this plan",
                got=type(entry).__name__,
            )
        if geometry and isinstance(entry, (Implanted, type(dense))) and users[id(dense.weight)] == 1:
            small_rows = set(implant.indices) if implant is not None else set()
            rows = sorted(places.of(layer.weight, layer.output_axis, layer.filters), key=small_rows.__contains__)
            inputs = 1 - layer.output_axis
            columns = places.of(layer.weight, inputs, plan.structure.tensors[layer.weight].shape[inputs])
            if Reading(rows, columns, centre=False).bytes(prod(layer.kernel)) <= memory:
                jobs[layer.module] = _Job(
                    layer.module, geometry, layer.output_axis, dense, entry, tuple(rows), len(small_rows)
                )
    return jobs


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _geometry(layer: nn.Module) -> Geometry | None:
    """How a layer reads; None of what is neither a convolution nor a linear layer, GPT-2's ``Conv1D`` being one.

    None too of a subclass that computes something else: pads by itself, normalises, or ends in an activation.
    """
    if isinstance(layer, Dense) and "forward" not in vars(layer) and type(layer).forward in _PLAIN:
        return Geometry.of(layer)
    return Geometry() if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") else None


def _called_once(small: nn.Module, jobs: Mapping[str, _Job], example: Batch) -> dict[str, _Job]:
    """The layers that a forward pass calls once: only their one input tells what they should put out."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [job.entry.register_forward_pre_hook(count(name)) for name, job in jobs.items()]
    try:
        forward(small, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: job for name, job in jobs.items() if calls[name] == 1}
