"""Measured times that are kept between runs, in a JSON file."""

from __future__ import annotations

import json
import logging
import os
import platform
from functools import cache
from pathlib import Path

import torch

from hap.errors import HapError

log = logging.getLogger(__name__)


class LatencyCache:
    """Milliseconds by key, for one device; other devices' times in the same file stay.

    Args:
        path: the JSON file; None to keep times in memory only.
        device: where the model runs.

    Attributes:
        device: its name, with the number of threads and the version of PyTorch: what else a time depends on.

    Raises:
        HapError: the file is not such a cache.
    """

    def __init__(self, path: str | Path | None, device: torch.device) -> None:
        self.path = None if path is None else Path(path)
        self.device = describe(device)
        self._times = {} if self.path is None else _read(self.path).get(self.device, {})
        self._new: dict[str, float] = {}

    def get(self, key: str) -> float | None:
        """The time kept under this key."""
        return self._times.get(key)

    def put(self, key: str, milliseconds: float) -> None:
        """Keeps a time."""
        self._times[key] = self._new[key] = milliseconds

    def write(self) -> None:
        """Adds what is new to the file, written whole or not at all; where it cannot, the run goes on.

        What other runs have written since stays.
        """
        if self.path is None or not self._new:
            return
        new, self._new = self._new, {}
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = _read(self.path)
            found[self.device] = found.get(self.device, {}) | new
            part.write_text(json.dumps(found, indent=0, sort_keys=True), encoding="utf-8")
            part.replace(self.path)
        except (OSError, HapError) as error:
            log.warning("the measured times are not kept for the next run: %s", error)
            self.path = None  # says so once


def describe(device: torch.device) -> str:
    """The device's name, with the number of threads on a CPU, and the version of PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


@cache
def processor() -> str:
    """The processor's model, for one machine's times are not another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, where Python's word for it is the architecture alone
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, dict[str, float]]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {device: {key: float(ms) for key, ms in times.items()} for device, times in data.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise HapError(
            f"{path} holds no measured times",
            expected="the JSON file that an earlier run wrote",
            got=f"{type(error).__name__}: {error}",
            remedy="name another file, or delete this one to measure anew",
        ) from error
