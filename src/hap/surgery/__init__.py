"""A model and a plan -> the smaller model, and the proof that it is the right one."""

from hap.surgery.apply import apply, apply_, check
from hap.surgery.config import dense_config
from hap.surgery.merge import merge
from hap.surgery.optimizer import follow_
from hap.surgery.refit import refit_
from hap.surgery.verify import verify

__all__ = ["apply", "apply_", "check", "dense_config", "follow_", "merge", "refit_", "verify"]
