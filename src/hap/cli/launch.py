"""How a verb runs on several devices, and where its numbers go."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hap.errors import HapError, missing, unknown
from hap.types import Log

TRACKERS = ("tensorboard", "wandb", "mlflow")
LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed starts from
HALF = ("bf16", "fp16")


def accelerator(device: torch.device) -> Any:
    """Accelerate's, where ``torchrun`` or ``accelerate launch`` has started several processes; else None.

    One process that ``accelerate launch`` was given mixed precision for needs it too.

    Raises:
        HapError: the package is not installed, or no launcher has started the several processes.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in HALF:
        return None
    lacking = [name for name in LAUNCHER if several and name not in os.environ]
    if lacking:
        raise HapError(
            "WORLD_SIZE speaks of several processes, but no launcher has started this one",
            expected=f"{', '.join(LAUNCHER)}, which launchers set",
            got=f"no {', '.join(lacking)}",
            remedy="torchrun --nproc-per-node N -m hap ..., or unset WORLD_SIZE for one process",
        )
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise missing("several processes need", "accelerate", "text", error) from error
    return Accelerator(cpu=device.type == "cpu")


@contextmanager
def tracking(name: str | None, out: Path, settings: Mapping[str, Any]) -> Iterator[Log | None]:
    """A function that takes numbers for one of Accelerate's trackers, while a run lasts; None without a name.

    Args:
        name: one of `TRACKERS`.
        out: the run directory. TensorBoard writes beside it, in ``logs``: ``tensorboard --logdir logs``. The others
            write where they are told to by their own settings (``MLFLOW_TRACKING_URI``, ``WANDB_DIR``).
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
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        extra = None if package in ("wandb", "mlflow") else "log"
        raise missing(f"--log-to {name} needs", package, extra, error) from error
    PartialState()  # the trackers ask it who logs
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind(out.name, out.absolute().parent / "logs")
    elif name == "wandb":
        tracker = kind("hap", name=out.name)
    else:
        tracker = kind("hap", run_name=out.name)
    tracker.start()
    try:
        tracker.store_init_configuration({name: _plain(value) for name, value in settings.items()})
        yield tracker.log
    finally:
        tracker.finish()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
