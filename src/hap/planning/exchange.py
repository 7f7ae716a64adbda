"""Repair and improvement of a choice, with exact costs: step by step, then by exchange."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hap.planning.cost import Share
from hap.planning.prices import Scale
from hap.planning.problem import Problem
from hap.planning.state import State

TRIALS = 200  # exchanges tried at most
PAYS = 1e-4  # of the predicted loss: what an exchange must gain
CHOICES = 4  # units of a family that are tried in turn
TINY = 1e-300  # keeps a division by nothing quiet
AT_ONCE = 24  # of them, those tried from one choice


@dataclass(frozen=True, eq=False)
class _Step:
    """One step to a smaller or larger model.

    Attributes:
        layer: the layer whose blocks are implanted or made full again; -1 where units leave or come back.
        who: the blocks or units.
        loss: the change of the predicted loss.
        used: shares of the budget afterwards, shape ``(quantities,)``.
    """

    layer: int
    who: np.ndarray
    loss: float
    used: np.ndarray


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
        while True:
            now = self.used(state)
            over = np.maximum(now - 1, 0.0)
            if not over.any():
                return True
            best, least = None, np.inf
            for step in self.steps(state, smaller=True):
                saved = float(np.minimum(now - step.used, over)[over > 0].sum())
                rate = _rate(step.loss, saved)
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
        now, found = self.used(state), []
        # where units are independent, a family's next cheapest one is never better than its cheapest
        choices = 1 if self.problem.gram is None else CHOICES
        for smaller in (False, True):
            steps = [
                (step.loss / max(float(np.abs(now - step.used).sum()), TINY), step)
                for step in self.steps(state, smaller=smaller, choices=choices)
            ]
            steps.sort(key=lambda pair: pair[0])
            found += [(step, smaller) for _, step in steps[: AT_ONCE // 2]]
        return found

    def take(self, state: State, step: _Step, *, smaller: bool) -> None:
        """Carries a step out."""
        if step.layer >= 0:
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
        if self.implants:
            yield from self._of_layers(state, smaller)

    def _of_families(self, state: State, smaller: bool, choices: int) -> Iterator[_Step]:
        move = self.problem.fewer if smaller else self.problem.more
        after = np.array([move(f, n) for f, n in enumerate(state.counts.tolist())], dtype=np.int64)
        changed = np.flatnonzero(after != state.counts)
        if not len(changed):
            return
        places = np.tile(state.counts, (len(changed), 1))
        places[np.arange(len(changed)), changed] = after[changed]
        used = self.scale.used(places, state.shares())
        alone = state.marginal() - state.own
        spans = list(self.problem.spans())
        for i, family in enumerate(changed.tolist()):
            span, count = spans[family], abs(int(after[family] - state.counts[family]))
            values = np.where(state.gone[span] != smaller, alone[span] if smaller else -alone[span], np.inf)
            order = np.argsort(values, kind="stable")
            for units in np.split(order, range(count, count * choices + 1, count))[:choices]:
                if len(units) == count and np.isfinite(values[units[-1]]):
                    who = span.start + units
                    yield _Step(-1, who, state.rise(who) if smaller else -state.fall(who), used[:, i])

    def _of_layers(self, state: State, smaller: bool) -> Iterator[_Step]:
        now, shares = self.used(state), state.shares()
        for k, layer in enumerate(self.problem.layers):
            blocks = state.open_blocks(k) if smaller else np.flatnonzero(state.implanted[k])
            if not len(blocks):
                continue
            option, module = layer.options[state.option[k]], layer.layer.module
            rises = layer.rise[state.option[k]][blocks]
            chosen = int(rises.argmin() if smaller else rises.argmax())
            before = shares.get(module, Share(0, option.form, option.rank))
            after = replace(before, rows=before.rows + (layer.block if smaller else -layer.block))
            change = self.scale.cost.weights(module, state.counts, after) - self.scale.cost.weights(
                module, state.counts, before
            )
            used = now + change * self.scale.weight(layer.layer)
            yield _Step(k, blocks[[chosen]], float(rises[chosen]) * (1 if smaller else -1), used)


def _rate(loss: float, saved: float) -> float:
    """Loss for what is saved; infinite where nothing is."""
    return loss / saved if saved > 0 else np.inf
