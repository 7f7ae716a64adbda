"""Sensitivities, costs and a budget -> a plan: what to keep, implant and prune."""

from hap.planning.compose import compose
from hap.planning.constraints import Widths, inside
from hap.planning.cost import CostModel
from hap.planning.decide import Joint, Mode, checked, decide
from hap.planning.latency import Latency, measure_latency
from hap.planning.latency_profile import time_layers, ways
from hap.planning.latency_table import LatencyTable
from hap.planning.plan import Decision, Implant, Plan, versions

__all__ = [
    "CostModel",
    "Decision",
    "Implant",
    "Joint",
    "Latency",
    "LatencyTable",
    "Mode",
    "Plan",
    "Widths",
    "checked",
    "compose",
    "decide",
    "inside",
    "measure_latency",
    "time_layers",
    "versions",
    "ways",
]
