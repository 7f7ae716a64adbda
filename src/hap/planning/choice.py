"""What is chosen for every unit and filter, before it becomes a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hap.planning.cost import CostModel
from hap.planning.plan import Decision, Implant
from hap.types import Cost, Structure


@dataclass(frozen=True, eq=False)
class Choice:
    """Who leaves, and who is replaced.

    Attributes:
        pruned: for each family that loses units, a mask over them.
        implants: by module; only filters that are kept.
        predicted: the rise of the loss that the sensitivity predicts; None where that is not known.
    """

    pruned: Mapping[str, np.ndarray]
    implants: Mapping[str, Implant]
    predicted: float | None = None

    def cost(self, model: CostModel) -> Cost:
        """What is left."""
        return model(self.pruned, self.implants)

    def decisions(self, structure: Structure) -> dict[str, Decision]:
        """For every family, the units that stay and those that leave."""
        found = {}
        for family in structure.families:
            mask = self.pruned.get(family.name, np.zeros(family.size, dtype=bool))
            found[family.name] = Decision(tuple(np.flatnonzero(~mask).tolist()), tuple(np.flatnonzero(mask).tolist()))
        return found
