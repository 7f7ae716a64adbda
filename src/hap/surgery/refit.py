"""`refit_`: closed-form correction of what is left, so that it makes up for what has gone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hap.batches import Batch, device_of, evaluating, forward, take
from hap.errors import HapError
from hap.implants import ImplantedConv, centre
from hap.planning import Plan
from hap.surgery.apply import check
from hap.surgery.layout import layout
from hap.types import Progress, silent

_Part = nn.Linear | _ConvNd
_CHUNK = 1 << 24  # elements of unfolded patches held at a time


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
    out, and W_0 the weights as cut. Filters with implants are solved over the centre tap. Exact ridge
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
    before = [(p, p.detach().clone()) for job in jobs for p in job.parameters()]
    try:
        with evaluating(small), evaluating(model), torch.no_grad():
            for job in progress(jobs, "refitting", len(jobs)):
                job.solve(_moments(job, small, model, data), ridge)
    except BaseException:
        with torch.no_grad():
            for parameter, old in before:
                parameter.copy_(old)
        raise


@dataclass(frozen=True)
class _Job:
    """One layer to refit: its module in either model, and the dense filters that it still has.

    Attributes:
        name: the module's name.
        dense: the dense model's module.
        parts: the small model's modules that hold weights, each with the dense filters of its rows.
        entry: the small model's module that reads the layer's input.
    """

    name: str
    dense: nn.Module
    parts: tuple[tuple[_Part, tuple[int, ...]], ...]
    entry: nn.Module

    def parameters(self) -> Iterable[nn.Parameter]:
        """Everything that `solve` changes."""
        return itertools.chain.from_iterable(part.parameters(recurse=False) for part, _ in self.parts)

    @property
    def rows(self) -> list[int]:
        """The dense filters of all parts, one part after the other."""
        return [row for _, rows in self.parts for row in rows]

    def solve(self, moments: tuple[torch.Tensor, torch.Tensor], ridge: float) -> None:
        """Writes the solution of the normal equations into the parts."""
        xx, xy = moments
        start = 0
        for part, rows in self.parts:
            columns = self._columns(part, len(xx))
            target = xy[columns, start : start + len(rows)]
            start += len(rows)
            system = xx[columns][:, columns]
            pull = ridge * system.diagonal().mean().clamp_min(1e-30)
            old = _stacked(part).to(system)
            eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
            _unstack_(part, torch.linalg.solve(system + pull * eye, target + pull * old.T).T)

    def _columns(self, part: _Part, width: int) -> torch.Tensor:
        """Which columns of the unfolded input a part reads: all, or for an implant the centre tap's."""
        device = next(part.parameters()).device
        every = torch.arange(width, device=device)
        if part is self.entry or not isinstance(self.entry, ImplantedConv) or part is self.entry.dense:
            return every
        assert isinstance(self.dense, _ConvNd)
        place = 0
        for kernel in self.dense.kernel_size:
            place = place * kernel + centre(kernel)
        taps = every.new_tensor(self.dense.kernel_size).prod()
        biased = self.dense.bias is not None
        inputs = every[: width - biased].reshape(-1, int(taps))[:, place]
        return torch.cat([inputs, every[width - 1 :]]) if biased else inputs


def _jobs(small: nn.Module, model: nn.Module, plan: Plan) -> list[_Job]:
    places = layout(plan)
    modules = dict(small.named_modules())
    jobs = []
    for layer in plan.structure.layers:
        entry, dense = modules.get(layer.module), model.get_submodule(layer.module)
        rows = tuple(places.of(layer.weight, layer.output_axis, layer.filters))
        if not layer.positions or layer.groups > 1 or layer.transposed:
            continue
        if layer.module in plan.implants:
            if not isinstance(entry, ImplantedConv):
                raise HapError(
                    f"{layer.module!r} has no implant",
                    expected="the model that hap.apply made of this plan",
                    got=type(entry).__name__,
                )
            small_rows = set(plan.implants[layer.module].indices)
            large = tuple(r for r in rows if r not in small_rows)
            parts: list[tuple[_Part, tuple[int, ...]]] = [] if entry.dense is None else [(entry.dense, large)]
            parts.append((entry.implant, tuple(r for r in rows if r in small_rows)))
            jobs.append(_Job(layer.module, dense, tuple(parts), entry))
        elif isinstance(entry, (nn.Linear, _ConvNd)) and not isinstance(entry, _ConvTransposeNd):
            jobs.append(_Job(layer.module, dense, ((entry, rows),), entry))
    return jobs


def _moments(job: _Job, small: nn.Module, model: nn.Module, data: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """``E x x'`` and ``E x y'`` over the data, float64; x is unfolded, with a 1 at the end for the bias."""
    xx = xy = torch.zeros(())
    count = 0
    for batch in data:
        x = _caught(small, job.entry, batch, before=True)
        y = _caught(model, job.dense, batch, before=False)
        step = max(1, _CHUNK * len(x) // max(1, _patch_elements(job, x, y)))
        for first in range(0, len(x), step):
            a = _unfolded(job.dense, x[first : first + step])
            b = _rows(job.dense, y[first : first + step])[job.rows]
            xx = xx + (a @ a.T).double()
            xy = xy + (a @ b.T).double()
            count += a.shape[1]
    return xx / count, xy / count


def _caught(model: nn.Module, module: nn.Module, batch: Batch, *, before: bool) -> torch.Tensor:
    """What `module` reads, or puts out, in the forward pass; the pass ends there."""
    caught: list[torch.Tensor] = []

    def stop(value: torch.Tensor) -> None:
        caught.append(value)
        raise _Reached

    register: Callable[[], torch.utils.hooks.RemovableHandle]
    if before:
        register = lambda: module.register_forward_pre_hook(lambda _, args: stop(args[0]))  # noqa: E731
    else:
        register = lambda: module.register_forward_hook(lambda _, __, output: stop(output))  # noqa: E731
    handle = register()
    try:
        forward(model, batch)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    raise HapError(f"{type(module).__name__} is not called", expected="a layer that every forward pass calls")


def _patch_elements(job: _Job, x: torch.Tensor, y: torch.Tensor) -> int:
    """Elements that the unfolded input would have."""
    if isinstance(job.dense, _ConvNd):
        taps = job.dense.weight[0, 0].numel()
        return x.shape[1] * taps * (y.numel() // y.shape[1])
    return x.numel()


def _unfolded(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies, one column for each output position: (inputs * taps [+ 1], columns)."""
    columns = _patches(layer, x) if isinstance(layer, _ConvNd) else x.reshape(-1, x.shape[-1]).T
    if layer.bias is not None:
        columns = torch.cat([columns, columns.new_ones(1, columns.shape[1])])
    return columns


def _patches(conv: _ConvNd, x: torch.Tensor) -> torch.Tensor:
    """Shifted views of the padded input, one for each tap; any number of axes, stride and dilation."""
    x = F.pad(
        x, conv._reversed_padding_repeated_twice, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], conv.kernel_size, conv.dilation, conv.stride, strict=True)
    ]
    views = []
    for taps in itertools.product(*map(range, conv.kernel_size)):
        spans = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(taps, conv.dilation, sizes, conv.stride, strict=True)
        ]
        views.append(x[(slice(None), slice(None), *spans)])
    stacked = torch.stack(views, dim=2)  # (N, inputs, taps, *positions)
    return stacked.flatten(3).permute(1, 2, 0, 3).reshape(stacked.shape[1] * stacked.shape[2], -1)


def _rows(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """The outputs, one row for each filter: (filters, columns)."""
    return y.movedim(1, 0).reshape(y.shape[1], -1) if isinstance(layer, _ConvNd) else y.reshape(-1, y.shape[-1]).T


def _stacked(part: _Part) -> torch.Tensor:
    """Weights, with the bias as a last column."""
    weight = part.weight.detach().flatten(1)
    return weight if part.bias is None else torch.cat([weight, part.bias.detach()[:, None]], dim=1)


def _unstack_(part: _Part, solution: torch.Tensor) -> None:
    width = part.weight[0].numel()
    part.weight.copy_(solution[:, :width].reshape(part.weight.shape))
    if part.bias is not None:
        part.bias.copy_(solution[:, width])
