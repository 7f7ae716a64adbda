"""The paper's rule: which candidates are implanted and which are pruned when n of them must go."""

from __future__ import annotations

import math

import numpy as np

from hap.planning.candidates import Candidates, block
from hap.planning.choice import Choice
from hap.planning.plan import Implant

POINTWISE = "pointwise"  # the paper's only form of a filter
HALVES = 2  # narrow heads in the place of one


class Rule:
    """The paper's rule as a function of n, the number of candidates that do not stay as they are.

    A candidate only ever goes from kept to implanted to pruned as n grows, so that parameters and multiplications fall
    with n. Time does too without implants; with them it may rise: an implanted layer can be slower than a full one.
    """

    def __init__(self, ranked: Candidates, implant_ratio: float, round_to: int) -> None:
        self.ranked = ranked
        self.ratio = implant_ratio
        self.round_to = round_to
        self.excluded: set[int] = set()
        self._active = np.arange(len(ranked))

    def __len__(self) -> int:
        return len(self._active)

    def exclude(self, candidate: int) -> None:
        """Keeps this candidate whatever n is."""
        self.excluded.add(candidate)
        self._active = np.array([i for i in range(len(self.ranked)) if i not in self.excluded], dtype=np.int64)

    def last_moves(self, n: int) -> list[int]:
        """The candidates whose state differs between n - 1 and n."""
        moved = [self._low(n) - 1] if self._low(n) > self._low(n - 1) else []
        return [int(self._active[i]) for i in {*moved, n - 1}]

    def _low(self, n: int) -> int:
        return n - math.ceil(self.ratio * n - 1e-9)

    def __call__(self, n: int) -> Choice:
        ranked, low = self.ranked, self._low(n)
        pruned = {name: mask.copy() for name, mask in ranked.forced.items()}
        units: list[tuple[int, int]] = []
        filters: list[tuple[int, int]] = []
        narrow: dict[int, list[int]] = {}
        for position, i in enumerate(self._active[:n].tolist()):
            family, unit, layer = int(ranked.family[i]), int(ranked.unit[i]), int(ranked.layer[i])
            if layer >= 0:
                filters.append((layer, unit))
                continue
            if position >= low and family in ranked.heads:
                narrow.setdefault(family, []).append(unit)
                continue
            units.append((family, unit))
            if position < low or not ranked.implants[family]:
                pruned[ranked.families[family].name][unit] = True
        self._round(pruned)
        return Choice(pruned, self._implanted(pruned, units, filters) | self._narrow(pruned, narrow))

    def _narrow(self, pruned: dict[str, np.ndarray], chosen: dict[int, list[int]]) -> dict[str, Implant]:
        """The heads that become narrow, by module; of those that find no other to share a place, least first, none."""
        found = {}
        for family, units in chosen.items():
            heads, form = self.ranked.heads[family]
            over = len(units) % HALVES
            pruned[heads.family.name][units[:over]] = True
            if units[over:]:
                found[heads.module] = Implant(tuple(sorted(units[over:])), form, heads.width // HALVES)
        return found

    def _round(self, pruned: dict[str, np.ndarray]) -> None:
        """Takes back the most sensitive pruned units of a family until its width is a multiple."""
        if self.round_to == 1:
            return
        names = [f.name for f in self.ranked.families]
        for i in reversed(self._active.tolist()):
            if self.ranked.layer[i] < 0:
                mask = pruned[names[self.ranked.family[i]]]
                if mask[self.ranked.unit[i]] and (len(mask) - mask.sum()) % self.round_to:
                    mask[self.ranked.unit[i]] = False

    def _implanted(
        self, pruned: dict[str, np.ndarray], units: list[tuple[int, int]], filters: list[tuple[int, int]]
    ) -> dict[str, Implant]:
        """The filters of `units` and `filters` by module, less those that pruning took away.

        A unit that rounding took back is among them: it was implanted for a smaller n.
        """
        ranked = self.ranked
        rows: dict[int, set[int]] = {}
        for family, unit in units:
            for layer, indices in ranked.implants[family].items():
                rows.setdefault(layer, set()).update(indices[unit])
        for layer, first in filters:
            rows.setdefault(layer, set()).update(range(first, first + block(ranked.layers[layer])))
        for layer, found in rows.items():
            for family, by_layer in ranked.implants.items():
                mask = pruned[ranked.families[family].name]
                for gone in np.flatnonzero(mask).tolist() if layer in by_layer else ():
                    found.difference_update(by_layer[layer][gone])
        return {
            ranked.layers[layer].module: Implant(tuple(sorted(found)), POINTWISE)
            for layer, found in rows.items()
            if found
        }
