"""Composes the stages: `prune` for a model in memory, `run` for a whole experiment with its report."""

from hap.pipeline.experiment import Recover, Training, run
from hap.pipeline.record import Run
from hap.pipeline.stages import Result, prune

__all__ = ["Recover", "Result", "Run", "Training", "prune", "run"]
