"""Pruned models on disk: safetensors and JSON, written whole or not at all."""

from hap.checkpoint.card import Origin
from hap.checkpoint.directory import fresh_directory, refuse_existing
from hap.checkpoint.save import PLAN, load, save, write

__all__ = ["PLAN", "Origin", "fresh_directory", "load", "refuse_existing", "save", "write"]
