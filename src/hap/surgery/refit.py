"""`refit_`: closed-form correction of what is left, so that it makes up for what has gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hap.attention import opened
from hap.batches import Batch, device_of, evaluating, forward, take
from hap.errors import HapError
from hap.implants import Dense, Geometry, Implanted, Moments, Sums, flat, form_of, solve
from hap.planning import Plan
from hap.surgery.apply import check
from hap.surgery.layout import layout
from hap.types import Progress, silent


class _Reached(Exception):
    """Ends a forward pass at the layer of interest."""


def refit_(
    small: nn.Module,
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    samples: int | None = 512,
    ridge: float = 1e-3,
    progress: Progress = silent,
) -> None:
    """Solves each layer's weights anew so that it puts out what the dense layer puts out.

    Layer by layer, from the input on: ``min_W E |Y - W X|^2 + ridge |X|^2 |W - W_0|^2``, where X is what
    the small model's layer reads (the earlier layers refitted already), Y what the dense layer puts
    out, and W_0 the weights as cut. Implants are fitted anew, in their form. Exact ridge
    regression over streamed moments: one pass of both models up to each layer, no gradients.

    Grouped and transposed convolutions, and layers that are not modules of their own, stay as they are.

    Args:
        small: what `hap.apply` made; changed in place. Where this raises, it is as it was.
        model: the dense model; left as it is.
        plan: the plan in between.
        batches: calibration data; one pass is read and kept in memory.
        samples: examples to use at most.
        ridge: pull towards the weights as cut, relative to the mean energy of the layer's inputs.
        progress: shows the layers.

    Raises:
        HapError: `model` is not the plan's dense model, `small` is not what the plan made, or there is no data.
    """
    check(model, plan)
    data = list(take(batches, samples, device_of(model)))
    jobs = _jobs(small, model, plan)
    before = [(p, p.detach().clone()) for job in jobs for p in job.entry.parameters()]
    try:
        with evaluating(small), evaluating(model), opened(small), opened(model), torch.no_grad():
            for job in progress(jobs, "refitting", len(jobs)):
                job.solve(job.moments(small, model, data), ridge)
    except BaseException:
        with torch.no_grad():
            for parameter, old in before:
                parameter.copy_(old)
        raise


@dataclass(frozen=True)
class _Job:
    """One layer to refit.

    Attributes:
        name: the module's name.
        dense: the dense model's module.
        entry: the small model's module.
        rows: the dense filters that it still has: the unchanged ones, then those with implants.
        implanted: how many of them have implants.
    """

    name: str
    dense: Dense
    entry: Implanted | Dense
    rows: tuple[int, ...]
    implanted: int

    def moments(self, small: nn.Module, model: nn.Module, data: Sequence[Batch]) -> Moments:
        """Of what the small model's layer reads and the dense one's puts out."""
        sums: Sums | None = None
        for batch in data:
            x = _caught(small, self.entry, batch, before=True)
            y = _caught(model, self.dense, batch, before=False)
            geometry = Geometry.of(self.dense)
            if sums is None:
                axis = geometry.channel_axis
                every = range(x.shape[axis])
                sums = Sums(self.name, geometry, y.shape[axis], self.rows, every, centre=False, device=x.device)
            sums.add(x, y)
        assert sums is not None
        return sums.moments()

    def solve(self, found: Moments, ridge: float) -> None:
        """Writes the solution of the normal equations into the layer."""
        kept = len(self.rows) - self.implanted
        whole = self.entry.dense if isinstance(self.entry, Implanted) else self.entry
        if whole is not None:
            _solve_dense(whole, found.of(slice(kept)), ridge)
        if isinstance(self.entry, Implanted):
            _solve_implant(self.entry, found.of(slice(kept, None)), ridge)


def _solve_dense(layer: Dense, found: Moments, ridge: float) -> None:
    old = layer.weight.detach().flatten(1)[None]
    about = found if layer.bias is None else found.centred()
    solution = about.pulled(old, ridge).solution()
    layer.weight.copy_(solution.reshape(layer.weight.shape))
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


def _jobs(small: nn.Module, model: nn.Module, plan: Plan) -> list[_Job]:
    places = layout(plan)
    modules = dict(small.named_modules())
    jobs = []
    for layer in plan.structure.layers:
        entry, dense = modules.get(layer.module), model.get_submodule(layer.module)
        if not layer.positions or layer.groups > 1 or layer.transposed:
            continue
        implant = plan.implants.get(layer.module)
        if implant is not None and not isinstance(entry, Implanted):
            raise HapError(
                f"{layer.module!r} has no implant",
                expected="the model that hap.apply made of this plan",
                got=type(entry).__name__,
            )
        if isinstance(entry, Implanted | Dense) and isinstance(dense, Dense):
            small_rows = set(implant.indices) if implant is not None else set()
            rows = sorted(places.of(layer.weight, layer.output_axis, layer.filters), key=small_rows.__contains__)
            jobs.append(_Job(layer.module, dense, entry, tuple(rows), len(small_rows)))
    return jobs


def _caught(model: nn.Module, module: nn.Module, batch: Batch, *, before: bool) -> torch.Tensor:
    """What `module` reads, or puts out, in the forward pass; the pass ends there."""
    caught: list[torch.Tensor] = []

    def stop(value: torch.Tensor) -> None:
        caught.append(value)
        raise _Reached

    if before:
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: stop(args[0] if args else kwargs["input"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda _, __, output: stop(output))
    try:
        forward(model, batch)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    raise HapError(f"{type(module).__name__} is not called", expected="a layer that every forward pass calls")
