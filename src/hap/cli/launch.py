"""How a verb runs on several devices, and where its numbers go."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hap.errors import missing, unknown
from hap.types import Log

TRACKERS = ("tensorboard", "wandb", "mlflow")


def accelerator(device: torch.device) -> Any:
    """Accelerate's, where ``torchrun`` or ``accelerate launch`` has started several processes; else None.

    Raises:
        HapError: the package is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise missing("several processes need", "accelerate", "text", error) from error
    return Accelerator(cpu=device.type == "cpu")


def first(accelerator: Any) -> bool:
    """Whether this is the first process, or the only one."""
    return accelerator is None or accelerator.is_main_process


@contextmanager
def tracking(name: str | None, out: Path, settings: Mapping[str, Any]) -> Iterator[Log | None]:
    """A function that takes numbers for one of Accelerate's trackers, while a run lasts; None without a name.

    Args:
        name: one of `TRACKERS`.
        out: the run directory. TensorBoard and MLflow write beside it, in ``logs``: ``tensorboard --logdir logs``.
        settings: of the run, for the tracker's record.

    Raises:
        HapError: the name is unknown, or a package is not installed.
    """
    if name is not None and name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if name is None or int(os.environ.get("RANK", "0")) > 0:
        yield None
        return
    try:
        importlib.import_module(name)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise missing(f"--log-to {name} needs", package, "log", error) from error
    kind, logs = LOGGER_TYPE_TO_CLASS[name], out.absolute().parent / "logs"
    if name == "tensorboard":
        tracker = kind(out.name, logs)
    elif name == "wandb":
        tracker = kind("hap", name=out.name)
    else:
        tracker = kind("hap", logging_dir=logs, run_name=out.name)
    tracker.start()
    try:
        tracker.store_init_configuration({name: _plain(value) for name, value in settings.items()})
        yield tracker.log
    finally:
        tracker.finish()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
