"""The low-rank replacement modules, and how they are fitted to what they replace."""

from hap.implants.build import build
from hap.implants.fit import Fitted, Target, centre_taps, least_squares
from hap.implants.pointwise import ImplantedConv, centre

__all__ = ["Fitted", "ImplantedConv", "Target", "build", "centre", "centre_taps", "least_squares"]
