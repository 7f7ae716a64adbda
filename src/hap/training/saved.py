"""The files that a killed run goes on from: one for each process, safetensors with JSON in the header."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch

from hap.errors import HapError, need_same, unwritable
from hap.files import write_tensors
from hap.training.devices import Alone

logger = logging.getLogger(__name__)

FORMAT = "hap training 1"
Step = tuple[int, int]  # of the optimizer; and the epochs that were complete, as validation follows the last step
INTERVAL = 50  # steps between two looks at the clock, where processes must agree on what it says


class Saved:
    """Where this process keeps its part of a run's state.

    Several processes save after the same step. Each writes its new file beside the old one, and only when all have
    done so does it take the old one's place: whenever they are killed, there is a step that all have a file of.

    Args:
        path: the file; its folder must be there. Several processes add ``.RANK-of-N`` to its name.
        run: what makes this run what it is; files of another run are refused.
        every: seconds between two saves; 0 saves after every step.
        devices: the processes.

    Raises:
        HapError: there is no such folder, or `every` is negative.
    """

    def __init__(self, path: Path, run: Mapping[str, str], *, every: float, devices: Alone) -> None:
        if not path.parent.is_dir() or path.is_dir():
            raise HapError("the state cannot be saved there", expected="a file in a folder that exists", got=str(path))
        if not every >= 0:
            raise HapError("save_every is out of range", expected="seconds, 0 or more", got=str(every))
        rank, world = devices.rank, devices.world
        _need_as_many(path, world)
        self.path = path if world == 1 else path.with_name(f"{path.name}.{rank}-of-{world}")
        self._next = self.path.with_name(f"{self.path.name}.next")
        self._run = dict(run)
        self._every = every
        self._devices = devices
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time to save after a step; the same for all processes."""
        if self._every == 0:
            return True
        if self._devices.world > 1 and step % INTERVAL:
            return False
        return self._devices.agree(time.monotonic() - self._last >= self._every)

    def write(self, step: Step, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """Saves a state; `about` is plain data. A kill leaves the state before it or this one."""
        header = {"format": FORMAT, "run": json.dumps(self._run), "step": json.dumps(step), "about": json.dumps(about)}
        write_tensors(self._next, tensors, header)
        self._devices.gather(None)  # all have written
        try:
            os.replace(self._next, self.path)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last state that all processes have; None without one.

        Raises:
            HapError: a file cannot be read, or is of another run.
        """
        found = {self._step(path): path for path in (self.path, self._next) if path.exists()}
        common = set.intersection(*map(set, self._devices.gather(list(found))))
        if not common:
            return None
        path = found[max(common)]
        tensors, header = _opened(path)
        logger.info("going on after step %s, from %s", max(common)[0], path)
        return tensors, json.loads(header["about"])

    def _step(self, path: Path) -> Step:
        _, header = _opened(path, only_header=True)
        need_same(json.loads(header["run"]), self._run, partial(refused, path))
        steps, epochs = json.loads(header["step"])
        return steps, epochs


def _need_as_many(path: Path, world: int) -> None:
    """Refuses the files of another number of processes: nothing could be taken from them."""
    for file in path.parent.glob(f"{glob.escape(path.name)}*"):
        found = re.fullmatch(r"(?:\.\d+-of-(\d+))?(?:\.next)?", file.name[len(path.name) :])
        if found and int(found[1] or 1) != world:
            raise refused(path, f"{found[1] or 1} processes, as there", str(world))


def _opened(path: Path, *, only_header: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = [] if only_header else list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise refused(path, "a state that finetune saved", str(error)) from error
    if header.get("format") != FORMAT:
        raise refused(path, FORMAT, f"format {header.get('format')!r}")
    return tensors, header


def refused(path: Path, expected: str, got: str) -> HapError:
    """The error for a state that is not this run's."""
    return HapError(
        f"{path} does not fit this run",
        expected=expected,
        got=got,
        remedy="train with the arguments it was begun with, delete the file, or name another",
    )
