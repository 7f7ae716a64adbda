"""The folder in which a recipe keeps what is done, until all is done."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hap.checkpoint import fresh_directory
from hap.errors import HapError, need_same
from hap.files import write_json
from hap.planning import versions
from hap.recipes.recipe import Recipe

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None  # Windows has no locks of this kind
SUFFIX = ".work"
RECIPE, DENSE, REPORT = "recipe.json", "dense", "report.json"
BEGUN = "begun"
_WORDS_ONLY = ("title", "targets", "notes")  # these change no result, nor do these:
_NO_MATTER = ("data.workers", "version of python")
_OF_DENSE = ("model", "data.", "dense.", "seed", "version of ")  # what the dense model is made from


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one recipe: the folder beside the run directory.

    Attributes:
        folder: holds ``recipe.json``, the dense model that was trained (``dense/``), its training while that goes on,
            and for each round what `hap.pipeline.run` keeps.
        first: whether this is the first of several processes, the only one that writes here what all have in common.
        begun: when the folder was made, in nanoseconds: by this the run directory that is made from it is known.
    """

    folder: Path
    first: bool = True
    begun: int = 0

    @staticmethod
    def beside(out: Path, recipe: Recipe, *, first: bool = True, restart: bool = False) -> Work:
        """The folder for `out`, made if it is not there.

        Args:
            restart: delete the rounds that are there; and the dense model with its training, where the model, `data`,
                `dense`, `seed` or the version of hap or PyTorch is another one now.

        Raises:
            HapError: it is there and holds work that the recipe as it is now, or other versions, would not have done;
                or it is none of hap's; or another run is at work in it.
        """
        folder = out.with_name(f"{out.name}{SUFFIX}")
        here = _identity(recipe)
        if (folder / RECIPE).exists():
            if first:
                _hold(folder)
            there = _read(folder)
            begun = there.pop(BEGUN, 0)
            lost = _lost(folder, there, here, restart)
            if lost and not restart:
                need_same(there, here, partial(_refused, folder, lost))
            if first:
                for path in lost:
                    _remove(path)
                if there != here:  # a run directory that the other recipe has made is not of this work
                    begun = time.time_ns()
                    write_json(folder / RECIPE, {**here, BEGUN: begun})
            return Work(folder, first, begun)
        begun = time.time_ns()
        if first:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise HapError(
                    f"{folder} is in the way",
                    expected=f"a folder of a recipe's work, with {RECIPE}, or none",
                    got="one with other files" if folder.is_dir() else "a file",
                    remedy="move it, or choose another --out",
                )
            with fresh_directory(folder) as staging:
                write_json(staging / RECIPE, {**here, BEGUN: begun})
            _hold(folder)
        return Work(folder, first, begun)

    @property
    def dense(self) -> Path:
        """The directory of the dense model."""
        return self.folder / DENSE

    @property
    def training(self) -> Path:
        """The state of the dense training."""
        return self.folder / "training.safetensors"

    def finish(self) -> None:
        """Removes the folder; its record last, so that what a kill leaves of it is still known for what it is."""
        if self.first:
            for path in self.folder.iterdir():
                if path.name != RECIPE:
                    _remove(path)
            shutil.rmtree(self.folder)
            _release(self.folder)


def finished(recipe: Recipe, out: str | Path) -> bool:
    """Whether the run directory is whole already and only its work was left behind by a kill; that is removed."""
    out = Path(out).absolute()
    folder = out.with_name(f"{out.name}{SUFFIX}")
    if not (folder / RECIPE).exists() or not (out / REPORT).exists():
        return False
    there = _read(folder)
    begun = there.pop(BEGUN, 0)
    try:
        made = json.loads((out / REPORT).read_text(encoding="utf-8"))["options"][BEGUN]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if made != begun or there != _identity(recipe):
        return False
    Work(folder).finish()
    return True


_HELD: dict[Path, int] = {}  # folders that this process is at work in


def _hold(folder: Path) -> None:
    """Keeps other runs out of a folder while this process lives, where the system and the disk have locks.

    Raises:
        HapError: another run is in it.
    """
    _release(folder)
    if fcntl is None:
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(place)
        raise HapError(
            f"another run is at work in {folder}",
            expected="one run for each --out at a time",
            remedy="wait for it, end it, or choose another --out",
        ) from error
    except OSError:  # a disk without locks
        os.close(place)
    else:
        _HELD[folder] = place


def _release(folder: Path) -> None:
    if folder in _HELD:
        os.close(_HELD.pop(folder))


def as_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists, texts and numbers, without what changes no result."""
    data = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return {name: value for name, value in data.items() if name not in _WORDS_ONLY}


def _flat(data: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted key."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes the work what it is."""
    flat = dict(_flat(as_data(recipe)))
    return _that_matter({**flat, **{f"version of {name}": text for name, text in versions().items()}})


def _that_matter(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _NO_MATTER}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return _that_matter(dict(json.loads((folder / RECIPE).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise HapError(
            f"{folder / RECIPE} cannot be read", expected="JSON", got=str(error), remedy=f"delete {folder}"
        ) from error


def _lost(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], restart: bool) -> list[Path]:
    """What does not hold any more: the rounds where anything has changed, and all where the dense model has."""
    if any(there.get(name) != here.get(name) for name in {*there, *here} if name.startswith(_OF_DENSE)):
        return [path for path in folder.iterdir() if path.name != RECIPE]
    return list(folder.glob("round*")) if restart or there != here else []


def _refused(folder: Path, lost: Sequence[Path], expected: str, got: str) -> HapError:
    named = ", ".join(sorted("the dense model" if path.name == DENSE else path.name for path in lost))
    return HapError(
        f"{folder} holds the work of another recipe",
        expected=expected,
        got=got,
        remedy="go on with the recipe it was begun with, choose another --out, or pass --restart (restart=True): it "
        f"deletes {named}, and does anew what that was",
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
