"""Whole experiments as data: read from YAML, checked before anything starts, scaled down, run and resumed."""

from hap.recipes.execute import execute
from hap.recipes.read import read
from hap.recipes.recipe import Data, Dense, Implants, Measure, Planning, Recipe
from hap.recipes.scale import scaled
from hap.recipes.work import Work, finished

__all__ = [
    "Data",
    "Dense",
    "Implants",
    "Measure",
    "Planning",
    "Recipe",
    "Work",
    "execute",
    "finished",
    "read",
    "scaled",
]
