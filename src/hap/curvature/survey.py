"""What gates can follow, found out on a few samples before anything is measured.

Usually the first axis of what a module reads counts the samples. Window attention has several rows
for a sample, other models put positions first, and what does not depend on the input has no samples
at all. Code does not say which; running it does: with the samples in reverse order, the rows come in
reverse order. A family whose readers cannot be followed is left out, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hap import batches
from hap.curvature.layout import Layout
from hap.curvature.rows import Rows
from hap.curvature.taps import Lost, Tap, input_taps, not_followed, output_taps
from hap.types import Structure

log = logging.getLogger(__name__)

SAMPLES = 5  # of the first batch; seldom a divisor of another axis
FEW = 8  # batches that are looked at for one of several examples
CLOSE = 1e-4  # of the spread between rows: kernels round differently for other orders
ROUNDING = 100  # units in the last place of a row's norm, below which rows are alike

Key = tuple[str, str]  # a module, and "in" or "out"


@dataclass(frozen=True)
class Survey:
    """What has been found on the first batch.

    Attributes:
        followed: the structure without the families that no gate can follow.
        skipped: these families, and why.
        rows: for what a module reads or puts out, where the samples are; None if nowhere, left out if not called.
    """

    followed: Structure
    skipped: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[Key, Rows | None] = field(default_factory=dict)

    def embedded(self, gram: torch.Tensor, structure: Structure) -> torch.Tensor:
        """The matrix over all units of the whole structure, with zeros for those that were skipped."""
        if not self.skipped:
            return gram
        places = torch.cat([torch.full((f.size,), f.name not in self.skipped) for f in structure.families])
        whole = gram.new_zeros(len(places), len(places))
        kept = places.nonzero()[:, 0]
        whole[kept[:, None], kept] = gram
        return whole


def survey(model: nn.Module, structure: Structure, batch: batches.Batch | None) -> Survey:
    """Runs the first samples of `batch` in their order and in reverse.

    Args:
        model: in evaluation mode.
        structure: whose families and layers are to have gates.
        batch: the first one; None if there is none.

    Raises:
        HapError: no family can be followed.
    """
    if batch is None:
        return Survey(structure)
    layout = Layout.of(structure)
    inputs, lost = input_taps(model, structure, layout)
    rows = _all_rows(model, {"in": inputs, "out": output_taps(model, structure, layout)}, batch)
    for tap in inputs:
        if (tap.module, "in") not in rows and tap.layer.positions:  # without positions: called in training mode only
            problem = "the model's forward never calls as a module"
            expected = "consumers that are called, not used as functions of their weights"
            lost += [Lost(name, tap.module, problem, expected) for name in tap.families]
        elif rows.get((tap.module, "in"), Rows()) is None:
            problem, expected = "has an input without a batch axis", "as many rows for each sample"
            lost += [Lost(name, tap.module, problem, expected) for name in tap.families]
    skipped = {one.family: f"it is read by {one.reader!r}, which {one.problem}" for one in reversed(lost)}
    left = tuple(family for family in structure.families if family.name not in skipped)
    if structure.families and not left:
        raise not_followed(lost)
    for name, reason in skipped.items():
        log.warning("family %r stays, for want of a score: %s", name, reason)
    return Survey(replace(structure, families=left), skipped, rows)


def _all_rows(model: nn.Module, taps: Mapping[str, Sequence[Tap]], batch: batches.Batch) -> dict[Key, Rows | None]:
    batch = batches.to_device(batches.cut(batch, 0, min(SAMPLES, batches.size(batch))), batches.device_of(model))
    samples = batches.size(batch)
    reverse = pytree.tree_map_only(torch.Tensor, lambda t: t.flip(0) if t.ndim and len(t) == samples else t, batch)
    forwards, backwards = (_prints(model, taps, one) for one in (batch, reverse))
    return {key: _rows(forwards[key], backwards[key], samples) for key in forwards}


class Peeked:
    """Batches of which one has been looked at, without reading any twice.

    Attributes:
        first: the first one with several examples among the first few, since one example shows nowhere where the
            samples are; the first if there is none; None without any batch.
    """

    def __init__(self, data: Iterable[batches.Batch]) -> None:
        self._data = data
        self._rest: Iterator[batches.Batch] | None = iter(data)
        self._read: list[batches.Batch] = []
        for batch in islice(self._rest, FEW):
            self._read.append(batch)
            if batches.size(batch) > 1:
                break
        several = self._read and batches.size(self._read[-1]) > 1
        self.first = self._read[-1] if several else next(iter(self._read), None)

    def __iter__(self) -> Iterator[batches.Batch]:
        rest, self._rest = self._rest, None
        if rest is None:
            return iter(self._data)
        return chain(self._read, rest)


def _rows(forwards: Sequence[torch.Tensor], backwards: Sequence[torch.Tensor], samples: int) -> Rows | None:
    """The first axis, of those that could hold the samples, along which they changed places."""
    possible = [
        (Rows(axis, inner), f, b)
        for axis, (f, b) in enumerate(zip(forwards, backwards, strict=True))
        for inner in (False, True)
        if len(f) and len(f) % samples == 0
    ]
    if not all(values.isfinite().all() for values in (*forwards, *backwards)):
        return Rows()  # the criterion will say so
    for rows, f, b in possible:
        here = Rows(0, rows.inner)  # the sums have this axis first
        first, second = here.first(f, samples), here.first(b, samples)
        if _close(first.flip(0), second, f):
            alike = _close(first.flip(0), first, f)
            if samples == 1 or not alike or (rows == Rows() and len(f) == samples):
                return rows
    return None


def _close(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> bool:
    tolerance = CLOSE * scale[:, :2].std(0, correction=0) + ROUNDING * scale[:, 2].max()
    return bool(((first - second)[..., :2].abs() <= tolerance).all())


def _prints(model: nn.Module, taps: Mapping[str, Sequence[Tap]], batch: batches.Batch) -> dict[Key, list[torch.Tensor]]:
    prints: dict[Key, list[torch.Tensor]] = {}
    with torch.no_grad(), _watching(model, taps, prints):
        batches.forward(model, batch)
    return prints


@contextmanager
def _watching(
    model: nn.Module, taps: Mapping[str, Sequence[Tap]], prints: dict[Key, list[torch.Tensor]]
) -> Iterator[None]:
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    try:
        for tap in taps["in"]:
            hook = partial(_enter, prints, tap)
            handles.append(modules[tap.module].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in taps["out"]:
            handles.append(modules[tap.module].register_forward_hook(partial(_leave, prints, tap)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(prints: Any, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    prints[tap.module, "in"] = _sums(tap, args[0] if args else next(iter(kwargs.values())))


def _leave(prints: Any, tap: Tap, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    if isinstance(output, torch.Tensor):
        prints[tap.module, "out"] = _sums(tap, output)


def _sums(tap: Tap, values: torch.Tensor) -> list[torch.Tensor]:
    """For each axis that could hold samples, two weighted sums over all others and how they round, (length, 3).

    The weights are random, since norms make plain sums the same everywhere. A convolution's samples are
    on its first axis, a linear layer's on any but the last.
    """
    wide = values.detach().double()
    least = len(tap.layer.kernel) + 2 if tap.layer.kernel else 2
    axes = range(min(1, values.ndim) if tap.layer.kernel else values.ndim - 1) if values.ndim >= least else range(0)
    found = []
    for axis in axes:
        rows = wide.movedim(axis, 0).flatten(1)
        weights = torch.randn(rows.shape[1], 2, generator=torch.Generator().manual_seed(axis), dtype=torch.float64)
        rounding = torch.finfo(values.dtype).eps * rows.norm(dim=1, keepdim=True)
        found.append(torch.cat([rows @ weights.to(rows.device), rounding], 1))
    return found
