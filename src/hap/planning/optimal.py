"""Mode ``optimal``: the least predicted loss for a budget, with exact costs.

What a unit saves depends on its neighbours' widths, so that this is a knapsack whose prices move. We solve it at
fixed prices, take the prices at the solution, and repeat; at a fixed point no choice is better at its own prices.
Of all rounds the best choice is kept, and improved by exchange with exact costs. With fixed prices, independent units
are solved by Lagrangian bisection; units with a Gram matrix greedily, with exact marginal losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hap.planning.budget import lowest, unreachable
from hap.planning.choice import Choice
from hap.planning.cost import CostModel, Share
from hap.planning.exchange import Exchange
from hap.planning.joint import Greedy
from hap.planning.lagrange import best_at, rates
from hap.planning.prices import Prices, Scale, prices
from hap.planning.problem import Problem
from hap.planning.state import State
from hap.types import Budget

ROUNDS = 8  # of prices
HALVINGS = 36  # of the interval of rates, at most
CLOSE = 0.9999  # of the budget: what is used when halving stops
TIES = 1e-6  # of the mean rise: what the last unit counts more than the first, so that no two are equal


def choose(problem: Problem, cost: CostModel, budget: Budget) -> Choice:
    """The best choice found.

    Raises:
        HapError: the budget cannot be reached (says how low it can go).
    """
    scale = Scale(cost, budget)
    pruning, both = Exchange(problem, scale, implants=False), Exchange(problem, scale, implants=True)
    if both.fits(start := _start(problem)):
        return start.choice()
    lowest = _lowest(problem, cost, both)
    # what is found without implants comes first and is only ever improved: implants never make a plan worse
    found = [both.improve(state) for state in _best(problem, pruning)]
    found += _best(problem, both) if problem.layers else []
    return min(found or [both.improve(lowest)], key=lambda state: state.predicted).choice()


def _best(problem: Problem, exchange: Exchange) -> list[State]:
    """The best choice of all rounds, improved; none if no round met the budget."""
    found = []
    for state in _rounds(problem, exchange):
        if exchange.shrink(state):
            exchange.fill(state)
            found.append(state)
    return [exchange.improve(min(found, key=lambda state: state.predicted))] if found else []


def _start(problem: Problem) -> State:
    """Everything kept but what leaves in any case."""
    state = State(problem)
    state.remove(problem.lowest(problem.least))
    return state


def _lowest(problem: Problem, cost: CostModel, exchange: Exchange) -> State:
    """A choice that meets the budget: all units that may leave have left, and more where that is not enough.

    Raises:
        HapError: there is none.
    """
    bare = _bare(problem)
    smallest = _smallest(problem, cost, bare.copy())
    for state in (bare, smallest):
        if exchange.fits(state):
            return state
    tried = [bare, smallest]
    for state in (bare, smallest):  # implants save parameters, not always time
        tried.append(state.copy())
        if exchange.shrink(tried[-1]):
            return tried[-1]
    least = lowest(state.choice().cost(cost) for state in tried)
    raise unreachable(least, cost.dense, exchange.scale.budget, implants=bool(problem.layers))


def _bare(problem: Problem) -> State:
    """All units that may leave have left."""
    state = State(problem)
    state.remove(problem.lowest(problem.most))
    return state


def _smallest(problem: Problem, cost: CostModel, state: State) -> State:
    """The form of the fewest parameters is everywhere where it saves."""
    place = cost.place(state.counts)
    for k, layer in enumerate(problem.layers):
        blocks, module = state.open_blocks(k), layer.module
        shares = [Share(len(blocks) * layer.block, option.form, option.rank) for option in layer.options]
        sizes = [float(place.layer(module, share)[0]) for share in shares]
        if min(sizes) < place.layer(module)[0]:
            state.change(k, int(np.argmin(sizes)), blocks)
    return state


def _rounds(problem: Problem, exchange: Exchange) -> Iterator[State]:
    """Choices just over and just under the budget, at prices that follow the choices.

    First all units at one price, which is the plain ranking; then the prices of a model that shrinks evenly, and so on.
    With several limits, what is used up more counts for more in the next round.
    """
    limits = exchange.scale.budget.limits.values()
    gone = np.round(problem.most * (1 - min(limits) ** 0.5)).astype(np.int64)
    mix, shares = np.full(len(limits), 1 / len(limits)), dict[str, Share]()
    greedy: Greedy | None = None
    for number in range(ROUNDS + 1):
        at = prices(problem, exchange.scale, gone, shares, mix)
        if number == 0 or not exchange.implants:
            at = at.without_implants()
        if number == 0:
            at = replace(at, unit=np.ones_like(at.unit))
        if problem.gram is None or number == 0:
            over, under = _independent(problem, at, exchange)
        else:
            greedy = Greedy(problem, at, greedy)
            over, under = _cut(problem, greedy, exchange)
        yield over
        yield under
        if number:
            gone, shares = (gone + under.counts + 1) // 2, under.shares()
            mix = mix * exchange.used(under) ** 2
            mix = mix / mix.sum()


def _independent(problem: Problem, at: Prices, exchange: Exchange) -> tuple[State, State]:
    """The choices at the two rates between which the budget is met."""
    # equal units leave in order, not all at once
    units = max(1, len(problem.score))
    least = TIES * max(float(problem.score.sum()) / units, 1e-30)
    rises = problem.score + least * np.arange(1, len(problem.score) + 1) / units
    low, high = rates(problem, at, rises)
    over, under = best_at(problem, at, low, rises), best_at(problem, at, high, rises)
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        state = best_at(problem, at, middle, rises)
        if exchange.fits(state):
            high, under = middle, state
            if exchange.used(state).max() > CLOSE:
                break
        else:
            low, over = middle, state
    return over, under


def _cut(problem: Problem, greedy: Greedy, exchange: Exchange) -> tuple[State, State]:
    """The two places on a greedy path between which the budget is met."""
    low, high = int(problem.least.sum()), len(greedy.moves)
    while high - low > 1:
        middle = (low + high) // 2
        if exchange.fits(greedy.after(middle)):
            high = middle
        else:
            low = middle
    greedy.cut = high
    return greedy.after(low), greedy.after(high)
