"""The forms of implants: what they cost, how they are fitted, and the modules that they become."""

from hap.implants import depthwise, lowrank, pointwise  # noqa: F401  (they register themselves)
from hap.implants.build import build, inherit_
from hap.implants.fit import Fitted, Init, Target, flat, from_weights, least_squares, solve
from hap.implants.form import FORMS, Form, form_of, register
from hap.implants.geometry import Dense, Geometry
from hap.implants.implanted import Implanted
from hap.implants.moments import Moments
from hap.implants.observe import Reading, dense_layer, observe
from hap.implants.options import Option, options
from hap.implants.sums import Sums

__all__ = [
    "Dense",
    "FORMS",
    "Fitted",
    "Form",
    "Geometry",
    "Implanted",
    "Init",
    "Moments",
    "Option",
    "Reading",
    "Sums",
    "Target",
    "build",
    "dense_layer",
    "flat",
    "form_of",
    "from_weights",
    "inherit_",
    "least_squares",
    "observe",
    "options",
    "register",
    "solve",
]
