"""Fine-tuning, evaluation, and batch-norm statistics."""

from hap.training.course import Select
from hap.training.evaluate import evaluate
from hap.training.finetune import finetune
from hap.training.history import EpochRecord, History
from hap.training.layout import ChannelsLast
from hap.training.loop import Optimizer
from hap.training.objective import Distillation
from hap.training.precision import Precision
from hap.training.recalibrate import recalibrate_
from hap.training.schedule import Schedule

__all__ = [
    "ChannelsLast",
    "Distillation",
    "EpochRecord",
    "History",
    "Optimizer",
    "Precision",
    "Schedule",
    "Select",
    "evaluate",
    "finetune",
    "recalibrate_",
]
