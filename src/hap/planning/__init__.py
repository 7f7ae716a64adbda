"""Sensitivities, costs and a budget -> a plan: what to keep, implant and prune."""

from hap.planning.decide import decide
from hap.planning.plan import Decision, Implant, Plan

__all__ = ["Decision", "Implant", "Plan", "decide"]
