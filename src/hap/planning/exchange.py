"""Repair and improvement of a choice, with exact costs: step by step, then by exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np

from hap.planning.cost import Place, Share
from hap.planning.prices import Scale
from hap.planning.problem import Problem
from hap.planning.state import State

TRIALS = 200  # exchanges tried at most
AT_ONCE = 24  # of them, those tried from one choice
PAYS = 1e-4  # of the predicted loss: what an exchange must gain
CHOICES = 4  # units of a family that are tried in turn
TINY = 1e-300  # keeps a division by nothing quiet
KEPT = 20_000  # layers whose steps are kept
ROUNDING = 1e-12  # of the budget: a saving below is none


What = Literal["smaller", "larger", "whole"]


@dataclass(frozen=True, eq=False)
class _Step:
    """One step to a smaller or larger model.

    Attributes:
        layer: the layer whose blocks are implanted or made full again; -1 where units leave or come back.
        who: the blocks or units.
        loss: the change of the predicted loss.
        used: shares of the budget afterwards, shape ``(quantities,)``.
        option: the option that the layer changes to, `who` being its implanted blocks; None where it stays.
    """

    layer: int
    who: np.ndarray
    loss: float
    used: np.ndarray
    option: int | None = None


_Change = tuple[np.ndarray, float, np.ndarray, int | None]  # a step's `who`, `loss`, change of `used`, `option`


class Exchange:
    """Steps from choice to choice.

    Args:
        problem: the choices.
        scale: costs as shares of the budget.
        implants: whether there are steps that implant.
    """

    def __init__(self, problem: Problem, scale: Scale, *, implants: bool) -> None:
        self.problem = problem
        self.scale = scale
        self.implants = implants
        self._kept: dict[tuple[object, ...], list[_Change]] = {}  # what `_of_layer` said

    def used(self, state: State) -> np.ndarray:
        """Shares of the budget, shape ``(quantities,)``."""
        found: np.ndarray = self.scale.used(state.counts[None], state.shares())[:, 0]
        return found

    def fits(self, state: State) -> bool:
        """Whether the budget is met."""
        return bool((self.used(state) <= 1).all())

    def shrink(self, state: State) -> bool:
        """Takes steps to a smaller model until the budget is met: least loss for what they save, first.

        Only what is over the budget counts as saved. Returns whether it was met.
        """
        several = len(self.scale.budget.limits) > 1 or self.scale.budget.latency is not None
        while True:
            excess = _excess(self.used(state))
            if not excess:
                return True
            # what takes less of one quantity may take more of another, and of time also what is no smaller
            steps = chain(self.steps(state, smaller=True), self._of_layers(state, "whole") if several else ())
            best, least = None, np.inf
            for step in steps:
                rate = _rate(step.loss, excess - _excess(step.used))
                if rate < least:
                    best, least = step, rate
            if best is None:
                return False
            self.take(state, best, smaller=True)

    def fill(self, state: State) -> None:
        """Takes steps to a larger model while one that lowers the loss fits: the largest fall first."""
        while True:
            steps = [s for s in self.steps(state, smaller=False) if s.loss < 0 and (s.used <= 1).all()]
            if not steps:
                return
            self.take(state, min(steps, key=lambda s: s.loss), smaller=False)

    def improve(self, state: State) -> State:
        """Exchanges while that lowers the predicted loss.

        From each choice the most promising steps are tried, to a larger model (which then shrinks to the budget)
        and to a smaller one (which is then filled); the first outcome that is better is the next choice.
        """
        trials = 0
        while trials < TRIALS:
            for step, smaller in self._promising(state):
                trials += 1
                other = state.copy()
                self.take(other, step, smaller=smaller)
                if not self.shrink(other):
                    continue
                self.fill(other)
                if other.predicted < state.predicted * (1 - PAYS):
                    state = other
                    break
            else:
                break
        return state

    def _promising(self, state: State) -> list[tuple[_Step, bool]]:
        """The steps to either side with the best ratio of loss to cost."""
        now = self.used(state)
        # where units are independent, a family's next cheapest one is never better than its cheapest
        choices = 1 if self.problem.gram is None else CHOICES

        def best(steps: Iterable[_Step], smaller: bool) -> list[tuple[_Step, bool]]:
            by_rate = sorted(steps, key=lambda step: step.loss / max(float(np.abs(now - step.used).sum()), TINY))
            return [(step, smaller) for step in by_rate[: AT_ONCE // 2]]

        return [
            *best(self.steps(state, smaller=False, choices=choices), smaller=False),
            *best(self.steps(state, smaller=True, choices=choices), smaller=True),
            *best(self._of_layers(state, "whole"), smaller=True),
        ]

    def take(self, state: State, step: _Step, *, smaller: bool) -> None:
        """Carries a step out."""
        if step.option is not None:
            state.change(step.layer, step.option, step.who)
        elif step.layer >= 0:
            state.implant(step.layer, step.who, smaller)
        elif smaller:
            state.remove(step.who)
        else:
            state.restore(step.who)

    def steps(self, state: State, *, smaller: bool, choices: int = 1) -> Iterator[_Step]:
        """For each family, and each layer that may be implanted, the step of its cheapest (or dearest) members.

        With more `choices`, also the steps of the next cheapest units.
        """
        yield from self._of_families(state, smaller, choices)
        yield from self._of_layers(state, "smaller" if smaller else "larger")

    def _of_families(self, state: State, smaller: bool, choices: int) -> Iterator[_Step]:
        move = self.problem.fewer if smaller else self.problem.more
        after = np.array([move(f, n) for f, n in enumerate(state.counts.tolist())], dtype=np.int64)
        changed = np.flatnonzero(after != state.counts)
        if not len(changed):
            return
        places = np.tile(state.counts, (len(changed), 1))
        places[np.arange(len(changed)), changed] = after[changed]
        used = self.scale.used(places, state.shares())
        alone, sign = state.marginal() - state.own, 1 if smaller else -1
        spans = list(self.problem.spans())
        for i, family in enumerate(changed.tolist()):
            span, count = spans[family], abs(int(after[family] - state.counts[family]))
            values = np.where(state.gone[span] != smaller, sign * alone[span], np.inf)
            # to look for one is faster than to sort all
            order = np.argsort(values, kind="stable") if count * choices > 1 else np.array([values.argmin()])
            for units in np.split(order, range(count, count * choices + 1, count))[:choices]:
                if len(units) == count and np.isfinite(values[units[-1]]):
                    who = span.start + units
                    yield _Step(-1, who, float(values[units].sum()) + state.between(who), used[:, i])

    def _of_layers(self, state: State, what: What) -> Iterator[_Step]:
        """The steps of all layers that may be implanted; what a layer has not changed since is not worked out again."""
        if not self.implants:
            return
        now, place = self.used(state), self.scale.cost.place(state.counts)
        if len(self._kept) > KEPT:
            self._kept.clear()
        for k, layer in enumerate(self.problem.layers):
            key = (what, k, state.stamps[k], state.option[k], place.key(layer.module))
            if key not in self._kept:
                work_out = (
                    self._of_whole_layer if what == "whole" else partial(self._of_layer, smaller=what == "smaller")
                )
                self._kept[key] = list(work_out(state, k, place))
            for who, loss, change, option in self._kept[key]:
                yield _Step(k, who, loss, now + change, option)

    def _of_layer(self, state: State, k: int, place: Place, *, smaller: bool) -> Iterator[_Change]:
        """One more implant, or one less."""
        layer, there = self.problem.layers[k], state.option[k]
        implanted = np.flatnonzero(state.implanted[k])
        blocks = state.open_blocks(k) if smaller else implanted
        if not len(blocks):
            return
        rises, sign = layer.rise[there][blocks], 1 if smaller else -1
        chosen = np.argsort(sign * rises, kind="stable")[: layer.step(there, len(implanted), smaller=smaller)]
        before, after = (self._layer(place, k, there, n) for n in (len(implanted), len(implanted) + sign * len(chosen)))
        yield blocks[chosen], float(rises[chosen].sum()) * sign, after - before, None

    def _of_whole_layer(self, state: State, k: int, place: Place) -> Iterator[_Change]:
        """No implants, the same ones in another form, and all filters in each form."""
        layer, there = self.problem.layers[k], state.option[k]
        current, options = np.flatnonzero(state.implanted[k]), range(len(layer.options))
        every = np.union1d(state.open_blocks(k), current)
        ways = [(there, current[:0])] if len(current) else []
        ways += [(o, every) for o in options if o != there or len(current) < len(every)]
        ways += [(o, current) for o in options if o != there and 0 < len(current) < len(every)]
        before, lost = self._layer(place, k, there, len(current)), float(layer.rise[there][current].sum())
        for o, blocks in ways:
            change = self._layer(place, k, o, len(blocks)) - before
            yield blocks, float(layer.rise[o][blocks].sum()) - lost, change, o

    def _layer(self, place: Place, k: int, option: int, blocks: int) -> np.ndarray:
        """The shares of the budget that a layer takes with so many of its blocks implanted."""
        layer, chosen = self.problem.layers[k], self.problem.layers[k].options[option]
        return self.scale.layer(place, layer.module, Share(blocks * layer.block, chosen.form, chosen.rank))


def _excess(used: np.ndarray) -> float:
    """By how much the budget is broken, all limits together."""
    return float(np.maximum(used - 1, 0.0).sum())


def _rate(loss: float, saved: float) -> float:
    """Loss for what is saved; infinite where nothing is."""
    return loss / saved if saved > ROUNDING else np.inf
