"""The multiple-choice knapsack at fixed prices: what pays at a rate of exchange of loss for budget."""

from __future__ import annotations

import numpy as np

from hap.planning.prices import Prices
from hap.planning.problem import Problem
from hap.planning.state import State


def best_at(problem: Problem, prices: Prices, rate: float, rises: np.ndarray) -> State:
    """The choices that minimise ``loss + rate * cost``; each unit and block for itself, each layer in one form.

    Per unit: keep it (gain 0), remove it (gain ``rate * price - rise``), or implant its blocks (the sum of what
    each gains). Of each family the allowed number of units with the largest gains leaves.

    Args:
        problem: the choices.
        prices: of every choice.
        rate: nats for the whole budget, the Lagrange multiplier.
        rises: the predicted rise of the loss for each unit, shape ``(units,)``.
    """
    gain = rate * np.repeat(prices.unit, problem.sizes) - rises
    option, chosen = _forms(problem, prices, rate, gain)
    instead = np.zeros(len(gain))  # what a unit's implants would gain
    for layer, good in zip(problem.layers, chosen, strict=True):
        owned = layer.owner >= 0
        np.add.at(instead, layer.owner[owned], good[owned])
    state = State(problem, option)
    state.remove(_leaving(problem, gain - instead))
    for k, good in enumerate(chosen):
        state.implant(k, np.flatnonzero((good > 0) & state.full(k)))
    return state


def _forms(problem: Problem, prices: Prices, rate: float, gain: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """For each layer the best option, and what it gains for each block; nothing where no option is worth it."""
    option, chosen = [], []
    for layer, price, entry in zip(problem.layers, prices.block, prices.entry, strict=True):
        removal = np.maximum(np.append(gain, 0.0)[layer.owner], 0.0)  # filters that are no unit's: owner -1
        gains = np.maximum(rate * price[:, None] - layer.rise, 0.0)
        worth = np.maximum(gains - removal, 0.0).sum(1) - rate * entry
        best = int(worth.argmax())
        option.append(best)
        chosen.append(gains[best] if worth[best] > 0 else np.zeros(len(layer.owner)))
    return option, chosen


def _leaving(problem: Problem, gain: np.ndarray) -> np.ndarray:
    leaving = []
    for family, span in enumerate(problem.spans()):
        order = np.argsort(-gain[span], kind="stable")
        allowed = problem.allowed(family)
        total = np.concatenate([[0.0], np.cumsum(gain[span][order])])[allowed]
        leaving.append(span.start + order[: allowed[total.argmax()]])
    return np.concatenate([np.zeros(0, dtype=np.int64), *leaving])


def rates(problem: Problem, prices: Prices, rises: np.ndarray) -> tuple[float, float]:
    """Rates at which no choice pays, and at which every choice that saves anything does."""
    price = np.repeat(prices.unit, problem.sizes)
    found = [rises[price > 0] / price[price > 0]]
    for layer, each in zip(problem.layers, prices.block, strict=True):
        found += [rise / p for rise, p in zip(layer.rise, each.tolist(), strict=True) if p > 0]
    ratio = np.concatenate(found)
    ratio = ratio[ratio > 0]
    return (float(ratio.min()) / 2, float(ratio.max()) * 1e3) if len(ratio) else (1.0, 1.0)
