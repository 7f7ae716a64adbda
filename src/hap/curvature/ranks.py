"""The rank of feature maps (HRank)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores, register
from hap.curvature.layout import Layout
from hap.curvature.moments import Moments
from hap.curvature.sums import Sums
from hap.curvature.taps import Tap, input_taps, output_taps
from hap.errors import HapError


@register
class FeatureRank(Criterion):
    """The rank of what a unit hands on for one example, averaged over examples (HRank, Lin et al., CVPR 2020).

    A unit's map is taken where its consumers read it, behind norms and activations as in the paper, and averaged
    over them; a filter's is the layer's own output. In front of a convolution the matrix is the map, height x
    width; a unit of several channels has them one below the other. In front of a linear layer it has a row for
    each of the unit's features and a column for each position: up to its width for an attention head, 1 or 0 for
    one neuron, which is then no more than whether it ever fires. A low rank means that the unit can be spared.
    No labels are needed, and only forward passes. The standard error is from the spread over examples.
    """

    name: ClassVar[str] = "feature-rank"
    watches: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    covers_data: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Layers whose output cannot be seen (used as functions, not modules) have no filter scores.

        Raises:
            HapError: what a family's consumers read cannot be seen, or is not finite.
        """
        layout = Layout.of(problem.structure)
        reads, _ = input_taps(problem.model, problem.structure, layout)
        writes = output_taps(problem.model, problem.structure, layout)
        ranks = _Ranks(layout)
        moments, missed = Moments(), Sums()
        with torch.no_grad(), _watched(problem.model, reads, writes, ranks):
            for _, batch in problem.share(self.name, moments, missed):
                ranks.start(batches.size(batch))
                batches.forward(problem.model, batch)
                ranks.need_units()
                moments.add(ranks.total / ranks.calls.clamp(min=1))
                missed.add(batches=ranks.calls == 0)
        found = layout.scores(moments.mean, moments.stderr(), samples=moments.count, draws=0)
        seen = {layer.module for layer, offset in layout.filter_offsets() if not missed["batches"][offset]}
        filters, stderr = ({k: v for k, v in d.items() if k in seen} for d in (found.filters, found.filters_stderr))
        return Scores(moments.count, 0, found.scores, found.stderr, filters, stderr)


class _Ranks:
    """Ranks summed over the calls of modules, for every example of a batch and every unit and filter.

    Attributes:
        total: (examples, units and filters).
        calls: for every unit and filter, how many ranks of one example were added.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.start(0)

    def start(self, examples: int) -> None:
        """Begin a batch."""
        self.total = torch.zeros(examples, self.layout.size, dtype=torch.float64)
        self.calls = torch.zeros(self.layout.size, dtype=torch.float64)

    def add(self, tap: Tap, values: torch.Tensor) -> None:
        """Add the ranks of what one module reads or puts out; nothing, if it has no row for each example."""
        if values.ndim < max(2, len(tap.layer.kernel) + 2) or len(values) != len(self.total):
            return
        if not values.isfinite().all():
            raise HapError(
                "a feature map is not finite",
                expected="finite numbers",
                got=f"NaN or infinity at {tap.layer.module!r}",
                remedy="check inputs and weights for NaN or overflow",
            )
        maps = _maps(tap, values.to(torch.promote_types(values.dtype, torch.float32)))
        order = tap.gates.argsort(stable=True)
        gates, widths = tap.gates[order].unique_consecutive(return_counts=True)
        for channels, gate in _of_one_width(tap.channels[order], gates, widths):
            ranks = torch.linalg.matrix_rank(maps[:, channels].flatten(2, 3)).cpu()
            self.total.index_add_(1, gate, ranks.double())
            self.calls.index_add_(0, gate, torch.ones(len(gate), dtype=torch.float64))

    def need_units(self) -> None:
        """Raises a HapError if a family has not been seen."""
        for family, offset in self.layout.unit_offsets():
            if not self.calls[offset : offset + family.size].all():
                raise HapError(
                    f"feature-rank cannot see what reads family {family.name!r}",
                    expected="consumers that are called as modules, with one row for each example",
                    remedy=f"leave it out: hap.trace(..., ignore=[{family.name!r}]); or choose another criterion",
                )


def _maps(tap: Tap, values: torch.Tensor) -> torch.Tensor:
    """The matrix of each channel: (examples, channels, height, width); (examples, features, 1, positions)."""
    if tap.layer.kernel:
        return values.reshape(*values.shape[:2], -1, values.shape[-1])
    return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2).unsqueeze(2)


def _of_one_width(
    channels: torch.Tensor, gates: torch.Tensor, widths: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Channels (gates, width) and their gates, on the CPU, for each number of channels that a gate has."""
    ends = widths.cumsum(0)
    for width in widths.unique().tolist():
        same = widths == width
        first = (ends - widths)[same]
        yield channels[first.unsqueeze(1) + torch.arange(width, device=first.device)], gates[same].cpu()


@contextlib.contextmanager
def _watched(model: nn.Module, reads: list[Tap], writes: list[Tap], ranks: _Ranks) -> Iterator[None]:
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    try:
        for tap in reads:
            hook = partial(_enter, ranks, tap)
            handles.append(modules[tap.module].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in writes:
            handles.append(modules[tap.module].register_forward_hook(partial(_leave, ranks, tap)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(ranks: _Ranks, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ranks.add(tap, args[0] if args else next(iter(kwargs.values())))


def _leave(ranks: _Ranks, tap: Tap, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    ranks.add(tap, output)
