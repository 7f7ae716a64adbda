"""Choosing together: units that are cheap alone and dear together are not both removed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hap.planning.lagrange import best_at
from hap.planning.prices import Prices
from hap.planning.problem import Problem
from hap.planning.state import State

TINY = 1e-300  # keeps a division by nothing quiet
Move = tuple[int, int]  # a layer and a block to implant; or -1 and a unit that leaves


class Greedy:
    """The order in which units leave and blocks are implanted, at fixed prices, to the end.

    Next goes whoever loses least for what it saves: unit p raises the loss by ``1/2 F_pp + sum of F_pq`` over the
    units q gone before it (less what its implants lost already). Each step costs one row of the matrix F.

    Args:
        problem: the choices, with a gram.
        prices: of every choice.
        before: a path that was cut where it met the budget. The rate of exchange there says in which form each layer
            is implanted now; without it, none is.

    Attributes:
        moves: in their order.
        rates: loss for saving of each.
        option: for each layer, the option in use.
        cut: how many moves meet the budget; the caller's to set.
    """

    def __init__(self, problem: Problem, prices: Prices, before: Greedy | None) -> None:
        self.problem = problem
        self.moves: list[Move] = []
        self.rates: list[float] = []
        self.option = [0] * len(problem.layers)
        self.cut = 0
        blocks: list[_Block] = []
        if before is not None and before.cut:
            rises = np.maximum(before.after(before.cut).marginal(), 0.0)
            like = best_at(problem, prices, before.rates[before.cut - 1], rises)
            self.option = like.option
            blocks = _blocks(problem, prices, like)
        self._walk(prices, blocks)

    def _walk(self, prices: Prices, blocks: list[_Block]) -> None:
        problem, gram = self.problem, self.problem.gram
        assert gram is not None
        family = np.repeat(np.arange(len(problem.families)), problem.sizes)
        rise, price = problem.score.copy(), prices.unit[family]
        left = problem.most.copy()
        closed = left[family] == 0
        inverse, barrier = _open(price, closed)
        forced = problem.lowest(problem.least).tolist()  # these leave in any case
        following = iter(blocks)
        block = next(following, None)
        while True:
            ratio = rise * inverse
            ratio += barrier
            must = bool(forced)
            unit = forced.pop() if must else int(ratio.argmin())
            if block is not None and not must and block.ratio < ratio[unit]:
                if block.owner < 0 or not closed[block.owner]:
                    self.moves.append((block.layer, block.number))
                    self.rates.append(block.ratio)
                    if block.owner >= 0:
                        rise[block.owner] -= block.rise
                        price[block.owner] -= block.price
                        inverse, barrier = _open(price, closed)
                block = next(following, None)
                continue
            if not must and not np.isfinite(ratio[unit]):
                return
            self.moves.append((-1, unit))
            self.rates.append(0.0 if must else float(ratio[unit]))  # a forced unit pays nothing
            rise += gram[unit]
            left[family[unit]] -= 1
            done = unit if left[family[unit]] else family == family[unit]
            closed[done], inverse[done], barrier[done] = True, 0.0, np.inf

    def after(self, moves: int) -> State:
        """The state after so many moves; of each family the last units stay for a width that is allowed."""
        problem = self.problem
        units: list[list[int]] = [[] for _ in problem.families]
        numbers: list[list[int]] = [[] for _ in problem.layers]
        family = np.searchsorted(problem.start, np.arange(len(problem.score)), side="right") - 1
        for layer, number in self.moves[:moves]:
            (units[family[number]] if layer < 0 else numbers[layer]).append(number)
        state = State(problem, list(self.option))
        for f, found in enumerate(units):
            allowed = problem.allowed(f)
            fit = allowed[allowed <= len(found)]
            state.remove(np.array(found[: fit[-1]] if len(fit) else [], dtype=np.int64))
        for k, chosen in enumerate(numbers):
            state.implant(k, np.intersect1d(np.array(chosen, dtype=np.int64), state.open_blocks(k)))
        return state


def _open(price: np.ndarray, closed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One over the prices; and what keeps a unit from being chosen that has left already, or saves nothing."""
    shut = closed | (price <= 0)
    return np.where(shut, 0.0, 1 / np.maximum(price, TINY)), np.where(shut, np.inf, 0.0)


@dataclass(frozen=True)
class _Block:
    """A block that may be implanted: loss for saving, where it is, and what it loses and saves."""

    ratio: float
    layer: int
    number: int
    owner: int
    rise: float
    price: float


def _blocks(problem: Problem, prices: Prices, like: State) -> list[_Block]:
    """The blocks of the layers that another state implants, best first.

    What a form costs once is shared out among the blocks that state implants.
    """
    found = []
    for k, layer in enumerate(problem.layers):
        option, count = like.option[k], int(like.implanted[k].sum())
        price = float(prices.block[k][option]) - float(prices.entry[k][option]) / max(count, 1)
        if count and price > 0:
            found += [
                _Block(rise / price, k, number, owner, rise, price)
                for number, (rise, owner) in enumerate(
                    zip(layer.rise[option].tolist(), layer.owner.tolist(), strict=True)
                )
            ]
    return sorted(found, key=lambda block: (block.ratio, block.layer, block.number))
