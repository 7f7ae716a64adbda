"""The folder in which a recipe keeps what is done, until all is done."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hap.checkpoint import fresh_directory
from hap.errors import HapError
from hap.planning import versions
from hap.recipes.recipe import Recipe
from hap.report import write_json

SUFFIX = ".work"
RECIPE, DENSE, REPORT = "recipe.json", "dense", "report.json"
BEGUN = "begun"
_WORDS_ONLY = ("title", "targets", "notes")  # these change no result, nor does this:
_WORKERS = "data.workers"
_OF_DENSE = ("model", "data.", "dense.", "seed", "version of ")  # what the dense model is made from
logger = logging.getLogger(__name__)


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
    def beside(out: Path, recipe: Recipe, *, first: bool = True) -> Work:
        """The folder for `out`, made if it is not there.

        Where it is of a recipe with the same dense model, that stays, and what was done after it goes.

        Raises:
            HapError: it is there and of another dense model, was begun with other versions, or is none of hap's.
        """
        folder = out.with_name(f"{out.name}{SUFFIX}")
        here = _identity(recipe)
        if (folder / RECIPE).exists():
            there = _read(folder)
            begun = there.pop(BEGUN, 0)
            _need_same(folder, there, here)
            if first and there != here:
                _begin_anew(folder, {**here, BEGUN: begun}, there)
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
    flat.pop(_WORKERS)
    return {**flat, **{f"version of {name}": text for name, text in versions().items()}}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise HapError(
            f"{folder / RECIPE} cannot be read", expected="JSON", got=str(error), remedy=f"delete {folder}"
        ) from error


def _need_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in _different(there, here):
        if name.startswith(_OF_DENSE):
            raise HapError(
                f"{folder} holds the work of another recipe",
                expected=f"{name} {there.get(name)}, as there",
                got=f"{name} {here.get(name)}",
                remedy=f"go on with the recipe it was begun with, delete {folder}, or choose another --out",
            )


def _begin_anew(folder: Path, record: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Removes all but the dense model and its training, then says of which recipe the folder is now."""
    changed = ", ".join(name for name in _different(there, record) if name != BEGUN)
    logger.warning("%s was begun with another %s: the dense model stays, all after it is done anew", folder, changed)
    for path in folder.glob("round*"):
        _remove(path)
    beside = folder / f"{RECIPE}.tmp"
    write_json(beside, record)
    os.replace(beside, folder / RECIPE)


def _different(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
