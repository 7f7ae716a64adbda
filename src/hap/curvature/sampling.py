"""Sampling until it is good enough: read examples until the ranking is settled where units are cut off.

Scores are means over examples, so disjoint chunks of the data can be scored one after the other and merged. After 128,
256, 512, ... examples one looks whether more of them would still change which units leave.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores
from hap.curvature.sums import State
from hap.errors import HapError
from hap.types import silent

log = logging.getLogger(__name__)

FIRST = 128  # examples at the first look
BLOCK = 32  # examples scored together where only the spread between chunks tells what other data would say
MARGIN = 0.8  # heavy tails make standard errors too small where scores are too low: see docs/curvature.md


def until_settled(criterion: Criterion, problem: Problem, *, keep: float, risk: float) -> Scores:
    """Scores from as many examples as it takes, `problem.samples` at most.

    Stops at the first look at which `misplaced` is below `MARGIN` times `risk`. Every chunk has random draws of its
    own. Logs a warning if the data or the cap ends first.

    Args:
        keep: the fraction of units that stays; the others, of the lowest scores, leave.
        risk: the expected fraction of units on the wrong side that is good enough.

    Raises:
        HapError: the criterion is no mean over examples; or as the criterion does.
    """
    need_additive(criterion)
    reader = _Reader(problem.batches(criterion.label))
    merged, walk = Merged(), problem.walk
    chunks = walk.resume(merged, reader.first)
    if walk.saved:
        walk.saved.need_count(reader.skip(merged.count), merged.count, of="examples")
    look = min(FIRST, problem.samples)
    while True:
        while look < merged.count:  # looked at before the run was interrupted
            look = min(2 * look, problem.samples)
        while merged.count < look and reader.more():
            step = look - merged.count if criterion.covers_data else min(BLOCK, look - merged.count)
            chunk = replace(problem, data=reader.take(step), samples=step, seed=_seed(problem, chunks), progress=silent)
            merged.add(criterion.score(chunk), covers_data=criterion.covers_data)
            chunks += 1
            walk.next(chunks)
        doubt = merged.misplaced(keep)
        log.info("%s: %d examples, %.1f %% of the units misplaced", criterion.label, merged.count, 100 * doubt)
        if doubt <= MARGIN * risk:
            return merged.scores()
        if merged.count < look or look == problem.samples:
            break
        look = min(2 * look, problem.samples)
    log.warning(
        "%s: the ranking is not settled after %d examples, %s: an estimated %.1f %% of the units are on the wrong side "
        "of the cut, where %.1f %% would do",
        criterion.label,
        merged.count,
        "the cap" if merged.count == problem.samples else "all there are",
        100 * doubt,
        100 * MARGIN * risk,
    )
    return merged.scores()


def misplaced(scores: torch.Tensor, stderr: torch.Tensor, keep: float) -> float:
    """The expected fraction of units that noise puts on the wrong side of the cut.

    The cut t lies half-way between the last unit that leaves and the first that stays. A unit of score s is on the
    wrong side with probability ``Phi(-|s - t| / stderr)``: with normal errors, and before one knows anything about it,
    a unit's true score lies as likely above its estimate as below. A unit without error is where it belongs.

    Args:
        scores, stderr: of all units, flat.
        keep: the fraction of units that stays.

    Returns:
        The mean of the probabilities; NaN where a standard error is.

    >>> misplaced(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.1, 0.1, 0.1]), 0.5) < 1e-6
    True
    >>> round(misplaced(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 1e6), 0.5), 3)
    0.5
    """
    leave = round((1 - keep) * len(scores))
    if not 0 < leave < len(scores):
        return 0.0
    ranked = scores.sort().values
    distance = (scores - (ranked[leave - 1] + ranked[leave]) / 2).abs()
    wrong = torch.where(stderr == 0, 0, torch.special.ndtr(-distance / stderr))
    return float(wrong.mean())


def need_additive(criterion: Criterion) -> None:
    """Raises a HapError if scores of chunks of the data cannot be merged."""
    if not criterion.additive:
        raise HapError(
            f"{criterion.name} cannot tell when it has seen enough",
            expected="samples='auto' with a criterion whose scores are means over examples",
            got=f"criterion {criterion.label!r}",
            remedy="give a number of samples" if criterion.needs_data else "leave samples out: it reads no data",
        )


class Merged:
    """A `Part`: scores of disjoint chunks as if of one: means, and the standard errors that the examples' spread gives.

    As `Moments` merges rows (Chan, Golub and LeVeque 1979), each chunk by its number of terms, such as tokens. For the
    errors a chunk's examples count as if all had its mean number.

    Attributes:
        count: number of examples.
        draws: of each chunk.
        terms: number of terms.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """See `Part.clear`."""
        self.count = self.draws = 0
        self.terms = 0.0
        self._freedom = -1  # degrees of freedom of the squares
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)
        self._weights = 0.0  # sum of the squares of the examples' numbers of terms
        self._gram: torch.Tensor | None = None
        self._sizes: dict[str, dict[str, int]] = {"units": {}, "filters": {}}

    def add(self, found: Scores, *, covers_data: bool) -> None:
        """Merge a chunk; `covers_data` as in `Criterion`: else a chunk is one draw, whatever its own error is."""
        size = found.samples
        terms = float(size) if found.terms is None else found.terms
        share = terms / (self.terms + terms)
        step = _flat(found.scores, found.filters) - self._mean
        weights = terms**2 / size
        apart = self._weights * share**2 + weights * (1 - share) ** 2
        self._squares = self._squares + step.square() * apart
        if covers_data and size > 1:
            own = _flat(found.stderr, found.filters_stderr).square() * (terms**2 * (size - 1) / size)
            self._squares = self._squares + own
        self._mean = self._mean + step * share
        if found.gram is not None:
            self._gram = found.gram if self._gram is None else self._gram + (found.gram - self._gram) * share
        self.count += size
        self.draws = found.draws
        self.terms += terms
        self._weights += weights
        self._freedom += size if covers_data else 1
        for kind, values in (("units", found.scores), ("filters", found.filters)):
            self._sizes[kind] = {name: len(value) for name, value in values.items()}

    def state(self) -> State:
        """See `Part.state`."""
        if not self.count:
            return {}
        facts = [self.count, self.draws, self.terms, self._weights, self._freedom]
        found = {"facts": torch.tensor(facts, dtype=torch.float64), "mean": self._mean, "squares": self._squares}
        for kind, sizes in self._sizes.items():
            for place, (name, size) in enumerate(sizes.items()):
                found[f"{kind}.{name}"] = torch.tensor([place, size])
        return found if self._gram is None else {**found, "gram": self._gram}

    def merge(self, state: State) -> None:
        """See `Part.merge`; this one must be empty."""
        if not state:
            return
        assert not self.count, "merges into an empty one only"
        count, self.draws, self.terms, self._weights, freedom = state["facts"].tolist()
        self.count, self.draws, self._freedom = int(count), int(self.draws), int(freedom)
        self._mean, self._squares, self._gram = state["mean"], state["squares"], state.get("gram")
        for kind in self._sizes:
            named = {
                name.removeprefix(f"{kind}."): t.tolist() for name, t in state.items() if name.startswith(f"{kind}.")
            }
            self._sizes[kind] = {name: size for name, (_, size) in sorted(named.items(), key=lambda item: item[1])}

    def stderr(self) -> torch.Tensor:
        """Standard errors, flat; NaN with nothing to tell them from."""
        if self._freedom < 1:
            return torch.full_like(self._mean, torch.nan)
        return (self._squares * (self.count / self._freedom)).sqrt() / self.terms

    def misplaced(self, keep: float) -> float:
        """`misplaced` of the units so far; NaN with too little to tell."""
        units = sum(self._sizes["units"].values())
        if self._freedom < 3:
            return torch.nan
        student = (self._freedom / (self._freedom - 2)) ** 0.5  # standard deviation of t with few degrees of freedom
        return misplaced(self._mean[:units], self.stderr()[:units] * student, keep)

    def scores(self) -> Scores:
        """All chunks as one."""
        scores, filters = self._named(self._mean)
        stderr, filters_stderr = self._named(self.stderr())
        return Scores(self.count, self.draws, scores, stderr, filters, filters_stderr, self._gram, self.terms)

    def _named(self, flat: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
        """A flat vector as the scores of units, and of filters."""
        found, start = [], 0
        for sizes in self._sizes.values():
            total = sum(sizes.values())
            parts = flat[start : start + total].split(list(sizes.values()))
            found.append({name: part.clone() for name, part in zip(sizes, parts, strict=True)})
            start += total
        return tuple(found)


def _flat(units: Mapping[str, torch.Tensor], filters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.to("cpu").double() for values in (*units.values(), *filters.values())])


def _seed(problem: Problem, chunk: int) -> int:
    """A seed of its own for each chunk: with the same one, chunks would share their draws' luck."""
    return int(torch.randint(2**62, (), generator=problem.generator("chunk", chunk)))


class _Reader:
    """Hands out batches in chunks of given numbers of examples, each example once; cuts batches where chunks end."""

    def __init__(self, items: Iterator[batches.Batch]) -> None:
        self._items = items
        self._held: batches.Batch | None = None

    def more(self) -> bool:
        """Whether there is an example left."""
        if self._held is None:
            self._held = next(self._items, None)
        return self._held is not None

    def first(self) -> batches.Batch:
        """The batch that comes next, which stays."""
        self.more()
        return self._held

    def skip(self, count: int) -> int:
        """Leave out that many examples, or what is left; returns how many."""
        return sum(batches.size(batch) for batch in self.take(count))

    def take(self, count: int) -> Iterator[batches.Batch]:
        """The next `count` examples, or what is left."""
        while count and self.more():
            batch, size = self._held, batches.size(self._held)
            self._held = batches.cut(batch, count, size) if size > count else None
            batch = batches.cut(batch, 0, count) if size > count else batch
            count -= min(size, count)
            yield batch
