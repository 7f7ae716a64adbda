"""The file that an interrupted measurement goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from hap.batches import digest
from hap.curvature.sums import Part
from hap.errors import HapError
from hap.types import Structure

logger = logging.getLogger(__name__)

_FORMAT = "hap measurement 1"


class Saved:
    """Sums, random states and the number of batches they stand for, in a safetensors file.

    Args:
        path: the file; its folder must be there.
        run: what makes this measurement what it is, see `identity`: a file of another run is refused.
        every: seconds between two saves; 0 saves after every batch.

    Raises:
        HapError: there is no such folder, or `every` is negative.
    """

    def __init__(self, path: Path, run: Mapping[str, str], *, every: float) -> None:
        if not path.parent.is_dir() or path.is_dir():
            raise HapError("the state cannot be saved there", expected="a file in a folder that exists", got=str(path))
        if not every >= 0:
            raise HapError("save_every is out of range", expected="seconds, 0 or more", got=str(every))
        self.path = path
        self.run = dict(run)
        self.every = every
        self._last = time.monotonic()

    def restore(self, parts: Sequence[Part], generators: Sequence[torch.Generator]) -> tuple[int, str]:
        """Fill empty parts and set generators as they were saved; nothing, if there is no file.

        Returns:
            The number of batches that were read, and the `digest` of the first.

        Raises:
            HapError: the file cannot be read, or is of another run.
        """
        if not self.path.exists():
            return 0, ""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (safetensors.SafetensorError, OSError) as error:
            raise self._refused("a state that measure saved", str(error)) from error
        if about.get("format") != _FORMAT:
            raise self._refused(_FORMAT, f"format {about.get('format')!r}")
        self._need_same(json.loads(about["run"]))
        for number, part in enumerate(parts):
            prefix = f"{number}."
            part.merge({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
        for number, generator in enumerate(generators):
            generator.set_state(tensors[f"generator.{number}"])
        logger.info("going on after %s batches, from %s", about["batches"], self.path)
        return int(about["batches"]), about["first"]

    def save(self, count: int, first: str, parts: Sequence[Part], generators: Sequence[torch.Generator]) -> None:
        """Write everything if it is time to. The file is replaced at once: a kill leaves the old one or the new."""
        if time.monotonic() - self._last < self.every:
            return
        # Cloned, because the format holds no two tensors that share memory.
        states = {f"{i}.{name}": t.cpu().clone() for i, part in enumerate(parts) for name, t in part.state().items()}
        states |= {f"generator.{i}": generator.get_state() for i, generator in enumerate(generators)}
        about = {"format": _FORMAT, "run": json.dumps(self.run), "batches": str(count), "first": first}
        save_file({name: t.contiguous() for name, t in states.items()}, self._beside, metadata=about)
        os.replace(self._beside, self.path)
        self._last = time.monotonic()

    def need_first(self, found: str, saved: str) -> None:
        """Raises a HapError if the first batch is another than the one that the saved state began with."""
        if saved and found != saved:
            raise self._refused("the same batches in the same order", "another first batch")

    def need_count(self, count: int, saved: int) -> None:
        """Raises a HapError if there are fewer batches than the saved state has seen."""
        if count < saved:
            raise self._refused(f"{saved} batches or more", f"{count}")

    def remove(self) -> None:
        """Delete the file, and one that a kill left half written."""
        self.path.unlink(missing_ok=True)
        self._beside.unlink(missing_ok=True)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tmp")

    def _need_same(self, run: Mapping[str, str]) -> None:
        for name in sorted({*run, *self.run}):
            there, here = run.get(name, "none"), self.run.get(name, "none")
            if there != here:
                raise self._refused(f"{name} {there}, as in the file", f"{name} {here}")

    def _refused(self, expected: str, got: str) -> HapError:
        return HapError(
            f"{self.path} does not fit this run",
            expected=expected,
            got=got,
            remedy="measure with the arguments it was begun with, delete the file, or name another",
        )


def identity(model: nn.Module, structure: Structure, **options: object) -> dict[str, str]:
    """What makes a measurement what it is: the weights' bytes, the structure, and options, each as a short text."""
    parts = repr((structure.families, structure.layers)).encode()
    return {
        "structure": hashlib.sha256(structure.fingerprint.encode() + parts).hexdigest()[:16],
        "weights": digest([*model.parameters(), *model.buffers()]),
        **{name: str(value) for name, value in options.items()},
    }
