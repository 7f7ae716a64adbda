"""Sensitivities, costs and a budget -> a plan: what to keep, implant and prune."""

from hap.planning.cost import CostModel
from hap.planning.decide import decide
from hap.planning.latency import Latency, measure_latency
from hap.planning.plan import Decision, Implant, Plan, versions

__all__ = ["CostModel", "Decision", "Implant", "Latency", "Plan", "decide", "measure_latency", "versions"]
