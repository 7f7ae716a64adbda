"""hap: trained PyTorch networks, smaller and faster, by second-order structured pruning with implants.

>>> import hap, torch
>>> torch.manual_seed(0)  # doctest: +ELLIPSIS
<torch...>
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
>>> result = hap.prune(net, data, None, hap.Budget(params=0.5))
>>> result.model[0].out_features, result.verification.ok
(3, True)
"""

from importlib import metadata

from hap.checkpoint import load, save
from hap.curvature import measure
from hap.errors import HapError
from hap.pipeline import Result, prune
from hap.planning import CostModel, Plan, decide
from hap.structure import trace
from hap.surgery import apply, apply_, merge, refit_, verify
from hap.training import Distillation, History, evaluate, finetune, recalibrate_
from hap.types import Budget, Evaluation, Sensitivity, Structure, Verification

try:
    __version__ = metadata.version("torch-hap")
except metadata.PackageNotFoundError:  # a source tree that was not installed
    __version__ = "unknown"

__all__ = [
    "Budget",
    "CostModel",
    "Distillation",
    "Evaluation",
    "HapError",
    "History",
    "Plan",
    "Result",
    "Sensitivity",
    "Structure",
    "Verification",
    "apply",
    "apply_",
    "decide",
    "evaluate",
    "finetune",
    "load",
    "measure",
    "merge",
    "prune",
    "recalibrate_",
    "refit_",
    "save",
    "trace",
    "verify",
]
