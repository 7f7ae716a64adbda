"""What of a recipe only the model can tell, checked before the dense training, which may take days."""

from __future__ import annotations

from torch import nn

from hap.batches import arguments, device_of, take
from hap.planning import CostModel
from hap.planning.budget import check_measured
from hap.planning.constraints import constraints
from hap.recipes.recipe import Recipe
from hap.structure import trace
from hap.types import Budget
from hap.zoo import DataSplits


def check(recipe: Recipe, model: nn.Module, data: DataSplits) -> None:
    """Traces the model, and reads what the plan and the budget say of it.

    Raises:
        HapError: a name or a pattern of the plan fits nothing, widths contradict each other, or the model has nothing
            that the budget counts.
    """
    plan = recipe.plan
    args, kwargs = arguments(next(iter(take(data.calibration, 1, device_of(model)))))
    structure = trace(model, args, kwargs, ignore=plan.ignore)
    names = "floor", "minimum", "maximum", "round_to", "protect", "units", "inexact"
    constraints(structure, **{name: getattr(plan, name) for name in names})
    counted = {name: limit for name, limit in recipe.budget.limits.items() if name != "latency"}  # timed later
    if counted:
        check_measured(Budget(**counted), CostModel(structure).dense)
