"""Families, layers and data in; a sensitivity for each unit and filter, with its standard error, out."""

from __future__ import annotations

from hap.curvature.baselines import EmpiricalFisher, Random, Taylor
from hap.curvature.criterion import CRITERIA, Criterion, Problem, Scores, register
from hap.curvature.fisher import GateEmpirical, GateFisher, GateGGN
from hap.curvature.gaussnewton import GGNQuadratic, GGNTrace
from hap.curvature.gradients import GateGradient, GateTaylor, HeadGradient
from hap.curvature.hutchinson import HessianTrace
from hap.curvature.measure import measure
from hap.curvature.norms import L1, WHC, BatchNormScale, GroupL1, GroupL2, Magnitude
from hap.curvature.quadratic import HessianQuadratic
from hap.curvature.ranks import FeatureRank

__all__ = [
    "BatchNormScale",
    "CRITERIA",
    "Criterion",
    "EmpiricalFisher",
    "FeatureRank",
    "GGNQuadratic",
    "GGNTrace",
    "GateEmpirical",
    "GateFisher",
    "GateGGN",
    "GateGradient",
    "GateTaylor",
    "GroupL1",
    "GroupL2",
    "HeadGradient",
    "HessianQuadratic",
    "HessianTrace",
    "L1",
    "Magnitude",
    "Problem",
    "Random",
    "Scores",
    "Taylor",
    "WHC",
    "measure",
    "register",
]
