"""Unit ids, and which of them must leave together (union-find)."""

from __future__ import annotations

import numpy as np

from hap.types import Role

Ids = np.ndarray  # int64 unit ids, of any shape


class Units:
    """A growing set of unit ids with the relations that the rules find between them.

    Rules never look at what they tie: they state facts (these are one unit, these cannot leave,
    this axis reads, that one writes), and `families` draws the conclusions at the end.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.arange(0)
        self.owners: dict[tuple[str, int], Ids] = {}  # of the positions along each axis of each tensor
        self.roles: dict[tuple[str, int], Role] = {}
        self.frozen: dict[int, str] = {}
        self.inexact: set[int] = set()
        self.heads: set[int] = set()
        self.grids: list[Ids] = []
        self._owner_of: dict[int, tuple[str, int]] = {}
        self._tensors: set[str] = set()

    def fresh(self, count: int) -> Ids:
        """New ids, tied to nothing."""
        ids = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def own(self, tensor: str, axis: int, size: int) -> Ids:
        """The ids of a tensor's axis; the same ones whenever it is asked for."""
        key = (tensor, axis)
        if key not in self.owners:
            ids = self.fresh(size)
            self.owners[key] = ids
            self._owner_of[int(ids[0])] = key
        return self.owners[key]

    def read(self, tensor: str) -> None:
        """Says that the graph reads this tensor."""
        self._tensors.add(tensor)

    def knows(self, tensor: str) -> bool:
        """Whether the graph reads this tensor."""
        return tensor in self._tensors

    def play(self, ids: Ids | None, role: Role) -> None:
        """Says that the tensor axis these ids belong to produces, or consumes, its units.

        An axis that does both (a weight used again transposed) counts as a consumer: with its
        weights at zero a unit is read by nobody, so that what is written to it does not matter.
        """
        key = self._owner_of.get(int(ids.flat[0])) if ids is not None else None
        if key is not None and self.roles.get(key) != "consumer":
            self.roles[key] = role

    def roots(self, ids: Ids) -> Ids:
        """The representatives of many units, in the shape of `ids`."""
        parent = self._parent
        found = parent[ids]
        while ((above := parent[found]) != found).any():
            found = above
        parent[ids] = found
        return found

    def tie(self, first: Ids | None, second: Ids | None) -> None:
        """Makes aligned ids one unit each; shapes broadcast. Ids tied to nothing (None) are frozen."""
        if first is None or second is None:
            for ids in (first, second):
                if ids is not None:
                    self.freeze(ids, "meets an axis of fixed size")
            return
        first, second = np.broadcast_arrays(first, second)
        while True:
            ours, theirs = self.roots(first), self.roots(second)
            apart = ours != theirs
            if not apart.any():
                return
            # Where a unit is tied to several others at once, the smallest wins and the next round ties the rest.
            np.minimum.at(self._parent, np.maximum(ours, theirs)[apart], np.minimum(ours, theirs)[apart])

    def freeze(self, ids: Ids, reason: str) -> None:
        """Forbids these units to leave; the first reason given to an id is the one reported."""
        for i in np.unique(ids):
            self.frozen.setdefault(int(i), reason)

    def blur(self, ids: Ids) -> None:
        """Says that removing these units differs from closing their gates (a norm mixes them)."""
        self.inexact.update(int(i) for i in np.unique(ids))

    def head(self, ids: Ids) -> None:
        """Says that attention treats these units side by side."""
        self.heads.update(int(i) for i in np.unique(ids))

    def are_heads(self, ids: Ids) -> bool:
        """Whether attention treats these units side by side."""
        return int(ids.flat[0]) in self.heads

    def settle_grids(self) -> None:
        """Makes every split of an axis into several rectangular.

        A view from ``g * n`` to ``(g, n)`` stays valid only if the kept units form a grid. Where
        nothing has said which axis may shrink (attention says: the heads), the leading ones are
        numbers of groups, which code keeps constant (channel shuffle, chunks, GroupNorm), so each
        group must lose the same positions.
        """
        changed = True
        while changed:
            changed = False
            for grid in self.grids:
                roots = self.roots(grid)
                varying = [a for a in range(roots.ndim) if (roots != roots.take([0], a)).any()]
                if len(varying) > 1:
                    self.tie(grid[(slice(1),) * (grid.ndim - 1)], grid)
                    changed = True
