"""Families, layers and data in; a sensitivity for each unit and filter, with its standard error, out."""

from __future__ import annotations

from hap.curvature.baselines import Magnitude, Random, Taylor
from hap.curvature.criterion import CRITERIA, Criterion, Problem, Scores, register
from hap.curvature.fisher import GateFisher, GateGGN
from hap.curvature.hutchinson import HessianTrace
from hap.curvature.measure import measure

__all__ = [
    "CRITERIA",
    "Criterion",
    "GateFisher",
    "GateGGN",
    "HessianTrace",
    "Magnitude",
    "Problem",
    "Random",
    "Scores",
    "Taylor",
    "measure",
    "register",
]
