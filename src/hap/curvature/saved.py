"""The file that an interrupted measurement goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from hap.batches import digest
from hap.curvature.sums import Part
from hap.errors import HapError, need_same
from hap.files import write_tensors
from hap.types import Structure

logger = logging.getLogger(__name__)

_FORMAT = "hap measurement 2"


class Saved:
    """Sums, random states and the number of batches they stand for, in a safetensors file.

    Where the data is read in chunks (``samples="auto"``) they are those of the present chunk, and beside them lies what
    all chunks before it came to: see `restore_before`.

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
        self.chunk = 0
        self._loop = -1  # of those over this chunk's batches: a criterion may have several
        self._before: Part | None = None
        self._last = time.monotonic()

    def restore_before(self, before: Part, first: str) -> None:
        """Read in chunks: fill an empty part with what all chunks before the one that was saved came to.

        `chunk` is then the number of that one. The part is saved with every chunk from now on.

        Args:
            first: the `digest` of the first batch of all.

        Raises:
            HapError: as `restore` does.
        """
        self._before = before
        self.run["the first batch"] = first
        about = self._about()
        if about:
            before.merge(_of("before", self._tensors()))
            self.chunk = int(about["chunk"])

    def next(self, chunk: int) -> None:
        """The chunk of this number comes now."""
        self.chunk, self._loop = chunk, -1

    def restore(self, parts: Sequence[Part], generators: Sequence[torch.Generator]) -> tuple[int, str]:
        """Before a loop: fill empty parts and set generators as they were saved; nothing, if no file is of this loop.

        Returns:
            The number of batches that were read, and the `digest` of the first.

        Raises:
            HapError: the file cannot be read, or is of another run.
        """
        self._loop += 1
        about = self._about()
        if not about or (about["chunk"], about["loop"]) != (str(self.chunk), str(self._loop)):
            return 0, ""
        tensors = self._tensors()
        for number, part in enumerate(parts):
            part.merge(_of(str(number), tensors))
        for number, generator in enumerate(generators):
            generator.set_state(tensors[f"generator.{number}"])
        logger.info("going on after %s batches, from %s", about["batches"], self.path)
        return int(about["batches"]), about["first"]

    def _about(self) -> dict[str, str]:
        """What the file says of itself; nothing, if there is none."""
        if not self.path.exists():
            return {}
        with self._opened() as file:
            about: dict[str, str] = file.metadata() or {}
        if about.get("format") != _FORMAT:
            raise self._refused(_FORMAT, f"format {about.get('format')!r}")
        need_same(json.loads(about["run"]), self.run, self._refused)
        return about

    def _tensors(self) -> dict[str, torch.Tensor]:
        with self._opened() as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                yield file
        except (safetensors.SafetensorError, OSError) as error:
            raise self._refused("a state that measure saved", str(error)) from error

    def save(self, count: int, first: str, parts: Sequence[Part], generators: Sequence[torch.Generator]) -> None:
        """Write everything if it is time to. The file is replaced at once: a kill leaves the old one or the new."""
        if time.monotonic() - self._last < self.every:
            return
        named = {str(number): part for number, part in enumerate(parts)}
        if self._before is not None:
            named["before"] = self._before
        states = {f"{key}.{name}": t for key, part in named.items() for name, t in part.state().items()}
        states |= {f"generator.{i}": generator.get_state() for i, generator in enumerate(generators)}
        about = {"format": _FORMAT, "run": json.dumps(self.run), "batches": str(count), "first": first}
        about |= {"chunk": str(self.chunk), "loop": str(self._loop)}
        write_tensors(self.path, states, about)
        self._last = time.monotonic()

    def need_first(self, found: str, saved: str) -> None:
        """Raises a HapError if the first batch is another than the one that the saved state began with."""
        if saved and found != saved:
            raise self._refused("the same batches in the same order", "another first batch")

    def need_count(self, count: int, saved: int, of: str = "batches") -> None:
        """Raises a HapError if there are fewer batches than the saved state has seen."""
        if count < saved:
            raise self._refused(f"{saved} {of} or more", f"{count}")

    def remove(self) -> None:
        """Delete the file, and one that a kill left half written."""
        self.path.unlink(missing_ok=True)
        self._beside.unlink(missing_ok=True)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tmp")

    def _refused(self, expected: str, got: str) -> HapError:
        return HapError(
            f"{self.path} does not fit this run",
            expected=expected,
            got=got,
            remedy="measure with the arguments it was begun with, delete the file, or name another",
        )


def _of(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one part, by their own names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def identity(model: nn.Module, structure: Structure, **options: object) -> dict[str, str]:
    """What makes a measurement what it is: the weights' bytes, the structure, and options, each as a short text."""
    parts = repr((structure.families, structure.layers)).encode()
    return {
        "structure": hashlib.sha256(structure.fingerprint.encode() + parts).hexdigest()[:16],
        "weights": digest([*model.parameters(), *model.buffers()]),
        **{name: str(value) for name, value in options.items()},
    }
