"""Composes the stages: `prune` for a model in memory, `run` for a whole experiment with its report."""

from hap.pipeline.experiment import Recover, run
from hap.pipeline.record import Run
from hap.pipeline.stages import Result, prune
from hap.pipeline.training import Training

__all__ = ["Recover", "Result", "Run", "Training", "prune", "run"]
