"""Fine-tuning, evaluation, and batch-norm statistics."""

from hap.training.evaluate import evaluate
from hap.training.finetune import finetune
from hap.training.history import EpochRecord, History
from hap.training.recalibrate import recalibrate_

__all__ = ["EpochRecord", "History", "evaluate", "finetune", "recalibrate_"]
