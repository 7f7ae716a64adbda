"""The forms of implants: what they cost, how they are fitted, and the modules that they become."""

from hap.implants import depthwise, lowrank, pointwise, spatial, tucker  # noqa: F401  (they register themselves)
from hap.implants.build import build, inherit_
from hap.implants.fit import Fitted, Init, Target, flat, from_weights, least_squares, solve
from hap.implants.form import FORMS, Form, form_of, register
from hap.implants.geometry import Dense, Geometry
from hap.implants.head_options import head_options
from hap.implants.heads import HEAD, NARROW, VALUES, Heads, heads_of, packs
from hap.implants.implanted import Implanted
from hap.implants.moments import Moments
from hap.implants.narrow import FittedHeads, narrow_heads
from hap.implants.observe import Reading, dense_layer, observe
from hap.implants.options import Option, options
from hap.implants.packing import Packed, Packing, packed_type
from hap.implants.sums import Sums
from hap.implants.value_packing import ValuePacking

__all__ = [
    "Dense",
    "FORMS",
    "Fitted",
    "FittedHeads",
    "Form",
    "Geometry",
    "HEAD",
    "Heads",
    "Implanted",
    "Init",
    "Moments",
    "NARROW",
    "Option",
    "Packed",
    "Packing",
    "Reading",
    "Sums",
    "Target",
    "VALUES",
    "ValuePacking",
    "build",
    "dense_layer",
    "flat",
    "form_of",
    "from_weights",
    "head_options",
    "heads_of",
    "inherit_",
    "least_squares",
    "narrow_heads",
    "observe",
    "options",
    "packed_type",
    "packs",
    "register",
    "solve",
]
