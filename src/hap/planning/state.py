"""A choice in the making: who has left, who is implanted, and what one more step would do to the loss."""

from __future__ import annotations

import itertools

import numpy as np

from hap.planning.choice import Choice
from hap.planning.cost import Share
from hap.planning.plan import Implant
from hap.planning.problem import Problem

_FEW = 64  # units whose rows of the Gram matrix are added one by one rather than all anew
_stamps = itertools.count(1)


class State:
    """Starts with everything kept; changed in place by `remove`, `restore` and `implant`.

    Attributes:
        gone: which units have left, shape ``(units,)``.
        counts: how many of each family.
        option: for each layer, the option in use.
        implanted: for each layer, which of its blocks are implanted; none of them is gone.
        own: for each unit, the predicted rise by the implants among its own filters.
        stamps: for each layer, a number that no other choice of its blocks has; 0 while all of them are full.
    """

    def __init__(self, problem: Problem, option: list[int] | None = None) -> None:
        self.problem = problem
        self.gone = np.zeros(len(problem.score), dtype=bool)
        self.counts = np.zeros(len(problem.families), dtype=np.int64)
        self.option = option or [0] * len(problem.layers)
        self.implanted = [np.zeros(len(layer.owner), dtype=bool) for layer in problem.layers]
        self.own = np.zeros(len(problem.score))
        self.stamps = [0] * len(problem.layers)
        self._blocks = [0] * len(problem.layers)  # how many are implanted
        self._lost = 0.0  # by implants
        self._pull: np.ndarray | None = None  # gram @ gone, once it is asked for

    def copy(self) -> State:
        """Another one that changes on its own."""
        new = State.__new__(State)
        new.problem = self.problem
        new.gone, new.counts, new.own = self.gone.copy(), self.counts.copy(), self.own.copy()
        new.option, new.implanted = list(self.option), [mask.copy() for mask in self.implanted]
        new.stamps, new._blocks = list(self.stamps), list(self._blocks)
        new._lost = self._lost
        new._pull = self._pull  # never changed in place
        return new

    def marginal(self) -> np.ndarray:
        """For each unit, how much more is lost with it gone than with it there, given all others."""
        score = self.problem.score
        return score if self.problem.gram is None else self._pulled() + np.where(self.gone, -score, score)

    @property
    def predicted(self) -> float:
        """The predicted rise of the loss."""
        if self.problem.gram is None:
            return float(self.problem.score[self.gone].sum()) + self._lost
        return float(self._pulled()[self.gone].sum()) / 2 + self._lost

    def _pulled(self) -> np.ndarray:
        """For each unit, the sum of its second derivatives with all units that are gone."""
        assert self.problem.gram is not None
        if self._pull is None:
            rows = np.flatnonzero(self.gone)  # of a symmetric matrix; few of them are read in far less time than all
            few = len(rows) < len(self.gone) // 4
            self._pull = self.problem.gram[rows].sum(0) if few else self.problem.gram @ self.gone.astype(np.float64)
        return self._pull

    def between(self, units: np.ndarray) -> float:
        """Half of the second derivatives between different units of a set: what they lose together besides."""
        gram = self.problem.gram
        if gram is None or len(units) < 2:
            return 0.0
        part = gram[np.ix_(units, units)]
        return float(part.sum() - part.trace()) / 2

    def remove(self, units: np.ndarray) -> None:
        """Lets kept units leave, with the implants among their filters."""
        for k in self._flip(units, True):
            if self._blocks[k]:
                self.implanted[k] &= ~np.isin(self.problem.layers[k].owner, units)
                self._blocks[k] = int(self.implanted[k].sum())
        self._lost -= float(self.own[units].sum())
        self.own[units] = 0.0

    def restore(self, units: np.ndarray) -> None:
        """Brings units back, with full filters."""
        self._flip(units, False)

    def _flip(self, units: np.ndarray, gone: bool) -> set[int]:
        """Returns the layers that compute units of these families."""
        sign, gram = 1 if gone else -1, self.problem.gram
        self.gone[units] = gone
        families = np.searchsorted(self.problem.start, units, side="right") - 1
        np.add.at(self.counts, families, sign)
        if gram is None or self._pull is None or len(units) > _FEW:
            self._pull = None
        else:
            self._pull = self._pull + sign * gram[units].sum(0)
        layers = {k for family in set(families.tolist()) for k in self.problem.writers[family]}
        for k in layers:
            self.stamps[k] = next(_stamps)
        return layers

    def implant(self, layer: int, blocks: np.ndarray, there: bool = True) -> None:
        """Implants full blocks of filters of a layer, or (not `there`) makes implanted ones full again."""
        chosen, sign = self.problem.layers[layer], 1 if there else -1
        rises = sign * chosen.rise[self.option[layer]][blocks]
        self.implanted[layer][blocks] = there
        self._blocks[layer] += len(blocks) if there else -len(blocks)
        self.stamps[layer] = next(_stamps)
        owners = chosen.owner[blocks]
        np.add.at(self.own, owners[owners >= 0], rises[owners >= 0])
        self._lost += float(rises.sum())

    def change(self, layer: int, option: int, blocks: np.ndarray) -> None:
        """Implants these blocks of a layer by another option, and no others."""
        self.implant(layer, np.flatnonzero(self.implanted[layer]), there=False)
        self.option[layer] = option
        self.implant(layer, blocks)

    def open_blocks(self, layer: int) -> np.ndarray:
        """The blocks that are full: neither gone nor implanted."""
        return np.flatnonzero(self.full(layer))

    def full(self, layer: int) -> np.ndarray:
        """A mask over the blocks of a layer: neither gone nor implanted."""
        owner = self.problem.layers[layer].owner
        gone = np.append(self.gone, False)[owner]  # the last is for filters that are no unit's: their owner is -1
        found: np.ndarray = ~(gone | self.implanted[layer])
        return found

    def shares(self) -> dict[str, Share]:
        """The implants, for the cost model."""
        found = {}
        for layer, option, blocks in zip(self.problem.layers, self.option, self._blocks, strict=True):
            if blocks:
                chosen = layer.options[option]
                found[layer.module] = Share(blocks * layer.block, chosen.form, chosen.rank)
        return found

    def choice(self) -> Choice:
        """What the plan says."""
        implants = {}
        for layer, option, mask in zip(self.problem.layers, self.option, self.implanted, strict=True):
            rows = np.flatnonzero(np.repeat(mask, layer.block)).tolist()
            if rows:
                implants[layer.module] = Implant(tuple(rows), layer.options[option].form, layer.options[option].rank)
        pruned = {
            f.name: self.gone[span].copy() for f, span in zip(self.problem.families, self.problem.spans(), strict=True)
        }
        return Choice(pruned, implants, self.predicted)
